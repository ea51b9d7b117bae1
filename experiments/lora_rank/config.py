"""What rank the LoRA of long tuning needs.

longlive ablate experiments/lora_rank/config.py --publish
"""

from longlive_jax.experiments.study import TIME, Plot, Study
from longlive_jax.experiments.tasks import Switch

RANKS = (4, 8, 16, 32, 64)


def get_config() -> Study:
    return Study(
        name="lora_rank",
        question="What rank does the LoRA of long tuning need?",
        task=Switch(frames=120),
        grids=({"checkpoint": ("none", *(f"rank {rank}" for rank in RANKS), "full")},),
        checkpoints={
            "none": "runs/toy/init/export",
            **{f"rank {rank}": f"runs/toy/long_rank{rank}/export" for rank in RANKS if rank != 32},
            # Stage `long` itself, after as many steps: its rate is constant.
            "rank 32": "runs/toy/long/exports/000180",
            "full": "runs/toy/long_full/export",
        },
        metrics=("switch", "segments"),
        columns=("story.settled", "obeyed", "held", "stays", "jump.shade"),
        plots=(
            Plot("settled", "story.settled", x="checkpoint", label="all four attributes, after two blocks"),
            Plot("held", "held", x="checkpoint", label="new attributes held"),
            Plot(
                "new", "blocks.new", x=TIME, by=("checkpoint",), label="changed attributes as asked, by block"
            ),
        ),
        settings={"switch.keep_sink": False},  # the recache that `long` trains with
        baseline={"checkpoint": "rank 32"},
        paper="rank: trainable parameters, VBench-Long total. 32: 44M, 81.08; 64: 87M, 82.68; 128: 175M, "
        "82.98; 256: 350M, 83.12; 512: 700M, 83.04; all 1.3B: 83.52.",
    )
