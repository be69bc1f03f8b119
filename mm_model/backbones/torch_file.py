"""Reads the tensors of a weights file that `torch.save` wrote, without torch.

Supports PyTorch's format before version 1.6, in which the file consists of pickles, followed by the
bytes of each storage. A storage is a flat array that tensors view by offset, shape and strides.
"""

import pickle
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def read_torch_file(path: Path, checksum: str) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict by name.

    Args:
        path: File.
        checksum: Expected SHA-256 of the file, in hexadecimal; nothing is read if it differs.

    Raises:
        OSError: If the file cannot be read, is another file than expected, or is damaged.
    """
    content = path.read_bytes()
    if (actual := sha256(content).hexdigest()) != checksum:
        raise OSError(f"{path} has the SHA-256 {actual}, expected {checksum}; install it again")
    return read_state_dict(content)


def read_state_dict(content: bytes) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict, given the content of its file.

    Unpickling creates only dicts, tuples, strings, numbers and NumPy arrays. A malicious file can
    still exhaust the memory, so check where it comes from.

    Raises:
        OSError: If the content is damaged or refers to any other Python object.
    """
    file = BytesIO(content)
    try:
        magic, protocol, _ = (_Unpickler(file).load() for _ in range(3))
        if (magic, protocol) != (_MAGIC, _PROTOCOL):
            raise ValueError("it does not start like a file of torch.save")
        state = _Unpickler(file).load()
        storages = _read_storages(file, _Unpickler(file).load(), state.values())
        return {str(name): tensor.view(storages) for name, tensor in state.items()}
    except OSError:
        raise
    except Exception as error:
        # Damaged pickles raise errors of nearly every type.
        raise OSError(f"not a readable weights file of PyTorch: {error}") from error


@dataclass(frozen=True)
class _Storage:
    """A reference to a storage, whose numbers come later in the file."""

    key: str
    dtype: np.dtype
    size: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; the offset and the strides count numbers."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, storages: dict[str, np.ndarray]) -> np.ndarray:
        """Return a copy of the viewed numbers."""
        numbers = storages[self.storage.key]
        last = self.offset + sum(
            (n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)
        )
        if min((self.offset, *self.shape, *self.strides)) < 0 or last >= len(numbers):
            raise ValueError(f"a tensor of shape {self.shape} exceeds its storage")
        strides = [stride * numbers.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, strides).copy()


class _Unpickler(pickle.Unpickler):
    """Accepts only what a state dict consists of."""

    DTYPES: ClassVar = {
        "HalfStorage": "<f2",
        "FloatStorage": "<f4",
        "DoubleStorage": "<f8",
        "IntStorage": "<i4",
        "LongStorage": "<i8",
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return one of the accepted classes and functions."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild_tensor
        if module == "torch" and name in self.DTYPES:
            return np.dtype(self.DTYPES[name])
        raise OSError(f"refused to load {module}.{name} from a weights file")

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the reference to a storage."""
        kind, dtype, key, _device, size, view = pid
        if kind != "storage" or view is not None or not isinstance(dtype, np.dtype):
            raise ValueError(f"unexpected reference {pid}")
        return _Storage(str(key), dtype, int(size))


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: Sequence[int], strides: Sequence[int], *_: Any
) -> _Tensor:
    return _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _read_storages(file: BytesIO, keys: Sequence[str], tensors: Any) -> dict[str, np.ndarray]:
    """Return the numbers of each storage, which follow each other in the order of the keys."""
    known = {tensor.storage.key: tensor.storage for tensor in tensors}
    storages = {}
    for key in keys:
        storage = known[key]
        (size,) = np.frombuffer(file.read(8), "<i8")
        content = file.read(storage.size * storage.dtype.itemsize)
        numbers = np.frombuffer(content, storage.dtype)
        if size != storage.size or len(numbers) != size:
            raise ValueError(f"storage {key} is incomplete")
        storages[key] = numbers
    return storages
