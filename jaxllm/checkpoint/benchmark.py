"""How fast a checkpoint loads, against a plain sequential read of the same files: the data of `jaxllm bench load`."""

import gc
import os
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from jaxllm.checkpoint.index import Checkpoint, open_checkpoint
from jaxllm.checkpoint.load import load_params
from jaxllm.checkpoint.mapped import LazyTensor
from jaxllm.checkpoint.rules import Rule
from jaxllm.errors import UsageError

SCAN_BYTES = 16 << 20
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class LoadBenchmark:
    """Bytes per second of loading and of reading; `ratio` is the median over pairs taken one after the other.

    `read` fills fresh memory, as whoever wants the bytes must; `scan` reads through one buffer of 16 MiB and keeps
    nothing, which no loader can do. `host_peak_bytes` is how far the process's peak memory rose above its level before the load, the parameters
    themselves included where the device is the host; `parameter_bytes` says how much of it they are.
    """

    path: str
    container: str
    device: str
    file_bytes: int
    parameter_bytes: int
    largest_tensor_bytes: int
    load_bytes_per_s: float
    read_bytes_per_s: float
    scan_bytes_per_s: float
    ratio: float
    repeats: int
    cold: bool
    host_peak_bytes: int


def load_benchmark(path: str | os.PathLike, load_format: str = "auto", *, repeats: int = 3, cold: bool = False) -> LoadBenchmark:
    """The LoadBenchmark of every tensor at `path`, loaded to JAX's default device exactly as `load_params` does.

    Load and read alternate `repeats` times, in turn one and the other first; the read takes one file after another,
    front to back, into memory.
    `cold` asks the kernel to forget the files before each (posix_fadvise); otherwise one scan warms them first.
    """
    if repeats < 1:
        raise UsageError(f"repeats is {repeats}; at least 1 is needed", "repeats")
    jax.block_until_ready(jax.device_put(np.zeros(1)))  # the device starts outside the clock
    with open_checkpoint(path, load_format) as checkpoint:
        files = _data_files(checkpoint)
        tensors = {name: tensor for name, tensor in checkpoint.items() if jax.dtypes.canonicalize_dtype(tensor.dtype) == tensor.dtype}
        if not cold:
            _scan(files)
        before, reads, loads, scans, peak = _level_bytes(), [], [], [], 0
        load = (lambda: _load(checkpoint, tensors), loads)
        read = (lambda: _read(files), reads)
        for repeat in range(repeats):
            # The order alternates: whoever comes second finds the memory that the first gave back.
            for action, seconds in (load, read) if repeat % 2 == 0 else (read, load):
                seconds.append(_timed(action, files, cold))
                peak = peak or _peak_bytes() - before  # of the first load: the read has its own
            scans.append(_timed(lambda: _scan(files), files, cold))
        size, loaded = sum(file.stat().st_size for file in files), sum(tensor.nbytes for tensor in tensors.values())
        stored = sum({tensor.identity: tensor.nbytes for tensor in tensors.values()}.values())
        return LoadBenchmark(
            path=str(path),
            container=checkpoint.container,
            device=str(jax.devices()[0]),
            file_bytes=size,
            parameter_bytes=loaded,
            largest_tensor_bytes=max((tensor.nbytes for tensor in tensors.values()), default=0),
            load_bytes_per_s=stored / statistics.median(loads),
            read_bytes_per_s=size / statistics.median(reads),
            scan_bytes_per_s=size / statistics.median(scans),
            ratio=statistics.median(read * stored / (load * size) for read, load in zip(reads, loads, strict=True)),
            repeats=repeats,
            cold=cold,
            host_peak_bytes=max(peak, 0),
        )


def _load(checkpoint: Checkpoint, tensors: dict[str, LazyTensor]) -> None:
    # Names as dict keys, each its own target: the whole of load_params but the renaming.
    rules = [Rule(name.replace("{", "(").replace("}", ")"), str(index)) for index, name in enumerate(tensors)]
    template = {str(index): jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for index, tensor in enumerate(tensors.values())}
    params = load_params(_Subset(checkpoint, tensors), rules, template)
    jax.block_until_ready(params)


class _Subset(dict):
    """The tensors that this process's JAX can hold (no 64-bit types unless it was told so), as a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, tensors: dict[str, LazyTensor]):
        super().__init__((name.replace("{", "(").replace("}", ")"), tensor) for name, tensor in tensors.items())
        self.path = checkpoint.path


def _data_files(checkpoint: Checkpoint) -> list[Path]:
    found = [[entry for entry in sorted(file.rglob("*")) if entry.is_file()] if file.is_dir() else [file] for file in checkpoint.files]
    return [file for group in found for file in group]


def _read(files: list[Path]) -> None:
    # In blocks above the 32 MiB that glibc recycles: the memory is fresh, as it is for the first load of a process.
    kept = []
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            left = file.stat().st_size
            while left > 0:
                block = np.empty(min(BLOCK_BYTES, left), np.uint8)
                count = handle.readinto(block)
                kept.append(block)
                left = left - count if count else 0


def _scan(files: list[Path]) -> None:
    buffer = bytearray(SCAN_BYTES)
    for file in files:
        with open(file, "rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def _timed(action, files: list[Path], cold: bool) -> float:
    gc.collect()
    if cold:
        for file in files:
            with open(file, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def _level_bytes() -> int:
    """Resident memory now, from which the next peak is counted; where the kernel allows, the peak so far is forgotten."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status_bytes("VmRSS")
    except (OSError, LookupError):
        return _peak_bytes()


def _peak_bytes() -> int:
    """The most memory this process has had resident; getrusage counts in KiB on Linux and in bytes on macOS."""
    try:
        return _status_bytes("VmHWM")  # getrusage's maximum outlives exec, and may be that of a parent
    except (OSError, LookupError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _status_bytes(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024
