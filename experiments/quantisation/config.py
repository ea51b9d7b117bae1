"""What 8-bit weights, activations and caches cost and save.

longlive ablate experiments/quantisation/config.py --publish
"""

from longlive_jax.experiments.study import Plot, Study
from longlive_jax.experiments.tasks import Scenes


def get_config() -> Study:
    return Study(
        name="quantisation",
        question="What do 8-bit weights, activations and caches cost in quality, and what do they save?",
        task=Scenes(frames=60),
        grids=(
            {"quantization": ("none", "int8", "int8-weight-only", "fp8", "fp8-weight-only")},
            {"quantization": ("none", "int8"), "cache_dtype": ("int8", "fp8")},
        ),
        metrics=("adherence", "speed", "size"),
        columns=(
            *("all", "shape", "motion", "iou", "identity.shade", "drift.sprite"),
            *("frames_per_second", "weights_megabytes", "cache_megabytes"),
        ),
        plots=(Plot("adherence", "all", x="quantization", by=("cache_dtype",), label="adherence"),),
        baseline={"quantization": "none"},
        paper="on an RTX 5090 INT8 takes 1.4 GB, 16.4 FPS, VBench 84.31 (quality 86.20, semantic 76.74) "
        "against BF16's 2.7 GB, 12.6 FPS, 84.87 (86.97, 76.47).",
    )
