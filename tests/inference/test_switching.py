"""Text on the way from one prompt to another."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax.config import SwitchConfig
from longlive_jax.inference.switching import PromptTrack, mix

RECACHE = SwitchConfig("recache")


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Two embeddings [6, 8]: both have tokens 0..2, only the second has 3, none has 4 and 5."""
    a, b = (np.array(jax.random.normal(jax.random.key(i), (6, 8))) for i in range(2))
    a[3:], b[4:] = 0, 0
    b[2] = -3 * a[2]  # opposite: there is no direction between
    return a, b


@pytest.mark.parametrize("curve", ["linear", "spherical"])
def test_a_blend_ends_where_it_says(curve):
    a, b = texts()
    np.testing.assert_allclose(mix(a, b, 0.0, curve=curve), a, atol=1e-5)
    np.testing.assert_allclose(mix(a, b, 1.0, curve=curve), b, atol=1e-5)
    assert mix(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), 0.5, curve=curve).dtype == jnp.bfloat16


def test_a_spherical_blend_turns_evenly_and_a_linear_one_does_not():
    a, b = texts()
    whole = angle(a[0], b[0])
    quarter = np.asarray(mix(a, b, 0.25, curve="spherical"))
    assert angle(a[0], quarter[0]) == pytest.approx(whole / 4, rel=1e-3)
    lengths = [np.linalg.norm(x[0]) for x in (a, b)]
    assert np.linalg.norm(quarter[0]) == pytest.approx(0.75 * lengths[0] + 0.25 * lengths[1], rel=1e-4)
    straight = np.asarray(mix(a, b, 0.25, curve="linear"))
    np.testing.assert_allclose(straight, 0.75 * a + 0.25 * b, atol=1e-6)
    assert abs(angle(a[0], straight[0]) - whole / 4) > 0.01


def angle(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))


def test_tokens_without_a_direction_go_linearly():
    a, b = texts()
    halfway = mix(a, b, 0.5, curve="spherical")
    assert np.isfinite(halfway).all()
    np.testing.assert_allclose(halfway[2:], (a[2:] + b[2:]) / 2, atol=1e-5)
    np.testing.assert_allclose(mix(a, a, 0.3, curve="spherical"), a, atol=1e-5)


def test_a_track_goes_in_equal_steps_and_applies_the_policy_at_the_end():
    a, b = map(jnp.asarray, texts())
    track, how = PromptTrack(a).next_block()
    assert (how, track.weight) == (None, 1)
    track = track.switched(b, RECACHE, blocks=4)
    seen = []
    for _ in range(5):
        track, how = track.next_block()
        seen.append((None if how is None else how.policy, track.weight))
        np.testing.assert_allclose(track.shown, a + (b - a) * min(len(seen) / 4, 1), atol=1e-6)
    assert seen == [("keep", 0.25), ("keep", 0.5), ("keep", 0.75), ("recache", 1), (None, 1)]
    np.testing.assert_array_equal(track.shown, b)  # the last block is a plain switch, not a mixture


def test_a_new_switch_goes_on_from_where_a_blend_has_come_to():
    a, b = map(jnp.asarray, texts())
    track, _ = PromptTrack(a).switched(b, RECACHE, blocks=2).next_block()
    halfway = track.shown
    track, how = track.switched(a, SwitchConfig("flush"), blocks=2).next_block()
    np.testing.assert_allclose(track.shown, (halfway + a) / 2, atol=1e-6)
    assert how.policy == "keep"
    track, how = track.next_block()
    assert how.policy == "flush"
