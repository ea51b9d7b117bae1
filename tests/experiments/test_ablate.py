"""`longlive ablate`, from a config file to the report, on random weights."""

import csv
import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from longlive_jax.cli.main import main
from longlive_jax.errors import UserError
from longlive_jax.experiments import cells, parallel, report, store, study, table
from longlive_jax.experiments.study import Plot, Study, load_study
from longlive_jax.experiments.tasks import PromptFile, Scenes, Segments, Switch

CONFIG = """
from longlive_jax.experiments.study import TIME, Plot, Study
from longlive_jax.experiments.tasks import Scenes

def get_config():
    return Study(
        name="small",
        question="Does anything happen?",
        task=Scenes(frames=9),
        grids=({"window": (6,), "sink": (0, 3)},),
        metrics=("adherence", "collapse", "size"),
        columns=("shape", "background", "collapse.max", "cache_megabytes"),
        plots=(
            Plot("by_sink", "background", x="sink"),
            Plot("along", "blocks.distance", x=TIME),
        ),
        checkpoint="CHECKPOINT",
        seeds=(1, 2),
        clips=2,
        batch=2,
        baseline={"sink": 3},
        kept_videos=1,
    )
"""


@pytest.fixture
def config(place, checkpoint_of):
    file = place / "config.py"
    file.write_text(CONFIG.replace("CHECKPOINT", str(checkpoint_of(0))))
    return file


def longlive(capsys, *words):
    """Runs a command; returns status, standard output and standard error."""
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


