"""What this machine's library does with a sum, found by asking it: the `Forms` for the products of a model.

Bits decide which law holds and which forms have it; the clock decides only among forms of equal bits. So two probes of one
machine may find different forms, and never different bits.
"""
import dataclasses
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import forms as all_forms
from pallas_kernels.forms import FORMS, QUICK, SAFE, Forms, Law, possible

# Numbers of rows that are tried; between two of them the form of the larger is taken. 27 stands for all that are no power of two.
ROWS = (1, 2, 4, 8, 16, 27, 32, 64, 512)
AT_TRIED_ROWS = ("left", "stream", "passes")  # forms that run at the very numbers of rows that are tried
DISTINCT = 7                           # rows that differ; they repeat, so that a row meets every place of a tile
MOST_COLUMNS = 2048                    # N beyond it is tried as this and N's last 64
PORTABLE = Law(512, True)              # what the libraries of every processor seen so far can do
QUICKLY_COMPILED = {"xla_backend_optimization_level": 0}  # of programs that are the library's product, and little beside it
PASSES = 5                             # timings of each program; the least counts


@dataclasses.dataclass(frozen=True)
class Shapes:
    """The products of a model."""

    products: tuple[tuple[int, int], ...]  # (K, N) of each weight
    heads: int
    kv_heads: int
    head_dim: int


def laws(dtype, portable: bool) -> tuple[Law, ...]:
    """The laws that are tried, the first that holds everywhere is taken.

    The longer chain first: where the library has it, few rows need no chunks beside one another (docs/cpu-results.md). In bfloat16 the
    library's own order first: CONSISTENT forbids a processor's matrix unit, and costs up to 6.5 times there.
    """
    if portable:
        return (PORTABLE,)
    own, chains = (Law(None, False), Law(None, True)), (Law(1024, False), PORTABLE)
    return (own[0], *chains, own[1]) if dtype == jnp.bfloat16 else (*chains, *reversed(own))


def find(shapes: Shapes, dtype, *, portable: bool = False, split: int = 128, tile: int = 32) -> Forms:
    """The Forms for a model's products in `dtype` on the default CPU device; takes a second or two.

    Every form is compared with the law as XLA writes it out, or, for the library's own order, with itself at 64 rows. Where no
    quick form has a law's bits for some shape and number of rows, the safe ones are taken.
    """
    dtype = jnp.dtype(dtype)
    cases = [_Case(k, n, dtype) for k, n in dict.fromkeys((k, _columns(n)) for k, n in shapes.products)]
    heads = _Heads(shapes, dtype, split, tile)
    tried = laws(dtype, portable)
    with jax.ensure_compile_time_eval(), ThreadPoolExecutor(max_workers=4) as pool:
        for names, law in [(QUICK, law) for law in tried] + [(QUICK + SAFE, PORTABLE)]:
            attention = heads.holds(law, pool)
            table = attention and _table(cases, law, dtype, names, pool)
            if table:
                found = tuple(((k, n), table[k, _columns(n)]) for k, n in dict.fromkeys(shapes.products))
                return Forms(law, found, *attention, proven=True)
    return Forms(PORTABLE)


def _columns(n: int) -> int:
    return n if n <= MOST_COLUMNS else MOST_COLUMNS + n % 64


def _table(cases, law: Law, dtype, names: Iterable[str], pool) -> dict | None:
    """{(K, N): ((rows, form), ...)} by the fastest of the forms that have the law's bits; None where some rows have none."""
    anchors = dict(zip(cases, pool.map(lambda case: case.anchor(law), cases)))
    table = {}
    for group in ([n for n in names if n in QUICK], *([n] for n in names if n in SAFE)):
        open_cases = [case for case in cases if (case.k, case.n) not in table]
        todo = [(case, name, rows) for case in open_cases for rows in ROWS for name in group
                if possible(name, case.k, case.n, rows, law, dtype) and (rows & rows - 1 == 0 or name != "left")]
        programs = dict(zip(todo, pool.map(lambda at: at[0].program(*at[1:], law), todo)))
        holds = {at: at[0].has(program, at[2], anchors[at[0]]) for at, program in programs.items()}
        # What runs at other numbers of rows than those that were tried must hold at all of these.
        sound = {(case, name): name in AT_TRIED_ROWS or all(holds.get((case, name, rows), True) for rows in ROWS)
                 for case in open_cases for name in group}
        programs = {at: program for at, program in programs.items() if holds[at] and sound[at[:2]]}
        seconds = _seconds(programs, group)
        for case in open_cases:
            best = [min(((seconds[case, n, rows], n) for n in group if (case, n, rows) in programs), default=None) for rows in ROWS]
            if None not in best:
                table[case.k, case.n] = tuple((rows, name) for rows, (_, name) in zip(ROWS, best))
    return table if len(table) == len({(case.k, case.n) for case in cases}) else None


