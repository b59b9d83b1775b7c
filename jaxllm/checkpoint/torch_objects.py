"""What a torch pickle may name, and how its values become lazy tensors. Torch itself is never imported.

A saved tensor is a call, `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, ...)`, whose storage is a
persistent id ("storage", type, key, location, numel). Here the call makes a TensorRecord; the container reader knows
where the storage `key` lies.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.mapped import brief
from jaxllm.checkpoint.pickles import UNREAD, Allowed
from jaxllm.errors import CheckpointError, UnsupportedError

log = logging.getLogger("jaxllm.checkpoint")

# Deeper or wider than any state dict; a pickle of a kilobyte can describe a tree of 2**60 leaves by sharing.
MAX_DEPTH = 32
MAX_ENTRIES = 300_000
MAX_NAME_LENGTH = 1024  # shared long keys would multiply into any amount of memory
ENTRIES_FREE = 1024  # entries beyond one for each byte of the pickle, and letters of names beyond NAME_LETTERS for each
NAME_LETTERS = 64

_NAMED = {name: np.dtype(name) for name in "float64 float32 float16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64 complex128".split()}
_ML = "bfloat16 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu".split()
DTYPES: Mapping[str, np.dtype] = MappingProxyType(_NAMED | {name: np.dtype(getattr(ml_dtypes, name)) for name in _ML})

_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexDouble": "complex128", "ComplexFloat": "complex64",
}  # fmt: skip


@dataclass(frozen=True)
class StorageType:
    """The class of a storage: its element type, or None where only the tensor knows it (UntypedStorage)."""

    dtype: np.dtype | None


@dataclass(frozen=True)
class StorageRef:
    """A storage by its key in the file; `start` and `numel` count elements (bytes if untyped) of a view into it."""

    type: StorageType
    key: str
    location: str
    numel: int
    start: int = 0

    @property
    def nbytes(self) -> int:
        return self.numel * (self.type.dtype.itemsize if self.type.dtype else 1)

    @property
    def start_byte(self) -> int:
        return self.start * (self.type.dtype.itemsize if self.type.dtype else 1)


@dataclass(frozen=True)
class TensorRecord:
    """One tensor as the pickle describes it, not checked yet: strides and offset count elements."""

    storage: StorageRef
    dtype: np.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage, offset, size, stride, dtype=None) -> TensorRecord:
    if not isinstance(storage, StorageRef):
        raise TypeError("a tensor whose storage is no storage")
    if not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise TypeError("size and stride are tuples")
    dtype = dtype or storage.type.dtype or DTYPES["uint8"]
    if not isinstance(dtype, np.dtype):
        raise TypeError("a dtype that is none")
    return TensorRecord(storage, dtype, offset, size, stride)


def _plain(metadata) -> None:
    if metadata:
        raise TypeError("a conjugate or negated view; call resolve_conj().resolve_neg() before saving")


def _tensor_v2(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    _plain(metadata)
    return _tensor(storage, offset, size, stride)


def _tensor_v3(storage, offset, size, stride, requires_grad, hooks, dtype, metadata=None):
    _plain(metadata)
    return _tensor(storage, offset, size, stride, dtype)


def _parameter(data, requires_grad=True, hooks=None, state=None):
    if not isinstance(data, TensorRecord):
        raise TypeError("a parameter that wraps no tensor")
    return data


def _from_type(function, kind, args, state):
    if not isinstance(function, Allowed) or kind not in ("torch.Tensor", "torch.nn.parameter.Parameter") or not isinstance(args, tuple):
        raise TypeError("a tensor of a class that is not torch.Tensor or torch.nn.Parameter")
    return function.build(*args)


def _ordered_dict(pairs=()) -> dict:
    if not isinstance(pairs, list | tuple) or any(not isinstance(pair, list | tuple) or len(pair) != 2 for pair in pairs):
        raise TypeError("pairs are needed")
    if any(not isinstance(key, str | int) for key, _ in pairs):
        raise TypeError("keys are text or integers")
    return dict(pairs)


def _size(sizes=()) -> tuple:
    if not isinstance(sizes, list | tuple):
        raise TypeError("sizes are a tuple")
    return tuple(sizes)


def _counter(counts=None) -> dict:
    if counts is not None and not isinstance(counts, dict):
        raise TypeError("counts are a dict")
    return {} if counts is None else counts


def _complex(real, imaginary=0.0) -> complex:
    if type(real) not in (int, float) or type(imaginary) not in (int, float):
        raise TypeError("a complex number is two numbers")
    return complex(real, imaginary)


def _encoded(text, encoding="latin1") -> bytes:
    """Bytes, which pickles before protocol 3 write as text."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise TypeError("bytes are written as latin1 text")
    return text.encode("latin1")


def _device(kind, index=None) -> str:
    return brief(kind) if index is None else f"{brief(kind)}:{brief(index)}"


