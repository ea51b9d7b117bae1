"""Contact sheets show the right frames with their times and prompts."""

import numpy as np
import PIL.Image
import pytest

from longlive_jax import contact_sheet as sheets
from longlive_jax.errors import UserError
from tests.test_video import moving_bars, write


def test_contact_sheet_of_a_file_and_of_an_array(tmp_path):
    frames = moving_bars(33)
    write(tmp_path / "clip.mp4", frames)
    labels = [(0, "a red fox"), (17, "a very long description of a badger " * 9)]
    sheets.contact_sheet(tmp_path / "clip.mp4", path=tmp_path / "a.png", columns=3, count=6, labels=labels)
    sheets.contact_sheet(frames, path=tmp_path / "b.png", columns=3, count=6, fps=16, labels=labels)
    with PIL.Image.open(tmp_path / "a.png") as a, PIL.Image.open(tmp_path / "b.png") as b:
        assert a.size == b.size
        assert a.size[0] == 3 * 160 + 2 * 4
        difference = np.abs(np.asarray(a).astype(int) - np.asarray(b))
    assert difference.mean() < 6  # the same pictures with the same captions, one through H.264
    sheets.contact_sheet(frames[:1], path=tmp_path / "one.png", fps=16)
    sheets.contact_sheet(frames, path=tmp_path / "c.png", columns=3, count=6, fps=16)
    assert np.any(np.asarray(PIL.Image.open(tmp_path / "c.png")) != np.asarray(b))  # captions show


def test_contact_sheet_shows_the_first_and_the_last_frame():
    frames = moving_bars(30)
    chosen = sheets._evenly_spaced(frames, 4)
    assert [i for i, _ in chosen] == [0, 10, 19, 29]
    assert [i for i, _ in sheets._evenly_spaced(frames[:2], 4)] == [0, 1]


def test_contact_sheet_refusals(tmp_path):
    frames = moving_bars(3)
    with pytest.raises(UserError, match="fps is needed"):
        sheets.contact_sheet(frames, path=tmp_path / "x.png")
    with pytest.raises(UserError, match=r"must end in \.png"):
        sheets.contact_sheet(frames, path=tmp_path / "x.jpg", fps=16)
    with pytest.raises(UserError, match="does not exist"):
        sheets.contact_sheet(tmp_path / "no.mp4", path=tmp_path / "x.png", fps=16)
