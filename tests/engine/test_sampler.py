"""The sampler against numpy: edits in vLLM's order, truncation without a sort, keys, reported logprobs."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import EngineConfig
from jaxllm.engine import batch, keys, sampler
from jaxllm.engine.request import Request, Sequence
from jaxllm.engine.sampler import Features
from jaxllm.engine.scheduler import Work
from jaxllm.engine.stop import banned_next
from jaxllm.sampling_params import SamplingParams
from pallas_kernels import fast
from pallas_kernels.dispatch import SERVING

V = 64
CONFIG = EngineConfig(max_model_len=64, max_num_seqs=8, max_num_batched_tokens=64, num_pages=8)


def rows(*params, prompt=(1, 2, 3), output=(), **fields):
    """One work item for each SamplingParams, ready to be sampled."""
    works = []
    for i, p in enumerate(params):
        request = Request(str(i), tuple(prompt), p, seed=p.seed if p.seed is not None else i, max_total=64, **fields)
        sequence = Sequence(request, 0, [*prompt, *output])
        works.append(Work(sequence, 0, len(sequence.tokens), True, i, (0,), False))
    return tuple(works)


def draw(logits, works):
    inputs, features = batch.sampling_inputs(works, logits.shape[0], logits.shape[1], CONFIG)
    drawn, last = sampler.sample(jnp.asarray(logits), jnp.zeros(8, jnp.int32), jax.tree.map(jnp.asarray, inputs), features=features, kernels=SERVING)
    return jax.tree.map(np.asarray, drawn), np.asarray(last), features


@pytest.fixture
def logits():
    return np.random.default_rng(0).standard_normal((4, V)).astype(np.float32) * 2


def test_greedy_takes_the_likeliest_and_writes_it_where_the_next_step_reads(logits):
    drawn, last, features = draw(logits, rows(*[SamplingParams(temperature=0)] * 4))
    assert features == Features()
    assert drawn.tokens.tolist() == logits.argmax(-1).tolist() == last[:4].tolist()
    assert drawn.logprobs is None


def truncated_by_sort(scaled, k, p, m):
    """What top_k, top_p and min_p keep, by sorting: min_p first, then k, then the smallest set that holds p of what is left."""
    keep = np.exp(scaled - scaled.max()) >= m
    order = [i for i in np.argsort(-scaled, kind="stable") if keep[i]][:k or None]
    weight = np.exp(scaled[order].astype(np.float64) - scaled.max())
    before = np.cumsum(weight) - weight
    return {int(i) for i, b in zip(order, before) if b < p * weight.sum()}


@pytest.mark.parametrize("k,p,m", [(0, 1.0, 0.0), (1, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.5, 0.0), (0, 0.01, 0.0), (0, 1.0, 0.1), (7, 0.8, 0.05), (V, 0.999, 0.0)])
def test_truncation_keeps_what_a_sort_would(logits, k, p, m):
    s = logits.shape[0]
    kept = sampler.truncate(jnp.asarray(logits), jnp.full(s, k or V), jnp.full(s, p), jnp.full(s, m), SERVING)
    for row, out in zip(logits, np.asarray(kept)):
        assert {int(i) for i in np.flatnonzero(np.isfinite(out))} == truncated_by_sort(row, k, p, m)


def test_tied_tokens_are_kept_together():
    logits = np.zeros((1, V), np.float32)
    logits[0, :3] = 1.0
    kept = sampler.truncate(jnp.asarray(logits), jnp.array([1]), jnp.ones(1), jnp.zeros(1), SERVING)
    assert np.flatnonzero(np.isfinite(np.asarray(kept)[0])).tolist() == [0, 1, 2]


def test_draws_follow_the_softmax():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    n = 20_000
    noise = keys.gumbel(keys.draw_keys(jnp.tile(jnp.asarray(keys.seed_words(3)), (n, 1)), jnp.zeros(n, jnp.int32), jnp.arange(n)), 4)
    counts = np.bincount(np.asarray((logits + noise).argmax(-1)), minlength=4) / n
    # 4 standard deviations of a proportion over 20000 draws
    assert np.abs(counts - np.exp(logits)).max() < 4 * np.sqrt(0.25 / n)


def test_a_draw_depends_on_seed_choice_and_position_and_on_nothing_else():
    def noise(seed, choice, position):
        return np.asarray(keys.gumbel(keys.draw_keys(jnp.asarray(keys.seed_words(seed))[None], jnp.array([choice]), jnp.array([position])), 8))[0]

    base = noise(5, 0, 9)
    assert (base == noise(5, 0, 9)).all()
    for other in (noise(6, 0, 9), noise(5, 1, 9), noise(5, 0, 10), noise(5 + 2**32, 0, 9), noise(-5, 0, 9)):
        assert (base != other).all()
    expected = jax.random.gumbel(jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 0), 9), (8,))
    assert (base == np.asarray(expected)).all()


@pytest.mark.parametrize("count", [1, 7, 4099])
def test_noise_is_jaxs_own_to_the_bit(count):
    seeds = jnp.stack([keys.seed_words(seed) for seed in (0, 1, -5, 2**62 + 3)])
    own = keys.draw_keys(seeds, jnp.arange(4), jnp.arange(4) * 1000)
    with jax.threefry_partitionable(True):
        bits = jax.vmap(lambda key: jax.random.bits(key, (count,), jnp.uint32))(own)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, (count,), jnp.float32))(own)
    np.testing.assert_array_equal(keys.random_bits(own, count), bits)
    np.testing.assert_array_equal(jax.jit(keys.gumbel, static_argnums=1)(own, count), noise)


def test_penalties_bias_and_bans_in_their_order(logits):
    p = SamplingParams(temperature=0, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: 2.0}, logprobs=0)
    works = rows(p, prompt=(1, 2), output=(5, 5, 9), banned=((5, 9, 11), (3,), (9, 12), (5, 13)))
    table = batch.edit_table(works[0].sequence)
    expected = logits[0].astype(np.float64)
    expected[9] += 2.0
    expected[[11, 3, 12]] = -np.inf  # 13 stands behind 5, and the text ends with 9
    for token in (1, 2, 5, 9):
        expected[token] = expected[token] / 1.5 if expected[token] > 0 else expected[token] * 1.5
    expected[5] -= 0.25 * 2 + 0.5
    expected[9] -= 0.25 + 0.5
    inputs, _ = batch.sampling_inputs(works, 4, V, CONFIG)
    edited = np.asarray(sampler.apply_edits(jnp.asarray(logits), jax.tree.map(jnp.asarray, inputs)))
    np.testing.assert_allclose(edited[0], expected, rtol=1e-6)
    assert (edited[1:] == logits[1:]).all()
    assert set(table) == {1, 2, 3, 5, 9, 11, 12}


def test_only_allowed_tokens_are_drawn_and_their_logprobs_are_the_models_own(logits):
    p = SamplingParams(temperature=1.0, allowed_token_ids=[40, 7], seed=1, logprobs=2)
    drawn, _, features = draw(logits, rows(p, SamplingParams(temperature=0)))
    assert features.masked and drawn.tokens[0] in (7, 40)
    assert drawn.tokens[1] == logits[1].argmax()
    exact = logits[0].astype(np.float64) - np.log(np.exp(logits[0].astype(np.float64)).sum())
    # float32 sums of 64 terms: 64 * 2**-24 relative
    assert abs(drawn.logprobs[0] - exact[drawn.tokens[0]]) < 1e-5
    assert drawn.ranks[0] == (logits[0] > logits[0, drawn.tokens[0]]).sum() + 1
    assert drawn.top_ids[0][:2].tolist() == np.argsort(-logits[0])[:2].tolist()


def test_ends_are_banned_until_min_tokens():
    works = rows(SamplingParams(min_tokens=2, max_tokens=5), output=(8,), stop_ids=frozenset([4, 6]))
    assert banned_next(works[0].sequence) == {4, 6}
    works[0].sequence.tokens.append(9)
    assert banned_next(works[0].sequence) == set()


def test_a_row_draws_the_same_whatever_its_neighbours_need(logits):
    plain = SamplingParams(temperature=0.9, seed=11)
    alone, _, _ = draw(logits[:1], rows(plain))
    crowd, _, features = draw(logits, rows(plain, SamplingParams(temperature=0.7, top_p=0.5), SamplingParams(repetition_penalty=2.0),
                                           SamplingParams(allowed_token_ids=[3], logprobs=-1)))
    assert features == Features(True, True, 16, True, V)
    assert alone.tokens[0] == crowd.tokens[0]


def awkward_logits():
    """Rows of V: random, tied, tied in steps, mostly banned, one left, either zero, neighbours in float32, huge, tiny, one NaN."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((10, V)).astype(np.float32)
    x[1] = 2.5
    x[2] = np.round(x[2])
    x[3, rng.permutation(V)[:V - 5]] = -np.inf
    x[4] = np.where(np.arange(V) == 9, -7.0, -np.inf)
    x[5] = np.where(x[5] > 0, 0.0, -0.0)
    x[6] = (np.float32(1).view(np.int32) + rng.permutation(V).astype(np.int32)).view(np.float32)
    x[7] *= np.finfo(np.float32).max / 8
    x[8] *= np.finfo(np.float32).tiny
    x[9, 3] = np.nan
    return x


