"""A matrix product on a CPU: the laws that its sums may follow, and the forms in which a law can be computed.

XLA hands every product of two rows or more to a library whose order of additions is a fact about that library and that processor
(docs/reproducibility.md). So the order is a `Law`, and what computes it is a `form`, chosen on the machine by
`pallas_kernels.probe`, bit against bit; of the forms that have the same bits the fastest is taken. `Forms` is what was found.
"""
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.tree import added

# XLA's "consistent arithmetic": its library takes those kernels alone whose sums are chains of fused multiply-adds.
CONSISTENT = {"xla_cpu_enable_platform_dependent_math": False}
FEWEST = 8           # rows that the library computes at once with the weights as its left operand: fewer are padded
MOST_SPREAD = 64     # rows beyond which `left` is never faster: the library then packs as much as `plain` does
ACCUMULATORS = 8     # multiply-adds in flight in `stream`: one is bound by its latency, 16 leave no registers


def precision(dtype) -> lax.Precision:
    """float32 means float32: without this a GPU rounds the operands to TF32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def library(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [M, K] . b [N, K] -> float32 [M, N] by XLA's library, in whatever order that has. Nothing is fused with it."""
    out = lax.dot_general(lax.optimization_barrier(a), b, (((1,), (1,)), ((), ())), precision=precision(a.dtype),
                          preferred_element_type=jnp.float32)
    return lax.optimization_barrier(out)


def library_batched(a: jax.Array, b: jax.Array, *, last: bool) -> jax.Array:
    """a [n, K, M, C] . b -> float32 [n, K, M, D] by the same library; last: b is [n, K, D, C], else [n, K, C, D]."""
    out = lax.dot_general(lax.optimization_barrier(a), b, (((3,), (3 if last else 2,)), ((0, 1), (0, 1))), precision=precision(b.dtype),
                          preferred_element_type=jnp.float32)
    return lax.optimization_barrier(out)


@dataclasses.dataclass(frozen=True)
class Law:
    """The order of a product's sums: K in chunks, each an ascending chain of fused multiply-adds from zero, added ascending."""

    chunk: int | None   # K of one chain; None: the library's own order, whatever that is, as long as rows do not change it
    consistent: bool    # programs are compiled with CONSISTENT

    @property
    def compiler_options(self) -> dict:
        return CONSISTENT if self.consistent else {}

    def __str__(self) -> str:
        order = "the library's own" if self.chunk is None else f"chains of {self.chunk}"
        return order + (", consistent arithmetic" if self.consistent else "")


def plain(x: jax.Array, w: jax.Array, law: Law) -> jax.Array:
    """x . w. One row is XLA's own loop and another order, so it becomes two."""
    return library(at_least_two(x, jnp), w)[:x.shape[0]]


def at_least_two(x, xp):
    """One row as two; xp is jnp or, for a probe of the library alone, numpy."""
    return xp.concatenate([x, x]) if x.shape[0] == 1 else x


def left(x: jax.Array, w: jax.Array, law: Law) -> jax.Array:
    """w . x: the library packs its right operand, here the few rows and not the weights."""
    return gathered(library(w, spread(x, law, jnp)), x.shape, law)


