"""Config files: snapshots of what they resolve to, overrides, and the errors a user would see."""

import copy
import itertools
import json
import os
import pathlib

import pytest

from longlive_jax.errors import UserError
from longlive_jax.training.config_file import differing, from_json, load_config, to_json

ROOT = pathlib.Path(__file__).parents[2]
GOLDEN = pathlib.Path(__file__).parent / "golden"
FILES = sorted((ROOT / "configs/toy").glob("*.py"))
PAPER = [ROOT / f"configs/wan/{name}.py" for name in ("init", "long")]  # its others are for inference
RECIPE = (
    "vae_images",
    "vae",
    "vae_decoder",
    "text",
    "teacher_block",
    "teacher",
    "causal_init",
    "init",
    "long",
)


def config_file(name: str) -> pathlib.Path:
    return ROOT / f"configs/toy/{name}.py"


def name_of(file: pathlib.Path) -> str:
    return f"{file.parent.name}_{file.stem}"


@pytest.mark.parametrize("file", FILES + PAPER, ids=name_of)
def test_resolved_config_is_the_recorded_one(file):
    """Refresh on purpose: REFRESH_GOLDEN=1 pytest tests/training/test_configs.py"""
    golden = GOLDEN / f"{name_of(file)}.json"
    resolved = json.dumps(to_json(load_config(file)), indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("REFRESH_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(resolved)
    assert resolved == golden.read_text()


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_every_config_shrinks_and_survives_json(file):
    config = load_config(file, {"smoke": "true"})
    assert config.run.steps == 2
    assert config.run.folder.startswith("runs/smoke/")
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize("file", FILES + PAPER, ids=name_of)
def test_docstring_has_the_launch_line(file):
    assert f"longlive train {file.relative_to(ROOT)}" in file.read_text()


@pytest.mark.parametrize(("before", "after"), list(itertools.pairwise(RECIPE)))
def test_every_stage_begins_with_the_one_before(before, after):
    assert load_config(config_file(after)).base == f"{load_config(config_file(before)).run.folder}/export"


def test_the_stages_of_the_reward_begin_with_what_make_toy_makes():
    reader, reward = (load_config(config_file(name)) for name in ("reader", "reward"))
    assert reader.base == f"{load_config(config_file('vae_decoder')).run.folder}/export"
    assert reward.reward.reader == f"{reader.run.folder}/export"
    assert f"--to {reward.base} $(TOY_MEAN)" in (ROOT / "Makefile").read_text()


def test_overrides_are_typed():
    config = load_config(config_file("vae"), {"run.steps": "7", "optimizer.betas": "0.5,0.6"})
    assert config.run.steps == 7
    assert config.optimizer.betas == (0.5, 0.6)


def test_changes_come_after_smoke():
    assert load_config(config_file("vae"), {"run.steps": "5", "smoke": "true"}).run.steps == 5


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("vae", {"run.step": "7"}, "'step' is not a setting"),
        ("vae", {"run.steps": "many"}, "run.steps='many' must be of type int"),
        ("vae", {"run.steps": "0"}, "run.steps=0 must be 1 or more"),
        ("vae", {"optimizer.learning_rate": "0"}, "must be positive"),
        ("vae", {"optimizer.betas": "0.9,1"}, r"must be in \[0, 1\)"),
        ("vae", {"run.micro_batches": "3"}, "must be a multiple of run.micro_batches=3"),
        ("vae", {"smoke": "maybe"}, "must be true or false"),
        ("teacher_block", {"flow.text_dropout": "2"}, r"flow.text_dropout=2.0 must be in \[0, 1\]"),
        ("teacher_block", {"flow.frame_levels": "-1"}, r"flow.frame_levels=-1.0 must be in \[0, 1\]"),
        ("teacher_block", {"flow.causal_share": "0.01"}, "whole number of clips"),
        ("teacher_block", {"flow.frame_levels": "0.01"}, "flow.frame_levels=0.01 of the clips"),
        ("causal_init", {"data.frames": "10"}, "multiple of model.window.block_frames=3"),
        ("causal_init", {"flow.method": "ode"}, "flow.text_dropout=0.1 must be 0 with flow.method=ode"),
        ("causal_ode", {"flow.encoded_frames": "21"}, "flow.encoded_frames=21 must be 0 with"),
        ("causal_ode", {"flow.causal_share": "0.5"}, "flow.causal_share=0.5 must be 1 with"),
        ("causal_ode", {"flow.method": "dmd"}, "flow.method='dmd' must be"),
        ("teacher", {"data.frames": "24"}, "at least data.frames=24"),
        (
            "teacher",
            {"run.steps": "7000"},
            "optimizer.schedule_steps=6000 is less than the run's 7000 updates",
        ),
        (
            "long",
            {"optimizer.schedule_steps": "179"},
            "optimizer.schedule_steps=179 is less than the run's 180",
        ),
        (
            "long",
            {"critic_optimizer.schedule_steps": "180"},
            "critic_optimizer.schedule_steps=180 is less than",
        ),
    ],
)
def test_wrong_settings_are_refused(name, changes, message):
    with pytest.raises(UserError, match=message):
        load_config(config_file(name), changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "cannot be read"),
        ("x = 1", "has no get_config"),
        ("def get_config():\n    return 1", "must return a longlive_jax.training.config.Training"),
    ],
)
def test_wrong_files_are_refused(tmp_path, text, message):
    file = tmp_path / "config.py"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(file)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no Python file"):
        load_config(tmp_path / "absent.py")


def test_only_differences_that_matter_are_named():
    old = to_json(load_config(config_file("vae")))
    changes = {
        "run.log_every": "3",
        "mesh.fsdp": "2",
        "optimizer.learning_rate": "0.5",
        "model.vae.dim": "16",
    }
    new = to_json(load_config(config_file("vae"), changes))
    assert differing(old, new) == ["model.vae.dim", "optimizer.learning_rate"]
    assert differing(old, to_json(load_config(config_file("text")))) == ["stage"]


def test_the_length_of_a_run_matters_where_its_rates_follow_it():
    def steps_matter(name, **changes):
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        old, new = (to_json(load_config(config_file(name), dotted | {"run.steps": n})) for n in ("4", "6"))
        return differing(old, new) == ["run.steps"]

    assert not steps_matter("teacher")  # its schedule has a length of its own
    assert steps_matter("teacher", optimizer__schedule_steps="0")
    assert not steps_matter("long")
    assert steps_matter("long", critic_optimizer__schedule="cosine")


def test_a_setting_that_an_older_version_did_not_have_had_its_default():
    new = to_json(load_config(config_file("vae")))
    old = copy.deepcopy(new)
    del old["settings"]["model"]["sampler"]["opening_steps"]
    assert differing(old, new) == []
    changed = to_json(load_config(config_file("vae"), {"model.sampler.opening_steps": "1000,500"}))
    assert differing(old, changed) == ["model.sampler.opening_steps"]
    old["settings"]["model"]["sampler"]["colour"] = "red"  # and one that this version does not have
    assert "model.sampler.colour" in differing(old, new)