def digest_in_python(row):
    """The two numbers of `row_digests`, written out with Python's integers."""
    def scramble(x):
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            x = (x ^ x >> shift) * factor % 2**32
        return x ^ x >> 16

    return [sum(scramble(int(b) ^ scramble(i ^ half)) for i, b in enumerate(row.view(np.uint32))) % 2**32 for half in (0x243F6A88, 0x85A308D3)]


def test_the_digest_of_a_row_is_an_exact_number_of_its_bits_in_any_company():
    x = awkward_logits()
    want = [digest_in_python(row) for row in x]
    assert len({half for pair in want for half in pair}) == 2 * len(x)
    for rows_ in (slice(None), slice(3, 4), slice(None, None, -1)):
        for run in (sampler.row_digests, jax.jit(sampler.row_digests)):
            assert np.asarray(run(jnp.asarray(x[rows_]))).tolist() == want[rows_]


def test_one_changed_bit_anywhere_changes_both_halves_of_a_digest():
    x = awkward_logits()
    before = np.asarray(sampler.row_digests(jnp.asarray(x)))
    for place in (0, 3, V - 1):
        for bit in range(32):
            y = x.view(np.uint32).copy()
            y[:, place] ^= np.uint32(1 << bit)
            assert (np.asarray(sampler.row_digests(jnp.asarray(y.view(np.float32)))) != before).all(), (place, bit)
    for a, b in ((0.0, -0.0), (np.uint32(0x7FC00000).view(np.float32), np.uint32(0x7FC00001).view(np.float32))):
        a, b = (np.asarray(sampler.row_digests(jnp.full((1, V), value, jnp.float32))) for value in (a, b))
        assert (a != b).all()
    swapped = x[:1, [1, 0, *range(2, V)]]
    assert (np.asarray(sampler.row_digests(jnp.asarray(swapped))) != before[:1]).all()


