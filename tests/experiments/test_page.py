"""`longlive report` on runs and videos (studies are in test_ablate)."""

import base64
import html.parser
import json
import pathlib
import re

import numpy as np
import pytest

from longlive_jax.cli.main import main
from longlive_jax.experiments import page
from longlive_jax.video import open_writer, read_video


def film(path, *, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.random.default_rng(seed).integers(0, 256, (5, 16, 16, 3), np.uint8)
    with open_writer(path, fps=16, height=16, width=16) as writer:
        writer.write(frames)
    return path


def sidecar(video, *, prompt, seed, sink):
    values = {
        "format": "longlive-jax generate",
        "video": {"file": video.name},
        "request": {"story": {"segments": [{"prompt": prompt}, {"prompt": "then <b>"}]}, "seed": seed},
        "config": {"name": "toy", "window": {"sink_frames": sink, "window_frames": 12}},
    }
    video.with_suffix(".json").write_text(json.dumps(values))


class Tags(html.parser.HTMLParser):
    """Checks that every tag is closed, and counts them."""

    VOID = frozenset(("meta", "img", "input"))

    def __init__(self, text):
        super().__init__()
        self.open, self.count = [], {}
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_videos_of_a_folder_stand_side_by_side(place, capsys):
    folder = place / "outputs"
    for seed, sink in ((0, 3), (1, 0)):
        video = film(folder / f"fox-{seed}.mp4", seed=seed)
        sidecar(video, prompt="a fox & a hare", seed=seed, sink=sink)
    (folder / "other.json").write_text('{"format": "something else"}')
    assert main(["report", str(folder)]) == 0
    out = pathlib.Path(capsys.readouterr().out.strip())
    text = out.read_text()
    assert out == folder / "report.html"
    tags = Tags(text).count
    assert tags["video"] == 2
    assert "<h3>a fox &amp; a hare / then &lt;b&gt;</h3>" in text
    assert "<td>window.sink_frames</td><td>3</td><td>0</td>" in text
    # The videos are in the page, byte for byte, and nothing is fetched from elsewhere.
    inside = [base64.b64decode(data) for data in re.findall(r"data:video/mp4;base64,([^\"]+)", text)]
    assert inside == [(folder / f"fox-{i}.mp4").read_bytes() for i in range(2)]
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    back = place / "back.mp4"
    back.write_bytes(inside[0])
    assert read_video(back).shape == (5, 16, 16, 3)


def run_folder(folder, *, rate):
    film(folder / "samples/000001.mp4")
    lines = [{"step": i, "loss": 1 / (i + 1), "note": "text", "seconds": i} for i in range(3)]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo'  # a line that is being written
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.json").write_text(json.dumps({"optimizer": {"learning_rate": rate, "eps": 1e-8}}))
    (folder / "report.json").write_text(json.dumps({"scores": {"shape": 0.5}}))


def test_runs_are_compared(place):
    for name, rate in (("a", 1e-3), ("b", 1e-4)):
        run_folder(place / name, rate=rate)
    out = page.write([place / "a", place / "b"], place / "both.html")
    text = out.read_text()
    tags = Tags(text).count
    assert tags["video"] == 2
    assert tags["section"] == 3
    assert text.count("data:image/svg+xml") == 2  # the curve of the loss, of both
    assert "<td>optimizer.learning_rate</td><td>0.001</td><td>0.0001</td>" in text
    assert "optimizer.eps" not in text
    assert "<td>shape</td><td>0.5</td>" in text
    one = page.write([place / "a"], place / "one.html").read_text()
    assert "<summary>All settings</summary>" in one
    assert "<td>optimizer.eps</td>" in one


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nowhere",), "nowhere is no folder"),
        (("empty",), "empty holds no study.json"),
        (("damaged",), "damaged is damaged"),
        (("empty", "--out", "x.txt"), "must end in .html"),
    ],
)
def test_mistakes_are_refused(place, capsys, words, message):
    pathlib.Path("empty").mkdir()
    pathlib.Path("damaged").mkdir()
    pathlib.Path("damaged/study.json").write_text('{"study": {}}')
    assert main(["report", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(place.rglob("*.html"))


def test_too_much_for_one_page_is_refused(place, capsys, monkeypatch):
    sidecar(film(place / "v/a.mp4"), prompt="a", seed=0, sink=3)
    monkeypatch.setattr(page, "_MAX_BYTES", 10)
    assert main(["report", "v"]) == 2
    assert "one page holds" in capsys.readouterr().err
