"""Files as memory maps, and the tensors that lie in them: what every container reader hands to `index`."""

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxllm.errors import CheckpointError

# A dimension or a byte count above this is a lie: no machine has 2**56 bytes, and numpy's own limit is 2**63.
MAX_BYTES = 1 << 56
MAX_NDIM = 32
READ_BYTES = 1 << 30  # Linux reads at most 2 GiB at once


class MappedFile:
    """A read-only memory map of one file; views into it keep it alive after `close`."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self._handle = open(self.path, "rb", buffering=0)
            self.size = os.fstat(self._handle.fileno()).st_size
            if self.size == 0:
                self._handle.close()
                raise CheckpointError(f"{self.path} is empty (0 bytes): the download or copy did not finish; fetch it again")
            self._map = mmap.mmap(self._handle.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}; check the path and its permissions") from error
        self.bytes = np.frombuffer(self._map, np.uint8)

    def view(self, offset: int, nbytes: int) -> np.ndarray:
        """The bytes [offset, offset + nbytes) as a read-only uint8 array that shares the map's memory."""
        if self.bytes is None:
            raise CheckpointError(f"{self.path} was closed; read tensors inside the `with open_checkpoint(...)` block")
        return self.bytes[offset : offset + nbytes]

    def read_into(self, out: np.ndarray, offset: int) -> None:
        """None; `out`, a contiguous array of bytes, holds the file's from `offset` on.

        One copy by the kernel, where copying from the map costs a page fault every 64 KiB besides (half the speed).
        """
        content, done = memoryview(out), 0
        while done < out.size:
            count = os.preadv(self._handle.fileno(), [content[done : done + READ_BYTES]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path} became shorter while it was read; something else writes it; fetch it again")
            done += count

    def advise(self, offset: int, nbytes: int, advice_name: str) -> None:
        """None; the kernel is told `advice_name` (such as MADV_WILLNEED) for these bytes, where it has that advice."""
        advice = getattr(mmap, advice_name, None)
        if advice is None or self._map is None or nbytes == 0:
            return
        start = offset - offset % mmap.PAGESIZE
        self._map.madvise(advice, start, min(offset + nbytes, self.size) - start)

    def close(self) -> None:
        """None; the map goes when the last view of it does (unmapping under a live view would crash its reader)."""
        self.bytes = None
        self._map = None
        self._handle.close()


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a checkpoint, not read yet: `numpy()` gives its values, a view of the map where that is possible.

    `storage` names the bytes that hold it: tied or overlapping tensors have the same. `window` says which part of the
    storage this is, so two tensors with equal `storage` and `window` are the same values. `location` is the device
    that the file says it was saved from. `offset` is where its bytes begin in `file`, to read files front to back.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    container: str
    file: Path
    location: str = "cpu"
    storage: str = ""
    window: tuple = ()
    offset: int = 0
    read: Callable[[], np.ndarray] = field(repr=False, compare=False, default=None)
    drop: Callable[[], None] | None = field(repr=False, compare=False, default=None)
    span: tuple[MappedFile, int] | None = field(repr=False, compare=False, default=None)  # its bytes, if they lie as in C order

    @property
    def nbytes(self) -> int:
        return count_bytes(self.shape, self.dtype)

    @property
    def identity(self) -> tuple:
        """What is equal for two names of the same values: the bytes, the window into them, and how they are read."""
        return self.file, self.storage, self.window, self.shape, self.dtype

    def numpy(self) -> np.ndarray:
        """The values, read-only: a view of the memory map where the container allows it, a fresh array elsewhere."""
        return self.read()

    def read_into(self, out: np.ndarray) -> bool:
        """Whether `out` (contiguous, of this shape and dtype) was filled straight from the file; if not, it is as it was."""
        if self.span is None:
            return False
        mapped, offset = self.span
        mapped.read_into(out.reshape(-1).view(np.uint8), offset)
        return True

    def release(self) -> None:
        """None; the pages that reading brought into this process may leave it (they are read again on demand)."""
        if self.drop is not None:
            self.drop()


def count_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of a dense array of this shape, in Python's unbounded integers."""
    total = dtype.itemsize
    for size in shape:
        total *= size
    return total


def checked_shape(shape: object, dtype: np.dtype, where: str) -> tuple[int, ...]:
    """`shape` as a tuple of plain non-negative ints whose array could exist; `where` begins the error otherwise."""
    if not isinstance(shape, list | tuple) or any(type(size) is not int or size < 0 for size in shape):
        raise CheckpointError(f"{where} has shape {brief(shape)}; a shape is a list of non-negative integers; the file is damaged")
    if len(shape) > MAX_NDIM:
        raise CheckpointError(f"{where} has {len(shape)} dimensions; at most {MAX_NDIM} are allowed; the file is damaged")
    # Zero-size arrays count their other dimensions too: numpy refuses (0, 2**62) for the same reason.
    if count_bytes(tuple(max(size, 1) for size in shape), dtype) > MAX_BYTES:
        raise CheckpointError(f"{where} has shape {brief(shape)}, more bytes than any file holds; the file is damaged")
    return tuple(shape)


def brief(value: object, limit: int = 80) -> str:
    """A short, one-line text of `value` for an error message, safe for values that a hostile file made."""
    if isinstance(value, str):
        text = ascii(value[: limit + 1])
    elif isinstance(value, list | tuple) and all(type(item) is int and abs(item) < 1 << 128 for item in value[:9]):
        text = "[" + ", ".join(str(item) for item in value[:8]) + (", ...]" if len(value) > 8 else "]")
    elif value is None or isinstance(value, bool | float) or (type(value) is int and abs(value) < 1 << 128):
        text = repr(value)
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."
