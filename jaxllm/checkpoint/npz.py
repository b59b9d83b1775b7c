"""Arrays of a numpy .npz file as lazy tensors.

Numpy has no name for bfloat16 or fp8 and writes them as nameless bytes. Files that jaxllm writes hold such arrays as
unsigned integers of the same width, and say which they are in the member __dtypes__: UTF-8 JSON {name: dtype} as uint8.
"""

import io
import json
import warnings
from tokenize import TokenError

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.mapped import LazyTensor, MappedFile, brief, checked_shape, count_bytes
from jaxllm.checkpoint.zipmap import Member, description_bytes, member_bytes, member_head, read_members
from jaxllm.errors import CheckpointError, UnsupportedError

DTYPES_MEMBER = "__dtypes__"
MAX_HEADER_BYTES = 10_000  # numpy's own limit; a header is a dict of three short entries
NAMED_DTYPES = {name: np.dtype(getattr(ml_dtypes, name)) for name in dir(ml_dtypes) if name.startswith(("bfloat", "float", "int", "uint"))}


def read_npz(mapped: MappedFile) -> dict[str, LazyTensor]:
    """Every array of the file by name, views of the map where the member is stored uncompressed and in C order."""
    members = read_members(mapped)
    for name in members:
        if not name.endswith(".npy"):
            raise CheckpointError(f"{mapped.path}: member {brief(name)} is no .npy; an npz file holds only those")
    headers = {name.removesuffix(".npy"): _header(mapped, member) for name, member in members.items()}
    renamed = {}
    if DTYPES_MEMBER in headers:
        renamed = _read_dtypes(mapped, members[f"{DTYPES_MEMBER}.npy"], headers.pop(DTYPES_MEMBER))
    return {name: _tensor(mapped, name, members[f"{name}.npy"], *header, renamed.get(name)) for name, header in headers.items()}


def _header(mapped: MappedFile, member: Member) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether in Fortran order, dtype, and the bytes before the values."""
    if member.deflated and member.size > 1 << 32:
        raise UnsupportedError(f"{mapped.path}: {brief(member.name)} is compressed and above 4 GiB; write it with numpy.savez")
    stream = io.BytesIO(member_head(mapped, member, MAX_HEADER_BYTES + 64))
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"version {version}")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy warns of headers that Python 2 wrote
            shape, fortran, dtype = read(stream, max_header_size=MAX_HEADER_BYTES)
    except (ValueError, TypeError, SyntaxError, RecursionError, OverflowError, MemoryError, KeyError, EOFError, TokenError) as error:
        raise CheckpointError(f"{mapped.path}: {brief(member.name)} has a damaged header ({brief(str(error))}); fetch it again") from error
    return shape, fortran, dtype, stream.tell()


def _read_dtypes(mapped: MappedFile, member: Member, header: tuple) -> dict[str, np.dtype]:
    try:
        names = json.loads(description_bytes(mapped, member)[header[3] :].tobytes().decode("utf-8"))
        return {name: NAMED_DTYPES[dtype] for name, dtype in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{mapped.path}: its {DTYPES_MEMBER} is damaged ({brief(str(error))}); fetch it again") from error


def _tensor(
    mapped: MappedFile, name: str, member: Member, shape: object, fortran: bool, dtype: np.dtype, start: int, renamed: np.dtype | None
) -> LazyTensor:
    where = f"{mapped.path}: array {brief(name)}"
    if dtype.kind not in "biufc":
        hint = "; it may be bfloat16, which plain numpy writes without its name: save it as safetensors" if dtype.kind == "V" else ""
        raise UnsupportedError(f"{where} has dtype {brief(str(dtype))}; allowed are booleans, integers, floats and complex numbers{hint}")
    native = dtype.newbyteorder("=")
    if renamed is not None and (dtype.kind != "u" or renamed.itemsize != dtype.itemsize):
        raise CheckpointError(f"{where} is said to be {renamed} and stored as {dtype}; the file is damaged")
    shape = checked_shape(shape, dtype, where)
    need = count_bytes(shape, dtype)
    if start + need != member.size:
        raise CheckpointError(f"{where} has shape {brief(shape)} of {dtype}, {need} bytes, and {member.size - start} are there; fetch it again")

    def read() -> np.ndarray:
        raw = member_bytes(mapped, member)[start : start + need]
        values = raw.view(dtype).reshape(shape, order="F" if fortran else "C")
        values = values if dtype == native else values.astype(native)
        values = values if renamed is None else values.view(renamed)
        values.flags.writeable = False
        return values

    return LazyTensor(
        name=name,
        shape=shape,
        dtype=renamed or native,
        container="npz",
        file=mapped.path,
        storage=f"{mapped.path.name}:{name}",
        offset=member.offset,
        read=read,
        drop=lambda: mapped.advise(member.offset, member.packed, "MADV_DONTNEED"),
        span=None if member.deflated or fortran or dtype != native else (mapped, member.offset + start),
    )
