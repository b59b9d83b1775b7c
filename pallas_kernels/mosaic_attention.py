"""Attention on Hopper: over pages for a decode, prefill or mixed step, and over packed sequences for an encoder.

`mosaic_splits` computes; here the rows of a step become its tiles, and come back. A decode step's tile is a token; the
rows of a sequence are dealt into tiles of 64 or 128 by one gather and back by another, both in XLA.
"""
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mosaic_kv import write_kv
from pallas_kernels.mosaic_splits import PACKED, ROWS, launch, split_length
from pallas_kernels.ragged import Ragged, deal, rows_at

MOST_PARTS = 256 << 20  # bytes of partial results that a decode step may hold
SMS = 132  # of an H100 or H200 (SXM): decides between schedules, no part of the tree


def _wanted_run(tiles: int, kv_heads: int, splits: int, split_bytes: int) -> int | None:
    """Splits for one block, or None for all of a tile's: enough blocks to fill the card. Either way the bits are the same."""
    if splits == 1 or tiles * kv_heads >= 2 * SMS or tiles * kv_heads * splits * split_bytes > MOST_PARTS:
        return None
    return max(1, tiles * kv_heads * splits // (4 * SMS))


def _decode(q, k_pages, v_pages, ragged, run, **options):
    """One token for each sequence: its query heads of one kv head are the rows of a tile."""
    tokens, heads, width = q.shape
    kv_heads = k_pages.shape[2]
    group = heads // kv_heads
    rows = group if group < 8 else group + -group % 8  # what TMA takes: fewer than 8 or whole eights
    tiles = q.reshape(tokens, kv_heads, group, width)
    if rows > group:
        tiles = jnp.pad(tiles, ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    position = jnp.where(ragged.kv_len > 0, ragged.positions, -1)
    meta = jnp.stack([jnp.arange(tokens), jnp.maximum(position, 0), jnp.zeros_like(position), position], 1).astype(jnp.int32)
    if run == "auto":
        splits = pl.cdiv(ragged.block_tables.shape[1] * k_pages.shape[1], split_length(width))
        run = _wanted_run(tokens, kv_heads, splits, rows * width * 4)
    # The division by a tile's row count puts all rows at the token's own position.
    out = launch(tiles, k_pages, v_pages, ragged.block_tables, meta, group_size=ROWS * pl.cdiv(rows, ROWS), heads_first=True,
                 run=run, **options)
    return out[:, :, :group].reshape(tokens, heads, width)


def _dealt(q, starts, kv_heads, rows):
    """The (token, head) rows of each sequence in tiles: (q [n, rows, K, H], Dealt of those rows)."""
    tokens, heads, width = q.shape
    group = heads // kv_heads
    dealt = deal(starts * group, tokens * group, rows)
    by_row = q.reshape(tokens, kv_heads, group, width).swapaxes(1, 2).reshape(tokens * group, kv_heads, width)
    return rows_at(by_row, dealt.source), dealt


def _gathered(out, dealt, shape):
    """What `_dealt` has dealt, as [T, N, H] again; zero for a token of no sequence."""
    tokens, heads, width = shape
    _, rows, kv_heads, _ = out.shape
    by_row = rows_at(out.reshape(-1, kv_heads, width), dealt.place)
    return by_row.reshape(tokens, heads // kv_heads, kv_heads, width).swapaxes(1, 2).reshape(shape)


def _prefill(q, k_pages, v_pages, ragged, rows, **options):
    """Ragged queries, whose positions the step names."""
    tokens, heads, _ = q.shape
    group = heads // k_pages.shape[2]
    tiles, dealt = _dealt(q, ragged.query_start, k_pages.shape[2], rows)
    start, count = ragged.query_start[:-1][dealt.owner], jnp.diff(ragged.query_start)[dealt.owner]
    token = (start + dealt.first // group).clip(0, tokens - 1)
    last_token = (start + jnp.minimum((dealt.first + rows - 1) // group, count - 1)).clip(0, tokens - 1)
    last = jnp.where(dealt.source[:, 0] < tokens * group, ragged.positions[last_token], -1)
    meta = jnp.stack([dealt.owner, ragged.positions[token], dealt.first % group, last], 1).astype(jnp.int32)
    out = launch(tiles, k_pages, v_pages, ragged.block_tables, meta, group_size=group, heads_first=False, run=None, **options)
    return _gathered(out, dealt, q.shape)


def refusal(head_dim: int, dtype, page_size: int, group: int = 1) -> str | None:
    """Why these kernels do not take such a model, or None if they do."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"dtype {jnp.dtype(dtype).name}: mosaic kernels take bfloat16 and float16"
    if head_dim % 16 or not (16 <= head_dim <= 128 or head_dim == 256):
        return f"head_dim {head_dim}: mosaic attention takes multiples of 16 up to 128, and 256"
    if page_size % 8 or split_length(head_dim) % page_size:
        return f"page_size {page_size}: mosaic attention takes 8, 16, 32 and 64" + (" and 128" if head_dim <= 128 else "")
    if group > 2 * ROWS // (1 if head_dim <= 128 else 2):
        return f"{group} query heads for each kv head: mosaic attention takes at most {2 * ROWS // (1 if head_dim <= 128 else 2)}"
    return None


def _prefill_rows(width):
    """Rows of a prefill's tile: two groups that share the loads of k and v, but past 128 columns, which take two already."""
    return 2 * ROWS if width <= 128 else ROWS


def attention(q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, ragged: Ragged, *, scale: float, window: int | None = None,
              softcap: float | None = None, run: int | str | None = "auto") -> jax.Array:
    """Causal attention of q [T, N, H] over the pages of each token's sequence -> [T, N, H] in q's dtype.

    A token sees positions p with own - window < p <= own (window None: all up to its own). The tokens of a sequence in
    one step have consecutive positions. `run` picks the schedule of a decode step and changes no bit.
    """
    reason = refusal(q.shape[2], q.dtype, k_pages.shape[1], q.shape[1] // k_pages.shape[2])
    if reason or k_pages.dtype != q.dtype or v_pages.dtype != q.dtype:
        raise ValueError(reason or f"queries are {q.dtype}, pages {k_pages.dtype} and {v_pages.dtype}: mosaic attention takes one dtype")
    options = dict(scale=scale, window=window, softcap=softcap)
    if ragged.query_start is None:
        return _decode(q, k_pages, v_pages, ragged, run, **options)
    return _prefill(q, k_pages, v_pages, ragged, _prefill_rows(q.shape[2]), **options)


def attend(q, k, v, k_pages, v_pages, ragged: Ragged, **options):
    """Attention of q [T, N, H] after k and v [T, K, H] are written to their slots -> (out, k_pages, v_pages)."""
    k_pages, v_pages = write_kv(k_pages, v_pages, k, v, ragged.slots)
    return attention(q, k_pages, v_pages, ragged, **options), k_pages, v_pages


def attend_bidirectional(q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array, *, scale: float, window: int | None = None,
                         softcap: float | None = None) -> jax.Array:
    """Attention of q [T, N, H] over k and v [T, K, H] of whole sequences that follow one another -> [T, N, H] in q's dtype.

    starts int32 [S + 1]: the first token of each sequence, from 0, and the end of the last; tokens past it give zeros.
    Token i of a sequence sees every token j of it with |i - j| <= window (None: all), and nothing of its neighbours,
    not even a NaN. Splits count from the sequence's own start. ValueError where the kernel cannot take the operands.
    """
    tokens, heads, width = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    reason = refusal(width, q.dtype, PACKED, group)
    if reason or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(reason or f"queries are {q.dtype}, keys {k.dtype} and values {v.dtype}: mosaic attention takes one dtype")
    rows = _prefill_rows(width)
    tiles, dealt = _dealt(q, starts, kv_heads, rows)
    # TMA addresses every eighth row: keys and values are dealt too, so that each sequence begins at one.
    packed = deal(starts, tokens, PACKED)
    k, v = (rows_at(a, packed.source.reshape(-1)) for a in (k, v))
    eights = -(-jnp.diff(starts) // PACKED)
    own = dealt.owner
    position = dealt.first // group
    last = jnp.diff(starts)[own] - 1
    if window is not None:
        last = jnp.minimum(last, (dealt.first + rows - 1) // group + window)
    last = jnp.where(dealt.source[:, 0] < tokens * group, last, -1)
    meta = jnp.stack([(jnp.cumsum(eights) - eights)[own], position, dealt.first % group, last], 1).astype(jnp.int32)
    out = launch(tiles, k, v, None, meta, group_size=group, heads_first=False, run=None, scale=scale, window=window, softcap=softcap)
    return _gathered(out, dealt, q.shape)
