"""`system_fingerprint`: equal fingerprints promise equal bits, and its parts say what differs (docs/reproducibility.md lists them)."""
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import jax
import numpy as np

from jaxllm import machine
from jaxllm.errors import UsageError

log = logging.getLogger("jaxllm")


def package_version() -> str:
    """The version of the installed jaxllm."""
    try:
        return version("jaxllm")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "0+unknown"


def content_hash(files: Iterable[Path], cache: Path | None = None) -> str:
    """A hash of the files' contents. With `cache`, a JSON file, an unchanged file (size and time) is not read again."""
    known = _read_cache(cache)
    out = hashlib.blake2b(digest_size=16)
    changed = False
    for file in sorted(files, key=lambda f: f.name):
        stat = file.stat()
        key = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
        if key not in known:
            with file.open("rb") as stream:
                known[key] = hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            changed = True
        out.update(f"{file.name}:{known[key]}\n".encode())
    if changed and cache is not None:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            part = cache.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(known))
            part.replace(cache)
        except OSError as e:
            log.info("the hash of the weights is not kept: %s", e)
    return out.hexdigest()


def _read_cache(cache: Path | None) -> dict:
    try:
        known = json.loads(cache.read_text()) if cache is not None and cache.is_file() else {}
    except (OSError, ValueError):
        return {}  # a damaged cache costs one more read of the weights
    return known if isinstance(known, dict) else {}


def params_hash(params) -> str:
    """A hash of the weights themselves, for those that came from no file."""
    out = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        out.update(f"{jax.tree_util.keystr(path)}:{leaf.dtype}:{leaf.shape}".encode())
        out.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return out.hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where weights came from: files, or a name that the caller gave them, or neither. One object for each set of weights."""

    files: tuple[Path, ...] = ()
    version: str | None = None

    def hash(self, params, cache: Path | None) -> str:
        """What the fingerprint calls the weights."""
        if self.version is not None:
            return self.version
        if self.files:
            return content_hash(self.files, cache)
        if params is None:
            raise UsageError("this LLM is closed and its weights were never hashed; ask for the fingerprint before")
        return params_hash(params)


def config_hash(cfg) -> str:
    """A short hash of a frozen config: the shape of the model as the engine sees it."""
    return hashlib.blake2b(repr(cfg).encode(), digest_size=8).hexdigest()


def parts(*, dtype: str, kernels, weights: str, tokenizer: str, model: str, reproducible: str) -> dict[str, str]:
    """Everything that equal bits depend on, by name. Two processors of which one could answer otherwise have different parts."""
    here = machine.surroundings()
    return {
        "jaxllm": package_version(), "jax": here["jax"], "jaxlib": here["jaxlib"],
        "platform": here["platform"], "device": here["device"], "driver": here["driver"], "devices": "1", "xla_flags": here["xla_flags"],
        "dtype": dtype, "matmul_precision": "float32 accumulation, no TF32", "kernels": kernels.name, "sums": kernels.sums,
        "reproducible": reproducible, "model": model, "weights": weights, "tokenizer": tokenizer,
    }


def fingerprint(named: dict[str, str]) -> str:
    """The short form of `parts`: jaxllm-<version>-<12 hex digits>."""
    digest = hashlib.blake2b(json.dumps(named, sort_keys=True).encode(), digest_size=6).hexdigest()
    return f"jaxllm-{named['jaxllm']}-{digest}"
