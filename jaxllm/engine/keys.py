"""Every random key there is. `key = fold_in(fold_in(key(seed), choice), position)`, and nothing else is ever drawn.

`position` is the index of the token drawn, counted from the start of the prompt. So a draw depends on the request alone:
not on its batch, its slot, the steps it took to get there, or the draws of others.
"""
import jax
import jax.numpy as jnp
import numpy as np

IMPLEMENTATION = "threefry2x32"


def seed_words(seed: int) -> np.ndarray:
    """The key data uint32 [2] of `key(seed)` for an int64 seed, whatever jax_enable_x64 says."""
    return np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def draw_keys(seeds: jax.Array, choices: jax.Array, positions: jax.Array) -> jax.Array:
    """The keys [S] of the draws at `positions` [S] of `choices` [S] of requests with `seeds` uint32 [S, 2]."""
    request = jax.random.wrap_key_data(seeds, impl=IMPLEMENTATION)
    fold = jax.vmap(jax.random.fold_in)
    return fold(fold(request, choices), positions)


def gumbel(keys: jax.Array, count: int) -> jax.Array:
    """Standard Gumbel noise float32 [S, count], one row for each key: argmax(logits + noise) draws from the softmax."""
    return jax.vmap(lambda key: jax.random.gumbel(key, (count,), jnp.float32))(keys)
