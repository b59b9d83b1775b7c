"""The arrows of docs/design.md: which part of the house may import which."""
import ast
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(file for folder in ("jaxllm", "pallas_kernels") for file in (ROOT / folder).rglob("*.py"))
NO_JAX = ("jaxllm.engine.request", "jaxllm.engine.pages", "jaxllm.engine.scheduler", "jaxllm.engine.stop")

# importer -> what neither it nor anything below it may name
NEVER = {
    "pallas_kernels": ("jaxllm",),
    "jaxllm.models": ("jaxllm.engine", "jaxllm.text", "jaxllm.server", "jaxllm.llm"),
    "jaxllm.layers": ("jaxllm.engine", "jaxllm.models", "jaxllm.text", "jaxllm.server", "jaxllm.llm"),
    "jaxllm.engine": ("jaxllm.server", "jaxllm.text", "jaxllm.llm"),
    "jaxllm.checkpoint": ("jaxllm.models", "jaxllm.engine", "jaxllm.text", "jaxllm.server", "jaxllm.llm"),
    "jaxllm.text": ("jaxllm.engine", "jaxllm.models", "jaxllm.layers", "jaxllm.server", "jaxllm.llm", "jax"),
    "jaxllm": ("jaxllm.cli", "torch"),
    **{name: ("jax", "pallas_kernels") for name in NO_JAX},
}


def module_name(file: Path) -> str:
    """The dotted name under which a file is imported."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(file: Path, tree: ast.AST) -> set[str]:
    """Dotted names that the nodes of a tree import, with `from a import b` as both a and a.b."""
    package = module_name(file).split(".") if file.name == "__init__.py" else module_name(file).split(".")[:-1]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[:len(package) - node.level + 1], node.module or ""]).strip(".") if node.level else node.module
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def within(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


@pytest.mark.parametrize("importer", NEVER)
def test_forbidden_arrows_are_not_drawn(importer):
    found = [f"{module_name(file)} imports {name}" for file in FILES if within(module_name(file), importer)
             for name in imported(file, parsed(file)) for part in NEVER[importer]
             if within(name, part) and module_name(file) not in ("jaxllm.cli", "jaxllm.__main__")]
    assert found == []


def test_the_kernels_import_jax_and_numpy_only():
    allowed = sys.stdlib_module_names | {"jax", "jaxlib", "numpy", "pallas_kernels"}
    found = [f"{module_name(file)} imports {name}" for file in FILES if within(module_name(file), "pallas_kernels")
             for name in imported(file, parsed(file)) if name.split(".")[0] not in allowed]
    assert found == []


@pytest.mark.parametrize("start", NO_JAX)
def test_the_bookkeeping_of_the_engine_loads_without_jax(start):
    """Follows imports at the top of modules through the house; a function may import what it needs."""
    by_name = {module_name(file): file for file in FILES}
    if start not in by_name:
        pytest.skip(f"{start} is not written yet")
    todo, seen = [start], set()
    while todo:
        name = todo.pop()
        if name in by_name and name not in seen:
            seen.add(name)
            top = ast.Module([node for node in parsed(by_name[name]).body if isinstance(node, ast.Import | ast.ImportFrom)], [])
            names = imported(by_name[name], top)
            assert not any(within(n, "jax") for n in names), f"{start} reaches jax through {name}"
            todo += names | {name.rpartition(".")[0]}


def test_only_the_command_line_reads_the_environment():
    """And machine.py, which reads XLA_FLAGS: a variable of XLA's, not an option of ours."""
    def reads(tree):
        return any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb") for node in ast.walk(tree)) \
            or any(isinstance(node, ast.ImportFrom) and node.module == "os" and
                   {alias.name for alias in node.names} & {"environ", "getenv"} for node in ast.walk(tree))
    assert [module_name(file) for file in FILES if reads(parsed(file)) and module_name(file) not in ("jaxllm.cli", "jaxllm.machine")] == []


def test_no_file_holds_two_rooms():
    long = {module_name(file): count for file in FILES if (count := len(file.read_text(encoding="utf-8").splitlines())) > 450}
    assert long == {}
