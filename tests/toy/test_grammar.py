"""Captions are written and read back exactly."""

import pytest

from longlive_jax.errors import UserError
from longlive_jax.toy import (
    Attributes,
    World,
    combinations,
    describe,
    describe_scenes,
    parse,
    sample_scenes,
    vocabulary,
)
from longlive_jax.toy.world import TEMPLATE_COUNT


def test_every_caption_reads_back():
    texts = set()
    for codes in combinations("all"):
        attributes = Attributes.from_codes(codes)
        for template in range(TEMPLATE_COUNT):
            text = describe(attributes, template=template)
            assert parse(text) == attributes
            texts.add(text)
    assert len(texts) == 180 * TEMPLATE_COUNT


def test_example_sentences():
    ring = Attributes("ring", "red", "left", "dark")
    still = Attributes("square", "blue", "still", "light")
    assert describe(ring) == "a red ring moving left on a dark background"
    assert describe(still, template=1) == "the blue square stays still over a light background"


def test_the_vocabulary_is_all_the_words_and_no_more():
    used = {
        word
        for codes in combinations("all")
        for template in range(TEMPLATE_COUNT)
        for word in describe(Attributes.from_codes(codes), template=template).split()
    }
    assert set(vocabulary()) == used
    assert len(vocabulary()) == len(set(vocabulary())) == 26
    assert (
        max(
            len(describe(Attributes.from_codes(c), template=t).split())
            for c in combinations("all")
            for t in range(TEMPLATE_COUNT)
        )
        <= 12
    )


def test_case_space_and_a_full_stop_do_not_matter():
    text = "  A red   ring moving LEFT on a dark background. "
    assert parse(text) == Attributes("ring", "red", "left", "dark")


@pytest.mark.parametrize("text", ["a red cow moving left on a dark background", "", "ring", "moving left"])
def test_other_text_is_refused_with_the_vocabulary(text):
    with pytest.raises(UserError) as error:
        parse(text)
    message = str(error.value)
    assert repr(text) in message
    assert "\n" not in message
    assert all(word in message for word in vocabulary())


def test_an_unknown_template_is_refused():
    with pytest.raises(UserError, match="template=4"):
        describe(Attributes("ring", "red", "left", "dark"), template=4)


def test_scenes_use_every_phrasing():
    scenes = sample_scenes(World(), seed=0, indices=range(100))
    texts = describe_scenes(scenes)
    assert [parse(text).codes for text in texts] == [tuple(row) for row in scenes.codes.tolist()]
    assert {text.split()[0] for text in texts} == {"a", "the", "on"}
    assert any("scene" in text for text in texts)
