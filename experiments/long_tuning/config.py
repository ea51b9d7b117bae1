"""What streaming long tuning adds to training on short clips, up to 240 latent frames.

longlive ablate experiments/long_tuning/config.py --publish
"""

from longlive_jax.experiments.study import TIME, Plot, Study
from longlive_jax.experiments.tasks import Scenes


def get_config() -> Study:
    return Study(
        name="long_tuning",
        question="Does tuning on long sequences hold adherence and appearance over 240 latent frames?",
        task=Scenes(frames=240),
        grids=({"checkpoint": ("short only", "long")},),
        checkpoints={"short only": "runs/toy/init/export", "long": "runs/toy/long/mean"},
        metrics=("adherence",),
        columns=(
            *("first.all", "last.all", "fall.all", "last.motion", "vanished", "identity.size"),
            *("identity.shade", "drift.sprite", "drift.background", "flicker"),
        ),
        plots=(
            Plot("adherence", "windows.all", x=TIME, by=("checkpoint",), label="adherence, by window of 12"),
            Plot("motion", "windows.motion", x=TIME, by=("checkpoint",), label="motion, by window of 12"),
            Plot("drift", "windows.drift.sprite", x=TIME, by=("checkpoint",), label="drift of the sprite"),
        ),
        baseline={"checkpoint": "short only"},
        paper="streaming long tuning is what makes long videos possible; no table compares it with short "
        "training alone.",
    )
