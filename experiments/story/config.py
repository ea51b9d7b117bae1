"""A story of six prompts, adherence in every one of them: the paper's Table 2.

longlive ablate experiments/story/config.py --publish
"""

from longlive_jax.experiments.study import TIME, Plot, Study
from longlive_jax.experiments.tasks import Segments


def get_config() -> Study:
    return Study(
        name="story",
        question="Does a story of six prompts show each of them when it is told to?",
        task=Segments(segments=6, segment_frames=39),
        grids=({"policy": ("recache", "keep", "clear")},),
        metrics=("segments",),
        columns=("segments.all", "settled.all", "story.all", "story.settled"),
        plots=(
            Plot("segments", "segments.all", x=TIME, by=("policy",), label="adherence, by segment"),
            Plot("settled", "settled.all", x=TIME, by=("policy",), label="the same after two blocks"),
        ),
        baseline={"policy": "recache"},
        paper="CLIP score per 10 s of stories of six prompts: LongLive 28.85 25.68 24.64 24.23 24.32 24.32; "
        "Self-Forcing 28.46 24.89 23.53 22.96 23.07 23.19; SkyReels-V2 20.96 22.51 25.78 18.45 19.57 19.61 "
        "(Table 2).",
    )
