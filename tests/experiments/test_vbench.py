"""VBench: file names by the scorer's own rules, sampling that goes on, and the totals."""

import importlib
import importlib.util
import json
import os
import pathlib
import re
import sys
from unittest import mock

import numpy as np
import pytest

from longlive_jax.cli.main import main
from longlive_jax.errors import UserError
from longlive_jax.experiments.parallel import Shard
from longlive_jax.experiments.vbench import prompts, sampling, scores

# A list in the form of the official one: two entries with one prompt, punctuation, not only ASCII.
LIST = [
    {"prompt_en": "In a still frame, a stop sign", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "The bund Shanghai, oil painting",
        "dimension": ["appearance_style"],
        "auxiliary_info": {"appearance_style": {"appearance_style": "oil painting"}},
    },
    {"prompt_en": "The bund Shanghai, oil painting", "dimension": ["overall_consistency", "imaging_quality"]},
    {"prompt_en": "A cat's café - 4 o'clock.", "dimension": ["subject_consistency", "temporal_flickering"]},
]


@pytest.fixture
def listing(place):
    file = place / "VBench_full_info.json"
    file.write_text(json.dumps(LIST))
    return file


def found_by_the_scorer(folder, dimensions):
    """What the scorer finds in a folder, by the rules of vbench 0.1.5 (see `vbench.prompts`).

    Returns prompt to the indices of its videos.
    """
    names = os.listdir(folder)
    suffix = pathlib.Path(names[0]).suffix
    return {
        entry["prompt_en"]: [i for i in range(5) if f"{entry['prompt_en']}-{i}{suffix}" in names]
        for entry in LIST
        if set(dimensions) & set(entry["dimension"])
    }


@pytest.fixture
def scorer(monkeypatch):
    """The scorer's own class and its official list; what its networks read videos with is not needed."""
    if importlib.util.find_spec("vbench") is None:
        pytest.fail("vbench is not installed; `make test` does it: pip install --no-deps vbench==0.1.5")
    for name in ("decord", "torchvision", "torchvision.transforms"):
        monkeypatch.setitem(sys.modules, name, mock.MagicMock(__name__=name))
    package = importlib.import_module("vbench")
    yield package.VBench, pathlib.Path(package.__file__).parent / "VBench_full_info.json"
    for name in [name for name in sys.modules if name.split(".")[0] == "vbench"]:
        del sys.modules[name]


def test_the_scorers_own_code_finds_every_video_of_its_own_list(scorer, place, capsys):
    vbench, listing = scorer
    every = prompts.samples(prompts.read_prompts(listing))
    for one in every:
        file = pathlib.Path("out") / one.folder / one.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(exist_ok=False)
    judge = vbench("cpu", str(listing), "results")
    for dimension in judge.build_full_dimension_list():
        if dimension == prompts.FLICKERING:  # has a folder of its own, see below
            continue
        found = json.loads(
            pathlib.Path(judge.build_full_info_json("out/videos", dimension, [dimension])).read_text()
        )
        assert found, dimension
        assert {len(entry["video_list"]) for entry in found} == {5}, dimension
    assert "not found" not in capsys.readouterr().out
    # And it would say so.
    removed = next(one for one in every if one.folder == "videos")
    (pathlib.Path("out/videos") / removed.file).unlink()
    judge.build_full_info_json("out/videos", "again", judge.build_full_dimension_list())
    assert f"The missing video is: {removed.file}" in capsys.readouterr().out
    assert set(judge.build_full_dimension_list()) == set(prompts.DIMENSIONS)


def found_by_the_filter(folder):
    """Videos per prompt that the static filter looks at: the name without its number."""
    wanted = [entry["prompt_en"] for entry in LIST if "temporal_flickering" in entry["dimension"]]
    stems = [re.sub(r"-\d+$", "", path.stem) for path in folder.glob("*.mp4")]
    return {text: stems.count(text) for text in wanted}


def test_the_files_are_those_the_scorer_looks_for(listing):
    """Every dimension finds all its videos, the filter all of its, and nothing else is there."""
    every = prompts.samples(prompts.read_prompts(listing))
    for one in every:
        file = pathlib.Path("out") / one.folder / one.file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(exist_ok=False)
    others = [name for name in prompts.DIMENSIONS if name != prompts.FLICKERING]
    found = found_by_the_scorer("out/videos", others)
    assert found == {text: [0, 1, 2, 3, 4] for text in found}
    assert len(found) == 2
    assert len(os.listdir("out/videos")) == 10
    flickering = found_by_the_filter(pathlib.Path("out/temporal_flickering"))
    assert flickering == {"In a still frame, a stop sign": 25, "A cat's café - 4 o'clock.": 25}
    sampling.check_folders(every, pathlib.Path("out"))
    pathlib.Path("out/videos/notes.txt").touch()
    with pytest.raises(UserError, match=r"holds 'notes.txt', which is no video of this list"):
        sampling.check_folders(every, pathlib.Path("out"))


