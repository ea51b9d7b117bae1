"""Damaged and hostile files: one clear line, nothing executed, nothing allocated."""

import builtins
import json
import os
import pathlib
import pickle
import struct
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from longlive_jax.convert import readers
from longlive_jax.convert.readers import read_groups
from longlive_jax.errors import UserError
from tests.convert.sources import LONGLIVE, WAN


class Payload:
    """A pickle that runs a command when it is executed."""

    def __init__(self, target: pathlib.Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def _hostile_files(folder: pathlib.Path, payload: Payload) -> list[pathlib.Path]:
    content = {"generator": {"model.a": torch.zeros(2)}, "extra": payload}
    torch.save(content, folder / "zip.pt")
    torch.save(content, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    for protocol in (2, 4):
        (folder / f"bare{protocol}.pt").write_bytes(pickle.dumps(payload, protocol=protocol))
    return sorted(folder.glob("*.pt"))


def test_pickles_are_never_executed(tmp_path: pathlib.Path) -> None:
    marker = tmp_path / "executed"
    files = _hostile_files(tmp_path, Payload(marker))
    assert len(files) == 4
    for file in files:
        with pytest.raises(UserError, match="refused, its pickle asks for more than tensors") as info:
            read_groups(file)
        assert "\n" not in str(info.value)
        assert not marker.exists()
    with pytest.raises(UserError, match=r"\(posix\.system\)"):
        read_groups(tmp_path / "zip.pt")
    # The payload is real: the unrestricted loader runs it.
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.97])
def test_truncated_pytorch_file(legacy: bool, share: float, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "model.pt"
    torch.save({"generator": {"model.a": torch.randn(4000)}}, file, _use_new_zipfile_serialization=not legacy)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(UserError, match=r"damaged or truncated PyTorch file .*download it again") as info:
        read_groups(file)
    assert "\n" not in str(info.value)


def test_legacy_format_is_read(tmp_path: pathlib.Path) -> None:
    tensor = torch.randn(3, 4, dtype=torch.bfloat16)
    torch.save({"a.weight": tensor}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (group,), _ = read_groups(tmp_path / "old.pth")
    array = group.tensors["a.weight"].read()
    assert array.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(array.astype(np.float32), tensor.float().numpy())


def test_view_that_announces_more_than_the_file_holds(tmp_path: pathlib.Path) -> None:
    torch.save({"a": torch.zeros(1).expand(1 << 40)}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="more than its data"):
        read_groups(tmp_path / "bomb.pt")


def test_views_into_one_storage_are_read_as_what_they_show(tmp_path: pathlib.Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    torch.save({"a": whole[1:3], "b": whole.T, "c": whole[:, 2]}, tmp_path / "views.pt")
    (group,), _ = read_groups(tmp_path / "views.pt")
    for name, expected in (("a", whole[1:3]), ("b", whole.T), ("c", whole[:, 2])):
        for _ in range(2):  # the pages that were given back are there again
            np.testing.assert_array_equal(group.tensors[name].read(), expected.numpy())


def test_entries_that_are_not_known_are_named(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.pt"
    torch.save({"discriminator": {"x": torch.zeros(2)}}, file)
    with pytest.raises(UserError, match="entry 'discriminator' is not one that is known"):
        read_groups(file)
    torch.save([torch.zeros(2)], file)
    with pytest.raises(UserError, match="holds a list, not a dictionary of tensors"):
        read_groups(file)
    torch.save({"generator": {"x": torch.zeros(2), "y": 3}}, file)
    with pytest.raises(UserError, match="something other than tensors: y"):
        read_groups(file)
    torch.save({"x": torch.zeros(2, dtype=torch.int64)}, file)
    with pytest.raises(UserError, match=r"x is torch\.int64"):
        read_groups(file)
    torch.save({"step": 3}, file)
    with pytest.raises(UserError, match=r"holds no weights \(step\)"):
        read_groups(file)
    torch.save({"a._orig_mod.x": torch.zeros(2), "a.x": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="are the same tensor"):
        read_groups(file)


def test_other_values_are_left_out_and_named(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.pt"
    torch.save(
        {"model": {"x": torch.zeros(2)}, "config": {"lr": 1.0}, "lr_scheduler": {"x": 1}, "step": 7}, file
    )
    (group,), left_out = read_groups(file)
    assert [str(item) for item in left_out] == [
        "left out: a.pt:config (a dict, not weights)",
        "left out: a.pt:lr_scheduler (training state)",
        "left out: a.pt:step (training state)",
    ]
    assert group.step == 7


def test_pytorch_files_without_torch_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without_torch(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torch" or name.startswith("torch."):
            raise ImportError("No module named 'torch'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_torch)
    with pytest.raises(UserError, match=r"pip install longlive-jax\[convert\]"):
        read_groups(LONGLIVE / "longlive_base.pt")
    groups, _ = read_groups(WAN / "diffusion_pytorch_model.safetensors")  # needs none
    assert groups[0].tensors["head.modulation"].read().shape == (1, 2, 32)


def _safetensors(
    path: pathlib.Path, header: Any, data: bytes = b"", *, length: int | None = None
) -> pathlib.Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def _entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data_bytes"),
    [
        ({"a": _entry([2], 0, 8)}, 4),  # shorter than announced
        ({"a": _entry([2], 0, 8)}, 12),  # longer than announced
        ({"a": _entry([1 << 50], 0, 8)}, 8),  # a shape that is not its bytes
        ({"a": _entry([-2, -1], 0, 8)}, 8),
        ({"a": _entry([2], 0, 8), "b": _entry([2], 4, 12)}, 12),  # overlap
        ({"a": _entry([2], 0, 8), "b": _entry([1], 12, 16)}, 16),  # hole
        ({"a": _entry([2], -8, 0)}, 0),
        ({"a": _entry([2], 0, 8, "F33")}, 8),
        ({"a": _entry([True, 2], 0, 8)}, 8),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8),
        ({"a": 3}, 0),
        (b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1]}}', 4),
        (b'{"a":', 0),
        (b"{" + b'"a":{' * 100_000, 0),
    ],
)
def test_safetensors_headers_that_lie(header: Any, data_bytes: int, tmp_path: pathlib.Path) -> None:
    file = _safetensors(tmp_path / "a.safetensors", header, bytes(data_bytes))
    with pytest.raises(UserError, match="bad safetensors header") as info:
        read_groups(file)
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 400


def test_safetensors_header_longer_than_the_file(tmp_path: pathlib.Path) -> None:
    file = _safetensors(tmp_path / "a.safetensors", {"a": _entry([0], 0, 0)}, length=1 << 40)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        read_groups(file)


def test_file_that_shrinks_while_it_is_read(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1000)}, file)
    (group,), _ = read_groups(file)
    with file.open("rb+") as handle:
        handle.truncate(500)
    with pytest.raises(UserError, match="became shorter"):
        group.tensors["a"].read()


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "a/../../b.safetensors", "sub/a.safetensors", "..", "a\\b"],
)
def test_index_that_leaves_its_folder(name: str, tmp_path: pathlib.Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="outside its own folder; refused"):
        read_groups(index)


def test_index_and_shards_must_agree(tmp_path: pathlib.Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    save_file({"a": torch.zeros(2), "b": torch.zeros(3)}, tmp_path / "one.safetensors")
    for weight_map, message in (
        ({"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors"}, "shards lack: c"),
        ({"a": "one.safetensors"}, "does not name: b"),
        ({"a": "one.safetensors", "b": "two.safetensors"}, "shard two.safetensors is missing"),
        ({}, "has no weight_map"),
        ({"a": 3}, "has no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(UserError, match=message):
            read_groups(index)
    save_file({"a": torch.zeros(2)}, tmp_path / "two.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(UserError, match="a is in another shard as well"):
        read_groups(index)


def test_release_of_pages_only_happens_for_mapped_files(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[int] = []
    monkeypatch.setattr(readers, "_release", lambda address, size: released.append(size))
    (group, *_), _ = read_groups(LONGLIVE / "longlive_base.pt")
    group.tensors["model.head.head.bias"].read()
    assert released == [64 * 4]


def test_compressed_archive_is_refused_in_one_line(tmp_path: pathlib.Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("readme.txt", "not a model")
    with pytest.raises(UserError, match="damaged or truncated PyTorch file"):
        read_groups(tmp_path / "a.pt")
