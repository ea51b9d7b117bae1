"""Shipping the toy model: what is stored, where it is found again, and what its card says."""

import json
import pathlib
import shutil
import tomllib

import jax
import numpy as np
import pytest

from examples import demo
from longlive_jax import checkpoint, lora
from longlive_jax.cli.main import main
from longlive_jax.convert.inspect import inspect
from longlive_jax.errors import UserError
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.toy import bundle, card
from longlive_jax.training.config_file import load_config

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installation whose bundled model is in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGLIVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(checkpoint.BUNDLED, "toy", tmp_path / "assets/toy")
    return tmp_path / "assets/toy"


# --- the weights ------------------------------------------------------------------------------------


def test_the_bundled_model_is_the_checkpoint_in_bfloat16(package, smoke_checkpoint):
    source = smoke_checkpoint(0)
    assert bundle.main(["weights", str(source)]) == 0
    stored, original = checkpoint.open_checkpoint("toy"), checkpoint.open_checkpoint(source)
    assert stored.path == package
    assert {info.dtype for info in stored.parts.values()} == {"bfloat16"}
    assert stored.config == original.config
    assert dict(stored.source).keys() == {"stage", "steps", "seed", "written_by"}
    for part in bundle.PARTS:
        pairs = zip(
            jax.tree.leaves(stored.load(part, dtype=np.float32)),
            jax.tree.leaves(original.load(part)),
            strict=True,
        )
        assert all(np.abs(a - b).max() <= np.abs(b).max() / 256 for a, b in pairs)
    pipe = Pipeline.load("toy")
    assert pipe.config.dtype == "float32"
    leaves = jax.tree.leaves((pipe.params, pipe.vae_params))
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}
    assert "toy" in str(inspect("toy"))


def test_a_lora_is_merged_and_an_average_stands_in(package, smoke_checkpoint, tmp_path):
    original = checkpoint.open_checkpoint(smoke_checkpoint(0))
    params = original.load("transformer")
    adapters = lora.init(jax.random.key(0), params, rank=2)
    adapters = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), adapters)
    with checkpoint.create(tmp_path / "tuned", original.config, source={}) as writer:
        writer.add_tree("transformer_ema", params)
        writer.add_tree("text_encoder", original.load("text_encoder"))
        writer.add_tree("vae", original.load("vae"))
        writer.add_tree("lora", adapters, alpha=4, rank=2)
        writer.add_tokenizer(original.tokenizer_path)
    bundle.bundle(tmp_path / "tuned")
    found = checkpoint.open_checkpoint("toy").load("transformer", dtype=np.float32)
    expected = lora.merge(params, adapters, scale=2.0)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1 / 256, atol=1e-6)
    assert set(checkpoint.open_checkpoint("toy").parts) == set(bundle.PARTS)


def test_of_several_checkpoints_the_mean_is_stored(package, smoke_checkpoint):
    every = [smoke_checkpoint(0), smoke_checkpoint(1)]
    assert bundle.main(["weights", *map(str, every)]) == 0
    found = checkpoint.open_checkpoint("toy")
    trees = [checkpoint.open_checkpoint(path).load("transformer", dtype=np.float32) for path in every]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *trees)
    stored = found.load("transformer", dtype=np.float32)
    for a, b in zip(jax.tree.leaves(stored), jax.tree.leaves(mean), strict=True):
        np.testing.assert_allclose(a, b, rtol=1 / 256, atol=1e-6)
    only = bundle.bundle(every[1], destination=package.parent / "only")
    assert found.fingerprint("vae") == checkpoint.open_checkpoint(only).fingerprint("vae")


def test_checkpoints_of_different_configs_have_no_mean(package, smoke_checkpoint, tmp_path, capsys):
    other = shutil.copytree(smoke_checkpoint(0), tmp_path / "other")
    file = other / "config.json"
    file.write_text(file.read_text().replace('"keep_sink": false', '"keep_sink": true'))
    before = checkpoint.open_checkpoint(bundle.bundle(smoke_checkpoint(0))).fingerprint("transformer")
    assert bundle.main(["weights", str(other), str(smoke_checkpoint(1))]) == 2
    assert "another config" in capsys.readouterr().err
    assert checkpoint.open_checkpoint("toy").fingerprint("transformer") == before


