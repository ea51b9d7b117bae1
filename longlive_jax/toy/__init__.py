"""A world small enough to train on two CPU cores, and to see every effect of the method in it.

The Grain data sets are in `longlive_jax.toy.data`, apart because they alone need Grain.
"""

from longlive_jax.toy.grammar import describe, describe_scenes, parse, vocabulary
from longlive_jax.toy.measure import UNKNOWN, Readings, motion_codes, read
from longlive_jax.toy.renderer import Story, render, render_story
from longlive_jax.toy.scores import (
    IDENTITY,
    Interval,
    Scores,
    SwitchScores,
    score,
    score_spans,
    score_switch,
    summarise,
)
from longlive_jax.toy.world import (
    FIELDS,
    VALUES,
    Attributes,
    Scenes,
    World,
    combinations,
    is_held_out,
    sample_scenes,
    sample_switch,
)

__all__ = [
    "FIELDS",
    "IDENTITY",
    "UNKNOWN",
    "VALUES",
    "Attributes",
    "Interval",
    "Readings",
    "Scenes",
    "Scores",
    "Story",
    "SwitchScores",
    "World",
    "combinations",
    "describe",
    "describe_scenes",
    "is_held_out",
    "motion_codes",
    "parse",
    "read",
    "render",
    "render_story",
    "sample_scenes",
    "sample_switch",
    "score",
    "score_spans",
    "score_switch",
    "summarise",
    "vocabulary",
]
