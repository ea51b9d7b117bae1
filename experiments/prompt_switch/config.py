"""What happens to the cache when the prompt changes: the paper's Table 4.

longlive ablate experiments/prompt_switch/config.py --publish
"""

from longlive_jax.experiments.study import TIME, Plot, Study
from longlive_jax.experiments.tasks import Switch


def get_config() -> Study:
    return Study(
        name="prompt_switch",
        question="When the prompt changes, which treatment of the cache is both smooth and obedient?",
        task=Switch(frames=48),
        grids=(
            {"policy": ("clear", "keep", "flush", "cut")},
            {"policy": ("recache",), "keep_sink": (True, False)},
        ),
        metrics=("switch", "speed"),
        columns=("obeyed", "held", "stays", "jump", "jump.place", "jump.size", "jump.shade", "jump.gradient"),
        plots=(
            Plot("new", "blocks.new", x=TIME, label="changed attributes as the new prompt says, by block"),
            Plot("old", "blocks.old", x=TIME, label="changed attributes as the old prompt said, by block"),
            Plot("jump", "jump", x="policy", by=("keep_sink",), label="change at the switch over the median"),
            Plot("held", "held", x="policy", by=("keep_sink",), label="new attributes held"),
        ),
        baseline={"policy": "recache", "keep_sink": False},
        paper="background consistency, subject consistency and CLIP score over a switch: no cache 92.75, "
        "89.59, 28.95; cache kept 94.77, 93.69, 25.92; recache 94.81, 94.04, 27.87 (Table 4).",
    )
