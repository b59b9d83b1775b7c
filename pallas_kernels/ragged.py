"""Which tokens of a step belong to which sequence, and where their keys and values live.

Shape letters, here and everywhere: T tokens of the step, S sequences, P pages per sequence, D model width,
N query heads, K key/value heads, G = N / K, H head width, F mlp width, V vocabulary.
"""
import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Ragged:
    """The flat ragged layout of one step: decode, prefill and mixed steps share it.

    A padding token has a slot past the end of the cache, which a write drops. A padding sequence has kv_len 0.
    """

    positions: jax.Array           # [T] int32, index of each token in its own sequence
    slots: jax.Array               # [T] int32, page * page_size + offset where the token's key and value go
    kv_len: jax.Array              # [S] int32, tokens of context once this step is written
    block_tables: jax.Array        # [S, P] int32, pages of each sequence in order
    query_start: jax.Array | None  # [S + 1] int32, first token of each sequence; None: one token each (T == S)


def contiguous(batch: int, length: int, page_size: int) -> tuple[Ragged, int]:
    """The layout of `batch` whole sequences of `length` tokens on fresh consecutive pages, and the number of pages."""
    pages = -(-length // page_size)
    positions = jnp.tile(jnp.arange(length, dtype=jnp.int32), batch)
    first_page = jnp.repeat(jnp.arange(batch, dtype=jnp.int32) * pages, length)
    return Ragged(
        positions=positions,
        slots=first_page * page_size + positions,
        kv_len=jnp.full((batch,), length, jnp.int32),
        block_tables=jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages),
        query_start=jnp.arange(batch + 1, dtype=jnp.int32) * length,
    ), batch * pages


@dataclasses.dataclass
class Dealt:
    """The rows of ragged groups in tiles of R places, no tile holding rows of two groups."""

    owner: jax.Array   # [n] int32, the group of each tile
    first: jax.Array   # [n] int32, which row of its group lies at the tile's first place; past the group for a tile of nothing
    source: jax.Array  # [n, R] int32, the row at each place; `rows`, which is out of range, where there is none
    place: jax.Array   # [rows] int32, where each row lies in the flattened tiles; n * R for rows past the last group


def deal(starts: jax.Array, rows: int, per_tile: int) -> Dealt:
    """The tiles of groups that follow one another in `rows` rows; starts int32 [groups + 1] begins with 0 and ascends."""
    start, count = starts[:-1], jnp.diff(starts)
    groups = count.shape[0]
    tiles_of = -(-count // per_tile)
    after = jnp.cumsum(tiles_of)
    before = after - tiles_of
    # sum(ceil(count / per_tile)) for counts that add up to at most `rows`
    n = (rows + min(groups, rows) * (per_tile - 1)) // per_tile
    # compare_all: the default searches in a loop, and a loop would cut a step's command buffer in two
    owner = jnp.searchsorted(after, jnp.arange(n), side="right", method="compare_all").clip(0, groups - 1)
    first = (jnp.arange(n) - before[owner]) * per_tile
    offset = first[:, None] + jnp.arange(per_tile)
    source = jnp.where((offset >= 0) & (offset < count[owner][:, None]), start[owner][:, None] + offset, rows)
    row = jnp.arange(rows)
    group = jnp.searchsorted(starts[1:], row, side="right", method="compare_all").clip(0, groups - 1)
    place = jnp.where(row < starts[-1], before[group] * per_tile + row - start[group], n * per_tile)
    return Dealt(owner, first, source, place)


def rows_at(a: jax.Array, index: jax.Array) -> jax.Array:
    """a[index], zero where the index is past the end."""
    return a.at[index].get(mode="fill", fill_value=0)


def starts_of(sizes: jax.Array, rows: int) -> jax.Array:
    """int32 [groups + 1]: where each of the groups that follow one another begins and the last ends, cut off at `rows`."""
    return jnp.minimum(jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes, dtype=jnp.int32)]), rows)
