"""A checkpoint in another container, written shard by shard: resumable, and never half there.

Everything is written to the hidden folder .NAME.partial beside the target, each shard under a temporary name and
renamed when it is on the disk; the folder gets its name when all is complete. A conversion that was cut off goes on
with the first shard that is missing, if it is asked the same question of the same files.
"""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.index import Checkpoint, open_checkpoint
from jaxllm.checkpoint.layout import WEIGHTS
from jaxllm.checkpoint.mapped import LazyTensor, brief
from jaxllm.checkpoint.orbax_tree import write_orbax
from jaxllm.checkpoint.writers import Item, cast_values, check_writable, write_npz, write_safetensors
from jaxllm.errors import CapacityError, CheckpointError, UsageError

log = logging.getLogger("jaxllm.checkpoint")

TARGETS = ("safetensors", "orbax", "npz")
CAST_DTYPES = ("float32", "bfloat16", "float16", "float64")
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
MAX_SIDE_BYTES = 256 << 20

type Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What a conversion did: bytes of tensors in the target, those of them that an earlier run had written, seconds.

    `left_out` names what of the source's folder did not go along, each with its reason.
    """

    target: Path
    files: tuple[str, ...]
    tensors: int
    nbytes: int
    resumed_bytes: int
    seconds: float
    left_out: tuple[str, ...] = ()

    @property
    def bytes_per_s(self) -> float:
        return (self.nbytes - self.resumed_bytes) / max(self.seconds, 1e-9)


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    to: str = "safetensors",
    *,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    load_format: str = "auto",
    progress: Progress | None = None,
) -> Conversion:
    """What was written to the new folder `dst`: the tensors of `src` as `to`, and all else of its folder but other weights.

    `to`: safetensors, npz (shards of at most `max_shard_size` bytes, such as 5GB, and an index if there are several) or
    orbax (one tree, started anew when resumed). `dtype` casts the floating tensors. `progress(done, total)` gets bytes.
    Tied tensors stay tied in safetensors, by huggingface's metadata, unless config.json says they are not; elsewhere
    they are written out. Raises UsageError for options, CheckpointError for the source, CapacityError for a full disk.
    """
    started = time.monotonic()
    target = Path(dst).expanduser().absolute()
    limit = parse_size(max_shard_size)
    if to not in TARGETS:
        raise UsageError(f"cannot convert to {brief(to)}; allowed are {', '.join(TARGETS)}", "to")
    if dtype is not None and dtype not in CAST_DTYPES:
        raise UsageError(f"dtype {brief(dtype)} is not known; allowed are {', '.join(CAST_DTYPES)}", "dtype")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{target} exists already; remove it or give another name", "dst")
    with open_checkpoint(src, load_format) as checkpoint:
        items, aliases = _plan(checkpoint, to, dtype)
        shards = [items] if to == "orbax" else _shards(items, limit)
        total = sum(item.nbytes for item in items)
        work = target.with_name(f".{target.name}.partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _workplace(work, _question(checkpoint, to, dtype, shards)):
            done = _Counter(progress, total)
            present = _remaining(work, shards, to)
            done.skip(sum(item.nbytes for shard, there in zip(shards, present, strict=True) if there for item in shard))
            resumed = done.bytes
            _check_room(work, total - resumed)
            names = [_shard_name(to, number, len(shards)) for number in range(1, len(shards) + 1)]
            for shard, name, there in zip(shards, names, present, strict=True):
                if not there:
                    _write_shard(work, name, to, shard, aliases, done.add)
            if to != "orbax" and len(shards) > 1:
                _write_index(work, to, shards, names, total)
            left_out = _copy_sides(checkpoint, work, dtype, names)
            _check_result(work, to, {item.name: (item.source.shape, item.dtype) for item in items} | _alias_shapes(aliases, items))
            (work / _QUESTION).unlink()
            os.replace(work, target)
            _sync_folder(target.parent)
        return Conversion(target, tuple(names), len(items) + len(aliases), total, resumed, time.monotonic() - started, left_out)


def parse_size(size: int | str) -> int:
    """Bytes of a size such as 5GB, 512MiB or 1000000; UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]?I?B?)\s*", str(size).upper())
    unit = match and (match[2] if match[2] in UNITS else f"{match[2]}B")
    value = int(float(match[1]) * UNITS[unit]) if match and unit in UNITS else 0
    if value <= 0:
        raise UsageError(f"max_shard_size {brief(size)} is no size; write it as 5GB, 512MiB or a number of bytes", "max_shard_size")
    return value


