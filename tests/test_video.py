"""Video files: what was written is what is read, failures keep older files, memory stays flat."""

import errno
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

from longlive_jax import video
from longlive_jax.errors import UserError

HEIGHT, WIDTH = 32, 48
PATHS = ["clip.mp4", "clip.gif", "clip", "clip/"]


def moving_bars(count: int, *, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth colours with a bright bar that falls one pixel per frame, uint8 [V, Y, X, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 // width, y * 255 // height, np.full_like(x, 90)], -1).astype(np.uint8)
    frames = np.repeat(base[None], count, axis=0)
    for i in range(count):
        frames[i, i % height] = [250, 240, 20]
    return frames


def write(path, frames: np.ndarray, *, chunk: int = 5, fps: int = 16) -> None:
    with video.open_writer(path, fps=fps, height=frames.shape[1], width=frames.shape[2]) as writer:
        for start in range(0, len(frames), chunk):
            writer.write(frames[start : start + chunk])


def write_until(path: str, frames: np.ndarray, error: BaseException) -> None:
    """Writes all of `frames`, then fails with `error` before the video is finished."""
    with video.open_writer(path, fps=16, height=HEIGHT, width=WIDTH) as writer:
        writer.write(frames)
        raise error


@pytest.mark.parametrize(
    ("name", "bound"), [("clip.mp4", 8.0), ("clip.MP4", 8.0), ("clip.gif", 6.0), ("clip/", 0)]
)
def test_frames_survive_the_file(tmp_path, name, bound):
    frames = moving_bars(23)
    write(f"{tmp_path}/{name}", frames)
    again = video.read_video(tmp_path / name)
    assert again.dtype == np.uint8
    assert again.shape == frames.shape
    assert np.abs(again.astype(int) - frames).mean() <= bound
    # The bar is where it was written: frames are in order, none is doubled or dropped.
    np.testing.assert_array_equal(again[..., 0].mean(axis=2).argmax(axis=1), np.arange(23))


def test_still_frames_are_all_kept(tmp_path):
    frames = np.repeat(moving_bars(1), 9, axis=0)
    for name in ("clip.mp4", "clip.gif"):
        write(tmp_path / name, frames)
        assert len(video.read_video(tmp_path / name)) == 9


def test_mp4_is_ordinary_h264(tmp_path):
    import av

    write(tmp_path / "clip.mp4", moving_bars(40), fps=12)
    with av.open(tmp_path / "clip.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.average_rate) == (40, 12)  # a fragmented file would say 0 frames
        assert float(stream.duration * stream.time_base) == pytest.approx(40 / 12)
    assert video.read_fps(tmp_path / "clip.mp4") == 12


def test_mp4_keeps_saturated_colours(tmp_path):
    colours = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250], [128, 128, 128]], np.uint8)
    frames = np.repeat(colours, 16, axis=0)[None, None].repeat(4, 0).repeat(32, 1)  # [4, 32, 64, 3]
    write(tmp_path / "clip.mp4", frames)
    middle = video.read_video(tmp_path / "clip.mp4")[1, 16, 8::16].astype(int)
    assert np.abs(middle - colours).max() <= 6


_WRITE = """
import sys
import numpy as np
from longlive_jax import video

rows, columns = np.mgrid[:64, :64]
for file in sys.argv[1:]:
    with video.open_writer(file, fps=16, height=64, width=64) as writer:
        for i in range(21):
            wave = 128 + 80 * np.sin((columns + 3 * i) / 7) + 40 * np.cos(rows / 5)
            square = ((columns - 3 * i) % 64 < 20) & (abs(rows - 30) < 10)
            frame = np.stack([np.where(square, level, wave) for level in (230, 60, 50)], axis=-1)
            writer.write(frame[None].astype(np.uint8))
"""


def test_the_same_frames_are_the_same_bytes_whatever_memory_held(tmp_path):
    """glibc fills fresh memory with another byte in either process; elsewhere it holds whatever it does."""
    files = []
    for fill in ("85", "170"):
        names = [str(tmp_path / f"{fill}-{i}.mp4") for i in range(3)]
        environment = os.environ | {"MALLOC_PERTURB_": fill}
        subprocess.run([sys.executable, "-c", _WRITE, *names], env=environment, check=True)
        files += [pathlib.Path(name).read_bytes() for name in names]
    assert len(set(files)) == 1


def test_gif_plays_at_its_rate_and_loops(tmp_path):
    write(tmp_path / "clip.gif", moving_bars(32), fps=16)
    with PIL.Image.open(tmp_path / "clip.gif") as image:
        assert image.info["loop"] == 0
        total = 0
        for i in range(image.n_frames):
            image.seek(i)
            total += image.info["duration"]
    assert total == pytest.approx(2000, abs=30)  # milliseconds; a GIF counts in hundredths of seconds


@pytest.mark.parametrize("name", PATHS)
def test_interruption_leaves_what_was_written(tmp_path, name):
    frames = moving_bars(30)
    with pytest.raises(KeyboardInterrupt):
        write_until(f"{tmp_path}/{name}", frames[:7], KeyboardInterrupt())
    assert len(video.read_video(tmp_path / name)) == 7
    assert [p.name for p in tmp_path.iterdir()] == [pathlib.Path(name).name]


@pytest.mark.parametrize("name", PATHS)
def test_failure_keeps_the_older_file(tmp_path, name):
    write(f"{tmp_path}/{name}", moving_bars(4))
    before = video.read_video(tmp_path / name)
    with pytest.raises(ZeroDivisionError):
        write_until(f"{tmp_path}/{name}", moving_bars(9), ZeroDivisionError())
    np.testing.assert_array_equal(video.read_video(tmp_path / name), before)
    assert len(list(tmp_path.iterdir())) == 1
    write(f"{tmp_path}/{name}", moving_bars(6))
    assert len(video.read_video(tmp_path / name)) == 6  # and a good run replaces it


