"""The kernels in plain XLA: the oracle, the CPU's path, and the safety net on a GPU we have not met.

Every float sum has one order, whatever the batch. A product's is a `Law` of `pallas_kernels.forms`, which says how XLA's library is
made to keep it. Every other sum is written out, addition by addition: a `reduce` changes its tree at a few thousand elements.
XLA also hands what stands beside a product or a large `reduce` to that library, whose `exp` rounds differently from
XLA's own. So products and maxima stand between optimization barriers: whatever the shape, all else is compiled by XLA.
Attention follows the split law: the context is cut at multiples of SPLIT, each split has its own (max, sum, acc),
splits are merged in ascending order, and a split that a row does not see adds an exact zero.
"""
import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import forms as products
from pallas_kernels.forms import Forms, Law
from pallas_kernels.ragged import Ragged, deal, rows_at, starts_of
from pallas_kernels.rounding import add, rounded
from pallas_kernels.tree import added

SPLIT = 128        # tokens of context in one split; a multiple of every page size in use
MOST_UNROLLED = 4096  # K up to which a row's sum is 64 lanes: 64 additions of each
QUERY_TILE = 32    # query tokens of one sequence that share a gather of its pages, and rows that share an expert's weights
MASKED = -1e30     # stands for -inf and keeps `max - max` finite
ASSUMED = Forms(Law(None, False))  # what a product is computed with where nothing was probed

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def matmul(x: jax.Array, w: jax.Array, bias: jax.Array | None = None, *, residual: jax.Array | None = None, out_dtype=None,
           product=ASSUMED.product) -> jax.Array:
    """x [T, K] . w [N, K] + bias [N] -> [T, N] in out_dtype (x's by default); sums and bias in float32.

    With a residual [T, N] of out_dtype: the result is rounded, then added to it as `rounding.add` does.
    """
    out = product(x, w)
    if bias is not None:
        out = out + bias.astype(jnp.float32)
    out = rounded(out, out_dtype or x.dtype)
    return out if residual is None else add(residual, out)


