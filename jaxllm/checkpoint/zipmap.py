"""The members of a zip file as byte ranges of its memory map, every one checked against lies.

Python's zipfile copies what it reads and accepts what a hostile file may claim. Torch and numpy store their members
uncompressed, so that a checked range of the map is the member. The layout is PKWARE's APPNOTE 6.3.10, sections 4.3-4.5.
"""

import struct
import zlib
from dataclasses import dataclass

import numpy as np

from jaxllm.checkpoint.mapped import MappedFile, brief
from jaxllm.errors import CheckpointError, UnsupportedError

MAX_MEMBERS = 2_000_000
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_STORED, _DEFLATED = 0, 8
_ENCRYPTED = 0x1


@dataclass(frozen=True)
class Member:
    """One member: its bytes lie at [offset, offset + packed) of the map and unfold to `size` bytes."""

    name: str
    offset: int
    packed: int
    size: int
    deflated: bool
    crc: int


def read_members(mapped: MappedFile) -> dict[str, Member]:
    """Every member of the zip file by name; CheckpointError for duplicates, overlaps, paths and sizes that lie."""
    count, directory_start, directory_end = _directory(mapped)
    if count > MAX_MEMBERS or count * 46 > directory_end - directory_start:
        raise _damaged(mapped, f"it claims {count} members in a directory of {directory_end - directory_start} bytes")
    members: dict[str, Member] = {}
    ranges: list[tuple[int, int, str]] = []
    position = directory_start
    for _ in range(count):
        member, header_offset, position = _entry(mapped, position, directory_end)
        if member.name in members:
            raise _damaged(mapped, f"the member {brief(member.name)} is there twice")
        members[member.name] = member
        ranges.append((header_offset, member.offset + member.packed, member.name))
    if position != directory_end:
        raise _damaged(mapped, f"its directory holds {count} members and {directory_end - position} bytes more")
    end = 0
    for start, stop, name in sorted(ranges):
        if start < end or stop > directory_start:
            raise _damaged(mapped, f"the bytes of member {brief(name)} overlap others")
        end = stop
    return members


def member_bytes(mapped: MappedFile, member: Member) -> np.ndarray:
    """The member's bytes: a view of the map if it is stored, inflated (never beyond its stated size) if not."""
    raw = mapped.view(member.offset, member.packed)
    if not member.deflated:
        return raw
    inflater = zlib.decompressobj(-15)
    try:
        data = inflater.decompress(raw, member.size + 1)
    except zlib.error as error:
        raise _damaged(mapped, f"member {brief(member.name)} does not inflate ({error})") from error
    if len(data) != member.size or not inflater.eof or zlib.crc32(data) != member.crc:
        raise _damaged(mapped, f"member {brief(member.name)} does not unfold to the {member.size} bytes that it claims")
    return np.frombuffer(data, np.uint8)


def member_head(mapped: MappedFile, member: Member, count: int) -> bytes:
    """The first bytes of the member, at most `count`, and no more inflated."""
    raw = mapped.view(member.offset, member.packed)
    if not member.deflated:
        return raw[:count].tobytes()
    try:
        return zlib.decompressobj(-15).decompress(raw, count)
    except zlib.error as error:
        raise _damaged(mapped, f"member {brief(member.name)} does not inflate ({error})") from error


def description_bytes(mapped: MappedFile, member: Member) -> np.ndarray:
    """The bytes of a member that describes the others; one that unfolds beyond what the file could hold to describe is refused.

    A tensor takes some 150 bytes of a pickle, and as many of the zip file's own directory.
    """
    if member.deflated and member.size > max(1 << 20, 8 * mapped.size):
        raise _damaged(mapped, f"its {brief(member.name)} of {member.packed} bytes unfolds to {member.size}, more than 8 times the file")
    return member_bytes(mapped, member)


def _damaged(mapped: MappedFile, what: str) -> CheckpointError:
    return CheckpointError(f"{mapped.path} is a damaged zip file: {what}; fetch it again, and from a source you trust")


