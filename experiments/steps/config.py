"""How many denoising steps a block needs.

longlive ablate experiments/steps/config.py --publish
"""

from longlive_jax.experiments.study import Plot, Study
from longlive_jax.experiments.tasks import Scenes


def get_config() -> Study:
    return Study(
        name="steps",
        question="How many denoising steps does a block need?",
        task=Scenes(frames=60),
        grids=({"steps": (1, 2, 3, 4, 6, 8)}, {"steps": (4,), "opening_steps": (8, 16)}),
        metrics=("adherence", "speed"),
        columns=("all", "shape", "motion", "iou", "flicker", "residual", "frames_per_second"),
        plots=(
            Plot("adherence", "all", x="steps", by=("opening_steps",), label="adherence"),
            Plot(
                "sharpness", "iou", x="steps", by=("opening_steps",), label="overlap with the best template"
            ),
            Plot(
                "speed",
                "frames_per_second",
                x="steps",
                by=("opening_steps",),
                label="video frames per second",
            ),
        ),
        baseline={"steps": 4},
        paper="four steps, 1000, 750, 500 and 250, in all of its tables; other numbers are not reported.",
    )