_QUESTION = "conversion.json"


class _Counter:
    def __init__(self, progress: Progress | None, total: int):
        self.progress, self.total, self.bytes = progress, total, 0

    def add(self, count: int) -> None:
        self.bytes += count
        if self.progress is not None:
            self.progress(self.bytes, self.total)

    skip = add


def _plan(checkpoint: Checkpoint, to: str, dtype: str | None) -> tuple[list[Item], dict[str, str]]:
    """The tensors to write, in the order of the source's bytes, and which names repeat a written one."""
    ties = to == "safetensors" and _config(checkpoint.path).get("tie_word_embeddings", True) is not False
    items, aliases, written = [], {}, {}
    for tensor in sorted(checkpoint.values(), key=lambda tensor: (str(tensor.file), tensor.offset, tensor.name)):
        kind = _cast(tensor, dtype)
        if ties and tensor.nbytes and tensor.identity in written:
            aliases[tensor.name] = written[tensor.identity]
            continue
        check_writable(to, tensor.name, kind, tensor.shape)
        written[tensor.identity] = tensor.name
        items.append(Item(tensor.name, tensor, kind))
    return items, aliases


def _cast(tensor: LazyTensor, dtype: str | None) -> np.dtype:
    floating = tensor.dtype.kind == "f" or tensor.dtype.name.startswith(("bfloat", "float"))
    return np.dtype(getattr(ml_dtypes, dtype, dtype)) if dtype is not None and floating else tensor.dtype


def _shards(items: list[Item], limit: int) -> list[list[Item]]:
    shards, room = [[]], limit
    for item in items:
        if item.nbytes > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(item)
        room -= item.nbytes
    return shards


def _shard_name(to: str, number: int, total: int) -> str:
    if to == "orbax":
        return "default"  # orbax's own name for the one item of a checkpoint
    return f"model.{to}" if total == 1 else f"model-{number:05d}-of-{total:05d}.{to}"


def _question(checkpoint: Checkpoint, to: str, dtype: str | None, shards: list[list[Item]]) -> str:
    """What identifies this conversion: options, source files as they are now, and what goes into which shard."""
    files = [(str(file.absolute()), stat.st_size, stat.st_mtime_ns) for file in checkpoint.files if (stat := file.stat())]
    return json.dumps({"to": to, "dtype": dtype, "files": files, "shards": [[item.name for item in shard] for shard in shards]})


@contextlib.contextmanager
def _workplace(work: Path, question: str) -> Iterator[None]:
    """The folder to write in, held by this process alone; what another question left there is removed."""
    work.mkdir(exist_ok=True)
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left = work / _QUESTION
        if not left.is_file() or left.read_text() != question:
            for entry in work.iterdir():
                log.info("%s is of an unfinished conversion of something else and is removed", entry)
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            left.write_text(question)
        yield
    except BlockingIOError as error:
        raise CheckpointError(f"another process is writing {work}; wait for it, or give another name") from error
    finally:
        os.close(lock)


def _remaining(work: Path, shards: list[list[Item]], to: str) -> list[bool]:
    """For each shard whether an earlier run completed it (a shard has its name only when it was whole on the disk)."""
    return [(work / _shard_name(to, number, len(shards))).exists() for number in range(1, len(shards) + 1)]


def _check_room(work: Path, need: int) -> None:
    free = shutil.disk_usage(work).free
    if need > free:
        raise CapacityError(f"the conversion writes {need} bytes and {work.parent} has {free} free; free some, or cast to a smaller dtype")


