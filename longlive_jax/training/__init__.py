"""Training: the losses, as pure functions."""
