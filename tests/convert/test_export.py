"""Export: bit-exact round trips, and files that PyTorch libraries load."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import torch

from longlive_jax import checkpoint, lora
from longlive_jax.cli.main import main
from longlive_jax.config import PRESETS, TAEW2_1, WAN_LATENT_MEAN
from longlive_jax.config_dict import override
from longlive_jax.convert import carried, keys_transformer
from longlive_jax.convert.convert import convert
from longlive_jax.convert.export import export
from longlive_jax.errors import UserError
from longlive_jax.inference.pipeline import Pipeline, Video
from longlive_jax.storage import PathLike
from tests.convert import sources
from tests.convert.sources import LONGLIVE, RECORDED, WAN, assert_same_tensors, state_dict


@pytest.mark.parametrize("file", ["longlive_base.pt", "longlive_base_bf16.pt"])
def test_generator_file_survives_the_round_trip(file: str, tmp_path: pathlib.Path) -> None:
    convert(LONGLIVE / file, tmp_path / "ours", overrides=RECORDED)
    export(tmp_path / "ours", tmp_path / "back.pt", layout="longlive")
    back, original = state_dict(tmp_path / "back.pt"), state_dict(LONGLIVE / file)
    assert list(back) == ["generator", carried.ENTRY]
    assert_same_tensors(back["generator"], original["generator"])


def test_model_entry_comes_back_as_generator(tmp_path: pathlib.Path) -> None:
    file = LONGLIVE / "model_key_style_bf16.pt"
    convert(file, tmp_path / "ours", overrides=RECORDED)
    export(tmp_path / "ours", tmp_path / "back.pt", layout="longlive")
    assert_same_tensors(state_dict(tmp_path / "back.pt")["generator"], state_dict(file)["model"])


def test_averaged_weights_survive_the_round_trip(tmp_path: pathlib.Path) -> None:
    file = LONGLIVE / "trainer_style_ema_only.pt"
    convert(file, tmp_path / "ours", overrides=RECORDED)
    export(tmp_path / "ours", tmp_path / "back.pt", layout="longlive-ema")
    original = {
        k.replace("_fsdp_wrapped_module.", ""): v for k, v in state_dict(file)["generator_ema"].items()
    }
    assert_same_tensors(state_dict(tmp_path / "back.pt")["generator_ema"], original)


@pytest.mark.parametrize("file", ["lora.pt", "lora_generator_only_bf16.pt"])
def test_lora_file_survives_the_round_trip(file: str, tmp_path: pathlib.Path) -> None:
    convert(LONGLIVE / file, tmp_path / "ours", lora="keep")
    report = export(tmp_path / "ours", tmp_path / "back.pt", layout="lora")
    back, original = state_dict(tmp_path / "back.pt"), state_dict(LONGLIVE / file)
    assert set(back) == {*original, carried.ENTRY}
    for key, value in original.items():
        if key == "step":
            assert back[key] == value == 3000
        else:
            assert_same_tensors(back[key], value)
    assert "alpha=4" in str(report)


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("transformer", "diffusion_pytorch_model.safetensors"),
        ("vae", "Wan2.1_VAE.pth"),
        ("text_encoder", "models_t5_umt5-tiny-enc-bf16.pth"),
    ],
)
def test_wan_files_survive_the_round_trip(part: str, file: str, tmp_path: pathlib.Path) -> None:
    convert(WAN, tmp_path / "ours", parts=[part])
    report = export(tmp_path / "ours", tmp_path / "back", layout="wan")
    written = {path.name.replace("xxl", "tiny"): path for path in report.files}
    assert_same_tensors(state_dict(written[file]), state_dict(WAN / file))
    if part == "transformer":
        assert json.loads(written["config.json"].read_text()) == json.loads((WAN / "config.json").read_text())


def test_trainer_file_with_all_weights_survives_the_round_trip(tmp_path: pathlib.Path) -> None:
    state = {f"model.{k}": v for k, v in sources.wan_state_dict().items()}
    original = {"generator": state, "generator_ema": {k: v / 2 for k, v in state.items()}}
    original["critic"] = {k: v * 3 for k, v in state.items()}
    torch.save(original, tmp_path / "model.pt")
    convert(tmp_path / "model.pt", tmp_path / "ours", overrides=RECORDED)
    export(tmp_path / "ours", tmp_path / "back.pt", layout="longlive")
    back = state_dict(tmp_path / "back.pt")
    assert list(back) == [*original, carried.ENTRY]
    for key, value in original.items():
        assert_same_tensors(back[key], value)


def test_our_checkpoint_survives_the_round_trip(tmp_path: pathlib.Path) -> None:
    original = sources.tiny_checkpoint(tmp_path / "ours")
    export(original, tmp_path / "wan", layout="wan")
    convert(tmp_path / "wan", tmp_path / "again")
    again = checkpoint.open_checkpoint(tmp_path / "again")
    assert again.config == original.config
    assert again.tokenizer_path.read_bytes() == original.tokenizer_path.read_bytes()
    for part in original.parts:
        before, after = (checkpoint.flatten(c.load(part)) for c in (original, again))
        assert set(before) == set(after)
        for name, leaf in before.items():
            np.testing.assert_array_equal(leaf, after[name], err_msg=name)
            assert leaf.dtype == after[name].dtype


# --- what the layouts have no place for -----------------------------------------------------------


@pytest.fixture(scope="module")
def toy_exports(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The bundled model in every layout, and the folder once more without what is ours in it."""
    folder = tmp_path_factory.mktemp("toy")
    for name, layout in (("wan", "wan"), ("base.pt", "longlive"), ("ema.pt", "longlive-ema")):
        assert main(["export", "toy", str(folder / name), "--layout", layout]) == 0
    shutil.copytree(folder / "wan", folder / "bare")
    (folder / "bare" / carried.FILE).unlink()
    return folder