def test_every_video_has_a_seed_of_its_own(listing):
    every = prompts.samples(prompts.read_prompts(listing), seed=7)
    assert len({one.seed for one in every}) == len(every)
    # The seeds of some dimensions are those they have among all.
    some = prompts.samples(prompts.read_prompts(listing, dimensions=["imaging_quality"]), seed=7)
    assert {(one.file, one.seed) for one in some} <= {(one.file, one.seed) for one in every}
    assert len(some) == 5
    # Without the filter temporal flickering is scored among the others.
    flat = prompts.samples(prompts.read_prompts(listing), flickering_count=0)
    assert {one.folder for one in flat} == {"videos"}
    assert len(flat) == 15


def test_augmented_prompts_keep_the_names(listing):
    pathlib.Path("a.txt").write_text("one\ntwo\nthree\nfour\n")
    found = prompts.read_prompts(listing, augmented="a.txt")
    assert [(p.text, p.shown) for p in found[:2]] == [
        ("In a still frame, a stop sign", "one"),
        ("The bund Shanghai, oil painting", "two"),
    ]
    pathlib.Path("a.txt").write_text("one\n")
    with pytest.raises(UserError, match=r"has 1 lines; .* has 4 entries"):
        prompts.read_prompts(listing, augmented="a.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is not VBench_full_info.json"),
        ("not", "is not JSON"),
        (json.dumps([{"prompt_en": "a/b", "dimension": ["scene"]}]), "cannot be the name of a file"),
        (json.dumps([{"prompt_en": "é" * 130, "dimension": ["scene"]}]), "cannot be the name of a file"),
    ],
)
def test_wrong_lists_are_refused(place, content, message):
    pathlib.Path("l.json").write_text(content)
    with pytest.raises(UserError, match=message):
        prompts.read_prompts("l.json")


def test_sampling_goes_on_where_it_stopped(listing, checkpoint_of, capsys):
    """Two shares make the set; another setting is refused."""
    words = ["vbench", "sample", str(listing), "--checkpoint", str(checkpoint_of(0)), "--out", "out"]
    words += ["--frames", "3", "--dimensions", "scene,overall_consistency", "--quiet", "--batch", "2"]
    assert main([*words, "--shard", "1/2"]) == 0
    assert "2 videos made, 3 of 5 still missing" in capsys.readouterr().out
    first = {path.name: path.read_bytes() for path in pathlib.Path("out/videos").iterdir()}
    assert main(words) == 0
    assert "3 videos made, 0 of 5 still missing" in capsys.readouterr().out
    again = {path.name: path.read_bytes() for path in pathlib.Path("out/videos").iterdir()}
    assert set(again) == {f"The bund Shanghai, oil painting-{i}.mp4" for i in range(5)}
    assert {name: again[name] for name in first} == first
    assert len(set(again.values())) == 5  # every one has its own noise
    recorded = json.loads(pathlib.Path("out/samples.json").read_text())
    assert len(set(recorded["seeds"].values())) == 5
    assert main([*words, "--set", "sampler.shift=3"]) == 2
    assert "made with other config" in capsys.readouterr().err


def test_a_video_does_not_depend_on_what_is_made_beside_it(listing, checkpoint_of, monkeypatch):
    """Alone, and so on another row and perhaps another device, it has the same pixels up to float rounding.

    Compared is what the encoder is given: a pixel that rounding moves by one may change any byte of the file.
    """
    shown = {}
    open_writer = sampling.open_writer

    def recorded(path, **options):
        writer = open_writer(path, **options)
        write, shown[path.name] = writer.write, []
        writer.write = lambda rows: (shown[path.name].append(rows.astype(int)), write(rows))
        return writer

    monkeypatch.setattr(sampling, "open_writer", recorded)
    every = prompts.samples(prompts.read_prompts(listing, dimensions=["imaging_quality"]))
    request = sampling.Request(str(checkpoint_of(0)), {}, frames=3, batch=2)
    sampling.sample(every, request, pathlib.Path("out"), shard=Shard(), is_quiet=True)
    together = {name: np.concatenate(rows) for name, rows in shown.items()}
    first, second = (one.file for one in every[:2])  # a group of two
    assert np.abs(together[first] - together[second]).mean() > 5

    shown.clear()
    pathlib.Path("out/videos", second).unlink()
    sampling.sample(every, request, pathlib.Path("out"), shard=Shard(), is_quiet=True)
    assert list(shown) == [second]
    assert np.abs(np.concatenate(shown[second]) - together[second]).max() <= 1


