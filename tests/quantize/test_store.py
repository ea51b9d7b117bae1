"""`longlive quantize`: the small checkpoint is complete, exact, atomic, and every command takes it."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longlive_jax import checkpoint, lora, storage
from longlive_jax.checkpoint import flatten, open_checkpoint
from longlive_jax.convert.inspect import inspect
from longlive_jax.errors import UserError
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.quantize import tree
from longlive_jax.quantize.store import quantize_checkpoint
from tests.quantize._models import RECIPES


@pytest.fixture(scope="module")
def small(tiny, tmp_path_factory):
    """The tiny checkpoint in int8."""
    path = tmp_path_factory.mktemp("quantized") / "tiny-int8"
    quantize_checkpoint(tiny, path, recipe="int8")
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_stored_checkpoint_is_what_quantising_at_load_makes(recipe, tiny, tmp_path):
    """Streamed layer by layer to disk, or the whole tree at once in memory: the same bits (where a
    product comes first, to its rounding)."""
    slack = {"rtol": 1e-5, "atol": 1} if recipe == "int8-rotated" else {"rtol": 0}
    report = quantize_checkpoint(tiny, tmp_path / "small", recipe=recipe)
    opened = open_checkpoint(tmp_path / "small")
    assert opened.config.quantization == recipe
    loaded = Pipeline.load(tmp_path / "small")
    made = Pipeline.load(tiny, overrides={"quantization": recipe})
    assert loaded.transformer == made.transformer
    found, expected = flatten(loaded.params), flatten(made.params)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype
        pair = (np.asarray(x, np.float32) for x in (found[name], leaf))
        np.testing.assert_allclose(*pair, **slack, err_msg=name)
    sizes = [
        sum(x.nbytes for x in jax.tree.leaves(Pipeline.load(p).params)) for p in (tiny, tmp_path / "small")
    ]
    assert list(report.memory) == sizes
    assert (report.layers, report.kept) == (20, 7)


def test_the_report_tells_disk_from_memory(tiny, tmp_path):
    """Stored in bfloat16 and computed in float32: the file shrinks less than the arrays do."""
    opened = open_checkpoint(tiny)
    with checkpoint.create(tmp_path / "short", opened.config, source={}) as writer:
        writer.add_tree("transformer", opened.load("transformer", dtype=jnp.bfloat16))
    report = quantize_checkpoint(tmp_path / "short", tmp_path / "small", recipe="int8")
    files = [tmp_path / name / "transformer.safetensors" for name in ("short", "small")]
    assert list(report.disk) == [file.stat().st_size for file in files]
    (disk, in_memory) = (before / after for before, after in (report.disk, report.memory))
    assert disk < 0.6 * in_memory
    text = str(report)
    assert f"transformer on disk: {report.disk[0] / 2**20:.2f} MiB (bfloat16) -> " in text
    assert f"transformer in memory: {report.memory[0] / 2**20:.2f} MiB (float32) -> " in text
    assert f"{disk:.2f}x smaller" in text
    assert f"{in_memory:.2f}x smaller" in text


def test_scales_are_no_parameters(small, tiny, tmp_path):
    """Also of a checkpoint whose config.json counted them."""
    counts = [open_checkpoint(path).parts["transformer"].parameters for path in (tiny, small)]
    assert counts[0] == counts[1] > 0
    old = tmp_path / "old"
    shutil.copytree(small, old)
    values = json.loads((old / "config.json").read_text())
    values["parts"]["transformer"]["parameters"] += 1000
    (old / "config.json").write_text(json.dumps(values))
    for path in (tiny, small, old):
        (part,) = [part for part in inspect(path).parts if part.part == "transformer"]
        assert part.parameters == counts[0]


def test_a_lora_is_merged_first_and_only_what_generation_needs_is_taken(tiny, tmp_path):
    opened = open_checkpoint(tiny)
    params = opened.load("transformer")
    adapters = lora.init(jax.random.key(0), params, rank=2, targets=("blocks/ffn/fc1", "blocks/self_attn/q"))
    adapters = jax.tree.map(lambda x: x + 0.05, adapters)
    with checkpoint.create(tmp_path / "apart", opened.config, source={"steps": {"lora": 5}}) as writer:
        writer.add_tree("transformer", params)
        writer.add_tree("critic", params)
        writer.add_tree("lora", adapters, alpha=4.0, rank=2)
    report = quantize_checkpoint(tmp_path / "apart", tmp_path / "small", recipe="int8")
    assert "critic (only training needs it)" in str(report)
    assert "a LoRA was merged into 2 kernels first" in str(report)
    found = open_checkpoint(tmp_path / "small")
    assert list(found.parts) == ["transformer"]
    assert found.source["steps"] == {"lora": 5}
    assert found.source["quantized"] == {
        "recipe": "int8", "from": open_checkpoint(tmp_path / "apart").parts["transformer"].digest
    }  # fmt: skip
    merged = tree.quantize_tree(lora.merge(params, adapters, scale=2.0), "int8")
    stored = flatten(found.load("transformer"))
    for name, leaf in flatten(merged).items():
        close = {"atol": 1} if leaf.dtype == jnp.int8 else {"rtol": 1e-6}  # sums may round either way
        pair = (np.asarray(x, np.float32) for x in (stored[name], leaf))
        np.testing.assert_allclose(*pair, **close, err_msg=name)


def test_it_generates_without_the_big_one_and_near_to_it(small, tiny, tmp_path):
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    for file in pathlib.Path(small).iterdir():
        (alone / file.name).write_bytes(file.read_bytes())
    videos = {}
    for name, path, overrides in (
        ("full", tiny, {}),
        ("int8", alone, {}),
        ("both", alone, {"cache_dtype": "int8"}),
    ):
        pipe = Pipeline.load(path, overrides={"sampler.steps": (1000, 500), **overrides})
        chunks = pipe.stream_latents("a red fox", frames=9, seed=1)
        videos[name] = np.concatenate([np.asarray(x) for _, x in chunks], axis=1)
    spread = np.abs(videos["full"]).mean()
    for name in ("int8", "both"):
        assert 0 < np.abs(videos[name] - videos["full"]).mean() < 0.1 * spread
    assert np.abs(videos["both"] - videos["int8"]).max() > 0


def test_every_command_takes_it(small, tiny, longlive, tmp_path):
    result = longlive("inspect", small)
    assert result.status == 0
    assert "quantization: int8" in result.out
    words = ("--prompt", "a red fox", "--frames", 3, "--out", "a.mp4", "--set", "cache_dtype=int8")
    result = longlive("generate", "--checkpoint", small, *words)
    assert result.status == 0, result
    sidecar = json.loads((tmp_path / "a.json").read_text())
    assert sidecar["config"]["quantization"] == "int8"
    assert longlive("generate", "--from", "a.json", "--out", "b.mp4").status == 0
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    result = longlive("verify", small, "--layers", tiny)
    assert result.status == 0, result
    assert "self_attn/q" in result.out
    assert "velocity: " in result.out
    again = longlive("verify", tiny, "--layers", "--set", "quantization=int8")
    assert again.out == result.out
    assert longlive("memory", small).status == 0


def test_the_command_writes_a_checkpoint(tiny, longlive, tmp_path):
    result = longlive("quantize", tiny, "small", "--recipe", "fp8")
    assert result.status == 0, result
    assert "20 linear layers in 8 bits, 7 in float32" in result.out
    assert open_checkpoint(tmp_path / "small").config.quantization == "fp8"
    assert longlive("quantize", tiny, "small", "--overwrite").status == 0
    assert open_checkpoint(tmp_path / "small").config.quantization == "int8"


def test_what_cannot_be_is_refused_with_one_line(small, tiny, refused, tmp_path):
    assert "is quantised already (int8)" in refused("quantize", small, "again")
    assert "invalid choice: 'int7'" in refused("quantize", tiny, "x", "--recipe", "int7")
    assert "exists already" in refused("quantize", tiny, small)
    assert "is stored as 'int8' and cannot become" in refused(
        "verify", small, "--layers", tiny, "--set", "quantization=fp8"
    )
    assert "is not quantised; add --set quantization=int8" in refused("verify", tiny, "--layers")
    assert "is quantised; name the checkpoint in full precision" in refused("verify", small, "--layers")
    assert "give --against RECORDED.npz or --layers" in refused("verify", tiny)
    assert "is quantised (int8), which these layouts cannot hold" in refused("export", small, "x.pt")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_behind(tiny, tmp_path, monkeypatch):
    written = []

    def full(file, block):
        written.append(len(block))
        if len(written) > 4:
            raise OSError(28, "No space left on device")
        file.write(block)

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(UserError, match="free some space"):
        quantize_checkpoint(tiny, tmp_path / "small", recipe="int8")
    assert len(written) > 4
    assert not list(tmp_path.iterdir())


def test_a_damaged_scale_is_found_when_it_is_loaded(small, tmp_path):
    """Scales as qwix makes them of a stacked tree, one for all layers: (1, in, 1)."""
    opened = open_checkpoint(small)
    params = opened.load("transformer")
    query = params["blocks"]["self_attn"]["q"]
    query["kernel_scale"] = np.ones((1, query["kernel"].shape[1], 1), np.float32)
    with checkpoint.create(tmp_path / "bad", opened.config, source={}) as writer:
        writer.add_tree("transformer", params)
    with pytest.raises(UserError, match=r"wrong shape: blocks/self_attn/q/kernel_scale \(1, 64, 1\)"):
        Pipeline.load(tmp_path / "bad")


def test_a_quantised_checkpoint_keeps_its_own_precision(small):
    """A float32 computation over it widens what is in full precision, and nothing else."""
    for dtype in ("float32", "bfloat16"):
        pipe = Pipeline.load(small, overrides={"dtype": dtype})
        dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(pipe.params)}
        assert dtypes == {dtype, "int8", "float32"}
        assert dataclasses.replace(pipe.config, dtype="float32").quantization == "int8"
