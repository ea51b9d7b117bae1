"""Training: losses, the self-forcing rollout and streaming long tuning, as pure functions."""
