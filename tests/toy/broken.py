"""Ground-truth clips and ways to break their second half, for the tests of the measurement."""

import dataclasses

import numpy as np

from longlive_jax.toy import FIELDS, VALUES, Scenes, Story, World, render, render_story, sample_scenes
from longlive_jax.toy.renderer import wrap

WORLD = World()
FRAMES, HALF = 72, 36


def scenes(count: int, *, seed: int = 5) -> Scenes:
    """Scenes of every combination, the held-out ones included."""
    return sample_scenes(WORLD, seed=seed, indices=range(count), split="all")


def blur(video: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur on the torus, `sigma` in pixels."""
    batch, frames, rows, columns, channels = video.shape

    def mix(side: int) -> np.ndarray:
        offset = wrap(np.arange(side)[:, None] - np.arange(side), side)
        kernel = np.exp(-(offset**2) / (2 * sigma**2))
        return (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)

    down = mix(rows) @ video.reshape(batch * frames, rows, columns * channels)
    return (mix(columns) @ down.reshape(-1, columns, channels)).reshape(video.shape)


def noise(video: np.ndarray, sigma: float) -> np.ndarray:
    """Independent Gaussian noise per frame, `sigma` in units of the range [-1, 1]."""
    return video + np.random.default_rng(0).normal(0, sigma, video.shape).astype(np.float32)


def swap(clips: Scenes, field: str) -> np.ndarray:
    """One prompted attribute takes its next value halfway."""
    column = FIELDS.index(field)
    after = clips.codes.copy()
    after[:, column] = (after[:, column] + 1) % len(VALUES[field])
    return render_story(WORLD, clips, Story((0, HALF), np.stack([clips.codes, after], axis=1)), frames=FRAMES)


def breakages(clips: Scenes) -> dict[str, np.ndarray]:
    """Videos [B, FRAMES, Y, X, 3] whose second half is broken in one way each."""
    good = render(WORLD, clips, frames=FRAMES)

    def halfway(other: np.ndarray) -> np.ndarray:
        return np.concatenate([good[:, :HALF], other], axis=1)

    def instead(**changes: np.ndarray) -> np.ndarray:
        changed = dataclasses.replace(clips, **changes)
        return halfway(render(WORLD, changed, frames=FRAMES - HALF, first_frame=HALF))

    tail = good[:, HALF:]
    low, high = WORLD.size_range
    dim, bright = WORLD.shade_range
    empty = render(WORLD, dataclasses.replace(clips, size=np.full(len(clips), 1e-3)), frames=1)
    ramp = np.linspace(0, 1, FRAMES - HALF, dtype=np.float32)[:, None, None, None]
    signs = np.where(np.arange(FRAMES - HALF) % 2, 1, -1).astype(np.float32)[:, None, None, None]
    # Every second stripe of eight pixels shows the sprite moved by nine pixels: fragments.
    stripes = np.where((np.arange(64) % 8 < 4)[:, None, None], tail, np.roll(tail, 9, 3))
    return {
        "clean": good,
        "colour": swap(clips, "colour"),
        "shape": swap(clips, "shape"),
        "motion": swap(clips, "motion"),
        "background": swap(clips, "background"),
        "frozen": halfway(np.repeat(good[:, HALF - 1 : HALF], FRAMES - HALF, axis=1)),
        "vanished": halfway(np.repeat(empty, FRAMES - HALF, axis=1)),
        "noise": halfway(noise(tail, 0.1)),
        "blurred": halfway(blur(tail, 1.8)),
        "brighter": halfway(np.clip(tail + 0.35 * ramp, -1, 1)),
        "flicker": halfway(np.clip(tail + 0.06 * signs, -1, 1)),
        "size": instead(size=low + high - clips.size),
        "shade": instead(shade=dim + bright - clips.shade),
        "gradient": instead(gradient=-clips.gradient),
        "lane": instead(start=clips.start + 9),
        "fragments": halfway(stripes),
    }
