"""LongLive as released for videos without end: relative positions, 1050 latent frames (4 minutes 22 s).

longlive generate --config configs/wan/infinity.py
"""

from longlive_jax.inference.generation import Generation


def get_config() -> Generation:
    return Generation(
        checkpoint="checkpoints/longlive-1.3b",
        prompts="prompts/vidprom_filtered_extended.txt",
        frames=1050,
        seed=0,
        weights="transformer",
        settings={
            "window.window_frames": 12,
            "window.sink_frames": 3,
            "window.block_frames": 3,
            "window.rope": "relative",
            "sampler.steps": (1000, 750, 500, 250),
            "sampler.warp_steps": True,
            "sampler.shift": 5.0,
            "sampler.context_noise": 0.0,
            "switch.keep_sink": True,
        },
    )