def generated(path: PathLike) -> Video:
    return Pipeline.load(path)("a red square moving left on a dark background", frames=3, seed=5)


@pytest.fixture(scope="module")
def toy_video() -> Video:
    return generated("toy")


@pytest.mark.parametrize(
    ("names", "options", "said"),
    [
        (["wan"], [], "from longlive_jax.json\n"),
        (["wan"], ["--preset", "toy"], "from longlive_jax.json; preset=toy adds nothing"),
        (["bare", "base.pt"], [], "from base.pt:longlive_jax\n"),
        (["bare", "ema.pt"], ["--preset", "wan_1_3b"], "from ema.pt:longlive_jax; preset"),
        (["wan", "base.pt"], ["--set", "video.fps=16"], "from base.pt:longlive_jax and longlive_jax.json\n"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_bundled_model_generates_the_same_after_a_round_trip(
    names: list[str],
    options: list[str],
    said: str,
    toy_exports: pathlib.Path,
    toy_video: Video,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    paths = [str(toy_exports / name) for name in names]
    assert main(["convert", *paths, str(tmp_path / "back"), *options]) == 0
    assert f"config: as exported, {said}" in capsys.readouterr().out
    original, back = (checkpoint.open_checkpoint(path) for path in ("toy", tmp_path / "back"))
    assert back.config == original.config
    video = generated(tmp_path / "back")
    np.testing.assert_array_equal(video.latents, toy_video.latents)
    np.testing.assert_array_equal(video.frames, toy_video.frames)


def test_without_what_is_ours_a_file_says_what_anyone_would_read(
    toy_exports: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Files that others wrote are read as before; a preset that is named decides what they do not say."""
    assert convert(toy_exports / "bare", tmp_path / "plain").config.transformer.prediction == "v"
    report = convert(toy_exports / "bare", tmp_path / "named", preset="toy")
    assert report.config == PRESETS["toy"]
    assert not [note for note in report.notes if "exported" in note]


def test_overrides_win_over_the_exported_config(toy_exports: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = checkpoint.open_checkpoint("toy").config
    changes = {"window.sink_frames": 0, "transformer.prediction": "v"}
    report = convert(toy_exports / "wan", tmp_path / "back", overrides=changes, parts=["transformer"])
    assert report.config == override(config, changes)


def test_one_file_of_the_folder_brings_the_config_along(
    toy_exports: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    report = convert(toy_exports / "wan/Wan2.1_VAE.pth", tmp_path / "vae")
    assert [part.part for part in report.parts] == ["vae"]
    assert report.config == checkpoint.open_checkpoint("toy").config


def test_a_transformer_tuned_elsewhere_takes_the_folders_config(
    toy_exports: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """As with Wan's config.json, which speaks for files that come without one."""
    state = state_dict(toy_exports / "base.pt")["generator"]
    torch.save({"generator": {name: tensor * 2 for name, tensor in state.items()}}, tmp_path / "tuned.pt")
    report = convert([toy_exports / "wan", tmp_path / "tuned.pt"], tmp_path / "back")
    assert report.config == checkpoint.open_checkpoint("toy").config
    assert {part.part: part.origin for part in report.parts}["transformer"] == "tuned.pt:generator"


def test_the_settings_of_a_tiny_vaes_model_are_not_given_to_wans(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(sources.TINY, vae=TAEW2_1)
    with checkpoint.create(tmp_path / "ours", config, source={}) as writer:
        writer.add_tree("transformer", sources.random_tree("transformer", config))
    export(tmp_path / "ours", tmp_path / "base.pt", layout="longlive")
    report = convert([WAN / "Wan2.1_VAE.pth", tmp_path / "base.pt"], tmp_path / "back")
    assert report.config.vae.latent_mean == WAN_LATENT_MEAN
    assert report.config == dataclasses.replace(config, vae=report.config.vae)


def test_a_tiny_vae_survives_the_round_trip(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(sources.TINY, vae=TAEW2_1)
    with checkpoint.create(tmp_path / "ours", config, source={}) as writer:
        writer.add_tree("vae", sources.random_tree("vae", config))
    report = export(tmp_path / "ours", tmp_path / "wan", layout="wan")
    assert not report.notes
    assert convert(tmp_path / "wan", tmp_path / "back").config == config


def test_a_lora_comes_back_with_its_alpha_and_config(tmp_path: pathlib.Path) -> None:
    config = override(sources.TINY, {"window.sink_frames": 1, "transformer.prediction": "x0"})
    adapter = lora.init(jax.random.key(0), sources.random_tree("transformer", config), rank=4)
    with checkpoint.create(tmp_path / "ours", config, source={}) as writer:
        writer.add_tree("lora", adapter, alpha=8.0, rank=4)
        writer.add_tree("vae", sources.random_tree("vae", config))
    report = export(tmp_path / "ours", tmp_path / "lora.pt", layout="lora")
    assert "PyTorch programs must be told alpha=8" in str(report)
    assert "left out: vae (layout=lora has no place for it)" in str(report)
    back = convert(tmp_path / "lora.pt", tmp_path / "back", lora="keep")
    assert back.config == config
    assert checkpoint.open_checkpoint(tmp_path / "back").parts["lora"].alpha == 8.0
    chosen = convert(tmp_path / "lora.pt", tmp_path / "chosen", lora="keep", lora_alpha=2.0)
    assert checkpoint.open_checkpoint(chosen.path).parts["lora"].alpha == 2.0


def test_what_pytorch_must_be_told_and_what_stays_behind(tmp_path: pathlib.Path) -> None:
    sources.tiny_checkpoint(tmp_path / "ours")
    report = export(tmp_path / "ours", tmp_path / "wan", layout="wan")
    assert not report.notes
    assert not report.left_out
    report = export(tmp_path / "ours", tmp_path / "base.pt", layout="longlive")
    assert not report.notes
    assert [item.name for item in report.left_out] == ["text_encoder", "vae", "tokenizer"]
    report = export("toy", tmp_path / "toy", layout="wan")
    assert [note.partition(":")[0] for note in report.notes] == ["transformer", "vae"]
    assert "prediction='x0'" in str(report)
    assert "latent_mean" in str(report)


def _changed(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        *sections, last = key.split(".")
        for section in sections:
            content = content[section]
        content[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_changed("version", 2), "not what this version of `longlive export` writes"),
        (_changed("format", "x"), "not what this version of `longlive export` writes"),
        (_changed("config.transformer.prediction", "x1"), "prediction='x1' must be one of"),
        (_changed("config.transformer.num_layers", 7), r"has num_layers=2, .*longlive_jax.* says 7; remove"),
        (_changed("config.vae.dim", 5), r"has dim=4, .*longlive_jax.* says 5; remove"),
        (_changed("config.text_encoder.num_buckets", 9), "has num_buckets=32, .*longlive_jax.* says 9"),
        (_changed("config.future", 1), "future is not a setting"),
        (_changed("config", []), "must be a table of settings"),
        (_changed("alpha", {"lora": "8"}), "must hold positive numbers"),
    ],
)
def test_a_wrong_exported_config_is_one_clear_line(
    change: Callable[[dict[str, Any]], None], words: str, tmp_path: pathlib.Path
) -> None:
    sources.tiny_checkpoint(tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "wan", layout="wan")
    file = tmp_path / "wan" / carried.FILE
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words) as caught:
        convert(tmp_path / "wan", tmp_path / "back")
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("entry", [{"config": {"x": torch.zeros(2)}}, ["config"], "text"])
def test_a_strange_entry_of_a_pytorch_file_is_refused(entry: Any, tmp_path: pathlib.Path) -> None:
    torch.save({**state_dict(LONGLIVE / "longlive_base.pt"), carried.ENTRY: entry}, tmp_path / "base.pt")
    with pytest.raises(UserError, match=r"base.pt: the entry 'longlive_jax' is not what"):
        convert(tmp_path / "base.pt", tmp_path / "back", overrides=RECORDED)
    assert not (tmp_path / "back").exists()


# --- PyTorch's side -------------------------------------------------------------------------------


class _Adapted(torch.nn.Module):
    """Linear layers under the names of the original transformer's blocks."""

    def __init__(self, state: dict[str, torch.Tensor]):
        super().__init__()
        for name, tensor in state.items():
            if not name.endswith("weight") or tensor.ndim != 2 or not name.startswith("blocks."):
                continue
            parent: torch.nn.Module = self
            *path, last = name.removesuffix(".weight").split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, torch.nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, torch.nn.Linear(tensor.shape[1], tensor.shape[0], bias=False))
            getattr(parent, last).weight.data.copy_(tensor)

    def forward(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.get_submodule(name)(x)


def test_peft_loads_our_lora_and_computes_what_we_merge(tmp_path: pathlib.Path) -> None:
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config = sources.TINY.transformer
    params = sources.random_tree("transformer", sources.TINY)
    adapter = lora.init(jax.random.key(0), params, rank=4)
    adapter = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), adapter)
    with checkpoint.create(tmp_path / "ours", sources.TINY, source={}) as writer:
        writer.add_tree("lora", adapter, alpha=8.0, rank=4)
    export(tmp_path / "ours", tmp_path / "lora.pt", layout="lora")
    saved = state_dict(tmp_path / "lora.pt")["generator_lora"]

    def as_torch(tree: dict) -> dict[str, torch.Tensor]:
        leaves = checkpoint.flatten(tree)
        return {
            name: torch.tensor(rule.to_source(np.asarray(leaves[rule.target])[layer]))
            for name, rule, layer in keys_transformer.table(config).sources()
            if layer is not None
        }

    base = _Adapted(as_torch(params))
    names = [name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(names) == 10 * config.num_layers
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    result = set_peft_model_state_dict(model, saved)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    merged = _Adapted(as_torch(lora.merge(params, adapter, scale=2.0)))
    for name in names:
        x = torch.randn(3, merged.get_submodule(name).in_features)
        np.testing.assert_allclose(
            model(x, name).detach().numpy(), merged(x, name).detach().numpy(), rtol=1e-4, atol=1e-5
        )


def test_refusals(tmp_path: pathlib.Path) -> None:
    sources.tiny_checkpoint(tmp_path / "ours")
    with pytest.raises(
        UserError, match="layout='onnx' is unknown; choose one of longlive, longlive-ema, lora, wan"
    ):
        export(tmp_path / "ours", tmp_path / "x", layout="onnx")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"has no lora .*it has transformer, text_encoder, vae"):
        export(tmp_path / "ours", tmp_path / "x.pt", layout="lora")
    assert not (tmp_path / "x.pt").exists()
    (tmp_path / "there.pt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export(tmp_path / "ours", tmp_path / "there.pt", layout="longlive")
    with pytest.raises(UserError, match="is no checkpoint directory"):
        export(tmp_path / "there.pt", tmp_path / "x.pt", layout="longlive")
    with pytest.raises(UserError, match="no such folder; make it first"):
        export(tmp_path / "ours", tmp_path / "no" / "x.pt", layout="longlive")
    assert (tmp_path / "there.pt").read_text() == "mine"
    export(tmp_path / "ours", tmp_path / "there.pt", layout="longlive", overwrite=True)
    assert list(state_dict(tmp_path / "there.pt")) == ["generator", carried.ENTRY]