def test_nothing_written_leaves_nothing(tmp_path):
    for name in PATHS:
        video.open_writer(f"{tmp_path}/{name}", fps=16, height=HEIGHT, width=WIDTH).close()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_a_playable_partial_file(tmp_path):
    script = (
        "import sys, time; from tests.test_video import *\n"
        f"w = video.open_writer({str(tmp_path / 'clip.mp4')!r}, fps=4, height=HEIGHT, width=WIDTH)\n"
        "w.write(moving_bars(200)); print('written', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    [partial] = tmp_path.glob("clip.partial-*.mp4")
    assert len(video.read_video(partial)) > 50


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("clip.avi", (32, 48), r"clip\.avi: \.avi is not a format we write; use \.mp4, \.gif"),
        ("clip.mp4", (33, 48), r"height=33 is odd, which \.mp4 cannot hold; use 34 or \.gif"),
        ("clip.mp4", (32, 47), r"width=47 is odd"),
        ("nowhere/clip.mp4", (32, 48), r"the folder .*nowhere does not exist; create it"),
        ("nowhere/clip/", (32, 48), r"the folder .*nowhere does not exist; create it"),
        ("folder.gif", (32, 48), r"folder\.gif is a folder; name a file in it"),
        ("other", (32, 48), r"other holds other files"),
    ],
)
def test_bad_targets_are_refused_before_work(tmp_path, name, size, message):
    (tmp_path / "folder.gif").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message) as caught:
        video.open_writer(f"{tmp_path}/{name}", fps=16, height=size[0], width=size[1])
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_odd_sizes_are_fine_without_chroma_subsampling(tmp_path):
    frames = moving_bars(3, height=33, width=47)
    for name in ("clip.gif", "clip/"):
        write(f"{tmp_path}/{name}", frames)
        assert video.read_video(tmp_path / name).shape == frames.shape


def test_frames_of_another_shape_or_dtype_are_refused(tmp_path):
    with video.open_writer(tmp_path / "clip.mp4", fps=16, height=HEIGHT, width=WIDTH) as writer:
        for bad in (moving_bars(2).astype(np.float32), moving_bars(2)[:, :16], moving_bars(2)[0]):
            with pytest.raises(UserError, match=r"must be uint8 \[V, 32, 48, 3\]"):
                writer.write(bad)
        writer.write(moving_bars(2))
    assert len(video.read_video(tmp_path / "clip.mp4")) == 2


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip/", "latents.npy"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, name):
    """A file size limit stands for the disk; noise makes the encoder reach it."""
    script = f"""
import resource, sys, numpy as np
from longlive_jax import video
from longlive_jax.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
rng = np.random.default_rng(0)
path = {str(tmp_path)!r} + "/" + {name!r}
try:
    if path.endswith("npy"):
        writer = video.ArrayWriter(path, shape=(96, 96, 3), dtype=np.uint8)
    else:
        writer = video.open_writer(path, fps=16, height=96, width=96)
    with writer:
        for _ in range(200):
            writer.write(rng.integers(0, 256, (1, 96, 96, 3), dtype=np.uint8))
except UserError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "the disk is full after" in done.stdout, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_refused_at_the_start(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(video.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="the disk is full"):
        video.open_writer(tmp_path / "clip.mp4", fps=16, height=HEIGHT, width=WIDTH)


def test_a_refused_permission_is_the_users_line(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "x")

    monkeypatch.setattr(pathlib.Path, "open", refuse)
    with pytest.raises(UserError, match="cannot be written"):
        video.ArrayWriter(tmp_path / "x.npy", shape=(2,))


def test_array_grows_without_being_held(tmp_path):
    rows = np.random.default_rng(0).normal(size=(13, 4, 6, 16)).astype(np.float32)
    with video.ArrayWriter(tmp_path / "x.npy", shape=(4, 6, 16)) as writer:
        for start in range(0, 13, 3):
            writer.write(rows[start : start + 3])
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), rows)
    with pytest.raises(UserError, match=r"must end in \.npy"):
        video.ArrayWriter(tmp_path / "x.bin", shape=(4,))


@pytest.mark.parametrize("name", ["clip.mp4", "clip.gif", "clip/"])
def test_memory_does_not_grow_with_length(tmp_path, name):
    """Resident memory after 10 times the frames is the same, to a few frames' worth."""
    script = f"""
import resource, sys
from tests.test_video import *
frames = moving_bars(16, height=96, width=128)
def run(count):
    with video.open_writer({str(tmp_path)!r} + "/" + {name!r}, fps=16, height=96, width=128) as writer:
        for _ in range(count // 16):
            writer.write(frames)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
run(64)  # libraries and encoder buffers
short = run(64)
print(run(640) - short)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    growth, frame = int(done.stdout), 96 * 128 * 3
    assert growth < 576 * frame / 4  # holding the 576 additional frames would be four times this


def test_reading_what_is_no_video(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(UserError, match="cannot be read as a video"):
        video.read_video(tmp_path / "text.mp4")
    with pytest.raises(UserError, match=r"no frame_\*\.png"):
        video.read_video(tmp_path)


def test_writing_is_fast_enough_for_real_time(tmp_path):
    """Encoding must not be what limits 16 frames per second; here at a quarter of 832x480."""
    frames = moving_bars(48, height=240, width=416)
    start = time.perf_counter()
    write(tmp_path / "clip.mp4", frames)
    assert 48 / (time.perf_counter() - start) > 16
