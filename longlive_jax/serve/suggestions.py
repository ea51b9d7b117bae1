"""Prompts to try next."""

import dataclasses
import random

from longlive_jax.config import PipelineConfig
from longlive_jax.errors import UserError
from longlive_jax.toy import grammar
from longlive_jax.toy.world import FIELDS, VALUES, Attributes

_SCENES = (
    "A red fox runs through deep snow in a pine forest at dawn.",
    "A paper boat drifts down a narrow city gutter in the rain.",
    "An old lighthouse keeper climbs a spiral staircase with a lantern.",
    "Waves roll onto a black sand beach under a full moon.",
)
_TURNS = ("The camera slowly pulls back.", "It begins to snow.", "Night falls and the lights come on.",
          "Everything stops for a moment.")  # fmt: skip


def is_toy(config: PipelineConfig) -> bool:
    """Whether a model knows the procedural world and its sentences."""
    return config.name == "toy" or config.name.startswith("toy_")


def suggest(config: PipelineConfig, prompt: str, *, count: int = 4) -> list[str]:
    """Prompts that could follow another one; the same for the same prompt.

    For the toy they are captions of its grammar that change one attribute each; a sentence that is not
    such a caption, or the empty one, is answered with captions drawn at random.
    """
    if not is_toy(config):
        return list((_TURNS if prompt else _SCENES)[:count])
    random_of = random.Random(prompt)
    try:
        here = grammar.parse(prompt)
    except UserError:
        captions = [
            Attributes(**{name: random_of.choice(VALUES[name]) for name in FIELDS}) for _ in range(count)
        ]
        return [grammar.describe(attributes) for attributes in captions]
    fields = random_of.sample(FIELDS, k=len(FIELDS))[:count]
    return [
        grammar.describe(dataclasses.replace(here, **{name: _other(random_of, name, getattr(here, name))}))
        for name in fields
    ]


def _other(random_of: random.Random, name: str, value: str) -> str:
    return random_of.choice([option for option in VALUES[name] if option != value])
