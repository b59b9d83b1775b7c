"""The lazy tensor for a torch tensor record, once its storage is known to be `nbytes` bytes at some place."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxllm.checkpoint.mapped import LazyTensor, MappedFile, brief, checked_shape, count_bytes
from jaxllm.checkpoint.torch_objects import TensorRecord
from jaxllm.errors import CheckpointError


@dataclass(frozen=True)
class StorageBytes:
    """Where a storage lies: `read()` gives its bytes as a uint8 array, `start` its first byte in the file `mapped`
    (None if it is packed there)."""

    start: int
    nbytes: int
    read: Callable[[], np.ndarray]
    drop: Callable[[], None]
    mapped: MappedFile | None = None


def lazy_tensor(name: str, record: TensorRecord, storage: StorageBytes, file: Path, container: str, big_endian: bool = False) -> LazyTensor:
    """The tensor that `record` describes, after a check that its strides stay inside its storage."""
    where = f"{file}: tensor {brief(name)}"
    shape = checked_shape(record.size, record.dtype, where)
    strides, itemsize = record.stride, record.dtype.itemsize
    if len(strides) != len(shape) or any(type(stride) is not int or not 0 <= stride < 1 << 56 for stride in strides):
        raise CheckpointError(f"{where} has strides {brief(strides)} for shape {brief(shape)}; one non-negative stride per dimension is needed")
    if type(record.offset) is not int or not 0 <= record.offset < 1 << 56:
        raise CheckpointError(f"{where} begins at element {brief(record.offset)} of its storage; the file is damaged")
    elements = 0 if 0 in shape else 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    start = record.storage.start_byte + record.offset * itemsize
    room = record.storage.start_byte + record.storage.nbytes
    if elements and (start + elements * itemsize > room or room > storage.nbytes):
        raise CheckpointError(
            f"{where} reaches byte {start + elements * itemsize} of its storage {brief(record.storage.key)}, which has {min(room, storage.nbytes)}; "
            "the file is damaged; fetch it again"
        )

    # Row-major without gaps: then as many elements are spanned as there are, and strides never grow along the axes.
    steps = [stride for size, stride in zip(shape, strides, strict=True) if size > 1]
    is_dense = elements * itemsize == count_bytes(shape, record.dtype) and steps == sorted(steps, reverse=True)

    def read() -> np.ndarray:
        if not elements:
            return np.frombuffer(b"", record.dtype).reshape(shape)
        raw = storage.read()[start : start + elements * itemsize]
        values = _swapped(raw, record.dtype) if big_endian else raw.view(record.dtype)
        values.flags.writeable = False
        # Not as_strided: this constructor checks the bounds once more, and knows the float8 dtypes.
        return np.ndarray(shape, record.dtype, values, strides=[stride * itemsize for stride in strides])

    return LazyTensor(
        name=name,
        shape=shape,
        dtype=record.dtype,
        container=container,
        file=file,
        location=record.storage.location,
        storage=f"{file.name}:{record.storage.key}",
        window=(start, *strides),
        offset=storage.start + start,
        read=read,
        drop=storage.drop,
        span=(storage.mapped, storage.start + start) if storage.mapped and is_dense and not big_endian else None,
    )


def _swapped(raw: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`raw`, the big-endian bytes of values of `dtype`, in this machine's order (complex numbers by their two halves)."""
    width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    if width == 1:
        return raw.view(dtype)
    return raw.view(f">u{width}").astype(f"=u{width}").view(dtype)
