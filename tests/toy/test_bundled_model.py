"""The model that comes with the package: the stored weights, and what they make of a prompt."""

import pathlib

import numpy as np
import pytest

from longlive_jax import checkpoint, storage, toy
from longlive_jax.inference.pipeline import Pipeline
from longlive_jax.toy import bundle

RESULTS = pathlib.Path(__file__).parents[2] / "benchmarks/results/toy_model.json"
PROMPT = "a red square moving left on a dark background"


def test_all_files_together_are_small():
    files = [file for file in checkpoint.BUNDLED[bundle.NAME].rglob("*") if file.is_file()]
    assert len(files) >= len(bundle.PARTS) + 2  # config.json and tokenizer.json
    assert sum(file.stat().st_size for file in files) <= bundle.LIMIT_BYTES


def test_the_measurements_are_of_these_weights(tmp_path):
    opened = checkpoint.open_checkpoint(bundle.NAME)
    said = {part: opened.fingerprint(part) for part in bundle.PARTS}
    assert set(opened.parts) == set(said)
    assert storage.read_json(RESULTS)["checkpoints"]["model"]["weights"] == said
    # config.json says so; the files themselves must agree.
    for part, digest in said.items():
        file = opened.part_file(part)
        pieces = ((name, file.read(name)) for name in file.specs)
        copy = tmp_path / file.path.name
        assert storage.write_tensors(copy, file.specs, pieces, metadata=file.metadata) == digest
        assert copy.read_bytes() == file.path.read_bytes()


@pytest.fixture(scope="module")
def readings():
    """What the pixels of 9 latent frames say."""
    pipe = Pipeline.load(bundle.NAME)
    size = pipe.config.video
    video = pipe(PROMPT, frames=9, seed=0).frames
    world = toy.World(height=size.height, width=size.width, fps=size.fps)
    return toy.read(world, video / np.float32(127.5) - 1)


@pytest.mark.parametrize(
    ("field", "share"), [("colour", 0.95), ("background", 0.95), ("shape", 0.75), ("motion", 0.75)]
)
def test_an_easy_prompt_is_followed(readings, field, share):
    expected = toy.parse(PROMPT).codes[toy.FIELDS.index(field)]
    right = readings.codes[0, :, toy.FIELDS.index(field)] == expected
    assert right.mean() >= share


def test_there_is_one_sprite_in_every_frame(readings):
    assert readings.present.mean() >= 0.95
    assert np.median(readings.iou) > 0.6
