"""`verify`: right numbers pass, wrong ones fail, and a file that is no recording says so."""

import dataclasses

import numpy as np
import pytest
import torch

from longlive_jax import checkpoint
from longlive_jax.config import PRESETS, WAN_LATENT_MEAN, VAEConfig
from longlive_jax.convert import keys_text_encoder, keys_transformer, keys_vae
from longlive_jax.errors import UserError
from longlive_jax.models.tokenizer import train_word_tokenizer
from longlive_jax.verify import COMPONENTS, FLOAT32, read_recording, verify
from tests import diffusers_models
from tests.fixtures import CHECKPOINTS, load, weights
from tests.models._loading import load_tree

TINY = PRESETS["tiny"]
T5_FILE = CHECKPOINTS / "wan_models/Wan2.1-T2V-tiny/models_t5_umt5-tiny-enc-bf16.pth"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The recorded PyTorch weights as one checkpoint."""
    folder = tmp_path_factory.mktemp("verify")
    vae = load("F")
    statistics = {k: tuple(vae[k].tolist()) for k in ("mean", "std")}
    vae_config = VAEConfig(dim=4, latent_mean=statistics["mean"], latent_std=statistics["std"])
    config = dataclasses.replace(TINY, vae=vae_config)
    tokenizer = train_word_tokenizer(["a b c"], vocab_size=64, path=folder / "tokenizer.json")
    t5 = {k: v.float().numpy() for k, v in torch.load(T5_FILE, weights_only=True).items()}
    with checkpoint.create(folder / "released", config, source={}) as out:
        table = keys_transformer.table(config.transformer)
        out.add_tree("transformer", load_tree(table, weights(load("D"), "w/")))
        out.add_tree("vae", load_tree(keys_vae.table(vae_config), weights(vae, "w/")))
        out.add_tree("text_encoder", load_tree(keys_text_encoder.table(config.text_encoder), t5))
        out.add_tokenizer(tokenizer)
    return folder / "released"


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """Fixtures A and D use the same weights; D's rollouts are window 9."""
    d, f, j = load("D"), load("F"), load("J")
    rollout = {"noise": d["noise"], "renoise": d["renoise"][:, :, None]}
    texts = [d[f"ctx_p{i}"] for i in range(3)]
    arrays = {
        "vae_decode/latents": f["dec/latent"],
        "vae_decode/video": f["dec/wrapper_full_BTCHW_clamped"],
        "vae_encode:nine frames/video": f["enc/pixel"].transpose(0, 2, 1, 3, 4),
        "vae_encode:nine frames/latents": f["enc/latent_T9"],
        "text_encoder/ids": j["t5/ids"],
        "text_encoder/mask": j["t5/mask"],
        "text_encoder/embeddings": j["t5/raw_out_float32_from_bf16_weights"] * j["t5/mask"][..., None],
        "tokenizer/prompts": np.asarray(["a b", "c"]),
        "tokenizer/ids": np.asarray([[3, 4, 1] + [0] * 13, [5, 1] + [0] * 14]),
        **{f"rollout:plain/{k}": v for k, v in rollout.items()},
        "rollout:plain/text": np.stack(texts[:1]),
        "rollout:plain/latents": d["plain_no_switch/latents"],
        **{f"rollout:recache/{k}": v for k, v in rollout.items()},
        "rollout:recache/text": np.stack(texts),
        "rollout:recache/switch_frames": d["switches_late"],
        "rollout:recache/latents": d["recache_globalsink_true/late/latents"],
    }
    path = tmp_path_factory.mktemp("recording") / "recorded.npz"
    np.savez(path, **arrays)
    return path


def test_the_releases_numbers_pass(released, recording):
    rows = verify(released, recording, overrides={"window.window_frames": 9})
    assert [row.name for row in rows if not row.passed] == []
    assert {row.name.split(":")[0] for row in rows} == set(COMPONENTS) - {"transformer"}
    assert all(row.max_error < 1e-4 and row.scale > 0 for row in rows)


def test_a_wrong_setting_fails_the_rollout_alone(released, recording):
    """Window 12 instead of 9: whatever has no window still passes."""
    rows = verify(released, recording)
    assert {row.name for row in rows if not row.passed} == {"rollout:plain", "rollout:recache"}


