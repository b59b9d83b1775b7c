"""Tensors of a .safetensors file as lazy views of its memory map.

The format (huggingface/safetensors, README): eight bytes of little-endian header length, a JSON header
{name: {"dtype", "shape", "data_offsets": [begin, end]}}, then the tensors' bytes back to back. The header is checked
in full before any tensor is handed out, so a view can never reach outside its own bytes.
"""

import json
from dataclasses import replace
from types import MappingProxyType

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.mapped import LazyTensor, MappedFile, brief, checked_shape, count_bytes
from jaxllm.errors import CheckpointError, UnsupportedError

# The format's own limit on its header; a 100k-tensor model needs about 10 MB.
MAX_HEADER_BYTES = 100_000_000

DTYPES = MappingProxyType(
    {
        "BOOL": np.dtype(np.bool_),
        "U8": np.dtype(np.uint8),
        "I8": np.dtype(np.int8),
        "U16": np.dtype(np.uint16),
        "I16": np.dtype(np.int16),
        "U32": np.dtype(np.uint32),
        "I32": np.dtype(np.int32),
        "U64": np.dtype(np.uint64),
        "I64": np.dtype(np.int64),
        "F16": np.dtype(np.float16),
        "BF16": np.dtype(ml_dtypes.bfloat16),
        "F32": np.dtype(np.float32),
        "F64": np.dtype(np.float64),
        "C64": np.dtype(np.complex64),
        "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
        "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
        "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
        "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
        "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
        "F4": np.dtype(ml_dtypes.float4_e2m1fn),  # two to a byte in the file, the first in the low half
    }
)
REFUSED_DTYPES = ("F6_E2M3", "F6_E3M2")  # packed four to three bytes, a layout that the format does not write down


def read_safetensors(mapped: MappedFile) -> dict[str, LazyTensor]:
    """Every tensor of the file, in the order of their bytes; CheckpointError if anything in the header is untrue."""
    header, data_start = _header(mapped)
    metadata = header.pop("__metadata__", {})
    entries = [_entry(name, fields, mapped, data_start) for name, fields in header.items()]
    entries.sort(key=lambda entry: (entry[1], entry[2]))
    position = 0
    for tensor, begin, end in entries:
        if begin != position:
            found = "overlap the tensor before" if begin < position else "leave a gap after the tensor before"
            raise CheckpointError(
                f"{mapped.path}: the bytes [{begin}, {end}) of tensor {brief(tensor.name)} {found} (it ends at {position}); "
                "safetensors lie back to back; fetch the file again"
            )
        position = end
    found = mapped.size - data_start
    if found != position:
        state = "truncated" if found < position else "too long"
        raise CheckpointError(
            f"{mapped.path} is {state}: its header describes {position} bytes of tensors and {found} follow it; fetch the file again"
        )
    tensors = {tensor.name: tensor for tensor, _, _ in entries}
    return tensors | _tied(metadata, tensors)


def _tied(metadata: object, tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Tensors that were left out because they are another's values: metadata {name: name of the other}, as
    huggingface's save_model and jaxllm's convert write it."""
    pairs = metadata.items() if isinstance(metadata, dict) else ()
    return {
        name: replace(tensors[kept], name=name)
        for name, kept in pairs
        if name != "format" and name not in tensors and isinstance(kept, str) and kept in tensors
    }


def _header(mapped: MappedFile) -> tuple[dict, int]:
    if mapped.size < 8:
        raise CheckpointError(f"{mapped.path} is truncated: {mapped.size} bytes, and a safetensors file begins with 8; fetch it again")
    length = int.from_bytes(mapped.view(0, 8).tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{mapped.path} is not a safetensors file: its header claims {length} bytes, at most {MAX_HEADER_BYTES} are allowed"
        )
    if 8 + length > mapped.size:
        raise CheckpointError(
            f"{mapped.path} is truncated: its header needs {length} bytes and {mapped.size - 8} are there; fetch the file again"
        )
    text = mapped.view(8, length).tobytes()
    if text[:1] != b"{":
        raise CheckpointError(f"{mapped.path} is not a safetensors file: its header does not begin with '{{'")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{mapped.path}: the safetensors header is damaged ({brief(str(error))}); fetch the file again") from error
    return header, 8 + length


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {brief(twice, 40)} occurs twice")
    return found


def _entry(name: str, fields: object, mapped: MappedFile, data_start: int) -> tuple[LazyTensor, int, int]:
    where = f"{mapped.path}: tensor {brief(name)}"
    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is not described by exactly dtype, shape and data_offsets; the file is damaged")
    if fields["dtype"] in REFUSED_DTYPES:
        raise UnsupportedError(f"{where} has dtype {fields['dtype']}, which jaxllm does not read; allowed are {', '.join(DTYPES)}")
    dtype = DTYPES.get(fields["dtype"]) if isinstance(fields["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(f"{where} has dtype {brief(fields['dtype'])}; allowed are {', '.join(DTYPES)}")
    shape = checked_shape(fields["shape"], dtype, where)
    offsets = fields["data_offsets"]
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(edge) is int for edge in offsets)):
        raise CheckpointError(f"{where} has data_offsets {brief(offsets)}; two integers are needed; the file is damaged")
    begin, end = offsets
    packed = fields["dtype"] == "F4"
    need = count_bytes(shape, dtype)
    if packed and need % 2:
        raise CheckpointError(f"{where} has {need} F4 values; they come in pairs; the file is damaged")
    need = need // 2 if packed else need
    if not 0 <= begin <= end or end - begin != need:
        raise CheckpointError(
            f"{where} claims the bytes [{begin}, {end}), but its shape {brief(shape)} of {fields['dtype']} needs {need} bytes; "
            "the file is damaged; fetch it again"
        )
    start = data_start + begin

    def read() -> np.ndarray:
        raw = mapped.view(start, need)
        return _unpack_f4(raw).reshape(shape) if packed else raw.view(dtype).reshape(shape)

    tensor = LazyTensor(
        name=name,
        shape=shape,
        dtype=dtype,
        container="safetensors",
        file=mapped.path,
        storage=f"{mapped.path.name}:{start}",
        offset=start,
        read=read,
        drop=lambda: mapped.advise(start, need, "MADV_DONTNEED"),
        span=None if packed else (mapped, start),
    )
    return tensor, begin, end


def _unpack_f4(raw: np.ndarray) -> np.ndarray:
    halves = np.empty((raw.size, 2), np.uint8)
    np.bitwise_and(raw, 0x0F, out=halves[:, 0])
    np.right_shift(raw, 4, out=halves[:, 1])
    return halves.view(DTYPES["F4"]).reshape(-1)
