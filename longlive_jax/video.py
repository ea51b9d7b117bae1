"""Files of frames: written while a video is generated, read back for checks and contact sheets.

Every writer appends to a temporary name beside its target and takes the target's name only when it
is closed, so a failed run leaves an older file alone, and an interrupted one leaves what it had
generated, playable. No writer holds more than the frames it is given.
"""

import abc
import contextlib
import errno
import os
import pathlib
import shutil
import types
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, BinaryIO, Self

import numpy as np

from longlive_jax.errors import UserError, require

FRAME_NAME = "frame_{:06d}.png"
"""Name of one frame in a folder; counts from 0 and sorts in time."""

SUFFIXES = ".mp4, .gif, or a folder for PNG frames (no suffix, or a final /)"

_MIN_FREE_BYTES = 8 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# H.264 quality: 0 is lossless, 51 the worst; 18 is where viewers stop seeing a difference.
_CRF = 18
# Codes of ITU-T H.273 (the same one for matrix, primaries and transfer) and of FFmpeg. Numbers, because
# av gained names for some of them only lately.
_BT709, _LIMITED_RANGE, _FULL_RANGE = 1, 1, 2


class FileWriter(abc.ABC):
    """Appends rows (frames) to a file or folder that appears under its name when closed.

    As a context manager it closes on a normal exit and on an interruption (KeyboardInterrupt, or the
    enclosing generator being closed), and discards what it wrote on any other error.

    Attributes:
      path: where the result will be.
      count: rows written so far.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.count = 0
        # The suffix stays last so that what a killed process leaves can be opened as it is.
        self._temporary = path.with_name(f"{path.stem}.partial-{os.getpid()}{path.suffix}")
        self._is_open = False
        with self._disk_errors():
            self._check_target()
            self._open()
        self._is_open = True

    def write(self, rows: np.ndarray) -> None:
        """Appends `rows` along the first axis; see the writer's own class for shape and dtype."""
        if not self._is_open:
            raise ValueError(f"{self.path} is already closed")
        self._check_rows(rows)
        for row in rows:
            with self._disk_errors():
                self._append(row)
            self.count += 1

    def close(self) -> None:
        """Finishes the file and gives it its name. With no rows written there is no file."""
        if not self._is_open:
            return
        if self.count == 0:
            self.discard()
            return
        self._is_open = False
        try:
            with self._disk_errors():
                self._finish()
                self._publish()
        except BaseException:
            self._remove()
            raise

    def discard(self) -> None:
        """Throws away what was written; a file already at `path` stays as it is."""
        if not self._is_open:
            return
        self._is_open = False
        with contextlib.suppress(OSError):  # what is half-written may refuse to be finished
            self._finish()
        self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if kind is None or issubclass(kind, KeyboardInterrupt | GeneratorExit):
            self.close()
        else:
            self.discard()

    def _check_target(self) -> None:
        folder = self.path.parent
        require(folder.is_dir(), f"out={self.path}: the folder {folder} does not exist; create it first")
        require(not self.path.is_dir(), f"out={self.path} is a folder; name a file in it")
        require(os.access(folder, os.W_OK), f"out={self.path}: the folder {folder} is not writable")
        free = shutil.disk_usage(folder).free
        require(free >= _MIN_FREE_BYTES, f"out={self.path}: the disk is full ({free} bytes free); free some")

    def _publish(self) -> None:
        os.replace(self._temporary, self.path)

    def _remove(self) -> None:
        self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _disk_errors(self) -> Iterator[None]:
        """Turns a full disk or a refused permission into the user's one line."""
        try:
            yield
        except OSError as error:
            if error.errno in _DISK_FULL:
                message = f"out={self.path}: the disk is full after {self.count} frames; free some space"
            elif isinstance(error, PermissionError) or error.errno in (errno.EROFS, errno.EACCES):
                message = f"out={self.path} cannot be written ({error.strerror}); choose another place"
            else:
                raise
            raise UserError(message) from error

    @abc.abstractmethod
    def _check_rows(self, rows: np.ndarray) -> None:
        """Raises UserError if `rows` cannot be appended."""

    @abc.abstractmethod
    def _open(self) -> None:
        """Creates the temporary file."""

    @abc.abstractmethod
    def _append(self, row: np.ndarray) -> None:
        """Writes one row."""

    @abc.abstractmethod
    def _finish(self) -> None:
        """Completes and closes the temporary file."""


