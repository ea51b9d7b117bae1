"""Absolute and relative frame positions far beyond the training length: does the sink collapse?

longlive ablate experiments/rope/config.py --publish
"""

from longlive_jax.experiments.study import TIME, Plot, Study
from longlive_jax.experiments.tasks import Scenes


def get_config() -> Study:
    return Study(
        name="rope",
        question="Far beyond the training length, does the picture collapse onto the sink, and what helps?",
        task=Scenes(frames=480),
        grids=({"rope": ("absolute", "jittered", "relative")},),
        metrics=("collapse", "adherence"),
        columns=("collapse.max", "collapse.mean", "all", "fall.all", "last.motion", "identity.shade"),
        plots=(
            Plot("distance", "blocks.distance", x=TIME, label="distance from the first block, by block"),
            Plot("adherence", "windows.all", x=TIME, label="adherence, by window of 12 latent frames"),
        ),
        clips=16,
        baseline={"rope": "absolute"},
        paper="absolute positions up to 240 latent frames; infinite videos with relative ones, without a "
        "table. Later work (LoL, arXiv 2601.16914) reports collapses of LongLive onto its sink at latent "
        "frames 132 and 201, and per-head jitter of the rotary base as the cure: worst collapse 73 to 17, "
        "mean 31 to 4.",
    )
