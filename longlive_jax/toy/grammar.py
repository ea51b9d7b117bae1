"""Captions: a small grammar with a bounded vocabulary, written and read exactly.

Every combination of attributes has one caption per template, and no two differ in meaning and agree
in words, so `parse` inverts `describe`.
"""

import functools

import numpy as np

from longlive_jax.errors import UserError, require
from longlive_jax.toy.world import TEMPLATE_COUNT, Attributes, Scenes, combinations

_TEMPLATES = (
    "a {colour} {shape} {doing} on a {background} background",
    "the {colour} {shape} {does} over a {background} background",
    "on a {background} background a {colour} {shape} {does}",
    "a {background} scene with a {colour} {shape} {doing}",
)


def describe(attributes: Attributes, *, template: int = 0) -> str:
    """Writes the caption, for example "a red ring moving left on a dark background".

    Args:
      attributes: what to say.
      template: which sentence, in [0, TEMPLATE_COUNT).

    Raises:
      UserError: there is no such template.
    """
    require(0 <= template < TEMPLATE_COUNT, f"template={template} must be in [0, {TEMPLATE_COUNT})")
    still = attributes.motion == "still"
    return _TEMPLATES[template].format(
        shape=attributes.shape,
        colour=attributes.colour,
        background=attributes.background,
        doing="staying still" if still else f"moving {attributes.motion}",
        does="stays still" if still else f"moves {attributes.motion}",
    )


def describe_codes(codes: np.ndarray, template: np.ndarray) -> list[str]:
    """Writes the captions of a batch.

    Args:
      codes: attributes, int [B, 4].
      template: which sentence, int [B].
    """
    pairs = zip(codes, template, strict=True)
    return [describe(Attributes.from_codes(row), template=int(number)) for row, number in pairs]


def describe_scenes(scenes: Scenes) -> list[str]:
    """Writes the captions of scenes, each in its own phrasing."""
    return describe_codes(scenes.codes, scenes.template)


@functools.cache
def _meanings() -> dict[str, Attributes]:
    every = [Attributes.from_codes(codes) for codes in combinations("all")]
    return {describe(a, template=t): a for a in every for t in range(TEMPLATE_COUNT)}


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Every word a caption can contain, sorted."""
    return tuple(sorted({word for text in _meanings() for word in text.split()}))


def parse(text: str) -> Attributes:
    """Reads a caption back; case, surplus white space and a final full stop do not matter.

    Args:
      text: any sentence of the grammar.

    Raises:
      UserError: the text is not a caption of this world; the message shows one and lists the words.
    """
    found = _meanings().get(" ".join(text.lower().split()).rstrip("."))
    if found is None:
        raise UserError(
            f"prompt={text!r} is not a caption of the toy world; write it like "
            f"{next(iter(_meanings()))!r}, with the words {' '.join(vocabulary())}"
        )
    return found