class VideoWriter(FileWriter):
    """A `FileWriter` whose rows are frames: `write` takes uint8 [V, Y, X, 3]."""

    def __init__(self, path: pathlib.Path, *, fps: int, height: int, width: int) -> None:
        self.fps, self.height, self.width = fps, height, width
        super().__init__(path)

    def _check_rows(self, rows: np.ndarray) -> None:
        wanted = (self.height, self.width, 3)
        require(
            rows.dtype == np.uint8 and rows.ndim == 4 and rows.shape[1:] == wanted,
            f"frames: {rows.dtype}{list(rows.shape)} must be uint8 [V, {self.height}, {self.width}, 3]",
        )


class _AvWriter(VideoWriter):
    """What MP4 and GIF share: one PyAV container with one video stream."""

    codec: str
    pixel_format: str
    container_options: dict[str, str]
    codec_options: dict[str, str]

    def _open(self) -> None:
        import av  # a quarter of a second that the command line's help should not pay

        self._container = av.open(
            str(self._temporary), "w", format=self.path.suffix[1:].lower(), options=self.container_options
        )
        stream: Any = self._container.add_stream(self.codec, rate=self.fps, options=self.codec_options)
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, self.pixel_format
        self._stream = stream
        self._configure(stream.codec_context)

    def _configure(self, codec: Any) -> None:
        """Sets what is particular to the codec."""

    def _append(self, row: np.ndarray) -> None:
        frame = self._frame(row)
        frame.pts, frame.time_base = self.count, Fraction(1, self.fps)
        self._mux(frame)

    def _finish(self) -> None:
        try:
            if self.count:
                self._mux(None)
        finally:
            self._container.close()

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)

    @abc.abstractmethod
    def _frame(self, row: np.ndarray) -> Any:
        """Returns an av.VideoFrame in the codec's pixel format."""


class Mp4Writer(_AvWriter):
    """H.264, yuv420p. Colours are converted by BT.709 and the file says so."""

    codec, pixel_format = "libx264", "yuv420p"
    # Written in self-contained fragments, turned into an ordinary file at the end: a process that is
    # killed outright still leaves a temporary file that plays.
    container_options = {"movflags": "hybrid_fragmented", "flush_packets": "1"}  # noqa: RUF012
    # The same frames become the same bytes: not always with more threads, nor with B-frames, where x264's
    # choices depend on what fresh memory held. Without them files are about as large.
    codec_options = {"crf": str(_CRF), "preset": "medium", "threads": "1", "bf": "0"}  # noqa: RUF012

    def _check_target(self) -> None:
        for name, value in (("height", self.height), ("width", self.width)):
            require(value % 2 == 0, f"{name}={value} is odd, which .mp4 cannot hold; use {value + 1} or .gif")
        super()._check_target()

    def _configure(self, codec: Any) -> None:
        codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
        codec.color_range = _LIMITED_RANGE
        # A fragment ends with each key frame; two seconds bound what a killed process can lose.
        codec.gop_size = 2 * self.fps

    def _frame(self, row: np.ndarray) -> Any:
        import av

        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(row), format="rgb24")
        return frame.reformat(format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE)


class GifWriter(_AvWriter):
    """An endlessly looping GIF with a palette of 256 colours for every frame."""

    codec, pixel_format = "gif", "pal8"
    container_options = {"loop": "0"}  # noqa: RUF012
    codec_options = {}  # noqa: RUF012

    def _check_target(self) -> None:
        require(self.fps <= 50, f"fps={self.fps} is more than a .gif can show (50); use .mp4")
        super()._check_target()

    def _frame(self, row: np.ndarray) -> Any:
        import av
        import PIL.Image

        # A hundred times faster than median cut at 832x480, for a quarter more error.
        image = PIL.Image.fromarray(row).quantize(256, method=PIL.Image.Quantize.FASTOCTREE)
        colours = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        palette = np.zeros((256, 4), np.uint8)  # alpha, red, green, blue
        palette[:, 0] = 255
        palette[: len(colours), 1:] = colours
        indexed: Any = (np.asarray(image), palette)  # av's annotation forgets this pair
        return av.VideoFrame.from_ndarray(indexed, format="pal8")


class FolderWriter(VideoWriter):
    """A folder of numbered PNG files."""

    def _check_target(self) -> None:
        folder = self.path.parent
        require(folder.is_dir(), f"out={self.path}: the folder {folder} does not exist; create it first")
        require(os.access(folder, os.W_OK), f"out={self.path}: the folder {folder} is not writable")
        require(
            not self.path.exists() or self.path.is_dir(),
            f"out={self.path} is a file; name a folder, or one of {SUFFIXES}",
        )
        # Replacing the folder must not take anything with it that we did not write.
        if self.path.is_dir():
            foreign = [entry.name for entry in self.path.iterdir() if not entry.match("frame_*.png")]
            require(not foreign, f"out={self.path} holds other files ({foreign[:1]}...); name a new folder")

    def _open(self) -> None:
        self._remove()
        self._temporary.mkdir()

    def _append(self, row: np.ndarray) -> None:
        import PIL.Image

        PIL.Image.fromarray(row).save(self._temporary / FRAME_NAME.format(self.count))

    def _finish(self) -> None:
        pass

    def _publish(self) -> None:
        if self.path.is_dir():
            shutil.rmtree(self.path)
        os.replace(self._temporary, self.path)

    def _remove(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)