def spread(x, law: Law, xp):
    """The rows that `left` multiplies. The library cuts K by their number, so each chunk of the law becomes a row of its own, zero
    elsewhere: adding a product with zero changes no bit. Other numbers of rows than powers of two would let its cuts fall inside
    a chunk."""
    rows, k = x.shape
    chunk = law.chunk or k
    chunks = -(-k // chunk)
    if chunks > 1:
        here = (xp.arange(k) // chunk == xp.arange(chunks)[:, None])[:, None]
        x = xp.where(here, x, xp.zeros((), x.dtype)).reshape(chunks * rows, k)
    padded = max(FEWEST, 1 << (chunks * rows - 1).bit_length())
    return x if padded == chunks * rows else xp.pad(x, ((0, padded - chunks * rows), (0, 0)))


def gathered(parts, shape: tuple[int, int], law: Law):
    """What `left` makes of its product [N, rows]: the chunks of each row added, ascending."""
    rows, k = shape
    chunks = -(-k // (law.chunk or k))
    parts = parts[:, :chunks * rows].T
    return parts if chunks == 1 else added(parts.reshape(chunks, rows, -1))


def stream(x: jax.Array, w: jax.Array, law: Law) -> jax.Array:
    """One row [1, K] by XLA's own loops, reading w once and packing nothing: several rows of w at a time, and their chunks."""
    n, k = w.shape
    chunks = -(-k // law.chunk)
    several = _several(n, chunks)
    # Without the barrier what computes x is fused into the sums, and done again for each row of w.
    x = lax.optimization_barrier(jnp.where(jnp.arange(k) // law.chunk == jnp.arange(chunks)[:, None], x, 0))
    w = w.reshape(several, n // several, k)
    sums = _chains([(x[c], w[i]) for i in range(several) for c in range(chunks)])
    return jnp.concatenate([added(jnp.stack(sums[i * chunks:(i + 1) * chunks])) for i in range(several)])[None]


def passes(x: jax.Array, w: jax.Array, law: Law) -> jax.Array:
    """As `stream`, but a pass over w for each chunk: more rows of w at a time, and shorter loops."""
    n, k = w.shape
    several = _several(n, 1)
    x, w = lax.optimization_barrier(x), w.reshape(several, n // several, k)
    chunks = [slice(at, at + law.chunk) for at in range(0, k, law.chunk)]
    return added(jnp.stack([jnp.concatenate(_chains([(x[0, c], w[i, :, c]) for i in range(several)])) for c in chunks]))[None]


def _several(n: int, chunks: int) -> int:
    """How many rows of the weights `stream` sums at a time."""
    return next((c for c in (8, 4, 2, 1) if c * chunks <= ACCUMULATORS and n % c == 0), 0)


def cut(x: jax.Array, w: jax.Array, law: Law) -> jax.Array:
    """Chunk by chunk: asks nothing of the library but one chain in each. Slicing w copies it: 1.2 to 3 times slower."""
    k = x.shape[1]
    chunk = law.chunk or k
    return added(jnp.stack([plain(x[:, at:at + chunk], w[:, at:at + chunk], law) for at in range(0, k, chunk)]))


def written(x: jax.Array, w: jax.Array, law: Law) -> jax.Array:
    """Each multiply-add by XLA itself and no library: the law in person. Ten times slower for many rows."""
    n, k = w.shape
    x, w = lax.optimization_barrier((x, jnp.pad(w, ((0, n % 2), (0, 0))).reshape(2, -1, k)))
    parts = [jnp.concatenate(_chains([(x[:, None, at:at + law.chunk], half[:, at:at + law.chunk]) for half in w]), axis=1)
             for at in range(0, k, law.chunk)]
    return added(jnp.stack(parts))[:, :n]


def _chains(pairs: list[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, ...]:
    """For each of two or more (x [..., K], w [N, K]) the products summed over K in ascending order -> float32 [..., N] of each.

    As one `reduce` of several operands XLA keeps it to itself, and fuses each product with its addition; a `reduce` of one
    operand goes to the library where it is large.
    """
    products = tuple(w.astype(jnp.float32) * x.astype(jnp.float32) for x, w in pairs)
    return tuple(lax.reduce(products, (jnp.float32(0),) * len(products), lambda a, b: tuple(p + q for p, q in zip(a, b)),
                            (products[0].ndim - 1,)))


FORMS = {"plain": plain, "left": left, "stream": stream, "passes": passes, "cut": cut, "written": written}
QUICK, SAFE = ("plain", "left", "stream", "passes"), ("cut", "written")  # those that are timed; those that are taken if none of them holds


def possible(name: str, k: int, n: int, rows: int, law: Law, dtype) -> bool:
    """Whether a form can compute x [rows, K] . w [N, K] under a law, in one program of reasonable size."""
    chunks = 1 if law.chunk is None else -(-k // law.chunk)
    if name == "left":
        return chunks * rows <= MOST_SPREAD
    if name in ("stream", "passes"):  # their casts would cost bfloat16 more than they save
        several = _several(n, chunks) * chunks if name == "stream" else _several(n, 1) * (1 < chunks <= ACCUMULATORS)
        return rows == 1 and law.chunk is not None and dtype == jnp.float32 and several > 1
    return name == "plain" or law.chunk is not None


@dataclasses.dataclass(frozen=True)
class Forms:
    """What a machine computes products with, for one dtype and the shapes of one model. Frozen: a static argument of jit."""

    law: Law
    products: tuple[tuple[tuple[int, int], tuple[tuple[int, str], ...]], ...] = ()  # (K, N) -> (rows up to, form), ascending
    attention_rows: int = 2          # the fewest rows of an attention product; fewer are repeated
    values_last: bool = False        # values lie [H, L] in attention, so that both operands are summed over their last axis
    proven: bool = False             # found by the probe, not assumed

    @property
    def compiler_options(self) -> dict:
        return self.law.compiler_options

    def product(self, x: jax.Array, w: jax.Array) -> jax.Array:
        """x [T, K] . w [N, K] -> float32 [T, N] under the law; a row's bits do not depend on T. Differentiable, whatever the form."""
        return _product(self.form(w.shape[1], w.shape[0], x.shape[0]), self.law, x, w)

    def form(self, k: int, n: int, rows: int) -> str:
        """The name of the form for x [rows, K] . w [N, K]; a shape that was not probed is computed as it stands."""
        found = dict(self.products).get((k, n))
        if found is None:
            return "plain"
        return next((name for most, name in found if rows <= most), found[-1][1])

    def safer(self, rows: int) -> "Forms | None":
        """The same law for so many rows by forms that ask less of the library; None if there are none."""
        now = {self.form(k, n, rows) for (k, n), _ in self.products}
        if not self.products or self.law.chunk is None or now == {SAFE[-1]}:
            return None
        name = SAFE[0] if now - set(SAFE) else SAFE[-1]
        return dataclasses.replace(self, products=tuple((shape, ((1 << 30, name),)) for shape, _ in self.products))


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _product(form: str, law: Law, x: jax.Array, w: jax.Array) -> jax.Array:
    return FORMS[form](x, w, law)


@_product.defjvp
def _product_jvp(form, law, primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return _product(form, law, x, w), plain(dx, w, law) + plain(x, dw, law)
