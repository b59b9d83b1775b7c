"""Writers of one shard: safetensors and npz, streamed tensor by tensor, complete on disk before they return."""

import json
import os
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.copying import aligned_empty, copy_cast
from jaxllm.checkpoint.mapped import LazyTensor, brief, count_bytes
from jaxllm.checkpoint.npz import DTYPES_MEMBER
from jaxllm.checkpoint.safetensors import DTYPES
from jaxllm.errors import CheckpointError, UnsupportedError

WRITE_BYTES = 16 << 20  # a step of the progress bar
SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Item:
    """One tensor to write: where it is read from, and the dtype it gets."""

    name: str
    source: LazyTensor
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return count_bytes(self.source.shape, self.dtype)


def write_safetensors(path: Path, items: list[Item], aliases: Mapping[str, str], advance: Callable[[int], None]) -> None:
    """None; `path` holds the items, and `aliases` (tied name -> written name) in its metadata, synced to disk.

    `advance(n)` is called as n more bytes are written. The metadata are those that huggingface's save_model leaves.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **aliases}}
    position = 0
    for item in items:
        end = position + item.nbytes
        header[item.name] = {"dtype": SAFETENSORS_NAMES[item.dtype], "shape": list(item.source.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64 + 56)  # data begin on a 64-byte boundary, the eight bytes of length counted
    with open(path, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for item in items:
            _write_values(handle, item, advance)
        handle.flush()
        os.fsync(handle.fileno())


def write_npz(path: Path, items: list[Item], aliases: Mapping[str, str], advance: Callable[[int], None]) -> None:
    """None; `path` holds the items as uncompressed .npy members, bfloat16 and the like as integers and named aside."""
    renamed = {item.name: item.dtype.name for item in items if _is_ml_dtype(item.dtype)}
    with open(path, "wb") as handle:
        with zipfile.ZipFile(handle, "w", zipfile.ZIP_STORED) as archive:
            for item in items:
                stored = np.dtype(f"u{item.dtype.itemsize}") if item.name in renamed else item.dtype
                with archive.open(zipfile.ZipInfo(f"{item.name}.npy"), "w", force_zip64=True) as member:
                    fields = {"descr": np.lib.format.dtype_to_descr(stored), "fortran_order": False, "shape": item.source.shape}
                    np.lib.format.write_array_header_2_0(member, fields)
                    _write_values(member, item, advance)
            if renamed:
                with archive.open(zipfile.ZipInfo(f"{DTYPES_MEMBER}.npy"), "w") as member:
                    np.lib.format.write_array(member, np.frombuffer(json.dumps(renamed).encode(), np.uint8))
        handle.flush()
        os.fsync(handle.fileno())


def check_writable(to: str, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """None; UnsupportedError if the container `to` cannot hold a tensor of this name, dtype and shape."""
    if to == "orbax" and 0 in shape:
        raise UnsupportedError(f"tensor {name} has shape {list(shape)}, and orbax cannot hold an empty array; convert to safetensors or npz")
    if to == "safetensors" and dtype not in SAFETENSORS_NAMES:
        raise UnsupportedError(f"tensor {name} is {dtype}, which safetensors cannot hold; convert to npz or orbax, or cast with a dtype")
    if to == "safetensors" and dtype == ml_dtypes.float4_e2m1fn:
        raise UnsupportedError(f"tensor {name} is F4, which jaxllm reads and does not write; convert to npz, or cast with a dtype")
    if to == "npz" and (name.startswith(("/", "__")) or "\\" in name or ".." in name.split("/") or ":" in name[:3]):
        raise UnsupportedError(f"tensor {brief(name)} has a name that an npz member cannot have; convert to safetensors")
    if to == "orbax" and "/" in name:
        raise UnsupportedError(f"tensor {brief(name)} has a name that an orbax array cannot have; convert to safetensors")


def cast_values(item: Item) -> np.ndarray:
    """The item's values in its dtype, C-ordered; a view of the source where that is so already."""
    values = item.source.numpy()
    if values.dtype == item.dtype and values.flags.c_contiguous:
        return values
    out = aligned_empty(values.shape, item.dtype)
    copy_cast(values, out)
    if item.dtype == np.float16 and not np.isfinite(out).all() and bool(np.isfinite(values.astype(np.float32)).all()):
        raise CheckpointError(f"tensor {item.name} has values beyond 65504, the largest float16; cast it to bfloat16 or float32")
    return out


def _write_values(handle, item: Item, advance: Callable[[int], None]) -> None:
    # Through uint8, because the buffer protocol does not know the types of ml_dtypes.
    raw = cast_values(item).reshape(-1).view(np.uint8)
    for start in range(0, raw.size, WRITE_BYTES):
        part = raw[start : start + WRITE_BYTES]
        handle.write(memoryview(part))
        advance(part.size)
    item.source.release()


def _is_ml_dtype(dtype: np.dtype) -> bool:
    return hasattr(ml_dtypes, dtype.name)