_CALLS = {
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "_codecs.encode": _encoded,
    **{f"{place}.complex": _complex for place in ("builtins", "__builtin__")},
    **{f"{place}.{name}": lambda *parts: UNREAD for place in ("builtins", "__builtin__") for name in ("set", "frozenset", "bytearray")},
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
}
_QUANTISED = "a quantised tensor, which jaxllm does not read; save the model dequantised"
_REFUSED = {
    "torch._utils._rebuild_qtensor": _QUANTISED,
    **{f"torch.{name}Storage": _QUANTISED for name in ("QInt8", "QUInt8", "QInt32", "QUInt4x2", "QUInt2x4")},
    **{f"torch.{name}": _QUANTISED for name in ("qint8", "quint8", "qint32", "quint4x2", "quint2x4")},
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor, which jaxllm does not read; call to_dense() before saving",
    "torch._utils._rebuild_nested_tensor": "a nested tensor, which jaxllm does not read; save its parts",
    "torch._utils._rebuild_meta_tensor_no_storage": "a meta tensor, which has no values; save the model after its weights are loaded",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass, which jaxllm does not read; save plain tensors",
    "torch._utils._rebuild_device_tensor_from_numpy": "a tensor of an XLA or similar device; move it to the CPU before saving",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "a tensor of an XLA or similar device; move it to the CPU before saving",
    "torch.distributed.tensor.DTensor": "a distributed tensor; save it with full_tensor()",
    "torch.ComplexHalfStorage": "a complex32 storage, a type that numpy has not; save it as complex64",
    "torch.complex32": "the dtype complex32, which numpy has not; save it as complex64",
    "torch.float4_e2m1fn_x2": "the packed dtype float4_e2m1fn_x2, which jaxllm does not read from torch files; save it as safetensors",
}

# The whole list. Everything else that a pickle names is refused.
ALLOWED: Mapping[str, object] = MappingProxyType(
    {name: Allowed(name, build) for name, build in _CALLS.items()}
    | {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
    | {f"{place}.{name}Storage": StorageType(DTYPES[dtype]) for place in ("torch", "torch.cuda") for name, dtype in _STORAGES.items()}
    | {f"{place}.UntypedStorage": StorageType(None) for place in ("torch", "torch.storage")}
    | {name: name for name in ("torch.Tensor", "torch.nn.parameter.Parameter")}
    | {name: UnsupportedError(reason) for name, reason in _REFUSED.items()}
)


def storage_ref(saved: object, where: str) -> StorageRef:
    """The storage that a persistent id names: ("storage", type, key, location, numel[, view])."""
    fits = (
        isinstance(saved, tuple)
        and len(saved) in (5, 6)
        and saved[0] == "storage"
        and isinstance(saved[1], StorageType)
        and type(saved[2]) in (str, int)
        and isinstance(saved[3], str)
        and type(saved[4]) is int
        and 0 <= saved[4] < 1 << 56
    )
    if not fits:
        kind = brief(saved[0]) if isinstance(saved, tuple) and saved else brief(saved)
        raise CheckpointError(f"{where} refers to {kind} in a way that torch does not write; only storages are allowed; the file is damaged")
    root = StorageRef(saved[1], str(saved[2]), saved[3], saved[4])
    if len(saved) == 5 or saved[5] is None:
        return root
    # Files of torch before 0.4 name a view of a storage: (key of the view, first element, number of elements).
    view = saved[5]
    if not (isinstance(view, tuple) and len(view) == 3 and all(type(item) is int for item in view[1:]) and 0 <= view[1] <= view[1] + view[2] <= root.numel):
        raise CheckpointError(f"{where} has a view that reaches outside its storage {brief(root.key)}; the file is damaged")
    return StorageRef(root.type, root.key, root.location, view[2], view[1])


def tensors_of(value: object, where: str, nbytes: int) -> dict[str, TensorRecord]:
    """Every tensor of a nest of dicts and lists under its path, joined with dots; what is no tensor is left out and logged.

    `nbytes` are those of the pickle that described the nest: entries and letters of names are bounded by them, because
    a part that is shared is written once and found many times.
    """
    found: dict[str, TensorRecord] = {}
    most, letters = min(MAX_ENTRIES, nbytes + ENTRIES_FREE), NAME_LETTERS * (nbytes + ENTRIES_FREE)
    others = 0
    shown: list[str] = []
    for count, (path, leaf) in enumerate(_leaves(value, where)):
        if count >= most:
            raise CheckpointError(f"{where} describes more than {most} entries; a state dict of its size has fewer; refused")
        if not isinstance(leaf, TensorRecord):
            others += 1
            shown += [brief(".".join(path))] if others <= 5 else []
            continue
        length = sum(map(len, path))
        letters -= length
        if length > MAX_NAME_LENGTH:
            raise CheckpointError(f"{where} holds a name of more than {MAX_NAME_LENGTH} characters; a state dict does not; refused")
        if letters < 0:
            raise CheckpointError(f"{where} describes names of more than {NAME_LETTERS} times its own bytes; a state dict does not; refused")
        name = ".".join(path) or "tensor"
        if name in found:
            raise CheckpointError(f"{where} holds two tensors named {brief(name)}; rename one before saving")
        found[name] = leaf
    if others:
        more = f" and {others - 5} more" if others > 5 else ""
        log.info("%s: %d entries are no tensors and are left out: %s", where, others, ", ".join(shown) + more)
    return found


def _leaves(root: object, where: str) -> Iterator[tuple[tuple[str, ...], object]]:
    # Iterators and not lists of what is left: a list that holds itself would be laid out again at each level.
    pending: list[Iterator[tuple[tuple[str, ...], object]]] = [iter([((), root)])]
    while pending:
        entry = next(pending[-1], None)
        if entry is None:
            pending.pop()
            continue
        path, value = entry
        if len(path) > MAX_DEPTH:
            raise CheckpointError(f"{where} nests dicts or lists more than {MAX_DEPTH} deep; a state dict does not; refused")
        if not isinstance(value, dict | list | tuple):
            yield path, value
        elif value:
            pending.append(_children(path, value))
        else:
            yield path, None  # counted, so that a nest of empty lists meets the limit too


def _children(path: tuple[str, ...], value: dict | list | tuple) -> Iterator[tuple[tuple[str, ...], object]]:
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, _step(key)), child


def _step(key: object) -> str:
    """A dict key or a position, as a part of a name."""
    if isinstance(key, tuple):
        return f"({', '.join(map(_step, key))})"
    return key if isinstance(key, str) else brief(key)
