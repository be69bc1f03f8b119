"""Writes files as torch.save did before PyTorch 1.6, without torch."""

import io
import os
import pickle
import sys
from collections import OrderedDict
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from mm_model.backbones.torch_file import read_state_dict, read_torch_file


class Storage:
    def __init__(self, kind: type, numbers: np.ndarray):
        self.kind, self.numbers = kind, numbers


class Tensor:
    def __init__(self, storage: Storage, offset: int, shape: tuple, strides: tuple):
        self.parts = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.parts


@pytest.fixture
def torch(monkeypatch) -> ModuleType:
    """Modules with the names that such a file refers to."""
    module, utils = ModuleType("torch"), ModuleType("torch._utils")

    def _rebuild_tensor_v2(*_: Any) -> None: ...

    _rebuild_tensor_v2.__module__ = "torch._utils"
    _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = _rebuild_tensor_v2
    for name in ("FloatStorage", "LongStorage"):
        setattr(module, name, type(name, (), {"__module__": "torch"}))
    monkeypatch.setitem(sys.modules, "torch", module)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)
    return module


def saved(state: dict, storages: dict[str, Storage]) -> bytes:
    file = io.BytesIO()
    for start in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}):
        pickle.dump(start, file, protocol=2)
    keys = {id(storage): key for key, storage in storages.items()}

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if isinstance(obj, Storage):
                return ("storage", obj.kind, keys[id(obj)], "cpu", len(obj.numbers), None)
            return None

    Pickler(file, protocol=2).dump(state)
    pickle.dump(list(storages), file, protocol=2)
    for storage in storages.values():
        file.write(np.int64(len(storage.numbers)).tobytes() + storage.numbers.tobytes())
    return file.getvalue()


@pytest.fixture
def content(torch) -> bytes:
    floats = Storage(torch.FloatStorage, np.arange(12, dtype="<f4"))
    count = Storage(torch.LongStorage, np.asarray([7], "<i8"))
    state = OrderedDict(
        whole=Tensor(floats, 0, (3, 4), (4, 1)),
        transposed=Tensor(floats, 0, (4, 3), (1, 4)),
        part=Tensor(floats, 5, (2, 2), (4, 1)),
        empty=Tensor(floats, 0, (0,), (1,)),
        count=Tensor(count, 0, (), ()),
    )
    return saved(state, {"1": floats, "2": count})


def test_tensors_are_views_of_storages_with_offset_shape_and_strides(content):
    tensors = read_state_dict(content)
    whole = np.arange(12, dtype=np.float32).reshape(3, 4)
    expected = {"whole": whole, "transposed": whole.T, "part": whole[1:, 1:3], "count": 7}
    assert tensors.pop("empty").shape == (0,)
    assert set(tensors) == set(expected)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, expected[name])


def test_a_file_with_another_checksum_is_not_read(content, tmp_path):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"w\.pth has the SHA-256 .*, expected 00; install it again"):
        read_torch_file(path, "00")


def test_any_other_python_object_is_refused(torch):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("created",)

    with pytest.raises(OSError, match=r"refused to load posix\.mkdir from a weights file"):
        read_state_dict(saved({"a": Evil()}, {}))


@pytest.mark.parametrize("end", [0, 14, 60, 200, -50, -9, -1])
def test_an_incomplete_file_is_an_error(content, end):
    with pytest.raises(OSError, match="not a readable weights file of PyTorch"):
        read_state_dict(content[:end])


def test_a_tensor_that_exceeds_its_storage_is_an_error(torch):
    floats = Storage(torch.FloatStorage, np.arange(4, dtype="<f4"))
    for tensor in (Tensor(floats, 1, (4,), (1,)), Tensor(floats, 3, (2,), (-1,))):
        with pytest.raises(OSError, match=r"exceeds its storage"):
            read_state_dict(saved({"a": tensor}, {"1": floats}))
