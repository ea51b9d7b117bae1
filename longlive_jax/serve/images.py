"""Frames as browsers take them."""

import io

import numpy as np

# Up to this many pixels a PNG is smaller than a packet or two, and shows exactly what was generated.
_LOSSLESS_PIXELS = 128 * 128
# JPEG takes 3 ms for a frame of 832x480 where WebP takes 40: sixteen of them have to fit into a second.
_QUALITY = 90
_THUMB_HEIGHT = 72


def encode(frame: np.ndarray) -> bytes:
    """A PNG where that is small, else a JPEG.

    Args:
      frame: uint8 [Y, X, 3].
    """
    import PIL.Image

    image, out = PIL.Image.fromarray(frame), io.BytesIO()
    if frame.shape[0] * frame.shape[1] <= _LOSSLESS_PIXELS:
        image.save(out, "png", compress_level=1)
    else:
        image.save(out, "jpeg", quality=_QUALITY)
    return out.getvalue()


def decode(data: bytes) -> np.ndarray:
    """Inverse of `encode`, exact for PNG: uint8 [Y, X, 3]."""
    import PIL.Image

    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB"))


def thumbnail(frame: np.ndarray) -> bytes:
    """A small picture for the timeline, of uint8 [Y, X, 3]."""
    import PIL.Image

    height, width = frame.shape[:2]
    if height <= _THUMB_HEIGHT:
        return encode(frame)
    image, out = PIL.Image.fromarray(frame), io.BytesIO()
    image.resize((max(width * _THUMB_HEIGHT // height, 1), _THUMB_HEIGHT)).save(out, "jpeg", quality=80)
    return out.getvalue()


def media_type(data: bytes) -> str:
    """What `encode` and `thumbnail` made."""
    return "image/png" if data.startswith(b"\x89PNG") else "image/jpeg"
