"""Conversion: exact weights, recorded outputs, and clean refusals."""

import errno
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from longlive_jax import checkpoint, lora, storage
from longlive_jax.convert.convert import convert
from longlive_jax.convert.export import export
from longlive_jax.errors import UserError
from tests import diffusers_models
from tests.convert import sources
from tests.convert.sources import LONGLIVE, RECORDED, WAN
from tests.fixtures import load

TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # of the recorded single forwards


# --- weights and outputs --------------------------------------------------------------------------


def test_wan_transformer_computes_the_recorded_flow(tmp_path: pathlib.Path) -> None:
    convert(WAN, tmp_path / "out", parts=["transformer"])
    flow = sources.recorded_flow(checkpoint.open_checkpoint(tmp_path / "out"))
    expected = load("J")["wan_bidirectional/flow"].swapaxes(1, 2)
    np.testing.assert_allclose(flow, expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("file", "recorded"),
    [
        ("longlive_base.pt", "generator_base"),
        ("longlive_base_bf16.pt", "generator_base_bf16file_float32run"),
        ("model_key_style_bf16.pt", "generator_base_bf16file_float32run"),
        ("trainer_style_ema_only.pt", "generator_ema"),
    ],
)
def test_longlive_file_computes_the_recorded_flow(file: str, recorded: str, tmp_path: pathlib.Path) -> None:
    convert(LONGLIVE / file, tmp_path / "out", overrides=RECORDED)
    flow = sources.recorded_flow(checkpoint.open_checkpoint(tmp_path / "out"))
    np.testing.assert_allclose(flow, load("J")[f"{recorded}/flow_BTCHW"], **TOLERANCE)


def test_combined_source_merges_the_lora_into_the_later_transformer(tmp_path: pathlib.Path) -> None:
    report = convert(
        [WAN, LONGLIVE / "longlive_base.pt", LONGLIVE / "lora.pt"],
        tmp_path / "out",
        parts=["transformer", "lora", "critic_lora"],
    )
    opened = checkpoint.open_checkpoint(tmp_path / "out")
    assert list(opened.parts) == ["transformer"]
    assert opened.config.transformer.num_heads == 2  # from the Wan folder's config.json
    np.testing.assert_allclose(
        sources.recorded_flow(opened), load("J")["generator_base_plus_lora/flow_BTCHW"], **TOLERANCE
    )
    reasons = {item.name: item.reason for item in report.left_out}
    assert "longlive_base.pt:generator comes later" in reasons.values()
    assert "no critic to merge it into" in reasons["lora.pt:critic_lora"]
    assert "lora.pt:step" in reasons
    assert opened.source["lora"][0]["merged"] is True


def test_kept_lora_gives_the_same_flow_once_merged(tmp_path: pathlib.Path) -> None:
    convert(
        [LONGLIVE / "longlive_base.pt", LONGLIVE / "lora.pt"],
        tmp_path / "out",
        lora="keep",
        overrides=RECORDED,
    )
    opened = checkpoint.open_checkpoint(tmp_path / "out")
    info = opened.parts["lora"]
    assert (info.rank, info.alpha, info.parameters) == (4, 4.0, 2688)
    assert "critic_lora" in opened.parts
    params = lora.merge(opened.load("transformer"), opened.load("lora"), scale=info.alpha / info.rank)
    np.testing.assert_allclose(
        sources.recorded_flow(opened, params=params),
        load("J")["generator_base_plus_lora/flow_BTCHW"],
        **TOLERANCE,
    )


def test_lora_alpha_scales_the_merge(tmp_path: pathlib.Path) -> None:
    files = [LONGLIVE / "longlive_base.pt", LONGLIVE / "lora.pt"]
    merged = {}
    for name, alpha in (("one", 4.0), ("two", 8.0)):
        convert(files, tmp_path / name, overrides=RECORDED, lora_alpha=alpha)
        tree = checkpoint.open_checkpoint(tmp_path / name).load("transformer")
        merged[name] = tree["blocks"]["self_attn"]["q"]["kernel"][0]
    base = sources.state_dict(files[0])["generator"]["model.blocks.0.self_attn.q.weight"].numpy().T
    np.testing.assert_allclose(merged["two"] - base, 2 * (merged["one"] - base), rtol=1e-4, atol=1e-6)
    assert np.abs(merged["one"] - base).max() > 1e-3


