"""Every random key there is. `key = fold_in(fold_in(key(seed), choice), position)`, and nothing else is ever drawn.

`position` is the index of the token drawn, counted from the start of the prompt. So a draw depends on the request alone:
not on its batch, its slot, the steps it took to get there, or the draws of others.
"""
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

IMPLEMENTATION = "threefry2x32"
ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)


def seed_words(seed: int) -> np.ndarray:
    """The key data uint32 [2] of `key(seed)` for an int64 seed, whatever jax_enable_x64 says."""
    return np.array([(seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32)


def draw_keys(seeds: jax.Array, choices: jax.Array, positions: jax.Array) -> jax.Array:
    """The keys [S] of the draws at `positions` [S] of `choices` [S] of requests with `seeds` uint32 [S, 2]."""
    request = jax.random.wrap_key_data(seeds, impl=IMPLEMENTATION)
    fold = jax.vmap(jax.random.fold_in)
    return fold(fold(request, choices), positions)


def gumbel(keys: jax.Array, count: int) -> jax.Array:
    """Standard Gumbel noise float32 [S, count], one row for each key: argmax(logits + noise) draws from the softmax.

    The numbers are those of jax.random.gumbel(key, [count]) of each key.
    """
    words = random_bits(keys, count)
    uniform = lax.bitcast_convert_type((words >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.0  # 23 bits in [1, 2)
    noise = -jnp.log(-jnp.log(jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)))
    # Together with the argmax that it is for, XLA would compute it number by number on a CPU, in 5 times the time.
    return lax.platform_dependent(noise, cpu=lax.optimization_barrier, default=lambda noise: noise)


def random_bits(keys: jax.Array, count: int) -> jax.Array:
    """uint32 [S, count], one row for each key: jax.random.bits(key, [count]) with jax_threefry_partitionable.

    Threefry-2x32 with 20 rounds (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3") of the counters 0, 1, ...
    Written out because jax's own loops over whole arrays on a CPU: 54 ms, not 4, for 64 rows of 49152.
    """
    first, second = jax.random.key_data(keys).T[:, :, None]
    schedule = first, second, first ^ second ^ jnp.uint32(0x1BD11BDA)
    x, y = schedule[0], schedule[1] + jnp.arange(count, dtype=jnp.uint32)
    for i in range(5):
        for distance in ROTATIONS[i % 2]:
            x = x + y
            y = x ^ ((y << distance) | (y >> (32 - distance)))
        x, y = x + schedule[(i + 1) % 3], y + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return x ^ y
