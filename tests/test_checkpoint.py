"""The checkpoint directory: lazy loading, expectations, and what it says when something is missing."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from longlive_jax import checkpoint
from longlive_jax.checkpoint import Checkpoint, open_checkpoint
from longlive_jax.config import PRESETS
from longlive_jax.errors import UserError

TINY = PRESETS["tiny"]
TREE = {
    "embed": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)},
    "blocks": {"scale": np.full((4, 5), 2, ml_dtypes.bfloat16)},
}


@pytest.fixture
def opened(tmp_path: pathlib.Path) -> Checkpoint:
    with checkpoint.create(tmp_path / "model", TINY, source={"from": "a test"}) as writer:
        writer.add_tree("transformer", TREE)
        writer.add_tree("lora", {"a": jnp.ones((2, 2))}, alpha=8.0, rank=4)
    return open_checkpoint(tmp_path / "model")


def test_what_is_written_is_what_is_read(opened: Checkpoint) -> None:
    assert opened.config == TINY
    assert opened.source["from"] == "a test"
    loaded = opened.load("transformer")
    assert jax.tree.structure(loaded) == jax.tree.structure(TREE)
    jax.tree.map(np.testing.assert_array_equal, loaded, TREE)
    assert loaded["blocks"]["scale"].dtype == ml_dtypes.bfloat16
    info = opened.parts["transformer"]
    assert (info.parameters, info.dtype, info.alpha) == (29, "mixed", None)
    assert (opened.parts["lora"].alpha, opened.parts["lora"].rank) == (8.0, 4)


def test_stored_arrays_are_mapped_and_casts_are_copies(opened: Checkpoint) -> None:
    kernel = opened.load("transformer")["embed"]["kernel"]
    assert isinstance(kernel.base, np.memmap) or isinstance(getattr(kernel.base, "base", None), np.memmap)
    assert not kernel.flags.writeable
    cast = opened.load("transformer", dtype=ml_dtypes.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {np.dtype(ml_dtypes.bfloat16)}
    assert jnp.asarray(kernel).sum() == 15


def test_expectations_name_every_leaf_that_differs(opened: Checkpoint) -> None:
    expect = opened.specs("transformer")
    opened.load("transformer", expect=expect)
    del expect["embed"]["bias"]
    expect["embed"]["kernel"] = jax.ShapeDtypeStruct((3, 2), np.float32)
    expect["head"] = jax.ShapeDtypeStruct((1,), np.float32)
    with pytest.raises(UserError) as info:
        opened.load("transformer", expect=expect)
    message = str(info.value)
    assert "missing: head" in message
    assert "unexpected: embed/bias" in message
    assert "embed/kernel (2, 3) instead of (3, 2)" in message
    assert "\n" not in message


def test_missing_parts_name_the_remedy(opened: Checkpoint) -> None:
    with pytest.raises(UserError, match=r"has no vae \(it has transformer, lora\); convert it together with"):
        opened.load("vae")
    with pytest.raises(UserError, match=r"has no tokenizer\.json; copy"):
        _ = opened.tokenizer_path


def test_fingerprint_follows_the_content(tmp_path: pathlib.Path) -> None:
    prints = []
    for i, scale in enumerate((1, 1, 2)):
        with checkpoint.create(tmp_path / str(i), TINY, source={}) as writer:
            writer.add_tree("vae", {"x": np.full(3, scale, np.float32)})
        prints.append(open_checkpoint(tmp_path / str(i)).fingerprint("vae"))
    assert prints[0] == prints[1] != prints[2]


def test_failed_creation_leaves_nothing(tmp_path: pathlib.Path) -> None:
    def interrupted() -> None:
        with checkpoint.create(tmp_path / "model", TINY, source={}) as writer:
            writer.add_tree("transformer", TREE)
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_directories_that_are_not_ours(tmp_path: pathlib.Path, opened: Checkpoint) -> None:
    with pytest.raises(UserError, match="is no checkpoint directory"):
        open_checkpoint(tmp_path / "nowhere")
    config = opened.path / "config.json"
    good = json.loads(config.read_text())
    for change, message in (
        ({"format": "other"}, "not in our format"),
        ({"version": 2}, "has version 2, not 1"),
        ({"config": {**good["config"], "windows": 3}}, "windows is not a setting"),
        (
            {"parts": {"vae": {"file": "../../etc/passwd", "dtype": "", "parameters": 0, "digest": ""}}},
            "plain name",
        ),
        ({"parts": {"vae": {"files": "a"}}}, "bad entry for part vae"),
    ):
        config.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=message) as info:
            open_checkpoint(opened.path)
        assert "\n" not in str(info.value)


def test_damaged_file_is_one_line(opened: Checkpoint) -> None:
    file = opened.path / "transformer.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="bytes of data where the header announces") as info:
        opened.load("transformer")
    assert "\n" not in str(info.value)
    file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        opened.load("transformer")


def test_flatten_and_unflatten_are_inverse() -> None:
    flat = checkpoint.flatten(TREE)
    assert list(flat) == ["embed/kernel", "embed/bias", "blocks/scale"]
    assert jax.tree.structure(checkpoint.unflatten(flat)) == jax.tree.structure(TREE)
    with pytest.raises(UserError, match="lies below another tensor"):
        checkpoint.unflatten({"a": 1, "a/b": 2})
    with pytest.raises(UserError, match="both a tensor and a group"):
        checkpoint.unflatten({"a/b": 2, "a": 1})
