"""What rank the LoRA of long tuning needs.

longlive ablate experiments/lora_rank/config.py --publish
"""

from longlive_jax.experiments.study import Plot, Study
from longlive_jax.experiments.tasks import Scenes


def get_config() -> Study:
    return Study(
        name="lora_rank",
        question="What rank does the LoRA of long tuning need?",
        task=Scenes(frames=240),
        grids=({"checkpoint": ("rank 4", "rank 8", "rank 16", "rank 32", "rank 64", "full")},),
        checkpoints={
            **{f"rank {rank}": f"runs/toy/long_rank{rank}/export" for rank in (4, 8, 16, 64)},
            "rank 32": "runs/toy/long/export",
            "full": "runs/toy/long_full/export",
        },
        metrics=("adherence",),
        columns=("all", "last.all", "fall.all", "last.motion", "identity.size", "identity.shade"),
        plots=(
            Plot("last", "last.all", x="checkpoint", label="adherence in the last 21 frames"),
            Plot("identity", "identity.shade", x="checkpoint", label="shade kept"),
        ),
        baseline={"checkpoint": "rank 32"},
        paper="rank: trainable parameters, VBench-Long total. 32: 44M, 81.08; 64: 87M, 82.68; 128: 175M, "
        "82.98; 256: 350M, 83.12; 512: 700M, 83.04; all 1.3B: 83.52.",
    )