def _seconds(programs: dict, group: list[str]) -> dict:
    """The least time of each program over a few passes. Each form has its own copy of the weights, and a pass goes through all shapes,
    so that weights come from memory, as they do in a step; what has no rival is not run."""
    rivals = {at for at in programs if sum((at[0], name, at[2]) in programs for name in group) > 1}
    least = dict.fromkeys(programs, 0.0) | dict.fromkeys(rivals, 1e9)
    copies = {(at[0], at[1]): at[0].w + 0 for at in rivals}
    for rows in ROWS:
        turn = [at for at in programs if at in rivals and at[2] == rows]
        for _ in range(PASSES):
            for at in turn:
                compiled, operands, _ = programs[at]
                operands = [copies[at[:2]] if operand is at[0].w else operand for operand in operands]
                start = time.perf_counter()
                jax.block_until_ready(compiled(*operands))
                least[at] = min(least[at], time.perf_counter() - start)
    return least


class _Case:
    """One shape of a product, with numbers to try it on: large and small, and a row of zeros."""

    def __init__(self, k: int, n: int, dtype):
        rng = np.random.default_rng([k, n])
        self.k, self.n, self.dtype = k, n, dtype
        self.w = jax.device_put(((rng.random((n, k), np.float32) - 0.5) * np.float32((12 / k) ** 0.5)).astype(dtype))
        distinct = rng.standard_normal((DISTINCT, k), np.float32) * np.exp(rng.standard_normal((1, k), np.float32))
        distinct[-1] = 0
        self.distinct = distinct.astype(dtype)
        self._library = cache(self._product)

    def rows(self, count: int) -> np.ndarray:
        return np.resize(self.distinct, (count, self.k))

    def program(self, name: str, rows: int, law: Law):
        """(compiled, its operands, what makes [rows, N] of its result) of a form. Of the quick forms the library's product alone is
        compiled here, and numpy does the rest: it is moved and added, exactly."""
        x = self.rows(rows)
        if name == "left":
            x = all_forms.spread(x, law, np)
            return self._library(x.shape[0], True, law.consistent), (self.w, jax.device_put(x)), \
                lambda out: all_forms.gathered(out, (rows, self.k), law)
        if name == "plain":
            x = all_forms.at_least_two(x, np)
            return self._library(x.shape[0], False, law.consistent), (jax.device_put(x), self.w), lambda out: out[:rows]
        program = jax.jit(partial(FORMS[name], law=law), compiler_options=law.compiler_options or None)
        return program.lower(x, self.w).compile(), (jax.device_put(x), self.w), lambda out: out

    def _product(self, rows: int, weights_left: bool, consistent: bool):
        x = jax.ShapeDtypeStruct((rows, self.k), self.dtype)
        options = Law(None, consistent).compiler_options | QUICKLY_COMPILED
        return jax.jit(all_forms.library, compiler_options=options).lower(*((self.w, x) if weights_left else (x, self.w))).compile()

    def anchor(self, law: Law) -> np.ndarray:
        """[DISTINCT, N]: the law's bits, by XLA's own loops; of the library's own order, what it gives 64 rows."""
        compiled, operands, _ = self.program("plain", 64, law) if law.chunk is None else self.program("written", DISTINCT, law)
        return np.asarray(compiled(*operands))[:DISTINCT]

    def has(self, program, rows: int, anchor: np.ndarray) -> bool:
        """Whether all rows of a form have the law's bits."""
        compiled, operands, finish = program
        out = finish(np.asarray(compiled(*operands)))
        return np.ascontiguousarray(out).tobytes() == np.resize(anchor, out.shape).tobytes()


