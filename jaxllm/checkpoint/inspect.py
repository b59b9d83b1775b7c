"""What a checkpoint holds, without reading its data: the data of `jaxllm inspect`, and their rendering."""

import json
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path

from jaxllm.checkpoint.index import open_checkpoint

MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor; `shared_with` is the first name that has the same values in the same bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    location: str
    container: str
    nbytes: int
    file: str
    shared_with: str | None = None


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's tensors and totals; `stored_bytes` counts shared tensors once, `architecture` is config.json's.

    `left_out` names files beside it that look like weights and are not read; `keys` says what becomes of the keys of its JSON
    files: {file: {"honoured": keys, "ignored": keys, "refused": why it cannot be loaded, or None}}.
    """

    path: str
    container: str
    architecture: str | None
    model_type: str | None
    files: tuple[tuple[str, int], ...]
    tensors: tuple[TensorInfo, ...]
    parameters: int
    total_bytes: int
    stored_bytes: int
    dtypes: dict[str, int]
    left_out: tuple[str, ...] = ()
    keys: dict[str, dict] = field(default_factory=dict)

    def as_json(self) -> str:
        """The inspection as one JSON object (files as {name, bytes})."""
        fields = asdict(self) | {"files": [{"name": name, "bytes": size} for name, size in self.files]}
        return json.dumps(fields, indent=2)


def inspect_checkpoint(path: str | os.PathLike, load_format: str = "auto", account: Callable[[Path], dict] | None = None) -> Inspection:
    """The Inspection of the checkpoint at `path`: headers are read and checked, data are not. Raises as open_checkpoint.

    `account` gives the `keys` of a folder; it is the caller's, who knows the models.
    """
    with open_checkpoint(path, load_format) as checkpoint:
        config = _config(checkpoint.path)
        architectures = config.get("architectures")
        first: dict[tuple, str] = {}
        tensors, dtypes = [], Counter()
        parameters = stored = 0
        for tensor in checkpoint.values():
            shared_with = first.setdefault(tensor.identity, tensor.name) if tensor.nbytes else tensor.name
            is_repeat = shared_with != tensor.name
            tensors.append(
                TensorInfo(
                    tensor.name, tensor.shape, tensor.dtype.name, tensor.location, tensor.container, tensor.nbytes,
                    tensor.file.name, shared_with if is_repeat else None,
                )  # fmt: skip
            )
            if not is_repeat:
                parameters += prod(tensor.shape)
                stored += tensor.nbytes
                dtypes[tensor.dtype.name] += prod(tensor.shape)
        return Inspection(
            path=str(checkpoint.path),
            container=checkpoint.container,
            architecture=architectures[0] if isinstance(architectures, list) and architectures and isinstance(architectures[0], str) else None,
            model_type=config["model_type"] if isinstance(config.get("model_type"), str) else None,
            files=tuple((file.name, _size(file)) for file in checkpoint.files),
            tensors=tuple(tensors),
            parameters=parameters,
            total_bytes=checkpoint.total_bytes,
            stored_bytes=stored,
            dtypes=dict(dtypes),
            left_out=checkpoint.left_out,
            keys=account(checkpoint.path) if account and checkpoint.path.is_dir() else {},
        )


def render(inspection: Inspection, console: "rich.console.Console") -> None:  # noqa: F821  rich is imported when used
    """None; the inspection is printed as a table of tensors and a summary."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title, justify in (("tensor", "left"), ("shape", "left"), ("dtype", "left"), ("location", "left"), ("bytes", "right"), ("in", "left")):
        table.add_column(title, justify=justify, overflow="fold")
    for tensor in inspection.tensors:
        where = f"= {tensor.shared_with}" if tensor.shared_with else tensor.file
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        table.add_row(*map(escape, (tensor.name, shape, tensor.dtype, tensor.location, f"{tensor.nbytes:,}", where)))
    console.print(table)
    dtypes = ", ".join(f"{count:,} {name}" for name, count in inspection.dtypes.items())
    architecture = inspection.architecture or inspection.model_type or "not stated (no config.json)"
    for label, text in (
        ("path", inspection.path),
        ("container", f"{inspection.container}, {len(inspection.files)} file(s), {sum(size for _, size in inspection.files):,} bytes on disk"),
        ("architecture", architecture),
        ("tensors", f"{len(inspection.tensors):,}, {inspection.parameters:,} parameters ({dtypes})"),
        ("bytes", f"{inspection.stored_bytes:,}" + (f" ({inspection.total_bytes:,} if shared tensors count each)" if inspection.total_bytes != inspection.stored_bytes else "")),
    ):
        console.print(f"[bold]{label:>12}[/bold]  {escape(text)}", highlight=False)
    if inspection.left_out:
        console.print(f"[bold]{'left out':>12}[/bold]  {escape(', '.join(inspection.left_out))}", highlight=False)
    for file, keys in inspection.keys.items():
        for label in ("ignored", "refused"):
            if keys[label]:
                text = keys[label] if isinstance(keys[label], str) else f"in {file}: {', '.join(keys[label])}"
                console.print(f"[bold]{label:>12}[/bold]  {escape(text)}", highlight=False)


def _config(path: Path) -> dict:
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            return {}
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # an inspection shows the weights; the loader of the model reports a bad config.json
    return config if isinstance(config, dict) else {}


def _size(file: Path) -> int:
    if file.is_dir():
        return sum(entry.stat().st_size for entry in file.rglob("*") if entry.is_file())
    return file.stat().st_size
