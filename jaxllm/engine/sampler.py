"""Logits to tokens: the edits in vLLM's order, the draw with explicit keys, and the model's own logprobs.

Nothing is sorted. top_k and top_p keep the tokens above a threshold that is found by search over the 32 bits of a float, in
halves or in as many parts as the kernels weigh at once: a count is exact, and a sum of probabilities has the fixed tree of
`kernels.tail_sums`, so the kept set of a row depends on that row alone. Tokens tied at the threshold are kept together.
"""
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.engine import keys
from jaxllm.engine.request import Fault
from pallas_kernels.dispatch import Kernels

BANNED = -jnp.inf


@dataclasses.dataclass(frozen=True)
class Features:
    """What the rows of a step need; static, so that a greedy step does not pay for what it does not use."""

    random: bool = False
    truncated: bool = False     # top_k, top_p or min_p
    edits: int = 0              # width U of the table of edits, 0: none
    masked: bool = False        # allowed_token_ids
    top_logprobs: int | None = None  # None: no logprobs; 0: the drawn token's; more: the likeliest as well
    digests: bool = False       # of whole rows of logits


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class SamplingInputs:
    """What each row of logits is sampled with. S rows; U entries in a row's table of edits, padded with id V."""

    slots: jax.Array               # [S] int32, row of last_token that takes the drawn token; past the end: dropped
    seeds: jax.Array               # [S, 2] uint32
    choices: jax.Array             # [S] int32
    positions: jax.Array           # [S] int32, index of the drawn token in its sequence
    temperature: jax.Array         # [S] float32, 0: greedy
    top_k: jax.Array               # [S] int32, V: off
    top_p: jax.Array               # [S] float32, 1: off
    min_p: jax.Array               # [S] float32, 0: off
    repetition: jax.Array          # [S] float32, 1: off
    presence: jax.Array            # [S] float32, 0: off
    frequency: jax.Array           # [S] float32, 0: off
    edit_ids: jax.Array | None     # [S, U] int32, distinct in a row
    edit_bias: jax.Array | None    # [S, U] float32, added to the logit; -inf: banned
    edit_count: jax.Array | None   # [S, U] int32, times the id stands in the output
    edit_seen: jax.Array | None    # [S, U] bool, the id stands in prompt or output
    mask: jax.Array | None         # [S, ceil(V / 32)] uint32, bit set: allowed


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Drawn:
    """What a step drew. What nobody asked for is None."""

    tokens: jax.Array              # [S] int32
    logprobs: jax.Array | None     # [S] float32
    ranks: jax.Array | None        # [S] int32
    top_ids: jax.Array | None      # [S, top_logprobs] int32
    top_logprobs: jax.Array | None  # [S, top_logprobs] float32
    digests: jax.Array | None = None  # [S, 2] uint32, of the rows of logits
    faults: jax.Array | None = None   # [S] int8, a Fault: the token is worthless; 0: it is drawn


def sample(logits: jax.Array, last_token: jax.Array, inputs: SamplingInputs, *, features: Features,
           kernels: Kernels) -> tuple[Drawn, jax.Array]:
    """The drawn tokens of logits float32 [S, V], and last_token [max_num_seqs] with them written at their slots."""
    edited = logits
    if features.masked:
        edited = jnp.where(unpack_mask(inputs.mask, logits.shape[-1]), edited, BANNED)
    if features.edits:
        edited = apply_edits(edited, inputs)
    token = edited.argmax(-1).astype(jnp.int32)
    divisor = jnp.where(inputs.temperature > 0, inputs.temperature, 1.0)[:, None]
    faults = find_faults(logits, edited, token, divisor)
    if features.random:
        scaled = edited / divisor
        if features.truncated:
            scaled = truncate(scaled, inputs.top_k, inputs.top_p, inputs.min_p, kernels)
        noise = keys.gumbel(keys.draw_keys(inputs.seeds, inputs.choices, inputs.positions), logits.shape[-1])
        token = jnp.where(inputs.temperature > 0, (scaled + noise).argmax(-1).astype(jnp.int32), token)
    drawn = dataclasses.replace(report(logits, token, features.top_logprobs, kernels), faults=faults)
    if features.digests:
        drawn = dataclasses.replace(drawn, digests=row_digests(logits))
    return drawn, last_token.at[inputs.slots].set(token, mode="drop")


def find_faults(logits: jax.Array, edited: jax.Array, likeliest: jax.Array, divisor: jax.Array) -> jax.Array:
    """int8 [S]: the Fault of each row of logits [S, V], or 0. It is drawn from edited [S, V] over divisor [S, 1]; likeliest [S] is
    edited's argmax.

    An argmax takes the first NaN before all else, so that the one logit it found tells of the whole row.
    """
    best = jnp.take_along_axis(edited, likeliest[:, None], 1)
    # What a mask hides is a fault all the same. On a CPU the largest of a row passes over NaN. The barrier: see pallas_kernels/reference.py
    number = lambda x: jnp.where(jnp.isnan(x), jnp.inf, x)
    top = best if edited is logits else lax.optimization_barrier(number(logits).max(-1, keepdims=True))
    edits = jnp.where(best == BANNED, Fault.EMPTY, jnp.where(jnp.isfinite(best / divisor), 0, Fault.OVERFLOW))
    return jnp.where(jnp.isfinite(top), edits, Fault.LOGITS)[:, 0].astype(jnp.int8)


