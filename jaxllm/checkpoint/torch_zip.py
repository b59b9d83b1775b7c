"""Tensors of a torch file in the zip format (torch 1.6 and later): data.pkl describes them, data/<key> holds storages."""

from jaxllm.checkpoint.mapped import LazyTensor, MappedFile, brief
from jaxllm.checkpoint.pickles import MAX_BYTES, read_pickle
from jaxllm.checkpoint.torch_objects import ALLOWED, storage_ref, tensors_of
from jaxllm.checkpoint.torch_view import StorageBytes, lazy_tensor
from jaxllm.checkpoint.zipmap import Member, description_bytes, member_bytes, member_head, read_members
from jaxllm.errors import CheckpointError, UnsupportedError

def read_torch_zip(mapped: MappedFile) -> dict[str, LazyTensor]:
    """Every tensor of the file by name, views of the map where members are stored uncompressed, as torch writes them."""
    where = str(mapped.path)
    members = read_members(mapped)
    pickles = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    prefix = pickles[0].removesuffix("data.pkl") if len(pickles) == 1 else ""
    if any(name.startswith(f"{prefix}code/") or name == f"{prefix}constants.pkl" for name in members):
        raise UnsupportedError(f"{where} is a TorchScript archive (it holds code); save the model's state_dict() with torch.save")
    if len(pickles) != 1:
        raise CheckpointError(f"{where} is a zip file with {len(pickles)} data.pkl; a torch checkpoint has one")
    if members[pickles[0]].size > MAX_BYTES:
        raise CheckpointError(f"{where} has a data.pkl of {members[pickles[0]].size} bytes; at most {MAX_BYTES} are allowed")
    described = members[pickles[0]]
    big_endian = _is_big_endian(mapped, members.get(f"{prefix}byteorder"))

    def load_persistent(saved: object) -> object:
        ref = storage_ref(saved, where)
        member = members.get(f"{prefix}data/{ref.key}")
        if member is None:
            raise CheckpointError(f"{where} refers to the storage {brief(ref.key)}, which is not in the file; fetch it again")
        if ref.nbytes + ref.start_byte > member.size or (ref.start == 0 and ref.nbytes != member.size):
            raise CheckpointError(f"{where}: storage {brief(ref.key)} should have {ref.nbytes} bytes and has {member.size}; fetch it again")
        return ref

    saved, _ = read_pickle(description_bytes(mapped, described), 0, ALLOWED, f"{where} ({pickles[0]})", load_persistent)
    return {
        name: lazy_tensor(name, record, _storage(mapped, members[f"{prefix}data/{record.storage.key}"]), mapped.path, "pt-zip", big_endian)
        for name, record in tensors_of(saved, where, described.size).items()
    }


def _is_big_endian(mapped: MappedFile, member: Member | None) -> bool:
    """Whether values are big-endian; files older than the byteorder member are little-endian, as torch takes them."""
    text = b"little" if member is None else member_head(mapped, member, 16)
    if text not in (b"little", b"big"):
        raise CheckpointError(f"{mapped.path} names the byte order {brief(text.decode('ascii', 'replace'))}; little and big are allowed")
    return text == b"big"


def _storage(mapped: MappedFile, member: Member) -> StorageBytes:
    return StorageBytes(
        member.offset,
        member.size,
        lambda: member_bytes(mapped, member),
        lambda: mapped.advise(member.offset, member.packed, "MADV_DONTNEED"),
        None if member.deflated else mapped,
    )
