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
