"""What the release's configs have in common where they say nothing else: 81 video frames of 832x480.

    longlive generate --config configs/wan/defaults.py

The release merges these settings below those of every other config; here every config is whole, and this one
is the plain use of a model: the benchmark prompts at the length it was trained on.
"""

from longlive_jax.inference.generation import Generation


def get_config() -> Generation:
    return Generation(
        checkpoint="checkpoints/longlive-1.3b",
        prompts="prompts/MovieGenVideoBench.txt",
        frames=21,
        weights="auto",
        settings={
            "video.height": 480,
            "video.width": 832,
            "sampler.warp_steps": False,
            "sampler.context_noise": 0.0,
        },
    )