def test_every_tensor_arrives_bit_for_bit(tmp_path: pathlib.Path) -> None:
    convert(WAN, tmp_path / "out", parts=["transformer"])
    tree = checkpoint.flatten(checkpoint.open_checkpoint(tmp_path / "out").load("transformer"))
    source = sources.wan_state_dict()
    np.testing.assert_array_equal(tree["blocks/cross_norm/bias"], source["blocks.0.norm3.bias"].numpy()[None])
    np.testing.assert_array_equal(tree["head/proj/kernel"], source["head.head.weight"].numpy().T)
    assert sum(leaf.size for leaf in tree.values()) == sum(tensor.numel() for tensor in source.values())


def test_precision_is_kept_or_chosen(tmp_path: pathlib.Path) -> None:
    file = LONGLIVE / "longlive_base_bf16.pt"
    kept = convert(file, tmp_path / "kept", overrides=RECORDED)
    wide = convert(file, tmp_path / "wide", overrides=RECORDED, dtype="float32")
    assert (kept.parts[0].dtype, wide.parts[0].dtype) == ("bfloat16", "float32")
    narrow = convert(LONGLIVE / "longlive_base.pt", tmp_path / "narrow", overrides=RECORDED, dtype="bfloat16")
    assert narrow.bytes_written * 2 == wide.bytes_written
    opened = [checkpoint.open_checkpoint(tmp_path / name) for name in ("kept", "narrow")]
    for name in ("patch_embed", "head"):
        for a, b in zip(
            *(checkpoint.flatten(o.load("transformer")[name]).values() for o in opened), strict=True
        ):
            assert a.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(a, b)  # the file was rounded the same way


def test_text_encoder_and_vae_convert_alone(tmp_path: pathlib.Path) -> None:
    report = convert(WAN, tmp_path / "t5", parts=["text_encoder"])
    assert report.config.text_encoder.text_len == 16  # from the transformer's config.json
    assert any("tokenizer" in note for note in report.notes)
    assert convert(WAN / "Wan2.1_VAE.pth", tmp_path / "vae").config.vae.dim == 4


def test_whole_folder_with_parts_that_do_not_fit_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"text_dim/text_len=4096/16 must equal .*parts="):
        convert(WAN, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_diffusers_folder_with_shards_equals_the_original(tmp_path: pathlib.Path) -> None:
    original = sources.tiny_checkpoint(tmp_path / "ours")
    folder = _diffusers_folder(tmp_path / "diffusers", tmp_path / "ours", shards=3)
    report = convert(folder, tmp_path / "out", preset="tiny")  # nothing in this layout shows text_len
    converted = checkpoint.open_checkpoint(tmp_path / "out")
    assert {part.layout for part in report.parts} == {"diffusers", "transformers"}
    assert converted.tokenizer_path.read_bytes() == original.tokenizer_path.read_bytes()
    assert converted.config.transformer == original.config.transformer
    assert converted.config.vae == original.config.vae
    assert converted.config.text_encoder == original.config.text_encoder
    for part in ("transformer", "text_encoder", "vae"):
        ours, theirs = (checkpoint.flatten(c.load(part)) for c in (original, converted))
        assert set(ours) == set(theirs)
        for name, leaf in ours.items():
            np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


def test_lora_merges_into_a_diffusers_transformer_too(tmp_path: pathlib.Path) -> None:
    sources.tiny_checkpoint(tmp_path / "ours")
    folder = _diffusers_folder(tmp_path / "diffusers", tmp_path / "ours", shards=1)
    export(tmp_path / "ours", tmp_path / "base.pt", layout="longlive")
    torch.save({"generator_lora": _random_lora()}, tmp_path / "lora.pt")
    trees = []
    for name, source in (("a", folder), ("b", tmp_path / "base.pt")):
        convert([source, tmp_path / "lora.pt"], tmp_path / name, parts=["transformer", "lora"], preset="tiny")
        trees.append(checkpoint.flatten(checkpoint.open_checkpoint(tmp_path / name).load("transformer")))
    before = checkpoint.open_checkpoint(tmp_path / "ours").load("transformer")["blocks"]["ffn"]["fc2"][
        "kernel"
    ]
    assert np.abs(trees[0]["blocks/ffn/fc2/kernel"] - before).max() > 1e-3
    for name, leaf in trees[0].items():
        np.testing.assert_array_equal(leaf, trees[1][name], err_msg=name)


def test_trainer_checkpoint_parts_and_weights(tmp_path: pathlib.Path) -> None:
    state = {f"model.{k}": v for k, v in sources.wan_state_dict().items()}
    wrapped = {
        k.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): v * 2 for k, v in state.items()
    }
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}}
    file = tmp_path / "model.pt"
    torch.save(
        {
            "generator": state,
            "generator_ema": wrapped,
            "critic": {k: v * 3 for k, v in state.items()},
            "generator_optimizer": optimizer,
            "critic_optimizer": optimizer,
            "step": 700,
        },
        file,
    )
    first = {}
    for weights, kept in (
        ("both", ["transformer", "transformer_ema", "critic"]),
        ("generator", ["transformer", "critic"]),
        ("ema", ["transformer", "critic"]),
    ):
        report = convert(file, tmp_path / weights, weights=weights, overrides=RECORDED)
        opened = checkpoint.open_checkpoint(tmp_path / weights)
        assert list(opened.parts) == kept
        assert opened.source["steps"]["transformer"] == 700
        first[weights] = opened.load("transformer")["time_proj"]["bias"]
        names = {item.name for item in report.left_out}
        assert {"model.pt:generator_optimizer", "model.pt:critic_optimizer", "model.pt:step"} <= names
    np.testing.assert_array_equal(first["both"], first["generator"])
    np.testing.assert_array_equal(first["ema"], 2 * first["both"])