def test_a_study_from_config_to_report(config, capsys, monkeypatch):
    readme = config.parent / "README.md"
    readme.write_text(f"# Small\n\n{report.BEGIN}\n\nNot run yet.\n\n{report.END}\n\nBelow.\n")
    status, out, err = longlive(capsys, "ablate", config, "--publish", "--devices", "1")
    assert status == 0, err
    assert "4 cells, 0 stored, 4 to run here" in err
    assert re.search(r"about \d+:\d\d by the first", err)
    assert "left" in err
    folder = pathlib.Path("outputs/small")
    assert len(list((folder / "cells").iterdir())) == 4

    rows = list(csv.DictReader((folder / "table.csv").open()))
    lines = [json.loads(line) for line in (folder / "table.jsonl").open()]
    assert len(rows) == len(lines)
    assert {row["condition"] for row in rows} == {"window 6, sink 0", "window 6, sink 3"}
    sink = next(r for r in lines if (r["condition"], r["measure"]) == ("window 6, sink 3", "background"))
    assert (sink["window"], sink["sink"], sink["clips"], sink["seeds"]) == (None, 3, 4, 2)
    # Keys and values of 3 frames of 4 tokens, of 2 layers of width 32, in float32.
    sizes = {r["condition"]: r["mean"] for r in lines if r["measure"] == "cache_megabytes"}
    assert sizes["window 6, sink 0"] == sizes["window 6, sink 3"]
    assert sizes["window 6, sink 0"] >= 2 * 3 * 4 * 2 * 32 * 4 / 1e6
    along = [r for r in lines if (r["condition"], r["measure"]) == ("window 6, sink 0", "blocks.distance")]
    assert [r["window"] for r in along] == [0, 1]

    for name in ("by_sink", "along"):
        assert (folder / f"plots/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"plots/{name}.svg").read_text()
    text = (folder / "report.md").read_text()
    assert "Against `window 6, sink 3`, clip by clip" in text
    published = readme.read_text()
    assert "Not run yet." not in published
    assert published.endswith("\n\nBelow.\n")
    assert "| window 6, sink 0 |" in published
    assert (config.parent / "plots/along.svg").is_file()
    # Nothing that is committed says where it was made.
    assert str(config.parent) not in published + (config.parent / "table.csv").read_text()
    assert len(list((folder / "videos").glob("*.mp4"))) == 2
    assert "| window 6, sink 0 |" in out

    # Its page: a video per condition, the figures, and the one setting that differs.
    assert longlive(capsys, "report", folder)[0] == 0
    text = (folder / "report.html").read_text()
    assert text.count("<video") == 2
    assert text.count("data:image/svg+xml") == 2
    assert "<td>window.sink_frames</td><td>0</td><td>3</td>" in text
    assert "<td>window.window_frames</td>" not in text

    # A second run runs nothing and writes the same; a new seed runs its own cells only.
    def fail(*arguments, **options):
        raise AssertionError("ran again")

    monkeypatch.setattr(cells, "run_cell", fail)
    before = (folder / "table.csv").read_bytes(), (folder / "plots/along.svg").read_bytes()
    assert longlive(capsys, "ablate", config)[0] == 0
    assert ((folder / "table.csv").read_bytes(), (folder / "plots/along.svg").read_bytes()) == before
    status, out, _ = longlive(capsys, "ablate", config, "seeds=1,2,3", "--estimate")
    assert status == 0
    assert "6 cells, 4 stored, 2 to run" in out
    assert "by 4 stored cells" in out


def test_cells_run_on_several_devices_and_in_shares(config, capsys, monkeypatch):
    """Two devices and two processes' shares make what one device makes."""
    words = ("ablate", config, "seeds=1", "--quiet")
    shared = (*words, "--out", "shared", "--devices", "1")
    status, out, err = longlive(capsys, *shared, "--shard", "1/2")
    assert status == 0, err
    assert "this share is done" in out
    assert not pathlib.Path("shared/report.md").exists()
    assert longlive(capsys, *shared, "--shard", "0/2")[0] == 0
    used = set()
    opened = cells.Pipelines.open

    def open_on(self, *arguments):
        used.add(jax.config.jax_default_device)
        return opened(self, *arguments)

    monkeypatch.setattr(cells.Pipelines, "open", open_on)
    assert longlive(capsys, *words, "--out", "whole", "--devices", "2")[0] == 0
    assert len(used) == 2
    assert pathlib.Path("shared/table.csv").read_text() == pathlib.Path("whole/table.csv").read_text()


def test_an_interrupted_run_goes_on(config, capsys, monkeypatch):
    """A cell that ends halfway leaves nothing, the ones before it stay."""
    run, count = cells.run_cell, []

    def second_fails(*arguments, **options):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        run(*arguments, **options)

    monkeypatch.setattr(cells, "run_cell", second_fails)
    words = ("ablate", config, "seeds=1", "--quiet", "--devices", "1", "task.frames=9")
    assert longlive(capsys, *words)[0] == 130
    stored = sorted(pathlib.Path("outputs/small/cells").iterdir())
    assert len(stored) == 1
    assert not pathlib.Path("outputs/small/report.md").exists()
    times = stored[0].stat().st_mtime_ns
    monkeypatch.setattr(cells, "run_cell", run)
    assert longlive(capsys, *words)[0] == 0
    assert stored[0].stat().st_mtime_ns == times


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("grids=1",), "grids"),
        (("clips=3",), "batch=2 must divide clips=3"),
        (("seeds=1,1",), "seeds=(1, 1) must differ"),
        (("metrics=beauty",), "'beauty' is unknown; choose from adherence"),
        (("task.frames=0",), "task.frames=0"),
        (("checkpoint=nowhere",), "checkpoint=nowhere"),
        (("--shard", "2/2"), "--shard=2/2"),
        (("--checkpoint", "a=b"), "--checkpoint a"),
        (("--publish",), "README.md does not exist"),
        (("--devices", "99"), "--devices=99"),
        (("task.frames=6",), "metric collapse needs 3 blocks of 3"),
        (("metrics=clip_score",), "clip_score needs a network"),
        (("metrics=switch",), "switch is for the task Switch, not for Scenes"),
    ],
)
def test_mistakes_are_refused_in_one_line(config, capsys, words, message):
    status, _, err = longlive(capsys, "ablate", config, "--quiet", *words)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not pathlib.Path("outputs/small/report.md").exists()


def small(**changes):
    values = {
        "name": "s",
        "question": "?",
        "task": Scenes(frames=6),
        "grids": ({"window": (6,)},),
        "metrics": ("adherence",),
        "columns": ("all",),
        "clips": 2,
        "batch": 2,
    }
    return Study(**(values | changes))


def test_a_grid_is_all_combinations_once():
    one = small(grids=({"window": (6, 9), "sink": (0, 3)}, {"window": (9, 12), "sink": (3,)}))
    assert [c.label for c in one.conditions()] == [
        "window 6, sink 0",
        "window 6, sink 3",
        "window 9, sink 0",
        "window 9, sink 3",
        "window 12, sink 3",
    ]
    assert one.conditions()[1].settings == {"window.window_frames": 6, "window.sink_frames": 3}


