"""Fetching: local copies of the hub's repositories, and a hub that cannot be reached."""

import pathlib
import shutil

import pytest
import torch

from longlive_jax import checkpoint
from longlive_jax.config import TransformerConfig
from longlive_jax.convert.convert import convert
from longlive_jax.convert.export import export
from longlive_jax.convert.setup import MODELS, setup
from longlive_jax.errors import UserError
from tests.convert import sources


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The two repositories with a tiny model in them, file names as published."""
    folder = tmp_path_factory.mktemp("hub")
    sources.tiny_checkpoint(folder / "ours")
    export(folder / "ours", folder / "Wan-AI" / "Wan2.1-T2V-1.3B", layout="wan")
    models = folder / "Efficient-Large-Model" / "LongLive-1.3B" / "models"
    models.mkdir(parents=True)
    export(folder / "ours", models / "longlive_base.pt", layout="longlive")
    torch.save({"generator_lora": _zero_lora(sources.TINY.transformer), "step": 1}, models / "lora.pt")
    # Not fetched: all of its weights are in longlive_base.pt.
    (folder / "Wan-AI" / "Wan2.1-T2V-1.3B" / "diffusion_pytorch_model.safetensors").unlink()
    return folder


def _zero_lora(config: TransformerConfig) -> dict[str, torch.Tensor]:
    state = {}
    for layer in range(config.num_layers):
        stem = f"base_model.model.blocks.{layer}.cross_attn.k"
        state[f"{stem}.lora_A.weight"] = torch.ones(2, config.dim)
        state[f"{stem}.lora_B.weight"] = torch.zeros(config.dim, 2)
    return state


def test_setup_converts_everything_and_says_what_is_next(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    report = setup("longlive-1.3b", tmp_path / "model", source_root=root)
    opened = checkpoint.open_checkpoint(tmp_path / "model")
    assert list(opened.parts) == ["transformer", "text_encoder", "vae"]
    assert opened.has_tokenizer
    assert opened.config.transformer == sources.TINY.transformer  # heads from the Wan folder's config.json
    assert str(tmp_path / "model") in report.next_command
    assert any("merged lora.pt:generator_lora" in note for note in report.convert.notes)


def test_setup_names_a_missing_file(root: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(root, tmp_path / "root")
    (tmp_path / "root" / "Wan-AI" / "Wan2.1-T2V-1.3B" / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(UserError, match=r"Wan2\.1_VAE\.pth: missing; fetch Wan-AI/Wan2\.1-T2V-1\.3B again"):
        setup("longlive-1.3b", tmp_path / "model", source_root=tmp_path / "root")
    with pytest.raises(UserError, match="holds no folder Wan-AI"):
        setup("longlive-1.3b", tmp_path / "model", source_root=tmp_path)
    with pytest.raises(UserError, match=r"model='longlive-14b' is unknown; choose one of longlive-1\.3b"):
        setup("longlive-14b", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_only_needed_files_are_fetched(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}

    def download(repository: str, *, allow_patterns: list[str]) -> str:
        asked[repository] = allow_patterns
        return str(root / repository)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    setup("longlive-1.3b", tmp_path / "model")
    assert list(asked) == [repository.name for repository in MODELS["longlive-1.3b"]]
    files = [file for patterns in asked.values() for file in patterns]
    assert "models/longlive_base.pt" in files
    assert not any("diffusion_pytorch_model" in file for file in files)


def test_hub_name_as_a_source(
    root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(root / name))
    report = convert("Wan-AI/Wan2.1-T2V-1.3B", tmp_path / "out")
    assert [part.part for part in report.parts] == ["text_encoder", "vae"]


def test_offline_hub_is_one_clear_line(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"nobody/nothing: .*hub did not deliver it .*check the name") as info:
        convert("nobody/nothing", tmp_path / "out")
    assert "\n" not in str(info.value)
    assert not (tmp_path / "out").exists()