def test_a_large_or_incomplete_model_is_refused(package, smoke_checkpoint, monkeypatch, tmp_path):
    original = checkpoint.open_checkpoint(smoke_checkpoint(0))
    with checkpoint.create(tmp_path / "part", original.config, source={}) as writer:
        writer.add_tree("transformer", original.load("transformer"))
    with pytest.raises(UserError, match="has no text_encoder"):
        bundle.bundle(tmp_path / "part")
    monkeypatch.setattr(bundle, "LIMIT_BYTES", 1000)
    with pytest.raises(UserError, match="MB in bfloat16"):
        bundle.bundle(original.path)
    assert not package.exists()


# --- where it is found ------------------------------------------------------------------------------


def test_without_the_bundle_one_line_says_so(package, capsys):
    assert main(["generate", "--checkpoint", "toy", "--prompt", "a red ring"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: checkpoint=toy: the bundled model is not in this installation")
    assert err.count("\n") == 1


def test_a_folder_of_that_name_comes_first(package, smoke_checkpoint):
    bundle.bundle(smoke_checkpoint(0))
    assert checkpoint.locate("toy") == package
    bundle.bundle(smoke_checkpoint(1), destination="toy")
    assert checkpoint.locate("toy") == pathlib.Path("toy")
    assert checkpoint.open_checkpoint("toy").fingerprint("vae") != checkpoint.open_checkpoint(
        package
    ).fingerprint("vae")


def test_the_wheel_takes_the_assets():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    (pattern,) = [p for p in settings["package-data"]["longlive_jax"] if p.startswith("assets")]
    place = checkpoint.BUNDLED["toy"].relative_to(ROOT / "longlive_jax") / bundle.CARD_FILE
    assert place.match(pattern)


def test_make_toy_runs_every_stage_after_the_one_it_begins_with():
    (line,) = [x for x in (ROOT / "Makefile").read_text().splitlines() if x.startswith("TOY_RUNS :=")]
    names = [name for name in line.split()[2:] if (ROOT / f"configs/toy/{name}.py").exists()]
    assert len(names) >= 7
    configs = [load_config(ROOT / f"configs/toy/{name}.py") for name in names]
    assert [config.run.folder for config in configs] == [f"runs/toy/{name}" for name in names]
    assert [config.base for config in configs] == ["", *(f"runs/toy/{name}/export" for name in names[:-1])]


def test_the_demo_makes_its_video(package, smoke_checkpoint, capsys):
    bundle.bundle(smoke_checkpoint(0))
    assert demo.main(["out"]) == 0
    out = capsys.readouterr().out
    assert "out/demo.mp4, its contact sheet out/demo.png" in out
    sidecar = json.loads(pathlib.Path("out/demo.json").read_text())
    assert 15 <= sidecar["video"]["seconds"] < 15.2
    assert sidecar["request"]["checkpoint"] == "toy"
    segments = sidecar["request"]["story"]["segments"]
    assert [segment["prompt"] for segment in segments] == list(demo.PROMPTS)
    fps, stride = sidecar["config"]["video"]["fps"], 2  # of the smoke model
    assert segments[1]["at_frame"] * stride / fps == pytest.approx(7.5, abs=0.2)
    assert pathlib.Path("out/demo.png").stat().st_size > 1000


# --- the card ---------------------------------------------------------------------------------------


SOURCE = {"stage": "long", "steps": 10, "seed": 3}


def report(name, base, *, stage="teacher", steps=10, seed=3):
    return {
        "stage": stage,
        "settings": {
            "run": {"folder": f"/somewhere/{name}", "steps": steps, "seed": seed},
            "data": {"batch_size": 8, "frames": 21},
            "optimizer": {"learning_rate": 1e-3},
            "evaluation": {"metric": "all"},
            "base": base and f"/somewhere/{base}/export",
        },
        "steps": steps,
        "seconds_per_step": 36.0,
        "scores": {"all": 0.875},
        "environment": {"devices": "1 x cpu"},
    }


@pytest.fixture
def package_of(smoke_checkpoint, package):
    """Stores the model (of one export, or the mean of several) with the record of runs given as reports."""

    def store(reports, *, averaged=1):
        for name, values in reports.items():
            pathlib.Path("runs", name).mkdir(parents=True)
            pathlib.Path("runs", name, "report.json").write_text(json.dumps(values))
        made = finished(smoke_checkpoint(0))
        return bundle.main(["weights", "--runs", "runs", *[str(made)] * averaged])

    return store


def finished(path, **changes):
    """A copy of a checkpoint whose source is the end of the run `long`, with some changes."""
    copy = shutil.copytree(path, pathlib.Path("made"), dirs_exist_ok=True)
    values = json.loads((copy / "config.json").read_text())
    values["source"] = {**SOURCE, **changes}
    (copy / "config.json").write_text(json.dumps(values))
    return copy


@pytest.fixture
def measured(smoke_checkpoint, package):
    """The results of a measurement that saw everything hold, of the weights of `package_of`."""
    opened = checkpoint.open_checkpoint(bundle.bundle(smoke_checkpoint(0), destination="measured"))
    value = {"mean": 0.9, "low": 0.8, "high": 0.95, "clips": 64}
    rows = {name: value for name, _ in (*card._CLIP_ROWS, *card._LONG_ROWS, *card._SWITCH_ROWS)}
    rows |= {name: {"mean": [i / 20 for i in range(20)]} for name, _ in card._WINDOW_ROWS}
    rows["blocks.new"] = {"mean": [0.25, 0.5, 1.0]}
    row = {"first_cell": "long", "second_cell": "long, sink 0", "first": 0.9, "second": 0.5, "clips": 64}
    row |= {"difference": 0.4, "low": 0.3, "high": 0.5}
    names = ("clip", "long", "switch, recache", "switch, keep", "switch, clear")
    return {
        "checkpoints": {"model": {"weights": {part: opened.fingerprint(part) for part in bundle.PARTS}}},
        "settings": {"clips": 32, "seeds": [101, 102], "frames": 60, "long_frames": 240},
        "generation": {
            "video": {"height": 64, "width": 64, "fps": 16},
            "window": {"window_frames": 12, "sink_frames": 3, "block_frames": 3, "rope": "absolute"},
            "sampler": {"steps": [1000, 750, 500, 250]},
        },
        "dtype": "float32",
        "cells": dict.fromkeys(names, rows),
        "differences": [
            {**row, "measure": "identity.size", "differs": True},
            {**row, "measure": "flicker", "differs": False},
        ],
        "about_differences": "2 intervals",
    }


def written_card(measured):
    pathlib.Path("r.json").write_text(json.dumps(measured))
    assert bundle.main(["card", "--results", "r.json"]) == 0
    return (checkpoint.BUNDLED["toy"] / bundle.CARD_FILE).read_text()


def test_the_card_tells_what_was_trained_and_measured(measured, package_of):
    runs = {"a": report("a", ""), "b": report("b", "a"), "long": report("long", "b", stage="long")}
    assert package_of({**runs, "elsewhere": report("elsewhere", "a", steps=7)}) == 0
    text = written_card(measured)
    places = [text.index(f"| `{name}` |") for name in runs]
    assert places == sorted(places)
    assert "elsewhere" not in text
    assert "/somewhere" not in text
    assert (
        "| `a` | the bidirectional teacher, by flow matching | 10 | 8 | 21 | 0.001 | 3 | 0.10 | all 0.875 |"
        in text
    )
    assert "0.900 (0.800 to 0.950)" in text
    assert "over clips of the seeds 101, 102" in text
    assert "### 64 clips of 240 latent frames" in text
    assert "### 64 prompt switches" in text
    assert "| long | long, sink 0 | identity.size | 0.900 | 0.500 | +0.400 (+0.300 to +0.500) | 64 |" in text
    assert "- long and long, sink 0: flicker" in text
    assert "\n0.3 hours of steps in all, on 1 x cpu." in text
    assert "`make toy` repeats them.\n" in text
    for held in ("within 2 blocks", "while the unchanged ones stay"):
        assert f"| switches whose new attributes hold {held} | 0.900 (0.800 to 0.950) |" in text
    assert "gate** (colour 0.95, shape 0.85, motion 0.85, iou 0.65): colour 0.90." in text


def test_the_card_of_an_early_export_names_the_runs_that_stopped_early(measured, package_of):
    """The base was stopped after 10 of 30 steps; the model is from before the end of its own run."""
    runs = {"base": report("base", ""), "long": report("long", "base", stage="long", steps=40)}
    runs["base"]["settings"]["run"]["steps"] = 30
    runs["long"]["settings"]["optimizer"]["schedule_steps"] = 90
    assert package_of(runs) == 0
    text = written_card(measured)
    assert "| `base` | the bidirectional teacher, by flow matching | 10 of 30 |" in text
    assert "with prompt switches | 40 (schedule: 90) |" in text
    assert "`make toy` repeats them, with all planned steps of `base`.\n" in text


def test_the_card_says_when_the_gate_is_reached(measured, package_of):
    good = {"mean": 0.96, "low": 0.95, "high": 0.97, "clips": 64}
    measured["cells"] = {name: {**cell, "colour": good} for name, cell in measured["cells"].items()}
    assert package_of({"long": report("long", "", stage="long")}) == 0
    assert "gate (colour 0.95, shape 0.85, motion 0.85, iou 0.65) is reached" in written_card(measured)


@pytest.mark.parametrize(("averaged", "told"), [(1, "| 10 |"), (2, "| 10, mean of 2 exports |")])
def test_the_card_says_of_how_many_exports_the_model_is_the_mean(measured, package_of, averaged, told):
    assert package_of({"long": report("long", "", stage="long")}, averaged=averaged) == 0
    assert f"| the student on its own long rollouts with prompt switches {told}" in written_card(measured)


def test_the_record_of_a_base_stands_in_for_its_reports(measured, smoke_checkpoint, package_of):
    """The base is the model that was bundled until now, and its runs are gone."""
    first = {**card._run("old", report("old", "")), "note": "hours from the median step"}
    finished(smoke_checkpoint(1), training=[first]).rename("old")
    runs = {"long": report("long", "", stage="long")}
    runs["long"]["settings"]["base"] = "old"
    assert package_of(runs) == 0
    text = written_card(measured)
    assert text.index("| `old` |") < text.index("| `long` |")
    assert "\n- `old`: hours from the median step\n" in text
    assert "\n0.2 hours of steps in all, on 1 x cpu." in text


def test_a_card_for_other_weights_is_refused(measured, smoke_checkpoint, package, capsys):
    bundle.bundle(smoke_checkpoint(1))
    pathlib.Path("r.json").write_text(json.dumps(measured))
    assert bundle.main(["card", "--results", "r.json"]) == 2
    assert "measures other weights" in capsys.readouterr().err
    assert not (package / bundle.CARD_FILE).exists()


def test_a_card_without_a_record_is_refused(measured, smoke_checkpoint, package, capsys):
    bundle.bundle(smoke_checkpoint(0))
    pathlib.Path("r.json").write_text(json.dumps(measured))
    assert bundle.main(["card", "--results", "r.json"]) == 2
    assert "store it with `bundle weights --runs FOLDER`" in capsys.readouterr().err


def test_a_model_whose_runs_are_not_there_is_not_stored(smoke_checkpoint, package, package_of, capsys):
    before = checkpoint.open_checkpoint(bundle.bundle(smoke_checkpoint(1))).fingerprint("transformer")
    assert package_of({"long": report("long", "init", stage="long")}) == 2
    assert "there is no init/report.json" in capsys.readouterr().err
    assert checkpoint.open_checkpoint("toy").fingerprint("transformer") == before


def began_with(base):
    found = report("long", "", stage="long")
    return {**found, "settings": {**found["settings"], "base": base}}


def rewarded():
    found = began_with("runs/toy/init/mean")
    return {**found, "settings": {**found["settings"], "reward": {"reader": "runs/toy/reader/export"}}}


def test_what_gave_a_reward_stands_before_what_it_was_given_to():
    runs = {"long": rewarded(), "init": report("init", ""), "reader": report("reader", "vae", stage="reader")}
    found = card.training(runs, source=SOURCE, recorded=lambda base: None)
    assert [run["run"] for run in found] == ["init", "reader", "long"]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ({}, "0 reports"),
        ({"long": report("long", "init", stage="long")}, "no init/report.json"),
        ({"long": report("long", "long", stage="long")}, "its own base"),
        ({"a": report("a", "", stage="long"), "b": report("b", "", stage="long")}, "2 reports"),
        ({"long": began_with("toy")}, "long began with 'toy', of whose runs there are no reports"),
        ({"long": rewarded()}, "no reader/report.json, and long was rewarded by it"),
    ],
)
def test_runs_that_do_not_explain_the_model_are_refused(runs, message):
    with pytest.raises(UserError, match=message):
        card.training(runs, source=SOURCE, recorded=lambda base: None)


def test_two_runs_may_have_one_reader():
    runs = {
        "long": rewarded(),
        "init": {**rewarded(), "stage": "init"},
        "reader": report("reader", "vae", stage="reader"),
    }
    runs["init"]["settings"] = {**runs["init"]["settings"], "base": ""}
    found = card.training(runs, source=SOURCE, recorded=lambda base: None)
    assert [run["run"] for run in found] == ["reader", "init", "long"]


def test_a_model_is_not_its_own_base():
    """As when the bundled model is stored, and then stored once more."""
    runs = {"long": began_with("toy")}
    with pytest.raises(UserError, match="long is its own base"):
        card.training(runs, source=SOURCE, recorded=lambda base: [card._run("long", runs["long"])])