def test_presets_and_overrides_decide_what_tensors_do_not_show(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"number of heads is not in the tensors; set transformer\.num_heads"):
        convert(LONGLIVE / "longlive_base.pt", tmp_path / "out")
    changes = {"transformer.num_heads": "4", "window.sink_frames": 0}
    report = convert(LONGLIVE / "longlive_base.pt", tmp_path / "out", overrides=changes)
    assert report.config.transformer.num_heads == 4
    assert report.config.window.sink_frames == 0


# --- refusals -------------------------------------------------------------------------------------


@pytest.fixture
def weights_file(tmp_path: pathlib.Path) -> pathlib.Path:
    """A single-file source that tests damage."""
    (tmp_path / "source").mkdir()
    return tmp_path / "source" / "model.safetensors"


def _refused(source: pathlib.Path, tmp_path: pathlib.Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as info:
        convert(source, tmp_path / "target" / "out", overrides=RECORDED)
    assert "\n" not in str(info.value)
    assert not (tmp_path / "target").exists() or not list((tmp_path / "target").iterdir())


def test_missing_and_unknown_tensors_are_named(weights_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tensors = sources.wan_state_dict()
    save_file({k: v for k, v in tensors.items() if k != "blocks.0.ffn.2.bias"}, weights_file)
    _refused(weights_file, tmp_path, r"1 tensors are missing: blocks\.0\.ffn\.2\.bias")
    save_file({**tensors, "blocks.0.img.weight": torch.zeros(2)}, weights_file)
    _refused(weights_file, tmp_path, r"1 tensors are unknown: blocks\.0\.img\.weight")


@pytest.mark.parametrize("name", ["blocks.0.cross_attn.v.weight", "head.modulation", "time_embedding.2.bias"])
def test_wrong_shapes_are_named(name: str, weights_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    tensors = sources.wan_state_dict()
    shape = tuple(tensors[name].shape)
    save_file({**tensors, name: torch.zeros(*shape, 2)}, weights_file)
    _refused(weights_file, tmp_path, rf"wrong shape: {name} .*instead of \({', '.join(map(str, shape))},?\)")


def test_config_file_that_contradicts_the_tensors(weights_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    save_file(sources.wan_state_dict(), weights_file)
    settings = json.loads((WAN / "config.json").read_text())
    (weights_file.parent / "config.json").write_text(json.dumps({**settings, "num_layers": 2}))
    _refused(weights_file.parent, tmp_path, r"tensors have num_layers=1, the model's config.json says 2")


def test_unknown_and_mixed_files_are_refused(weights_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    save_file({"something.weight": torch.zeros(2)}, weights_file)
    _refused(weights_file, tmp_path, r"no part that is known \(something\.weight\)")
    save_file({**sources.wan_state_dict(), "encoder.downsamples.0.bias": torch.zeros(2)}, weights_file)
    _refused(weights_file, tmp_path, "mixes tensors of transformer wan and vae wan")
    weights_file.write_text("not a model")
    _refused(weights_file, tmp_path, "neither a safetensors file nor a PyTorch file")
    _refused(tmp_path / "nowhere.pt", tmp_path, "no such file or folder")
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", tmp_path, "holds no safetensors or PyTorch files")


def test_two_files_for_one_part_are_ambiguous(tmp_path: pathlib.Path) -> None:
    _refused(LONGLIVE, tmp_path, r"hold the transformer; name the file you want")


def test_lora_without_a_base_is_refused_unless_kept(tmp_path: pathlib.Path) -> None:
    _refused(LONGLIVE / "lora.pt", tmp_path, "nothing to be merged into.*lora=keep")
    report = convert(LONGLIVE / "lora.pt", tmp_path / "out", lora="keep")
    assert [(part.part, part.rank) for part in report.parts] == [("lora", 4), ("critic_lora", 4)]


def test_lora_that_does_not_fit_the_base_is_refused(tmp_path: pathlib.Path) -> None:
    state = sources.state_dict(LONGLIVE / "lora.pt")["generator_lora"]
    name = "base_model.model.blocks.0.ffn.0.lora_B.weight"
    torch.save({**state, name: state[name][:-1].clone()}, tmp_path / "lora.pt")
    with pytest.raises(UserError, match=r"ffn\.0\.lora_B\.weight \(47, 4\) instead of \(48, 4\)"):
        convert([LONGLIVE / "longlive_base.pt", tmp_path / "lora.pt"], tmp_path / "out", overrides=RECORDED)
    del state[name]
    torch.save(state, tmp_path / "lora.pt")
    with pytest.raises(UserError, match=r"missing: .*ffn\.0\.lora_B\.weight"):
        convert([LONGLIVE / "longlive_base.pt", tmp_path / "lora.pt"], tmp_path / "out", overrides=RECORDED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype='int8' is unknown; choose one of bfloat16, float32"),
        ({"lora": "drop"}, "lora='drop' is unknown"),
        ({"weights": "best"}, "weights='best' is unknown"),
        ({"parts": ["unet"]}, r"parts=\['unet'\] are unknown; choose from transformer"),
        ({"parts": ["vae"]}, "parts=vae: no source holds this"),
        ({"preset": "wan_2b"}, "preset='wan_2b' is unknown"),
        ({"overrides": {"transformer.heads": 2}}, "'heads' is not a setting"),
        ({"lora_alpha": -1.0}, "lora_alpha=-1.0 must be positive"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict, message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=message):
        convert(LONGLIVE / "longlive_base.pt", tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


# --- what is left on the disk ---------------------------------------------------------------------


def test_existing_destination_is_kept_unless_it_may_be_replaced(tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    convert(LONGLIVE / "longlive_base.pt", out, overrides=RECORDED)
    first = checkpoint.open_checkpoint(out).fingerprint("transformer")
    with pytest.raises(UserError, match="exists already"):
        convert(LONGLIVE / "trainer_style_ema_only.pt", out, overrides=RECORDED)
    assert checkpoint.open_checkpoint(out).fingerprint("transformer") == first
    convert(LONGLIVE / "trainer_style_ema_only.pt", out, overrides=RECORDED, overwrite=True)
    assert checkpoint.open_checkpoint(out).fingerprint("transformer") != first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path: pathlib.Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="was not written by longlive-jax"):
        convert(LONGLIVE / "longlive_base.pt", tmp_path / "home", overrides=RECORDED, overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("calls_before_full", [0, 20])
def test_full_disk_leaves_nothing_and_keeps_the_old(
    calls_before_full: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    convert(LONGLIVE / "longlive_base.pt", out, overrides=RECORDED)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    write, calls = storage.write_bytes, []

    def full(file, block) -> None:
        calls.append(len(block))
        if len(calls) > calls_before_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, block)

    monkeypatch.setattr(storage, "write_bytes", full)
    with pytest.raises(UserError, match=r"No space left on device.*free some space") as info:
        convert(LONGLIVE / "trainer_style_ema_only.pt", out, overrides=RECORDED, overwrite=True)
    assert "\n" not in str(info.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_too_small_a_disk_is_noticed_before_writing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"0\.0 GB are needed|free some space"):
        convert(LONGLIVE / "longlive_base.pt", tmp_path / "out", overrides=RECORDED)
    assert not list(tmp_path.iterdir())


def test_progress_counts_to_the_end(tmp_path: pathlib.Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = convert(
        LONGLIVE / "longlive_base.pt",
        tmp_path / "out",
        overrides=RECORDED,
        progress=lambda *values: seen.append(values),
    )
    assert seen[-1] == ("transformer", report.bytes_written, report.bytes_written)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert "transformer" in str(report)


def _random_lora() -> dict[str, torch.Tensor]:
    """A rank-2 LoRA for the tiny preset."""
    config, state = sources.TINY.transformer, {}
    torch.manual_seed(0)
    sizes = {f"{a}.{n}": (config.dim, config.dim) for a in ("self_attn", "cross_attn") for n in "qkvo"}
    sizes |= {"ffn.0": (config.dim, config.ffn_dim), "ffn.2": (config.ffn_dim, config.dim)}
    for layer in range(config.num_layers):
        for name, (inputs, outputs) in sizes.items():
            stem = f"base_model.model.blocks.{layer}.{name}"
            state[f"{stem}.lora_A.default.weight"] = torch.randn(2, inputs) / 4
            state[f"{stem}.lora_B.default.weight"] = torch.randn(outputs, 2) / 4
    return state


def _diffusers_folder(folder: pathlib.Path, ours: pathlib.Path, *, shards: int) -> pathlib.Path:
    """Our checkpoint, renamed into diffusers' layout and saved by diffusers and transformers themselves."""
    from longlive_jax.convert import keys_text_encoder, keys_transformer, keys_vae

    opened, config = checkpoint.open_checkpoint(ours), sources.TINY
    tables = {
        "transformer": keys_transformer.diffusers_table(config.transformer),
        "vae": keys_vae.diffusers_table(config.vae),
        "text_encoder": keys_text_encoder.transformers_table(config.text_encoder),
    }
    models = _library_models()
    for part, table in tables.items():
        tree = checkpoint.flatten(opened.load(part))
        state = {
            name: torch.tensor(
                rule.to_source(tree[rule.target] if layer is None else tree[rule.target][layer])
            )
            for name, rule, layer in table.sources()
        }
        missing, unexpected = models[part].load_state_dict(state, strict=False)
        assert set(missing) <= {"encoder.embed_tokens.weight"}
        assert not unexpected
        size = sum(t.numel() * 4 for t in state.values())
        models[part].save_pretrained(folder / part, max_shard_size=max(size // shards, 30_000) + 1000)
    shutil.copytree(opened.tokenizer_path.parent, folder / "tokenizer", ignore=lambda *_: _parts(ours))
    return folder


def _parts(ours: pathlib.Path) -> list[str]:
    return [path.name for path in ours.iterdir() if path.name != "tokenizer.json"]


def _library_models() -> dict:
    from transformers import UMT5Config, UMT5EncoderModel

    t, e, v = sources.TINY.transformer, sources.TINY.text_encoder, sources.TINY.vae
    return {
        "transformer": diffusers_models.transformer(t),
        "vae": diffusers_models.vae(v),
        "text_encoder": UMT5EncoderModel(
            UMT5Config(
                vocab_size=e.vocab_size,
                d_model=e.dim,
                d_kv=e.head_dim,
                d_ff=e.ffn_dim,
                num_layers=e.num_layers,
                num_heads=e.num_heads,
            )
        ),
    }