def test_axes_reach_the_config():
    from longlive_jax.config import preset

    grid = {"steps": (2,), "sampler.context_noise": (10.0,), "policy": ("keep",), "lora": (False,)}
    one = small(grids=({**grid, "checkpoint": ("short",)},), checkpoints={"short": "runs/short"})
    condition = one.conditions()[0]
    config = condition.resolve(preset("toy"))
    assert config.sampler.steps == (1000, 500)
    assert (config.sampler.context_noise, config.switch.policy) == (10.0, "keep")
    assert (condition.checkpoint, condition.use_lora) == ("runs/short", False)
    assert condition.label == "steps 2, sampler.context_noise 10, policy keep, lora off, checkpoint short"
    opened = small(grids=({"opening_steps": (4,)},)).conditions()[0].resolve(preset("toy"))
    assert opened.sampler.opening_steps == preset("toy").sampler.steps
    # The paper's four steps are the even spread of four.
    assert small(grids=({"steps": (4,)},)).conditions()[0].resolve(preset("toy")) == preset("toy")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grids": ({"windw": (6,)},)}, "'windw' is not an axis"),
        ({"grids": ()}, "grids is empty"),
        ({"grids": ({"window": ()},)}, "window has no values"),
        ({"baseline": {"window": 7}}, "baseline"),
        ({"plots": (Plot("p", "all", x="sink"),)}, "no axis 'sink'"),
        ({"name": "../up"}, "name='../up'"),
    ],
)
def test_wrong_studies_are_refused(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        small(**changes)


def test_a_condition_that_does_not_fit_is_named():
    from longlive_jax.config import preset

    condition = small(grids=({"window": (6,), "sink": (6,)},)).conditions()[0]
    with pytest.raises(UserError, match=r"condition \(window 6, sink 6\): window.window_frames=6 must be"):
        condition.resolve(preset("toy"))


@pytest.mark.parametrize("task", [Switch(frames=18), Segments(segments=3, segment_frames=7)])
def test_tasks_switch_where_blocks_begin_and_to_something_else(task):
    from longlive_jax.config import preset

    config = preset("toy")
    work = task.work(config, clips=4, seed=5)
    assert work.codes.shape == (4, len(work.starts), 4)
    assert all(start % config.window.block_frames == 0 for start in work.starts)
    for i, story in enumerate(work.stories):
        assert [s.frame for s in story.switches] == list(work.starts[1:])
        # The prompts say what is scored.
        from longlive_jax.toy import grammar

        assert [grammar.parse(text).codes for text in story.prompts] == [tuple(c) for c in work.codes[i]]
        assert (work.codes[i, 1:] != work.codes[i, :-1]).any(-1).all()
    again = task.work(config, clips=2, seed=5)
    assert again.stories == work.stories[:2]
    assert task.work(config, clips=4, seed=6).stories != work.stories


def test_a_prompt_file_is_named_by_its_content(place):
    from longlive_jax.config import preset
    from longlive_jax.experiments.tasks import task_key

    config, keys = preset("toy"), []
    for text in ("a\nb\n", "a\nc\n", "a\nb\n"):
        pathlib.Path("p.txt").write_text(text)
        task = PromptFile("p.txt", frames=6)
        keys.append(task_key(task, [task.work(config, clips=2, seed=0)]))
    assert keys[0] == keys[2] != keys[1]
    with pytest.raises(UserError, match="holds 2 prompts; clips=3"):
        task.work(config, clips=3, seed=0)


def test_checkpoints_that_generate_differently_are_compared_on_purpose_only(place, checkpoint_of):
    one, other = checkpoint_of(0), shutil.copytree(checkpoint_of(1), place / "other")
    file = other / "config.json"
    file.write_text(file.read_text().replace('"keep_sink": false', '"keep_sink": true'))
    both = {"grids": ({"checkpoint": (str(one), str(other))},)}
    with pytest.raises(UserError, match=r"checkpoints differ in switch.keep_sink: False .*, True .*settings"):
        cells.plan(small(**both), place)
    assert len(cells.plan(small(**both, settings={"switch.keep_sink": False}), place)) == 6
    apart = (
        {"checkpoint": (str(one),), "keep_sink": (False,)},
        {"checkpoint": (str(other),), "keep_sink": (True,)},
    )
    assert len(cells.plan(small(grids=apart), place)) == 6


def test_cells_are_told_apart_by_all_they_depend_on(place, checkpoint_of):
    base = small(checkpoint=str(checkpoint_of(0)))

    def files(one):
        return {cell.file.name for cell in cells.plan(one, place)}

    first = files(base)
    assert len(first) == 3
    for changes in (
        {"clips": 4},
        {"task": Scenes(frames=9)},
        {"metrics": ("size",)},
        {"checkpoint": str(checkpoint_of(1))},
        {"settings": {"sampler.shift": 3.0}},
        {"metrics": ("adherence", "size")},
    ):
        assert not first & files(dataclasses.replace(base, **changes)), changes
    # What does not change a number does not make a cell anew.
    assert files(dataclasses.replace(base, question="!", batch=1, kept_videos=0)) == first


def test_intervals_are_over_clips_or_over_runs():
    rows = table._rows(_cell(), "all", [np.array([0.2, 0.4]), np.array([0.6, np.nan])])
    assert (rows[0].mean, rows[0].clips, rows[0].seeds) == (0.4, 3, 2)
    assert 0.2 <= rows[0].low < 0.4 < rows[0].high <= 0.6
    runs = table._rows(_cell(), "frames_per_second", [np.full(4, 10.0), np.full(4, 12.0), np.full(4, 14.0)])
    assert (runs[0].mean, runs[0].clips) == (12.0, 3)
    # Student with two degrees of freedom: 4.303 * 2 / sqrt(3).
    assert runs[0].high - 12 == pytest.approx(4.9687, abs=1e-3)
    alone = table._rows(_cell(), "frames_per_second", [np.full(4, 10.0)])[0]
    assert (alone.mean, alone.low) == (10.0, None)


def _cell():
    one = small()
    return cells.Cell(one, one.conditions()[0], 1, None, None, None, {}, pathlib.Path("x"))


def test_stored_numbers_come_back(place):
    values = {"a": np.array([0.5, np.nan]), "w": np.arange(4.0).reshape(2, 2)}
    file = store.file_of(place, "window 6, sink 0", {"seed": 1, "config": {}})
    assert file.name.startswith("window-6-sink-0-seed1-")
    store.write(file, {"seed": 1, "config": {}}, values, seconds=1.0, frames=4, prompts=[["x"]])
    back = store.read(file)
    np.testing.assert_array_equal(back.table["a"], values["a"])
    np.testing.assert_array_equal(back.table["w"], values["w"])
    assert store.slug("x" * 200) != store.slug("x" * 201)


def test_the_setting_tables_show_differences_only():
    found = report.settings_table({"a": {"w": {"x": 1, "y": 2}}, "b": {"w": {"x": 1, "y": 3}}})
    assert found == [["setting", "a", "b"], ["w.y", "2", "3"]]


STUDIES = sorted((pathlib.Path(__file__).parents[2] / "experiments").glob("*/config.py"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.parent.name)
def test_every_study_loads_and_has_a_place_for_its_results(file):
    from longlive_jax.config import preset

    one = load_study(file)
    assert one.name == file.parent.name
    for condition in one.conditions():
        condition.resolve(preset("toy"))
    report.check_place(file.parent / "README.md")
    assert (
        f"longlive ablate experiments/{one.name}/config.py --publish"
        in (file.parent / "README.md").read_text()
    )
    assert set(one.columns) <= set(study_measures(one)), set(one.columns) - set(study_measures(one))


def study_measures(one):
    """Measures that a study's metrics give, found out on noise."""
    from longlive_jax.config import preset
    from longlive_jax.experiments.metrics import METRICS, Batch

    config = preset("toy")
    shorter = {"segment_frames": 9} if isinstance(one.task, Segments) else {"frames": 24}
    one = dataclasses.replace(one, task=dataclasses.replace(one.task, **shorter))
    work = one.task.work(config, clips=1, seed=0)
    random, frames = np.random.default_rng(0), one.task.frames
    video = random.integers(0, 256, (1, config.vae.video_frames(frames), 64, 64, 3), np.uint8)
    latents = random.normal(size=(1, frames, 8, 8, 16)).astype(np.float32)
    batch = Batch(config, one.task, work, video, latents, 1.0)
    tables = [METRICS[name].measure(batch) for name in one.metrics]
    names = {name for values in tables for name in values}
    assert {plot.measure for plot in one.plots} <= names
    return names


def test_shards_are_disjoint_and_cover():
    items = list(range(7))
    taken = [parallel.Shard(i, 3).take(items) for i in range(3)]
    assert sorted(x for part in taken for x in part) == items


def test_load_study_says_what_is_wrong(place):
    pathlib.Path("c.py").write_text("def get_config():\n    return 1\n")
    with pytest.raises(UserError, match=r"must return a longlive_jax\.experiments\.study\.Study"):
        study.load_study("c.py")
    pathlib.Path("c.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        study.load_study("c.py")
    with pytest.raises(UserError, match="no Python file; try experiments/window_sink"):
        study.load_study("nothing.py")
