"""LongLive as released for stories: six prompts in a minute, the cache rebuilt at every switch.

    longlive generate --config configs/wan/interactive.py

The prompt file has {"prompts": [six prompts]} per line.
"""

from longlive_jax.inference.generation import Generation


def get_config() -> Generation:
    return Generation(
        checkpoint="checkpoints/longlive-1.3b",
        prompts="prompts/interactive_example.jsonl",
        frames=240,
        seed=1,
        switch_frames=(40, 80, 120, 160, 200),
        weights="transformer",
        settings={
            "window.window_frames": 12,
            "window.sink_frames": 3,
            "window.block_frames": 3,
            "sampler.steps": (1000, 750, 500, 250),
            "sampler.warp_steps": True,
            "sampler.shift": 5.0,
            "sampler.context_noise": 0.0,
            "switch.policy": "recache",
            "switch.keep_sink": True,
        },
    )