class _Heads:
    """The two products of attention: scores q . k over the head's width, and p . v over a split."""

    def __init__(self, shapes: Shapes, dtype, split: int, tile: int):
        self.dtype, self.kv_heads, self.width, self.split = dtype, shapes.kv_heads, shapes.head_dim, split
        self.group = shapes.heads // shapes.kv_heads
        self.rows = (self.group, tile * self.group)       # of a decode step and of a prefill's tile
        rng = np.random.default_rng([self.group, self.width])
        draw = lambda *shape: rng.standard_normal(shape, np.float32)
        self.q, self.k, self.v = draw(self.group, self.width), draw(split, self.width), draw(split, self.width)
        self.p = np.exp(draw(self.group, split))

    def holds(self, law: Law, pool) -> tuple[int, bool] | None:
        """(attention_rows, values_last) under which rows have the law's bits in every company; the cheapest; None if nothing does."""
        for floor in (2, 4, 8):
            for last in (False, True):
                if self._holds(law, floor, last, pool):
                    return floor, last
        return None

    def _holds(self, law: Law, floor: int, last: bool, pool) -> bool:
        from pallas_kernels.reference import attention_products
        forms = dataclasses.replace(Forms(law), attention_rows=floor, values_last=last)
        scores, values = attention_products(forms)
        as_law = Law(law.chunk and max(law.chunk, self.split, self.width), law.consistent)

        def run(company):
            """[(got, q rows, p rows)] of one number of sequences, for each number of rows."""
            out = []
            for rows in self.rows:
                spread = lambda a, count: np.broadcast_to(np.resize(a, (count, a.shape[1])).astype(self.dtype),
                                                          (company, self.kv_heads, count, a.shape[1]))
                both = jax.jit(lambda q, p, k, v: (scores(q, k), values(p, v)), compiler_options=law.compiler_options | QUICKLY_COMPILED)
                out.append(both(spread(self.q, rows), spread(self.p, rows), spread(self.k, self.split), spread(self.v, self.split)))
            return [np.asarray(a) for pair in out for a in pair]

        results = list(pool.map(run, (1, 5)))
        if law.chunk is None:
            anchors = [a[0, 0, :self.group] for a in results[0][2:]]
        else:
            write = jax.jit(partial(all_forms.written, law=as_law))
            anchors = [np.asarray(write(a.astype(self.dtype), b.astype(self.dtype)))
                       for a, b in ((self.q, self.k), (self.p, np.ascontiguousarray(self.v.T)))]
        return all(a.tobytes() == np.broadcast_to(np.resize(anchors[i % 2], a.shape[2:]), a.shape).tobytes()
                   for company in results for i, a in enumerate(company))


def differing(kernels, shapes: Shapes, dtype, rows: int, many: int = 64) -> list[str]:
    """The names of the sums of `kernels` of which a row among `rows` has other bits than among `many`; what a failed proof reports."""
    dtype = jnp.dtype(dtype)
    width = shapes.products[0][0]
    draw = lambda *shape: jnp.asarray(np.random.default_rng(shape).standard_normal(shape, np.float32))
    sums = {f"the product of K {k} and N {n}": (k, partial(kernels.matmul, w=draw(n, k).astype(dtype), out_dtype=jnp.float32))
            for k, n in dict.fromkeys((k, _columns(n)) for k, n in shapes.products)}
    sums["rms_norm"] = width, lambda x: kernels.rms_norm(x, jnp.ones(width, dtype), 1e-5)
    sums["log_sum_exp"] = shapes.products[-1][1], lambda x: kernels.log_sum_exp(x.astype(jnp.float32))
    found = []
    for name, (k, function) in sums.items():
        x = draw(max(rows, many), k).astype(dtype)
        few, most = (np.asarray(jax.jit(function, compiler_options=kernels.compiler_options or None)(x[:n])) for n in (rows, many))
        both = min(rows, many)
        if few[:both].tobytes() != most[:both].tobytes():
            found.append(name)
    return found