def _directory(mapped: MappedFile) -> tuple[int, int, int]:
    """Number of members, and the first and last byte of the central directory."""
    tail_start = max(0, mapped.size - 22 - 65535)
    tail = mapped.view(tail_start, mapped.size - tail_start).tobytes()
    found = tail.rfind(_END)
    while found >= 0:
        # The record is the one whose comment ends with the file; its four bytes may also occur in data.
        if found + 22 <= len(tail) and found + 22 + struct.unpack_from("<H", tail, found + 20)[0] == len(tail):
            break
        found = tail.rfind(_END, 0, found)
    if found < 0:
        raise CheckpointError(f"{mapped.path} is truncated: it begins as a zip file and its directory, at the end, is missing; fetch it again")
    disk, start_disk, here, count, size, start = struct.unpack_from("<4H2L", tail, found + 4)
    end = tail_start + found
    if end >= 20 and mapped.view(end - 20, 4).tobytes() == _LOCATOR64:
        record = struct.unpack_from("<Q", mapped.view(end - 20, 20).tobytes(), 8)[0]
        if record + 56 > end - 20 or mapped.view(record, 4).tobytes() != _END64:
            raise _damaged(mapped, "its 64-bit directory record is not where it should be")
        disk, start_disk, here, count, size, start = struct.unpack_from("<2L4Q", mapped.view(record, 56).tobytes(), 16)
        end = record
    if disk or start_disk or here != count:
        raise _damaged(mapped, "it claims to be one part of several")
    if start + size != end:
        raise _damaged(mapped, f"its directory claims the bytes [{start}, {start + size}) and must end at {end}")
    return count, start, end


def _entry(mapped: MappedFile, position: int, directory_end: int) -> tuple[Member, int, int]:
    if position + 46 > directory_end:
        raise _damaged(mapped, "its directory ends inside an entry")
    fields = struct.unpack("<4s4B4HL2L5H2L", mapped.view(position, 46).tobytes())
    signature, flags, method, crc, packed, size = fields[0], fields[5], fields[6], fields[9], fields[10], fields[11]
    name_length, extra_length, comment_length, header_offset = fields[12], fields[13], fields[14], fields[18]
    end = position + 46 + name_length + extra_length + comment_length
    if signature != b"PK\x01\x02" or end > directory_end:
        raise _damaged(mapped, "its directory holds something that is no entry")
    raw_name = mapped.view(position + 46, name_length).tobytes()
    name = _checked_name(mapped, raw_name)
    extra = mapped.view(position + 46 + name_length, extra_length).tobytes()
    size, packed, header_offset = _wide(mapped, name, extra, size, packed, header_offset)
    if flags & _ENCRYPTED:
        raise UnsupportedError(f"{mapped.path}: member {brief(name)} is encrypted; jaxllm reads plain files")
    if method not in (_STORED, _DEFLATED):
        raise UnsupportedError(f"{mapped.path}: member {brief(name)} is compressed by method {method}; stored and deflated are read")
    if method == _STORED and size != packed:
        raise _damaged(mapped, f"member {brief(name)} is stored as {packed} bytes and claims {size}")
    # Deflate packs at most 1032 to 1, so that a small file cannot ask for the memory of a large one.
    if size > packed * 1032 + 64:
        raise _damaged(mapped, f"member {brief(name)} claims that {packed} bytes unfold to {size}")
    if header_offset + 30 > mapped.size:
        raise _damaged(mapped, f"member {brief(name)} lies outside the file")
    local = struct.unpack("<4s5H3L2H", mapped.view(header_offset, 30).tobytes())
    data_start = header_offset + 30 + local[9] + local[10]
    if local[0] != b"PK\x03\x04" or local[3] != method or mapped.view(header_offset + 30, local[9]).tobytes() != raw_name:
        raise _damaged(mapped, f"the header of member {brief(name)} says other than the directory")
    if data_start + packed > mapped.size:
        raise _damaged(mapped, f"member {brief(name)} needs the bytes up to {data_start + packed} and the file has {mapped.size}")
    return Member(name, data_start, packed, size, method == _DEFLATED, crc), header_offset, end


def _checked_name(mapped: MappedFile, raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _damaged(mapped, "a member's name is not UTF-8") from error
    if not name or "\0" in name or "\\" in name or name.startswith("/") or ":" in name[:3] or ".." in name.split("/"):
        raise CheckpointError(f"{mapped.path}: member {brief(name)} has a name that leads outside the archive; the file is hostile; refused")
    return name


def _wide(mapped: MappedFile, name: str, extra: bytes, size: int, packed: int, offset: int) -> tuple[int, int, int]:
    """The three numbers, those that did not fit 32 bits taken from the zip64 field in this order."""
    values = [size, packed, offset]
    missing = [index for index, value in enumerate(values) if value == 0xFFFFFFFF]
    while missing and len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1 and len(extra) >= 4 + length and length >= 8 * len(missing):
            for slot, index in enumerate(missing):
                values[index] = struct.unpack_from("<Q", extra, 4 + 8 * slot)[0]
            return values[0], values[1], values[2]
        extra = extra[4 + length :]
    if missing:
        raise _damaged(mapped, f"member {brief(name)} lacks its 64-bit sizes")
    return size, packed, offset