class ArrayWriter(FileWriter):
    """A .npy file that grows along its first axis; `write` takes `dtype` [n, *shape]."""

    def __init__(
        self, path: str | os.PathLike[str], *, shape: Sequence[int], dtype: np.dtype | type = np.float32
    ) -> None:
        self.shape, self.dtype = tuple(shape), np.dtype(dtype)
        target = pathlib.Path(path)
        require(target.suffix == ".npy", f"latents={path} must end in .npy")
        super().__init__(target)

    def _check_rows(self, rows: np.ndarray) -> None:
        require(
            rows.dtype == self.dtype and rows.shape[1:] == self.shape,
            f"rows: {rows.dtype}{list(rows.shape)} must be {self.dtype}[n, {str(list(self.shape))[1:]}",
        )

    def _open(self) -> None:
        self._file: BinaryIO = self._temporary.open("wb")
        self._header()
        self._data_start = self._file.tell()

    def _append(self, row: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(row).data)

    def _finish(self) -> None:
        try:
            self._file.seek(0)
            self._header()
            # numpy pads the header so that the first axis can grow in place.
            assert self._file.tell() == self._data_start
        finally:
            self._file.close()

    def _header(self) -> None:
        fields = {"shape": (self.count, *self.shape), "fortran_order": False}
        fields["descr"] = np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(self._file, fields)


_BY_SUFFIX: dict[str, type[VideoWriter]] = {".mp4": Mp4Writer, ".gif": GifWriter, "": FolderWriter}


def video_suffix(path: str | os.PathLike[str]) -> str:
    """The format a path asks for: ".mp4", ".gif" or "" (a folder); UserError for anything else."""
    text = os.fspath(path)
    suffix = "" if text.endswith(("/", os.sep)) else pathlib.Path(text).suffix.lower()
    require(suffix in _BY_SUFFIX, f"out={text}: {suffix} is not a format we write; use {SUFFIXES}")
    return suffix


def open_writer(path: str | os.PathLike[str], *, fps: int, height: int, width: int) -> VideoWriter:
    """Opens a video for writing; the format follows the suffix.

    Args:
      path: `x.mp4` (H.264), `x.gif`, or a folder of PNG frames (`x/` or `x`). Its parent must exist.
      fps: frames per second.
      height: rows Y in pixels; even for MP4.
      width: columns X in pixels; even for MP4.

    Returns:
      A writer whose `write` takes uint8 [V, Y, X, 3]; use it as a context manager.

    Raises:
      UserError: unknown suffix, odd size for MP4, missing or read-only folder, full disk.
    """
    require(fps > 0, f"fps={fps} must be positive")
    require(height > 0 and width > 0, f"height={height}, width={width} must be positive")
    writer = _BY_SUFFIX[video_suffix(path)]
    return writer(pathlib.Path(path), fps=fps, height=height, width=width)


def iter_video(path: str | os.PathLike[str]) -> Iterator[np.ndarray]:
    """Yields the frames of an MP4, a GIF or a folder of PNG files, uint8 [Y, X, 3], one at a time.

    Raises:
      UserError: there is no such file, or it cannot be decoded.
    """
    source = pathlib.Path(path)
    require(source.exists(), f"video={path} does not exist")
    if source.is_dir():
        import PIL.Image

        names = sorted(source.glob("frame_*.png"))
        require(bool(names), f"video={path} holds no frame_*.png")
        yield from (np.asarray(PIL.Image.open(name).convert("RGB")) for name in names)
        return
    import av

    try:
        with av.open(str(source)) as container:
            for frame in container.decode(video=0):
                # The ranges are spelled out because av before 17 ignores the file's colour matrix otherwise.
                ranges = {"src_color_range": frame.color_range, "dst_color_range": _FULL_RANGE}
                yield frame.reformat(format="rgb24", **ranges).to_ndarray()
    except (av.error.InvalidDataError, IndexError) as error:
        raise UserError(f"video={path} cannot be read as a video; is it complete?") from error


def read_video(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a whole video, uint8 [V, Y, X, 3]; see `iter_video`."""
    return np.stack(list(iter_video(path)))


def read_fps(path: str | os.PathLike[str]) -> float:
    """Frames per second an MP4 or GIF says it has."""
    import av

    with av.open(os.fspath(path)) as container:
        return float(container.streams.video[0].average_rate or 0)
