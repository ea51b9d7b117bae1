"""Export: bit-exact round trips, and files that PyTorch libraries load."""

import json
import pathlib

import jax
import numpy as np
import pytest
import torch

from longlive_jax import checkpoint, lora
from longlive_jax.convert import keys_transformer
from longlive_jax.convert.convert import convert
from longlive_jax.convert.export import export
from longlive_jax.errors import UserError
from tests.convert import sources
from tests.convert.sources import LONGLIVE, RECORDED, WAN, assert_same_tensors, state_dict


@pytest.mark.parametrize("file", ["longlive_base.pt", "longlive_base_bf16.pt"])
def test_generator_file_survives_the_round_trip(file: str, tmp_path: pathlib.Path) -> None:
    convert(LONGLIVE / file, tmp_path / "ours", overrides=RECORDED)
    export(tmp_path / "ours", tmp_path / "back.pt", layout="longlive")
    back, original = state_dict(tmp_path / "back.pt"), state_dict(LONGLIVE / file)
    assert list(back) == ["generator"]
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
    assert set(back) == set(original)
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
    assert list(back) == list(original)
    for key, value in original.items():
        assert_same_tensors(back[key], value)


def test_our_checkpoint_survives_the_round_trip(tmp_path: pathlib.Path) -> None:
    original = sources.tiny_checkpoint(tmp_path / "ours")
    export(original, tmp_path / "wan", layout="wan")
    convert(tmp_path / "wan", tmp_path / "again")
    again = checkpoint.open_checkpoint(tmp_path / "again")
    assert again.config.transformer == original.config.transformer
    assert again.config.text_encoder == original.config.text_encoder
    assert again.config.vae == original.config.vae
    assert again.tokenizer_path.read_bytes() == original.tokenizer_path.read_bytes()
    for part in original.parts:
        before, after = (checkpoint.flatten(c.load(part)) for c in (original, again))
        assert set(before) == set(after)
        for name, leaf in before.items():
            np.testing.assert_array_equal(leaf, after[name], err_msg=name)
            assert leaf.dtype == after[name].dtype


@pytest.mark.parametrize("layout", ["longlive", "wan"])
def test_a_model_of_x0_says_what_the_files_cannot(layout: str, tmp_path: pathlib.Path) -> None:
    def notes(folder: str) -> list[str]:
        return export(tmp_path / folder, tmp_path / f"{folder}.out", layout=layout).notes  # type: ignore[arg-type]

    sources.tiny_checkpoint(tmp_path / "velocity")
    sources.tiny_checkpoint(tmp_path / "x0")
    file = tmp_path / "x0/config.json"
    content = json.loads(file.read_text())
    content["config"]["transformer"]["prediction"] = "x0"
    file.write_text(json.dumps(content))
    assert notes("velocity") == []
    (note,) = notes("x0")
    assert "prediction='x0'" in note


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
    assert list(state_dict(tmp_path / "there.pt")) == ["generator"]
