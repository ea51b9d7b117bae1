"""Streaming safetensors files and publishing in one step."""

import os
import pathlib

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from longlive_jax import storage
from longlive_jax.errors import UserError
from longlive_jax.storage import Spec, open_tensors, write_tensors


def _arrays() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "b/kernel": generator.normal(size=(3, 4, 5)).astype(np.float32),
        "a": generator.normal(size=(7,)).astype(np.float16),
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(3.5, np.float32),
    }


def _specs(arrays: dict[str, np.ndarray]) -> dict[str, Spec]:
    return {name: Spec(array.shape, array.dtype) for name, array in arrays.items()}


def test_files_are_what_the_safetensors_library_reads(tmp_path: pathlib.Path) -> None:
    arrays = _arrays()
    write_tensors(tmp_path / "a.safetensors", _specs(arrays), arrays.items(), metadata={"format": "pt"})
    read = load_file(tmp_path / "a.safetensors")
    assert set(read) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(read[name], array)
        assert read[name].dtype == array.dtype


def test_files_of_the_safetensors_library_are_read(tmp_path: pathlib.Path) -> None:
    arrays = _arrays()
    save_file(arrays, tmp_path / "a.safetensors", metadata={"who": "me"})
    file = open_tensors(tmp_path / "a.safetensors")
    assert file.metadata == {"who": "me"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(file.read(name), array)
        np.testing.assert_array_equal(file.map(name), array)


def test_bfloat16_and_single_layers(tmp_path: pathlib.Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 3, 2).astype(ml_dtypes.bfloat16)
    write_tensors(tmp_path / "a", {"x": Spec(array.shape, array.dtype)}, [("x", array)])
    file = open_tensors(tmp_path / "a")
    assert file.map("x").dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(file.map("x"), array)
    np.testing.assert_array_equal(file.read("x", 2), array[2])
    assert file.offsets["x"] % 64 == 0
    with pytest.raises(ValueError, match="read-only"):
        file.map("x")[0] = 0


def test_layers_may_come_one_by_one_and_transposed(tmp_path: pathlib.Path) -> None:
    stacked = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    pieces = [("x", np.asfortranarray(layer)) for layer in stacked]
    digest = write_tensors(tmp_path / "a", {"x": Spec(stacked.shape, stacked.dtype)}, pieces)
    again = write_tensors(tmp_path / "b", {"x": Spec(stacked.shape, stacked.dtype)}, [("x", stacked)])
    np.testing.assert_array_equal(open_tensors(tmp_path / "a").read("x"), stacked)
    assert digest == again
    other = write_tensors(tmp_path / "c", {"x": Spec(stacked.shape, stacked.dtype)}, [("x", stacked + 1)])
    assert other != digest


@pytest.mark.parametrize(
    "pieces",
    [
        [("x", np.zeros(2, np.float32))],  # too little
        [("x", np.zeros(3, np.float32)), ("x", np.zeros(1, np.float32))],  # too much
        [("x", np.zeros(3, np.float64))],  # another precision
        [("y", np.zeros(3, np.float32))],  # another name
        [("x", np.zeros(3, np.float32)), ("y", np.zeros(3, np.float32))],
        [],
    ],
)
def test_pieces_must_be_what_was_announced(pieces: list, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"announced|continue"):
        write_tensors(tmp_path / "a", {"x": Spec((3,), np.dtype(np.float32))}, pieces)
    assert not list(tmp_path.iterdir())


def test_failure_while_writing_keeps_the_old_file(tmp_path: pathlib.Path) -> None:
    specs = {"x": Spec((2,), np.dtype(np.float32))}
    write_tensors(tmp_path / "a", specs, [("x", np.ones(2, np.float32))])

    def pieces():
        yield "x", np.zeros(1, np.float32)
        raise RuntimeError("the source broke")

    with pytest.raises(RuntimeError, match="the source broke"):
        write_tensors(tmp_path / "a", specs, pieces())
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    np.testing.assert_array_equal(open_tensors(tmp_path / "a").read("x"), [1, 1])


def test_place_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*choose another place"):
        write_tensors(tmp_path / "file" / "a", {}, [])
    with pytest.raises(UserError, match="cannot be written"):
        _publish(tmp_path / "file" / "folder", "a")


def _publish(target: pathlib.Path, name: str, *, interrupted: bool = False) -> None:
    with storage.new_folder(target, overwrite=True, replaceable=lambda _: True) as folder:
        (folder / name).write_text("new")
        if interrupted:
            raise KeyboardInterrupt


def test_folder_that_fails_half_way_is_as_before(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "folder"
    _publish(target, "old")
    with pytest.raises(KeyboardInterrupt):
        _publish(target, "new", interrupted=True)
    assert list(tmp_path.iterdir()) == [target]
    assert list(target.iterdir()) == [target / "old"]


def test_second_rename_that_fails_is_undone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "a").write_text("old")
    rename = os.rename

    def fail_to_publish(source: os.PathLike, destination: os.PathLike) -> None:
        if pathlib.Path(destination) == target and (pathlib.Path(source) / "b").exists():
            raise OSError(5, "Input/output error")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_to_publish)
    with pytest.raises(UserError, match="Input/output error"):
        _publish(target, "b")
    assert (target / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_json_files_say_what_is_wrong(tmp_path: pathlib.Path) -> None:
    storage.write_json(tmp_path / "a.json", {"x": [1, "ü"]})
    assert storage.read_json(tmp_path / "a.json") == {"x": [1, "ü"]}
    for text in ("{", "[1]", "\xff"):
        (tmp_path / "a.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match=r"a\.json: (not a JSON file|must hold a JSON object)"):
            storage.read_json(tmp_path / "a.json")
