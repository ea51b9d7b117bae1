"""Inspection names what is there without reading tensor data."""

import pathlib
import shutil

import pytest

from longlive_jax import storage
from longlive_jax.convert import readers
from longlive_jax.convert.convert import convert
from longlive_jax.convert.inspect import inspect
from longlive_jax.errors import UserError
from tests.convert import sources
from tests.convert.sources import LONGLIVE, RECORDED, WAN


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    files = [LONGLIVE / "longlive_base.pt", LONGLIVE / "lora.pt"]
    convert(files, folder / "with_lora", overrides=RECORDED, lora="keep")
    sources.tiny_checkpoint(folder / "complete")
    return folder


@pytest.fixture(autouse=True)
def _no_data_is_read(checkpoints: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(readers, "_read_torch", fail)
    monkeypatch.setattr(storage.TensorFile, "read", fail)


def test_wan_folder() -> None:
    report = inspect(WAN)
    assert {p.part: (p.layout, p.tensors, p.parameters, p.dtype) for p in report.parts} == {
        "transformer": ("wan", 42, 156_848, "float32"),
        "text_encoder": ("wan", 22, 22_944, "bfloat16"),
        "vae": ("wan", 194, 243_583, "float32"),
    }
    text = str(report)
    assert "dim=32 ffn_dim=48 num_heads=2 num_layers=1 text_dim=4096 text_len=16" in text
    assert "dim_mult=(1, 2, 4, 4)" in text


def test_lora_file_shows_its_rank_and_what_would_be_left_out() -> None:
    report = inspect(LONGLIVE / "lora.pt")
    assert [(p.part, p.layout, p.rank) for p in report.parts] == [
        ("lora", "peft", 4),
        ("critic_lora", "peft", 4),
    ]
    assert "rank 4" in str(report)
    assert "left out: lora.pt:step" in str(report)


def test_folder_of_many_files_names_the_ambiguity() -> None:
    report = inspect(LONGLIVE)
    assert "several files hold the transformer" in report.notes
    assert any("set transformer.num_heads" in note for note in report.notes)


def test_checkpoint(checkpoints: pathlib.Path, tmp_path: pathlib.Path) -> None:
    text = str(inspect(checkpoints / "with_lora"))
    assert "longlive-jax" in text
    assert "rank 4, alpha 4" in text
    assert "no tokenizer.json" in text
    assert "no tokenizer.json" not in str(inspect(checkpoints / "complete"))
    shutil.copytree(checkpoints / "complete", tmp_path / "broken")
    (tmp_path / "broken" / "vae.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        inspect(tmp_path / "broken")


def test_things_that_are_not_there() -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        inspect("/nowhere/at/all")
