"""Metrics of real videos by networks that look at pictures: CLIP score, steadiness of image features.

Needs the extra "metrics" (PyTorch and transformers, which read the published models as they are). A network
is a directory in the Hugging Face layout, or a name on the hub. Pictures are prepared here, as its
preprocessor_config.json says: transformers' own preparation changes with its versions.
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from longlive_jax import storage
from longlive_jax.errors import UserError
from longlive_jax.inference.story import effective_frame
from longlive_jax.toy.evaluation import Table, latent_windows, video_span

if TYPE_CHECKING:
    from longlive_jax.experiments.metrics import Batch

SEGMENT_FRAMES = 8
"""Video frames of a segment that are compared with its prompt, evenly spread."""

WINDOW_FRAMES = 12
"""Latent frames of the windows that consistency is followed over."""

_BATCH = 32  # pictures at once


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How pictures become a network's input.

    Attributes:
      resize: length of the shorter side after resizing.
      crop: side of the square cut from the middle.
      mean: per channel, of values in [0, 1].
      std: per channel.
    """

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, file: pathlib.Path) -> "Preparation":
        """From a preprocessor_config.json.

        Raises:
          UserError: it does not say what is needed.
        """
        values = storage.read_json(file)
        try:
            size, crop = values["size"], values.get("crop_size", values["size"])
            side = size if isinstance(size, int) else size.get("shortest_edge", size.get("height"))
            cut = crop if isinstance(crop, int) else crop.get("height", crop.get("shortest_edge"))
            return cls(int(side), int(cut), tuple(values["image_mean"]), tuple(values["image_std"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: no size, image_mean or image_std in it ({error})") from error

    def __call__(self, frames: np.ndarray) -> np.ndarray:
        """uint8 `[n, Y, X, 3]` to float32 `[n, 3, crop, crop]`."""
        import PIL.Image

        height, width = frames.shape[1:3]
        scale = max(self.resize, self.crop) / min(height, width)
        size = (max(round(width * scale), self.crop), max(round(height * scale), self.crop))
        left, top = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        box = (left, top, left + self.crop, top + self.crop)
        pictures = [
            np.asarray(PIL.Image.fromarray(f).resize(size, PIL.Image.Resampling.BICUBIC).crop(box))
            for f in frames
        ]
        values = (np.stack(pictures).astype(np.float32) / 255 - self.mean) / self.std
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2), np.float32)  # [n, 3, crop, crop]


# --- the two metrics --------------------------------------------------------------------------------


def clip_scores(batch: "Batch") -> Table:
    """Cosine of every segment's pictures with its prompt, times 100.

    Returns:
      `segments.clip_score` `[B, prompts]` where all stories have as many prompts, and `clip_score` `[B]`, the
      mean over the story.
    """
    network = _clip(batch.models["clip_score"])
    block = batch.config.window.block_frames
    scores = []
    for story, video in zip(batch.work.stories, batch.videos, strict=True):
        starts = [0, *(effective_frame(switch.frame, block) for switch in story.switches)]
        ends = [*starts[1:], batch.frames]
        spans = [video_span(batch.config.vae, *span) for span in zip(starts, ends, strict=True)]
        frames = [spread(begin, end) for begin, end in spans]
        pictures = network.pictures(video[np.concatenate(frames)])
        texts = network.texts(story.prompts)
        parts = np.split(pictures, np.cumsum([len(f) for f in frames])[:-1])
        scores.append([100 * float((part @ text).mean()) for part, text in zip(parts, texts, strict=True)])
    table: dict[str, np.ndarray] = {"clip_score": np.array([np.mean(one) for one in scores])}
    if len({len(one) for one in scores}) == 1:
        table["segments.clip_score"] = np.array(scores)
    return table


def spread(begin: int, end: int) -> np.ndarray:
    """At most `SEGMENT_FRAMES` frames of [begin, end), in the middle of equal parts of it."""
    count = min(SEGMENT_FRAMES, end - begin)
    return begin + ((np.arange(count) + 0.5) * (end - begin) / count).astype(int)


def consistency(batch: "Batch") -> Table:
    """Cosine of every picture's features with those of the one before and of the first, in [0, 1].

    One picture per latent frame. The mean of the two cosines over the video is what VBench calls subject
    consistency with DINO's features, and background consistency with CLIP's.

    Returns:
      `consistency` `[B]`, and `windows.first` `[B, W]`: the cosine with the first picture, by window.
    """
    network = _image_network(batch.models["temporal_consistency"])
    wholes, windows = [], []
    spans = latent_windows(batch.frames, min(WINDOW_FRAMES, batch.frames))
    for video in batch.videos:
        features = network.pictures(video[:: batch.config.vae.temporal_stride])  # [F, D]
        before = np.maximum((features[1:] * features[:-1]).sum(-1), 0)
        first = np.maximum(features[1:] @ features[0], 0)
        wholes.append(float(((before + first) / 2).mean()) if len(first) else 1.0)
        along = np.concatenate([[1.0], first])
        windows.append([along[begin:end].mean() for begin, end in spans])
    return {"consistency": np.array(wholes), "windows.first": np.array(windows)}


# --- networks ---------------------------------------------------------------------------------------


class _Network:
    """A network of transformers' with its preparation."""

    def __init__(self, model: Any, folder: pathlib.Path) -> None:
        import torch

        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().to(self._device)
        self._prepare = Preparation.read(folder / "preprocessor_config.json")

    def pictures(self, frames: np.ndarray) -> np.ndarray:
        """Unit vectors float32 `[n, D]` of uint8 frames `[n, Y, X, 3]`."""
        import torch

        parts = []
        for first in range(0, len(frames), _BATCH):
            pixels = torch.from_numpy(self._prepare(frames[first : first + _BATCH])).to(self._device)
            with torch.inference_mode():
                parts.append(self._embed(pixels).float().cpu().numpy())
        return _unit(np.concatenate(parts))

    def _embed(self, pixels: Any) -> Any:
        return self._model(pixel_values=pixels).last_hidden_state[:, 0]  # the class token


class _Clip(_Network):
    """CLIP with its text half."""

    def __init__(self, model: Any, folder: pathlib.Path, tokenizer: Any) -> None:
        super().__init__(model, folder)
        self._tokenizer = tokenizer

    def texts(self, prompts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 `[n, D]`; long prompts are cut off where CLIP's text ends."""
        import torch

        limit = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer(
            list(prompts), padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(self._device)
        with torch.inference_mode():
            hidden = self._model.text_model(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            ).pooler_output
            return _unit(self._model.text_projection(hidden).float().cpu().numpy())

    def _embed(self, pixels: Any) -> Any:
        return self._model.visual_projection(self._model.vision_model(pixel_values=pixels).pooler_output)


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-12)


@functools.cache
def _clip(place: str) -> _Clip:
    transformers = _transformers()
    folder = _folder(place)
    with _readable(place):
        model = transformers.CLIPModel.from_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return _Clip(model, folder, tokenizer)


@functools.cache
def _image_network(place: str) -> _Network:
    transformers = _transformers()
    folder = _folder(place)
    with _readable(place):
        kind = transformers.AutoConfig.from_pretrained(folder).model_type
        if kind == "clip":  # its whole: the vision half alone has a projection of its own default size
            return _Clip(transformers.CLIPModel.from_pretrained(folder), folder, None)
        return _Network(transformers.AutoModel.from_pretrained(folder), folder)


@contextlib.contextmanager
def _readable(place: str) -> Iterator[None]:
    """Turns what transformers says about a directory into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"models: {place} cannot be read as a network ({reason})") from error


def _folder(place: str) -> pathlib.Path:
    """The directory of a network, downloaded if it is a name on the hub."""
    if pathlib.Path(place).is_dir():
        return pathlib.Path(place)
    import huggingface_hub

    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(place, allow_patterns=["*.json", "*.txt", "*.safetensors"])
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"models: {place} is no directory and cannot be fetched ({reason})") from error


def _transformers() -> Any:
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise UserError(
            "clip_score and temporal_consistency need PyTorch and transformers; install them with "
            '`pip install "longlive-jax[metrics]"`'
        ) from error
    return transformers
