"""Makes the videos that the scorer looks for: resumable, in shares, on all devices."""

import dataclasses
import pathlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import jax

from longlive_jax import storage
from longlive_jax.checkpoint import open_checkpoint
from longlive_jax.config_dict import override, to_dict
from longlive_jax.errors import require
from longlive_jax.experiments.parallel import Shard, on_each
from longlive_jax.experiments.progress import Progress
from longlive_jax.experiments.vbench.prompts import FOLDERS, Sample
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.provenance import fingerprints
from longlive_jax.video import VideoWriter, open_writer

RECORD = "samples.json"
"""Beside the folders of videos (never in them): what they were made with, and every seed."""


@dataclasses.dataclass(frozen=True)
class Request:
    """How the videos are made.

    Attributes:
      checkpoint: directory, or name of a bundled one.
      overrides: dotted settings.
      frames: latent frames.
      batch: videos side by side.
    """

    checkpoint: str
    overrides: dict[str, Any]
    frames: int
    batch: int

    def __post_init__(self) -> None:
        require(self.frames > 0, f"--frames={self.frames} must be positive")
        require(self.batch > 0, f"--batch={self.batch} must be positive")


def sample(
    every: Sequence[Sample], request: Request, out: pathlib.Path, *, shard: Shard, is_quiet: bool
) -> tuple[int, int]:
    """Makes the videos that are missing.

    Args:
      every: all videos of the benchmark.
      request: how.
      out: folder; the videos go into the folders `FOLDERS` inside it.
      shard: this process's share.
      is_quiet: no progress.

    Returns:
      How many were made, and how many are still missing (of other shares).

    Raises:
      UserError: `out` holds videos that were made otherwise, or files that would disturb the scorer.
    """
    check_folders(every, out)
    record(every, request, out)
    missing = [one for one in shard.take(every) if not (out / one.folder / one.file).exists()]
    if missing:
        for one in missing:
            (out / one.folder).mkdir(exist_ok=True)
        with Progress(len(missing), is_quiet=is_quiet, unit="videos") as progress:
            _on_all_devices(missing, request, out, progress)
    left = sum(not (out / one.folder / one.file).exists() for one in every)
    if left == 0:  # nobody is at work any more: what a killed process has left goes
        for folder in FOLDERS:
            for partial in (out / folder).glob("*.partial-*"):
                partial.unlink()
    return len(missing), left


def check_folders(every: Sequence[Sample], out: pathlib.Path) -> None:
    """Refuses folders that hold anything but the videos: the scorer takes its suffix from any file."""
    for folder in FOLDERS:
        if not (out / folder).is_dir():
            continue
        wanted = {one.file for one in every if one.folder == folder}
        foreign = sorted(
            entry.name
            for entry in (out / folder).iterdir()
            if entry.name not in wanted and ".partial-" not in entry.name
        )
        require(
            not foreign,
            f"{out / folder} holds {foreign[0] if foreign else ''!r}, which is no video of this list; the "
            "scorer wants nothing else in the folder",
        )


def record(every: Sequence[Sample], request: Request, out: pathlib.Path) -> None:
    """Writes what the videos are made with, or compares it with what is there."""
    opened = open_checkpoint(request.checkpoint)
    values = {
        "config": to_dict(override(opened.config, request.overrides)),
        "weights": fingerprints(opened),
        "frames": request.frames,
        "seeds": {f"{one.folder}/{one.file}": one.seed for one in every},
        "texts": {one.prompt.text: one.prompt.shown for one in every if one.prompt.shown != one.prompt.text},
    }
    file = out / RECORD
    if file.exists():
        different = [name for name, value in storage.read_json(file).items() if values.get(name) != value]
        require(
            not different,
            f"{out} holds videos that were made with other {', '.join(different)}; choose another --out",
        )
        return
    out.mkdir(parents=True, exist_ok=True)
    storage.write_json(file, values)


def _on_all_devices(
    missing: Sequence[Sample], request: Request, out: pathlib.Path, progress: Progress
) -> None:
    waiting: queue.SimpleQueue[list[Sample]] = queue.SimpleQueue()
    for first in range(0, len(missing), request.batch):
        waiting.put(list(missing[first : first + request.batch]))
    texts = list(dict.fromkeys(one.prompt.shown for one in missing))
    on_each(
        jax.local_devices()[: max(1, waiting.qsize())],
        lambda stop: _run_queue(waiting, request, out, texts, progress.advance, stop),
    )


def _run_queue(
    waiting: "queue.SimpleQueue[list[Sample]]",
    request: Request,
    out: pathlib.Path,
    texts: Sequence[str],
    advance: Callable[[int], None],
    stop: threading.Event,
) -> None:
    pipe = Pipeline.load(request.checkpoint, overrides=request.overrides)
    pipe.check_vae()
    pipe.encode_prompts(texts)  # all at once: the text encoder is loaded once, its results are kept on disk
    while not stop.is_set():
        try:
            group = waiting.get_nowait()
        except queue.Empty:
            return
        # The last group is filled up, so that one shape is compiled; what fills it is dropped.
        filled = [*group, *group[:1] * (request.batch - len(group))]
        writers: list[VideoWriter] = []
        try:
            for chunk in pipe.stream(
                [one.prompt.shown for one in filled],
                frames=request.frames,
                seed=[one.seed for one in filled],
            ):
                if stop.is_set():
                    return
                size = chunk.video.shape[2:4]
                writers = writers or [_writer(out, one, pipe.config.video.fps, size) for one in group]
                for writer, video in zip(writers, chunk.video, strict=False):
                    writer.write(video)
            while writers:
                writers.pop(0).close()
                advance(1)
        finally:
            for writer in writers:
                writer.discard()


def _writer(out: pathlib.Path, one: Sample, fps: int, size: tuple[int, ...]) -> VideoWriter:
    return open_writer(out / one.folder / one.file, fps=fps, height=size[0], width=size[1])