def test_the_transformer_case_and_its_start_frame(released, tmp_path):
    recorded = load("A")
    text = np.stack([np.pad(recorded["ctx0"], ((0, 7), (0, 0))), recorded["ctx1"]])
    arrays = {
        "transformer/latents": recorded["x"].transpose(0, 2, 1, 3, 4),
        "transformer/timestep": recorded["t"],
        "transformer/text": text,
        "transformer/flow": recorded["out_flow"].transpose(0, 2, 1, 3, 4),
    }
    same_weights = all(
        np.array_equal(value, weights(load("D"), "w/")[name])
        for name, value in weights(recorded, "w/").items()
    )
    moved = {k.replace("transformer/", "transformer:moved/"): v for k, v in arrays.items()}
    np.savez(tmp_path / "a.npz", **arrays, **moved, **{"transformer:moved/start_frame": 500})
    rows = verify(released, tmp_path / "a.npz")
    assert rows[0].passed == same_weights
    # Rotary positions only enter as differences: moving all frames changes nothing but rounding.
    assert rows[1].max_error == pytest.approx(rows[0].max_error, rel=0.05, abs=1e-4)


@pytest.fixture(scope="module")
def toy_recording(tmp_path_factory):
    """What diffusers computes with the bundled model's weights; its transformer predicts x0."""
    opened = checkpoint.open_checkpoint("toy")
    config, random = opened.config, np.random.default_rng(7)
    latents = random.standard_normal((1, 2, 16, 8, 8), np.float32)
    text = random.standard_normal((1, config.transformer.text_len, config.transformer.text_dim), np.float32)
    timestep = np.asarray([625.0], np.float32)
    config = opened.config
    transformer = loaded(
        diffusers_models.transformer(config.transformer),
        opened,
        "transformer",
        keys_transformer.diffusers_table(config.transformer),
    )
    vae = loaded(diffusers_models.vae(config.vae), opened, "vae", keys_vae.diffusers_table(config.vae))
    mean, std = (np.float32(v)[:, None, None] for v in (config.vae.latent_mean, config.vae.latent_std))
    with torch.no_grad():
        text_states, raw = torch.from_numpy(text), torch.from_numpy(latents * std + mean)
        x0 = transformer(
            torch.from_numpy(latents).transpose(1, 2), torch.from_numpy(timestep), text_states
        ).sample.transpose(1, 2)
        decoded = vae.decode(raw.transpose(1, 2)).sample.transpose(1, 2)
    arrays = {
        "transformer/latents": latents,
        "transformer/timestep": timestep,
        "transformer/text": text,
        "transformer/flow": (latents - x0.numpy()) / 0.625,
        "vae_decode/latents": latents,
        "vae_decode/video": decoded.numpy(),
    }
    path = tmp_path_factory.mktemp("toy") / "recorded.npz"
    np.savez(path, **arrays)
    return path


def loaded(model, opened, part, table):
    leaves = checkpoint.flatten(opened.load(part, dtype=np.float32))
    state = {
        name: rule.to_source(leaves[rule.target] if layer is None else leaves[rule.target][layer])
        for name, rule, layer in table.sources()
    }
    model.load_state_dict({name: torch.tensor(value) for name, value in state.items()})
    return model.eval()


def test_the_bundled_model_passes(toy_recording):
    """A model of x0 is compared by the velocity that follows from it."""
    rows = verify("toy", toy_recording)
    assert [(row.name, row.passed) for row in rows] == [("transformer", True), ("vae_decode", True)]
    assert all(row.tolerance == FLOAT32 and row.scale > 0.1 for row in rows)


@pytest.mark.parametrize(
    ("component", "overrides"),
    [("transformer", {"transformer.prediction": "v"}), ("vae_decode", {"vae.latent_mean": WAN_LATENT_MEAN})],
    ids=["prediction", "latent_mean"],
)
def test_a_setting_that_is_not_the_bundled_models_fails(toy_recording, component, overrides, tmp_path):
    arrays = read_recording(toy_recording)[component]
    np.savez(tmp_path / "one.npz", **{f"{component}/{name}": array for name, array in arrays.items()})
    (row,) = verify("toy", tmp_path / "one.npz", overrides=overrides)
    assert not row.passed


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"nonsense/x": np.zeros(1)}, "'nonsense' is not a component"),
        ({"vae_decode/latents": np.zeros(1)}, "vae_decode lacks video"),
        (
            {"vae_decode/latents": np.zeros(1), "vae_decode/video": np.zeros(1), "vae_decode/z": np.zeros(1)},
            "know z",
        ),
        ({}, "holds no arrays"),
    ],
)
def test_files_that_are_no_recordings(released, tmp_path, arrays, words):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=words):
        verify(released, tmp_path / "bad.npz")


def test_pickles_and_text_are_refused(released, tmp_path):
    np.savez(tmp_path / "pickled.npz", **{"vae_decode/latents": np.asarray([object()])})
    (tmp_path / "text.npz").write_text("not a zip file")
    for name in ("pickled.npz", "text.npz", "absent.npz"):
        with pytest.raises(UserError, match="cannot be read"):
            verify(released, tmp_path / name)