def report(logits: jax.Array, tokens: jax.Array, top: int | None, kernels: Kernels) -> Drawn:
    """The model's logprobs of `tokens` [S] under logits [S, V], their ranks, and the `top` likeliest."""
    if top is None:
        return Drawn(tokens, None, None, None, None)
    norm = kernels.log_sum_exp(logits)
    own = jnp.take_along_axis(logits, tokens[:, None], 1)
    ranks = (logits > own).sum(-1, dtype=jnp.int32) + 1
    top_logits, top_ids = lax.top_k(logits, top)
    return Drawn(tokens, own[:, 0] - norm, ranks, top_ids, top_logits - norm[:, None])


def row_digests(logits: jax.Array) -> jax.Array:
    """uint32 [S, 2]: a hash of the bits of each row of logits float32 [S, V]: -0 is not 0, and each NaN is one of its own.

    Integers alone, and their sum has no order: a digest depends on its row and on nothing else, on every device. Each half adds
    up the bits of every logit, scrambled with its place; scrambling is one to one, so one changed logit always changes both halves.
    """
    bits = lax.bitcast_convert_type(logits, jnp.uint32)
    place = jnp.arange(logits.shape[-1], dtype=jnp.uint32)
    places = [scramble(place ^ jnp.uint32(digits)) for digits in (0x243F6A88, 0x85A308D3)]  # of pi: one for each half
    return jnp.stack([scramble(bits ^ place).sum(-1, dtype=jnp.uint32) for place in places], -1)


def scramble(x: jax.Array) -> jax.Array:
    """uint32, one to one: each bit of x moves about half of the bits (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def unpack_mask(mask: jax.Array, vocab: int) -> jax.Array:
    """bool [S, vocab] of packed uint32 [S, ceil(vocab / 32)], lowest bit first."""
    bits = (mask[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits.reshape(mask.shape[0], -1)[:, :vocab].astype(bool)


def apply_edits(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """logits [S, V] with bias, then repetition, frequency and presence penalties, at the ids of the table."""
    value = jnp.take_along_axis(logits, inputs.edit_ids, 1, mode="fill", fill_value=0) + inputs.edit_bias
    repetition = inputs.repetition[:, None]
    penalised = jnp.where(value > 0, value / repetition, value * repetition)
    value = jnp.where(inputs.edit_seen, penalised, value)
    value = value - inputs.frequency[:, None] * inputs.edit_count
    value = value - inputs.presence[:, None] * (inputs.edit_count > 0)
    row = jnp.arange(logits.shape[0])[:, None]
    return logits.at[row, inputs.edit_ids].set(value, mode="drop", unique_indices=True)


def truncate(scaled: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, kernels: Kernels) -> jax.Array:
    """scaled [S, V] with the tokens outside min_p, then top_k, then top_p of what is left, set to -inf."""
    top = lax.optimization_barrier(scaled.max(-1, keepdims=True))  # see pallas_kernels/reference.py
    scaled = jnp.where(scaled - top >= jnp.log(min_p)[:, None], scaled, BANNED)
    order = sortable(scaled)
    weight = jnp.exp(scaled - top)
    search = lambda enough: highest(enough, top_k, kernels.search_ways)[:, None]
    by_count = search(lambda thresholds: kernels.tail_sums(order, None, thresholds) >= top_k[:, None])

    def mass(thresholds):  # of what top_k left
        return kernels.tail_sums(order, weight, jnp.maximum(thresholds, by_count))

    needed = top_p[:, None] * mass(by_count)
    by_mass = search(lambda thresholds: mass(thresholds) >= needed)
    return jnp.where(order >= jnp.maximum(by_count, by_mass), scaled, BANNED)


def sortable(x: jax.Array) -> jax.Array:
    """int32 that compare as the floats x do."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def highest(enough, like: jax.Array, ways: int) -> jax.Array:
    """The highest int32 [S] at which the falling predicate `enough` still holds; the lowest if nowhere.

    enough(int32 [S, ways - 1]) -> bool [S, ways - 1]. Each turn cuts what is left in `ways` parts: 2, 4 or 16, so that the
    32 bits are whole turns. The answer is the same for all of them.
    """
    bits = ways.bit_length() - 1

    def narrow(turn, low):  # `low` holds, or nothing does; sums below wrap around, from the lowest int32 on
        part = jnp.int32(1) << (32 - bits * (turn + 1))
        holds = enough(low[:, None] + part * jnp.arange(1, ways, dtype=jnp.int32))
        return low + part * holds.sum(-1, dtype=jnp.int32)

    # A loop would end the CUDA graph of the step: there its turns are written out.
    search = lambda unroll: lambda low: lax.fori_loop(0, 32 // bits, narrow, low, unroll=unroll)
    return lax.platform_dependent(jnp.full_like(like, jnp.iinfo(jnp.int32).min), cuda=search(True), default=search(False))
