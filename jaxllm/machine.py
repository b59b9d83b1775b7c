"""What the machine at hand is, and what was found out about it: bits depend on both.

`Facts` keeps what a probe or a proof found in a file of the user's cache folder, under everything that it depends on: processor,
versions, flags, and the files that computed it.
"""
import hashlib
import json
import logging
import os
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp

import pallas_kernels
from pallas_kernels import probe
from pallas_kernels.forms import Forms, Law

log = logging.getLogger("jaxllm")
DEFAULT_FOLDER = "~/.cache/jaxllm"
# Instruction sets that a library chooses its kernels by.
TELLING = ("fma", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_fp16", "avx10_1",
           "asimd", "asimdhp", "bf16", "i8mm", "sve", "sve2")


@cache
def processor() -> str:
    """The processor's model and the instruction sets that decide on an order of sums; never a host's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    said = {}
    for line in lines:  # the first core speaks for all
        name, _, value = line.partition(":")
        said.setdefault(name.strip(), value.strip())
    name = said.get("model name") or f"{platform.machine()} implementer {said.get('CPU implementer')} part {said.get('CPU part')}"
    family = "".join(f" {word} {said[key]}" for word, key in (("family", "cpu family"), ("model", "model")) if key in said)
    flags = (said.get("flags") or said.get("Features") or "").split()
    return f"{name}{family}, {' '.join(flag for flag in TELLING if flag in flags) or 'no known extensions'}"


def xla_flags() -> str:
    """XLA_FLAGS as XLA read them: its variable and not ours, so that a process that sets it is told apart."""
    return " ".join(sorted(os.environ.get("XLA_FLAGS", "").split()))


def device() -> str:
    """The device that computes: a processor by its own name, a card by its kind."""
    first = jax.devices()[0]
    return processor() if first.platform == "cpu" else first.device_kind


def threads() -> int:
    """Threads that XLA computes with on a CPU: NPROC, a variable of XLA's, or the cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    stated = os.environ.get("NPROC", "")
    return int(stated) if stated.isdigit() and int(stated) > 0 else cores


@cache
def _code() -> str:
    """A hash of the files that decide on an order of sums: a fact found by other code is no fact."""
    root = Path(pallas_kernels.__file__).parent
    files = [*sorted(root.glob("*.py")), *sorted((Path(__file__).parent / "models").glob("*.py")), Path(__file__)]
    return hashlib.blake2b(b"".join(file.read_bytes() for file in files), digest_size=8).hexdigest()


def surroundings() -> dict[str, str]:
    """What every fact depends on, by name."""
    first = jax.devices()[0]
    return {"device": device(), "platform": first.platform, "driver": str(getattr(first.client, "platform_version", "")),
            "jax": jax.__version__, "jaxlib": version("jaxlib"), "xla_flags": xla_flags(), "code": _code()}


class Facts:
    """What was found on this machine, by name; kept in `folder` between processes, or with None in this one alone.

    A file that cannot be read or written costs the finding once more, and nothing else.
    """

    def __init__(self, folder: Path | None):
        self._file = folder and folder / "facts.json"
        self._known = self._read()

    def get(self, about):
        """The value that was put there, or None."""
        return self._known.get(_key(about))

    def put(self, about, value) -> None:
        """Keeps a JSON value; of two processes that write at once both keep theirs, or one finds again."""
        self._known = self._read() | self._known | {_key(about): value}
        if self._file is None:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            part = self._file.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(self._known))
            part.replace(self._file)
        except OSError as e:
            log.info("what was found about this machine is not kept: %s", e)

    def _read(self) -> dict:
        try:
            known = json.loads(self._file.read_text()) if self._file is not None else {}
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


def _key(about) -> str:
    # Threads are no part of the fingerprint: the bits are the same for one and for sixteen. Each number of them is proven anew.
    return hashlib.blake2b(json.dumps([surroundings(), threads(), about], sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def facts(folder: str | Path | None) -> Facts:
    """The facts kept in a folder; None: in the user's cache folder; "off": in this process alone. One object for each."""
    return _facts(None if folder == "off" else Path(folder or DEFAULT_FOLDER).expanduser())


@cache
def _facts(folder: Path | None) -> Facts:
    return Facts(folder)


def forms(shapes: probe.Shapes, dtype: str, portable: bool, known: Facts) -> Forms:
    """The forms of a model's products on this CPU: as they were found before, or found now, which takes a second or two."""
    about = ["forms", repr(shapes), dtype, portable]
    kept = known.get(about)
    if kept is not None:
        law, products, rows, last, proven = kept
        return Forms(Law(*law), tuple((tuple(shape), tuple(map(tuple, table))) for shape, table in products), rows, last, proven)
    found = probe.find(shapes, jnp.dtype(dtype), portable=portable)
    log.info("products in %s: %s", dtype, found.law)
    known.put(about, [[found.law.chunk, found.law.consistent], found.products, found.attention_rows, found.values_last, found.proven])
    return found
