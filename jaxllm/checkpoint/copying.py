"""Copies from a memory map into arrays of our own, cast on the way, at the speed of a plain read.

Copying into fresh memory is bound by the kernel handing out pages (3.5 GB/s on a 2-core machine that reads its page
cache at 9 GB/s into a warm buffer), and a second thread made it slower; casts are bound by arithmetic and gain.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

ALIGNMENT = 64  # what XLA asks of a host buffer that it may keep without a copy
CHUNK_BYTES = 4 << 20  # a thread's portion: large against its start, small against the largest tensor


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised C-ordered array that begins on a 64-byte boundary."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def copy_cast(source: np.ndarray, out: np.ndarray) -> None:
    """None; `out` holds `source` cast to its dtype (round to nearest even), chunks of it cast by several threads."""
    if source.shape != out.shape:
        raise ValueError(f"copy of shape {source.shape} into {out.shape}")
    if source.flags.c_contiguous and out.flags.c_contiguous:
        source, out = source.reshape(-1), out.reshape(-1)
    if source.dtype == out.dtype or source.nbytes <= CHUNK_BYTES or source.ndim == 0:
        _copy(source, out)
        return
    rows = max(1, CHUNK_BYTES * source.shape[0] // source.nbytes)
    parts = [slice(begin, begin + rows) for begin in range(0, source.shape[0], rows)]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda part: _copy(source[part], out[part]), parts))


def equal_values(one, other) -> bool:
    """Whether two lazy tensors hold the same values, read a portion at a time; at once where they are the same bytes."""
    if one.shape != other.shape:
        return False
    if one.identity[1:] == other.identity[1:] and one.file == other.file:
        return True
    a, b = one.numpy(), other.numpy()
    rows = max(1, CHUNK_BYTES * a.shape[0] // max(a.nbytes, 1)) if a.ndim else 1
    parts = [slice(begin, begin + rows) for begin in range(0, a.shape[0], rows)] if a.ndim else [...]
    same = all(_equal(a[part], b[part]) for part in parts)
    one.release()
    other.release()
    return same


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    bits = np.dtype(f"u{a.dtype.itemsize}") if a.dtype == b.dtype and a.dtype.itemsize in (1, 2, 4, 8) else None
    if bits is not None and np.array_equal(a.view(bits), b.view(bits)):  # at the speed of memory; numpy compares ml_dtypes one by one
        return True
    return np.array_equal(a.astype(np.float32), b.astype(np.float32))


def _copy(source: np.ndarray, out: np.ndarray) -> None:
    bits = np.dtype(f"u{out.dtype.itemsize}") if out.dtype.itemsize in (1, 2, 4, 8) else None
    if source.dtype == out.dtype and bits is not None:
        # As integers: numpy's copy of ml_dtypes goes element by element, and holds the interpreter lock.
        np.copyto(out.view(bits), source.view(bits))
    elif source.dtype == ml_dtypes.bfloat16 and out.dtype == np.float32:
        # A bfloat16 is the upper half of a float32; four times faster than ml_dtypes' cast, and the same bits.
        np.left_shift(source.view(np.uint16), np.uint32(16), out=out.view(np.uint32), dtype=np.uint32)
    else:
        with np.errstate(over="ignore", invalid="ignore"):  # a value out of range becomes infinity; `load` looks for it
            np.copyto(out, source, casting="unsafe")  # not astype: each thread would keep its temporary