def _write_shard(work: Path, name: str, to: str, shard: list[Item], aliases: dict[str, str], advance: Callable[[int], None]) -> None:
    temporary = work / f"{name}.tmp"
    if to == "orbax":
        shutil.rmtree(temporary, ignore_errors=True)
        write_orbax(temporary, {item.name: cast_values(item) for item in shard})
        advance(sum(item.nbytes for item in shard))
    else:
        here = {item.name for item in shard}
        write = write_safetensors if to == "safetensors" else write_npz
        write(temporary, shard, {name: kept for name, kept in aliases.items() if kept in here}, advance)
    os.replace(temporary, work / name)
    _sync_folder(work)


def _write_index(work: Path, to: str, shards: list[list[Item]], names: list[str], total: int) -> None:
    weight_map = {item.name: name for shard, name in zip(shards, names, strict=True) for item in shard}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1)
    (work / f"model.{to}.index.json").write_text(text)


def _copy_sides(checkpoint: Checkpoint, work: Path, dtype: str | None, written: list[str]) -> tuple[str, ...]:
    """What did not go along of the source's folder and the folders in it, and why; all else is copied."""
    source, left_out = checkpoint.path, []
    if not source.is_dir():
        return ()
    for folder, folders, files in os.walk(source):
        inner = Path(folder).relative_to(source)
        for name in [*sorted(folders), *sorted(files)]:
            file, place = Path(folder, name), inner / name
            own = inner == Path(".") and _is_read(checkpoint, name)
            reason = "it is converted" if own else "its name is taken" if str(place) in (_QUESTION, *written) else _unwanted(file)
            if reason and name in folders:
                folders.remove(name)
            elif name in folders:
                (work / place).mkdir(exist_ok=True)
            elif not reason:
                _copy(file, work / place)
            if reason and not own:
                left_out.append(f"{place}{'/' if file.is_dir() else ''} ({reason})")
    config = _config(source)
    keys = [key for key in ("dtype", "torch_dtype") if key in config]
    if dtype is not None and keys:
        (work / "config.json").write_text(json.dumps(config | dict.fromkeys(keys, dtype), indent=2) + "\n")
    return tuple(left_out)


def _copy(file: Path, target: Path) -> None:
    try:
        shutil.copyfile(file, target)
    except OSError as error:
        raise CheckpointError(f"cannot copy {file}: {error.strerror or error}; check its permissions and the room on the disk") from error


def _is_read(checkpoint: Checkpoint, name: str) -> bool:
    """Whether this entry at the top of the source's folder is part of the weights that are converted."""
    if checkpoint.load_format != "orbax":
        return bool(WEIGHTS.fullmatch(name)) and name not in checkpoint.left_out
    if not (checkpoint.path / "_METADATA").is_file():
        return name in ("default", "_CHECKPOINT_METADATA")
    return name.startswith("_") or name in ("commit_success.txt", "manifest.ocdbt", "descriptor") or (checkpoint.path / name).is_dir()


def _unwanted(file: Path) -> str | None:
    """Why this file or folder does not go along with converted weights; None if it does."""
    if file.name.startswith("."):
        return "hidden"
    if file.is_dir():
        return "a link to a folder" if file.is_symlink() else None
    if WEIGHTS.fullmatch(file.name):
        return "other weights or training state"
    if not file.is_file():
        return "not a plain file"
    return f"more than {MAX_SIDE_BYTES >> 20} MiB" if file.stat().st_size > MAX_SIDE_BYTES else None


def _config(source: Path) -> dict[str, Any]:
    try:
        config = json.loads((source / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # not needed to convert; whoever loads the model reports it
    return config if isinstance(config, dict) else {}


def _alias_shapes(aliases: dict[str, str], items: list[Item]) -> dict[str, tuple]:
    written = {item.name: (item.source.shape, item.dtype) for item in items}
    return {name: written[kept] for name, kept in aliases.items()}


def _check_result(work: Path, to: str, wanted: dict[str, tuple]) -> None:
    with open_checkpoint(work, to) as written:
        if {name: (tensor.shape, tensor.dtype) for name, tensor in written.items()} != wanted:
            raise CheckpointError(f"what was written to {work} is not what was asked; this is a fault of jaxllm or of the disk; report it")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