def row_sum(x: jax.Array) -> jax.Array:
    """float32 or int32 [..., K] summed over its last axis -> [...]: every addition is written out, in an order that K alone decides.

    Each lane adds its places, ascending: 64 lanes, which are then halved, or for long rows 8192, of which 32 become one. On a CPU
    a norm of 576 takes 0.4 (one row) to 0.8 (512 rows) of the time of a product with ones.
    """
    long = x.shape[-1] > MOST_UNROLLED
    lanes, fold = (8192, 32) if long else (64, 2)
    lanes = min(lanes, 1 << (x.shape[-1] - 1).bit_length())
    # What computes x stays outside: a product beside an addition would be fused with it, or not, by shape.
    x = lax.optimization_barrier(jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % lanes)]))
    while x.shape[-1] > 1:
        x = added(jnp.moveaxis(x.reshape(*x.shape[:-1], -1, lanes), -2, 0))
        x = lax.optimization_barrier(x) if long else x
        lanes = max(1, lanes // fold)
    return x[..., 0]


def tail_sums(order: jax.Array, weight: jax.Array | None, thresholds: jax.Array, *, row_sum=row_sum,
              count=row_sum) -> jax.Array:
    """For each threshold int32 [S, n] the sum of weight float32 [S, V] where order int32 [S, V] >= threshold -> float32 [S, n].

    Without weights their exact number, int32 [S, n]. A lower threshold never gives less, where weights are not negative.
    """
    tail = order[:, None] >= thresholds[..., None]
    return count(tail.astype(jnp.int32)) if weight is None else row_sum(jnp.where(tail, weight[:, None], 0.0))


def row_max(x: jax.Array) -> jax.Array:
    """The largest of each row [..., K] -> [..., 1]."""
    return lax.optimization_barrier(x.max(-1, keepdims=True))


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x [..., D] divided by its root mean square and scaled by weight [D], computed in float32, in x's dtype."""
    wide = x.astype(jnp.float32)
    mean_square = row_sum(wide * wide)[..., None] / x.shape[-1]
    # Not rsqrt, which processors approximate each in its own way: a square root and a quotient are exact everywhere.
    scale = 1 / lax.optimization_barrier(jnp.sqrt(mean_square + eps))
    return rounded(wide * scale * weight.astype(jnp.float32), x.dtype)


def log_sum_exp(x: jax.Array) -> jax.Array:
    """log(sum(exp(x))) over the last axis of float32 x [..., V] -> [...]."""
    top = row_max(x)
    return top[..., 0] + jnp.log(row_sum(jnp.exp(x - top)))


def gated_mlp(x: jax.Array, gate: jax.Array, up: jax.Array, activation: str, *, gate_bias=None, up_bias=None,
              product=matmul) -> jax.Array:
    """activation(x . gate) * (x . up) for x [T, D] and gate, up [F, D] -> [T, F]; rounded to x's dtype once."""
    g = product(x, gate, gate_bias, out_dtype=jnp.float32)
    u = product(x, up, up_bias, out_dtype=jnp.float32)
    return rounded(ACTIVATIONS[activation](g) * u, x.dtype)


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, out_dtype=None) -> jax.Array:
    """Each row of x [T, K] times the weights of its expert, w [E, N, K] -> [T, N] in out_dtype (x's by default).

    Rows come sorted by expert, group_sizes int32 [E] of each; rows past their sum give zeros. A row of expert e has the
    bits of `matmul(row, w[e])`. One expert's rows go QUERY_TILE at a time, so that few rows read few experts.
    """
    tokens = x.shape[0]
    dealt = deal(starts_of(group_sizes, tokens), tokens, min(tokens, QUERY_TILE))
    out = lax.map(lambda tile: matmul(tile[0], w[tile[1]], out_dtype=out_dtype), (rows_at(x, dealt.source), dealt.owner))
    return rows_at(out.reshape(-1, w.shape[1]), dealt.place)


def grouped_gated_mlp(x: jax.Array, gate: jax.Array, up: jax.Array, group_sizes: jax.Array, activation: str) -> jax.Array:
    """activation(x . gate) * (x . up) of each row with its expert's gate and up [E, F, D] -> [T, F]; `grouped_matmul` says more."""
    return gated_mlp(x, gate, up, activation, product=lambda x, w, _, out_dtype: grouped_matmul(x, w, group_sizes, out_dtype=out_dtype))


def write_kv(pages: jax.Array, rows: jax.Array, slots: jax.Array) -> jax.Array:
    """pages [num_pages, page_size, K, H] with each row [T, K, H] stored at its slot [T]; slots below 0 or past the end are dropped."""
    flat = pages.reshape(-1, *pages.shape[2:])
    # unless told, jax counts a negative index from the end
    return flat.at[slots].set(rows.astype(pages.dtype), mode="drop", wrap_negative_indices=False).reshape(pages.shape)