def test_a_digest_sees_the_unlikely_token_that_no_logprob_shows(logits):
    logits[0, 9] = -80.0
    other = logits.copy()
    other[0, 9] = -81.0
    p = SamplingParams(temperature=0, logprobs=3, logits_digest=True, allowed_token_ids=[7], logit_bias={8: 1.0})
    (a, _, features), (b, _, _) = draw(logits, rows(p, SamplingParams())), draw(other, rows(p, SamplingParams()))
    assert features.digests
    assert (a.logprobs[0], a.ranks[0], a.top_logprobs[0].tolist()) == (b.logprobs[0], b.ranks[0], b.top_logprobs[0].tolist())
    assert (a.digests[0] != b.digests[0]).all() and (a.digests[1:] == b.digests[1:]).all()
    assert a.digests.tolist() == [digest_in_python(row) for row in logits], "of the model's own logits, before masks and edits"


def test_a_step_that_asks_for_no_digest_has_none(logits):
    drawn, _, features = draw(logits, rows(SamplingParams(logprobs=0)))
    assert not features.digests and drawn.digests is None


@pytest.mark.parametrize("k", [1, 5, V])
@pytest.mark.parametrize("p", [1e-6, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("m", [0.0, 0.2])
def test_the_kept_set_is_the_same_in_however_many_parts_the_search_cuts(k, p, m):
    x = awkward_logits()
    limits = (jnp.full(x.shape[0], value) for value in (k, p, m))
    arguments = jnp.asarray(x), *limits
    keep = lambda ways: np.asarray(sampler.truncate(*arguments, dataclasses.replace(SERVING, search_ways=ways)))
    halves = keep(2)
    assert np.isfinite(halves[:9]).any(1).all()
    for ways in (4, 16):
        np.testing.assert_array_equal(keep(ways), halves)


@pytest.mark.parametrize("ways", [2, 4, 16])
def test_a_search_ends_at_the_highest_number_that_is_enough(ways):
    lowest, highest = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    ends = jnp.array([lowest, lowest + 1, -1, 0, 1, 0x3F800000, highest - 1, highest], jnp.int32)
    np.testing.assert_array_equal(sampler.highest(lambda t: t <= ends[:, None], ends, ways), ends)
    np.testing.assert_array_equal(sampler.highest(lambda t: jnp.zeros(t.shape, bool), ends, ways), jnp.full(8, lowest))


@pytest.mark.parametrize("ways", [2, 16])
@pytest.mark.parametrize("platform, loops", [("cpu", True), ("cuda", False)])
def test_the_search_is_a_loop_except_in_a_cuda_graph(platform, loops, ways):
    kernels = dataclasses.replace(SERVING, tail_sums=fast.tail_sums, search_ways=ways)
    row = lambda dtype: jax.ShapeDtypeStruct((2,), dtype)
    traced = jax.jit(lambda *a: sampler.truncate(*a, kernels)).trace(
        jax.ShapeDtypeStruct((2, V), jnp.float32), row(jnp.int32), row(jnp.float32), row(jnp.float32))
    assert ("stablehlo.while" in traced.lower(lowering_platforms=(platform,)).as_text()) == loops


def test_the_search_written_out_finds_what_its_loop_finds(logits, monkeypatch):
    arguments = jnp.asarray(logits), jnp.array([V, 3, 10, V]), jnp.array([0.5, 1.0, 0.9, 0.99]), jnp.array([0.0, 0.0, 0.1, 0.01])
    looped = sampler.truncate(*arguments, SERVING)
    monkeypatch.setattr(sampler.lax, "platform_dependent", lambda *a, cuda, default: cuda(*a))
    np.testing.assert_array_equal(np.asarray(sampler.truncate(*arguments, SERVING)), np.asarray(looped))
