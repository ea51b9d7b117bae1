"""The benchmark of the toy model, from a checkpoint to its JSON, on random weights."""

import json
import pathlib

import pytest

from benchmarks import toy_model
from longlive_jax.config import preset
from longlive_jax.toy import card

SMALL = (
    *("--clips", "3", "--seeds", "1", "2", "--batch", "3", "--frames", "6", "--long-frames", "18"),
    *("--switch-frames", "18"),
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGLIVE_CACHE", str(tmp_path / "cache"))


def test_everything_is_measured_once(smoke_checkpoint, monkeypatch, capsys):
    first, second = smoke_checkpoint(0), smoke_checkpoint(1)
    words = [str(first), *SMALL, "--compare", f"other={second}", "--json", "r.json", "--cells", "cells"]
    words += ["--long-clips", "1"]
    assert toy_model.main(words) == 0
    out, err = capsys.readouterr()
    assert "left" in err
    result = json.loads(pathlib.Path("r.json").read_text())
    assert list(result["cells"]) == [
        *("clip", "switch, recache", "long", "switch, keep", "switch, clear", "clip, opening steps 16"),
        *("long, relative rope", "long, sink 0"),
        *("clip, other", "switch, recache, other", "long, other"),
    ]
    assert result["cells"]["clip"]["all"]["clips"] == 6
    assert result["cells"]["long"]["all"]["clips"] == 2
    assert result["cells"]["switch, keep"]["held.2"]["clips"] == 2
    assert len(result["cells"]["switch, keep"]["blocks.new"]["mean"]) == 3
    assert result["cells"]["clip"]["shape"]["low"] <= result["cells"]["clip"]["shape"]["mean"]
    compared = {(row["first_cell"], row["second_cell"]) for row in result["differences"]}
    assert compared == {
        ("clip", "clip, opening steps 16"),
        ("clip", "clip, other"),
        ("long", "long, relative rope"),
        ("long", "long, sink 0"),
        ("long", "long, other"),
        ("switch, recache", "switch, keep"),
        ("switch, recache", "switch, clear"),
        ("switch, recache", "switch, recache, other"),
        ("switch, keep", "switch, clear"),
    }
    # Other weights and other caches do make other videos.
    changed = {(row["first_cell"], row["second_cell"]) for row in result["differences"] if row["difference"]}
    assert changed == compared
    assert result["settings"]["seeds"] == [1, 2]
    assert str(first.parent) not in json.dumps(result)
    assert "switch, keep" in out
    # The model card finds every measure it wants.
    text = card.render(result, [], parameters={"vae": 1}, size=1)
    assert "over clips of the seeds 1, 2" in text
    assert "6 clips of 6 latent frames" in text
    assert "2 clips of 18 latent frames" in text
    assert "6 prompt switches" in text

    # A second run measures nothing, and so does one that was interrupted before its result was written.
    def fail(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(toy_model, "measure", fail)
    pathlib.Path("r.json").unlink()
    assert toy_model.main([*words, "--quiet"]) == 0
    assert json.loads(pathlib.Path("r.json").read_text())["differences"] == result["differences"]
    with pytest.raises(AssertionError, match="measured again"):
        toy_model.main([*words, "--seeds", "1", "3", "--quiet"])


def test_the_plan_takes_the_method_apart():
    config = preset("toy")
    settings = toy_model.Settings(
        clips=2, seeds=(1,), batch=1, frames=60, long_frames=240, switch_frames=48, long_clips=1
    )
    cells = toy_model.plan(config, settings, ["init"])
    assert {(cell.kind, settings.clips_of(cell)) for cell in cells} == {
        *(("clip", 2), ("switch", 2), ("long", 1))
    }
    changes = {cell.name: dict(cell.overrides) for cell in cells if cell.kind == "long"}
    assert changes == {
        "long": {},
        "long, relative rope": {"window.rope": "relative"},
        "long, sink 0": {"window.sink_frames": 0},
        "long, init": {},
    }
    assert {cell.frames for cell in cells if cell.kind == "long"} == {240}
    opened = [cell for cell in cells if cell.overrides.keys() == {"sampler.opening_steps"}]
    assert [(cell.kind, len(cell.overrides["sampler.opening_steps"])) for cell in opened] == [("clip", 16)]
    assert [
        cell.policy for cell in cells if cell.checkpoint == toy_model.MODEL and cell.kind == "switch"
    ] == [*("recache", "keep", "clear")]
    assert [pair for pair in toy_model.pairs(cells) if pair[0] == "long"] == [
        ("long", "long, relative rope"),
        ("long", "long, sink 0"),
        ("long", "long, init"),
    ]
    # The other checkpoint generates as the first one does, whatever its own config says.
    assert toy_model.shared_settings(config)["window.sink_frames"] == 3
    assert toy_model.shared_settings(config)["sampler.steps"] == [1000, 750, 500, 250]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "checkpoint=nowhere"),
        (("SMOKE", "--clips", "0"), "--clips=0"),
        (("SMOKE", "--long-clips", "0"), "--long-clips=0"),
        (("SMOKE", "--seeds", "1", "1"), "--seeds=(1, 1)"),
        (("SMOKE", "--compare", "model=SMOKE"), "--compare"),
    ],
)
def test_mistakes_are_refused_in_one_line(words, message, smoke_checkpoint, capsys):
    smoke = str(smoke_checkpoint(0))
    assert toy_model.main([word.replace("SMOKE", smoke) for word in words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not pathlib.Path("outputs").exists()