def attention_products(forms: Forms):
    """The two products of attention, in float32: scores(q [n, K, M, H], k [n, K, L, H]) -> [n, K, M, L] and
    values(p [n, K, M, L], v [n, K, L, H]) -> [n, K, M, H]; a row's bits do not depend on n or M."""
    def product(a, b, last):
        rows = a.shape[2]
        a = jnp.concatenate([a] * -(-forms.attention_rows // rows), axis=2) if rows < forms.attention_rows else a
        return products.library_batched(a, b, last=last)[:, :, :rows]

    def values(p, v):
        return product(p, lax.optimization_barrier(v.swapaxes(2, 3)), True) if forms.values_last else product(p, v, False)

    return lambda q, k: product(q, k, True), values


def _attention(tiles, load, seen, first, last, *, scale, softcap, forms):
    """Softmax of q tiles [n, K, M, H] over splits first .. last - 1 -> float32 [n, K, M, H], zero for a row that sees nothing.

    load(i) -> k and v [n, K, SPLIT, H] of split i; seen(i) -> bool [n, 1, M, SPLIT], what each row sees of it.
    """
    scores, values = attention_products(forms)

    def split_step(i, carry):
        top, total, acc = carry
        k, v = load(i)
        score = scores(tiles, k) * scale
        if softcap is not None:
            # Fenced on both sides, or the division and the product are fused with what stands beside them, by shape.
            score = lax.optimization_barrier(jnp.tanh(lax.optimization_barrier(score / softcap)) * softcap)
        visible = seen(i)
        score = jnp.where(visible, score, MASKED)
        own_top = row_max(score)
        p = jnp.where(visible, jnp.exp(score - own_top), 0.0)
        own_total = row_sum(p)[..., None]
        own_acc = values(rounded(p, v.dtype), v)
        new_top = jnp.maximum(top, own_top)
        old, own = jnp.exp(top - new_top), jnp.exp(own_top - new_top)
        # Of two products in a sum a compiler may fuse either with the addition, and chooses by shape: one is rounded before.
        return (new_top, total * old + lax.optimization_barrier(own_total * own),
                acc * old + lax.optimization_barrier(own_acc * own))

    shape = tiles.shape[:3]
    start = (jnp.full(shape + (1,), MASKED, jnp.float32), jnp.zeros(shape + (1,), jnp.float32), jnp.zeros(tiles.shape, jnp.float32))
    _, total, acc = lax.fori_loop(first, last, split_step, start)
    return acc / jnp.where(total == 0, 1.0, total)


def _tiles_of(q, kv_heads):
    """q [n, Q, N, H] as [n, K, Q * G, H]: the rows that share a kv head."""
    n, per_tile, heads, width = q.shape
    group = heads // kv_heads
    return q.reshape(n, per_tile, kv_heads, group, width).swapaxes(1, 2).reshape(n, kv_heads, per_tile * group, width)


def _rows_of(tiles, per_tile):
    """[n, K, Q * G, H] as [n * Q, N, H]."""
    n, kv_heads, rows, width = tiles.shape
    out = tiles.reshape(n, kv_heads, per_tile, rows // per_tile, width).swapaxes(1, 2)
    return out.reshape(n * per_tile, -1, width)


def attention(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, ragged: Ragged, *, scale: float,
              window: int | None = None, softcap: float | None = None, static_bound: bool = False,
              forms: Forms = ASSUMED) -> jax.Array:
    """Causal attention of q [T, N, H] over the pages of each token's sequence -> [T, N, H] in q's dtype.

    A token sees positions p with own - window < p <= own (window None: all up to its own). With `static_bound` the
    loop runs over all pages of the tables, which makes it differentiable; the bits are the same, since a split that
    no row sees adds an exact zero.
    """
    page_size, kv_heads = k_pages.shape[1:3]
    if ragged.query_start is None:
        tiles, position, table = q[:, None], ragged.positions[:, None], ragged.block_tables
    else:
        dealt = deal(ragged.query_start, q.shape[0], QUERY_TILE)
        tiles = rows_at(q, dealt.source)
        position = ragged.positions.at[dealt.source].get(mode="fill", fill_value=-1)
        table = ragged.block_tables[dealt.owner]
    n, per_tile = position.shape
    row_position = jnp.repeat(position, q.shape[1] // kv_heads, axis=1)[:, None, :, None]  # [n, 1, Q * G, 1]

    pages_per_split = SPLIT // page_size
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % pages_per_split)))
    num_splits = table.shape[1] // pages_per_split

    last_seen = position.max(1)[:, None, None, None]

    def load(i):
        pages = lax.dynamic_slice_in_dim(table, i * pages_per_split, pages_per_split, 1)
        # Heads first, as the products want them: the gather then lays them out, and no pass over a copy does.
        k, v = (jnp.moveaxis(a[pages], 3, 1).reshape(n, kv_heads, SPLIT, -1) for a in (k_pages, v_pages))
        # What follows in the page may be another sequence's, or what it left there: its NaN times zero would be NaN.
        return k, jnp.where((i * SPLIT + jnp.arange(SPLIT))[:, None] <= last_seen, v, 0)

    def seen(i):
        position = i * SPLIT + jnp.arange(SPLIT)
        return (position <= row_position) & (True if window is None else position > row_position - window)

    first, last = 0, num_splits
    if not static_bound:
        last = jnp.minimum(position.max() // SPLIT + 1, num_splits)
        if window is not None:
            lowest = jnp.where(position >= 0, position, jnp.iinfo(jnp.int32).max).min()
            first = jnp.clip(lowest - window + 1, 0) // SPLIT
            first = jnp.minimum(first, last)
    out = _attention(_tiles_of(tiles, kv_heads), load, seen, first, last, scale=scale, softcap=softcap, forms=forms)
    out = _rows_of(rounded(out, q.dtype), per_tile)
    return out if ragged.query_start is None else rows_at(out, dealt.place)


def attend(q, k, v, k_pages, v_pages, ragged: Ragged, **options):
    """Attention of q [T, N, H] after k and v [T, K, H] are written to their slots -> (out, k_pages, v_pages)."""
    k_pages = write_kv(k_pages, k, ragged.slots)
    v_pages = write_kv(v_pages, v, ragged.slots)
    return attention(q, k_pages, v_pages, ragged, **options), k_pages, v_pages


def attend_bidirectional(q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, *, scale: float, window: int | None = None,
                         softcap: float | None = None, static_bound: bool = False, forms: Forms = ASSUMED) -> jax.Array:
    """Attention of q [T, N, H] over k and v [T, K, H] of whole sequences that follow one another -> [T, N, H] in q's dtype.

    starts int32 [S + 1]: the first token of each sequence, from 0, and the end of the last; tokens past it give zeros.
    Token i of a sequence sees every token j of it with |i - j| <= window (None: all), and nothing of its neighbours,
    not even a NaN. Splits count from the sequence's own start. `static_bound`: as for `attention`.
    """
    tokens, heads, _ = q.shape
    kv_heads = k.shape[1]
    dealt = deal(starts, tokens, QUERY_TILE)
    begin, end = starts[dealt.owner], starts[dealt.owner + 1]
    base, most = jnp.zeros_like(begin), -(-tokens // SPLIT)
    last_seen = end - begin - 1
    if window is not None:  # from the split that holds the first token that the tile's first row sees
        base = jnp.maximum(dealt.first - window, 0) // SPLIT
        last_seen = jnp.minimum(last_seen, dealt.first + QUERY_TILE - 1 + window)
        most = min(most, (2 * window + QUERY_TILE - 1) // SPLIT + 2)
    row = jnp.repeat(dealt.first[:, None] + jnp.arange(QUERY_TILE), heads // kv_heads, axis=1)[:, None, :, None]  # [n, 1, Q * G, 1]

    def positions(i):
        return (base + i)[:, None] * SPLIT + jnp.arange(SPLIT)

    def load(i):
        index = begin[:, None] + positions(i)
        index = jnp.where(index < end[:, None], index, tokens)
        return tuple(rows_at(a, index).swapaxes(1, 2) for a in (k, v))

    def seen(i):
        position = positions(i)[:, None, None]
        inside = position < (end - begin)[:, None, None, None]
        return inside & (True if window is None else jnp.abs(position - row) <= window)

    held = dealt.source[:, 0] < tokens
    last = most if static_bound else jnp.where(held, last_seen // SPLIT + 1 - base, 0).max()
    out = _attention(_tiles_of(rows_at(q, dealt.source), kv_heads), load, seen, 0, last, scale=scale, softcap=softcap, forms=forms)
    return rows_at(_rows_of(rounded(out, q.dtype), QUERY_TILE), dealt.place)