def test_a_failure_leaves_no_half_video(listing, checkpoint_of, monkeypatch):
    every = prompts.samples(prompts.read_prompts(listing, dimensions=["imaging_quality"]))
    request = sampling.Request(str(checkpoint_of(0)), {}, frames=3, batch=2)
    write = sampling.open_writer

    def broken(*arguments, **options):
        writer = write(*arguments, **options)
        monkeypatch.setattr(writer, "write", lambda rows: (_ for _ in ()).throw(RuntimeError("disk")))
        return writer

    monkeypatch.setattr(sampling, "open_writer", broken)
    with pytest.raises(RuntimeError, match="disk"):
        sampling.sample(every, request, pathlib.Path("out"), shard=Shard(0, 5), is_quiet=True)
    assert os.listdir("out/videos") == []


# --- scores -----------------------------------------------------------------------------------------


def test_perfect_and_worst_scores_are_100_and_0():
    high = {name: scores.RANGES[name][1] for name in prompts.DIMENSIONS}
    low = {name: scores.RANGES[name][0] for name in prompts.DIMENSIONS}
    assert scores.row("best", high) == scores.Row("best", 100, 100, 100)
    assert scores.row("worst", low) == scores.Row("worst", 0, 0, 0)


def test_the_total_is_the_leaderboards():
    """Worked out by hand from the published ranges and weights."""
    raw = dict.fromkeys(prompts.DIMENSIONS, 0.2)
    raw |= dict.fromkeys(prompts.QUALITY, 0.9)
    parts = [
        (0.9 - 0.1462) / (1 - 0.1462),
        (0.9 - 0.2615) / (1 - 0.2615),
        (0.9 - 0.6293) / (1 - 0.6293),
        (0.9 - 0.706) / (0.9975 - 0.706),
        0.9,
        0.9,
        0.5 * 0.9,
    ]
    quality = 100 * sum(parts) / 6.5
    semantic = 100 * (5 * 0.2 + 0.2 / 0.8222 + (0.2 - 0.0009) / (0.2855 - 0.0009) + 2 * 0.2 / 0.364) / 9
    row = scores.row("ours", raw)
    assert row.quality == pytest.approx(quality)
    assert row.semantic == pytest.approx(semantic)
    assert row.total == pytest.approx((4 * quality + semantic) / 5)


def test_the_papers_rows_have_the_papers_totals():
    """Four parts quality and one part semantic, in every published row."""
    for row in (*scores.SHORT, *scores.LONG):
        assert row.total == pytest.approx((4 * row.quality + row.semantic) / 5, abs=0.011), row


def test_collect_reads_what_the_scorer_writes(place, capsys):
    pathlib.Path("results").mkdir()
    for i, names in enumerate((prompts.QUALITY, prompts.SEMANTIC)):
        values = {name: [0.2 + 0.6 * (i == 0), [{"video_path": "x", "video_results": 1}]] for name in names}
        pathlib.Path(f"results/{i}_eval_results.json").write_text(json.dumps(values))
    pathlib.Path("results/0_full_info.json").write_text("[]")
    assert main(["vbench", "collect", "results", "--name", "ours"]) == 0
    out = capsys.readouterr().out
    assert "LongLive (paper)            84.87    86.97     76.47" in out
    assert re.search(r"^ours +\d\d\.\d\d +\d\d\.\d\d +\d\d\.\d\d$", out, re.MULTILINE)
    assert "missing" not in out
    assert main(["vbench", "collect", "results/1_eval_results.json", "--long"]) == 0
    out = capsys.readouterr().out
    assert "83.52" in out
    assert "missing, so there is no total: subject_consistency" in out


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beauty": [0.5, []]}, "'beauty' is not a dimension"),
        ({"scene": [52.0, []]}, "must be in [0, 1]"),
        ({"scene": ["x", []]}, "which is no number"),
        ({"scene": [0.4, []]}, "results.json says 0.5"),
    ],
)
def test_wrong_results_are_refused(place, values, message):
    pathlib.Path("a_eval_results.json").write_text(json.dumps({"scene": [0.5, []]}))
    pathlib.Path("b_eval_results.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=re.escape(message)):
        scores.read_results(["a_eval_results.json", "b_eval_results.json"])
    pathlib.Path("empty").mkdir()
    with pytest.raises(UserError, match="no results"):
        scores.read_results(["empty"])
