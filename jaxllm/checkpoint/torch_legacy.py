"""Tensors of a torch file in the older stream format (torch before 1.6, or _use_new_zipfile_serialization=False).

Five pickles follow one another: a magic number, a protocol version, facts about the machine, the saved object, and the
list of storage keys; then, for each key, a count as eight little-endian bytes and the raw values. Torch writes counts
and values little-endian on every machine and ignores the machine facts when it loads; so does this reader.
"""

from jaxllm.checkpoint.mapped import LazyTensor, MappedFile, brief
from jaxllm.checkpoint.pickles import read_pickle
from jaxllm.checkpoint.torch_objects import ALLOWED, StorageRef, storage_ref, tensors_of
from jaxllm.checkpoint.torch_view import StorageBytes, lazy_tensor
from jaxllm.errors import CheckpointError, UnsupportedError

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001


def read_torch_legacy(mapped: MappedFile) -> dict[str, LazyTensor]:
    """Every tensor of the file by name, as views of the map; CheckpointError or UnsupportedError otherwise."""
    where, referred = str(mapped.path), {}
    if mapped.size > 262 and mapped.view(257, 5).tobytes() == b"ustar":
        raise UnsupportedError(f"{where} is in torch's first format (tar, before 2017), which jaxllm does not read; load and save it with torch")

    def load_persistent(saved: object) -> StorageRef:
        if isinstance(saved, tuple) and saved and saved[0] == "module":
            raise UnsupportedError(f"{where} holds a whole module with its source code; save its state_dict() instead")
        ref = storage_ref(saved, where)
        kinds = referred.setdefault(ref.key, set())
        kinds.add(ref.type.dtype)
        return ref

    magic, position = read_pickle(mapped.bytes, 0, {}, where, load_persistent)
    if type(magic) is not int or magic != MAGIC_NUMBER:
        raise CheckpointError(f"{where} is a pickle, but not one that torch.save wrote; give a torch checkpoint or safetensors")
    version, position = read_pickle(mapped.bytes, position, {}, where, load_persistent)
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise UnsupportedError(f"{where} has torch's protocol version {brief(version)}; {PROTOCOL_VERSION} is the one that is read")
    _, start = read_pickle(mapped.bytes, position, {}, where, load_persistent)
    saved, position = read_pickle(mapped.bytes, start, ALLOWED, where, load_persistent)
    described = position - start
    keys, position = read_pickle(mapped.bytes, position, {}, where, load_persistent)
    if not isinstance(keys, list) or any(type(key) not in (str, int) for key in keys) or len(set(map(str, keys))) != len(keys):
        raise CheckpointError(f"{where} has a damaged list of storages; fetch the file again")
    storages = {}
    for key in map(str, keys):
        if key not in referred:
            raise CheckpointError(f"{where} stores the values {brief(key)}, which none of its tensors uses; the file is damaged")
        widths = {dtype.itemsize if dtype else 1 for dtype in referred[key]}
        if len(widths) != 1:
            raise CheckpointError(f"{where} reads the storage {brief(key)} as types of different widths; the file is damaged")
        storages[key], position = _storage(mapped, position, widths.pop(), key)
    records = tensors_of(saved, where, described)
    for name, record in records.items():
        if record.storage.key not in storages:
            raise CheckpointError(f"{where}: the values of tensor {brief(name)} (storage {brief(record.storage.key)}) are not in the file")
    return {name: lazy_tensor(name, record, storages[record.storage.key], mapped.path, "pt-legacy") for name, record in records.items()}


def _storage(mapped: MappedFile, position: int, width: int, key: str) -> tuple[StorageBytes, int]:
    start = position + 8
    count = int.from_bytes(mapped.view(position, 8).tobytes(), "little", signed=True) if start <= mapped.size else 0
    end = start + count * width
    if count < 0:
        raise CheckpointError(f"{mapped.path}: storage {brief(key)} claims {count} values; the file is damaged")
    if end > mapped.size or start > mapped.size:
        raise CheckpointError(
            f"{mapped.path} is truncated: storage {brief(key)} needs the bytes up to {end} and the file has {mapped.size}; fetch it again"
        )
    nbytes = end - start
    return StorageBytes(start, nbytes, lambda: mapped.view(start, nbytes), lambda: mapped.advise(start, nbytes, "MADV_DONTNEED"), mapped), end
