"""Sums of a row's tails, of every implementation: exact counts, sums of one order, and a search through them."""
import contextlib
import dataclasses
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.engine import sampler
from pallas_kernels import compat
from pallas_kernels.dispatch import SERVING, WAYS

LOWEST, HIGHEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max
WIDTHS = [40, 300, 301, 4301]  # for Mosaic padded to 128; two pieces of 256; padded to 384; padded to 4352, the last piece has 205
KERNELS = {"reference": contextlib.nullcontext, "mosaic_tail": compat.interpreting, "triton_rows": compat.interpreting_triton}


def operands(width, rows=3):
    """order [rows, width], weight over many binades, and 15 thresholds with the extremes and ties among them."""
    rng = np.random.default_rng(width)
    order = rng.integers(LOWEST, HIGHEST, (rows, width), endpoint=True).astype(np.int32)
    weight = np.exp(4 * rng.standard_normal((rows, width))).astype(np.float32)
    thresholds = rng.integers(LOWEST, HIGHEST, (rows, 15)).astype(np.int32)
    thresholds[:, :4] = np.stack([np.full(rows, LOWEST), np.full(rows, HIGHEST), order[:, 7], order.max(1)], 1)
    return order, weight, thresholds


@pytest.fixture(params=KERNELS)
def tail_sums(request):
    """A kernel's `tail_sums`, simulated where it is one for a card."""
    if request.param == "triton_rows" and (reason := compat.no_triton()):
        pytest.skip(reason)
    with KERNELS[request.param]():
        yield importlib.import_module(f"pallas_kernels.{request.param}").tail_sums


@pytest.fixture
def sums(tail_sums):
    return lambda *operands: np.asarray(tail_sums(*operands))


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_are_those_of_float64_and_counts_are_exact(sums, width):
    order, weight, thresholds = operands(width)
    held = order[:, None] >= thresholds[..., None]
    counts = sums(order, None, thresholds)
    assert counts.dtype == np.int32
    np.testing.assert_array_equal(counts, held.sum(-1))
    # of numbers that are not negative, at most 32 / 8 + 8 + 7 + 2 float32 additions deep
    want = (held * weight[:, None].astype(np.float64)).sum(-1)
    np.testing.assert_allclose(sums(order, weight, thresholds), want, rtol=32 * 2.0 ** -24)


@pytest.mark.parametrize("width", [301, 4301])
def test_a_sum_depends_on_its_row_and_threshold_alone(sums, width):
    order, weight, thresholds = operands(width)
    want = sums(order, weight, thresholds)
    np.testing.assert_array_equal(sums(order, weight, thresholds[:, ::-1])[:, ::-1], want)
    np.testing.assert_array_equal(sums(order[1:2], weight[1:2], thresholds[1:2]), want[1:2])
    for place in (0, 2, 14):
        np.testing.assert_array_equal(sums(order, weight, thresholds[:, place:place + 1])[:, 0], want[:, place])


def test_pieces_of_4096_are_summed_alike_and_added_in_ascending_order():
    from pallas_kernels.mosaic_tail import tail_sums
    order, weight, thresholds = operands(4301)
    with compat.interpreting():
        want = tail_sums(order, weight, thresholds)
        order, weight = (np.pad(a, ((0, 0), (0, 51))) for a in (order, weight))
        first = tail_sums(order[:, :4096], weight[:, :4096], thresholds)
        weight[:, :4096] = 0
        np.testing.assert_array_equal(first + tail_sums(order[:, 256:], weight[:, 256:], thresholds), want)


@pytest.mark.parametrize("width", [300, 4301])
def test_a_lower_threshold_never_gives_less(sums, width):
    order, weight, _ = operands(width, rows=1)
    thresholds = np.sort(order[0, np.random.default_rng(0).permutation(width)[:15]])[None]
    assert (np.diff(sums(order, weight, thresholds)) <= 0).all()
    # where the terms are too small to count, the sum stays and does not fall
    tiny = np.where(np.arange(width) == 3, 1, 2.0 ** -26).astype(np.float32)[None]
    order[0, 3] = HIGHEST
    got = sums(order, tiny, thresholds)
    assert (np.diff(got) <= 0).all() and (got >= 1).all()


def test_what_lies_below_the_threshold_is_not_seen(sums):
    order, weight, thresholds = operands(301)
    above = thresholds[:, 2:3]
    np.testing.assert_array_equal(sums(order, np.where(order < above, np.nan, weight), above), sums(order, weight, above))


def test_padding_is_not_seen_by_the_mosaic_kernel(monkeypatch):
    from pallas_kernels import mosaic_tail
    order, weight, thresholds = operands(301)
    with compat.interpreting():
        want = mosaic_tail.tail_sums(order, weight, thresholds), mosaic_tail.tail_sums(order, None, thresholds)
        poison = lambda x: jnp.pad(x, ((0, 0), (0, 83)), constant_values=HIGHEST if x.dtype == jnp.int32 else jnp.nan)
        monkeypatch.setattr(mosaic_tail, "_padded", poison)
        uncached = mosaic_tail.tail_sums.__wrapped__
        for got, expected in zip((uncached(order, weight, thresholds), uncached(order, None, thresholds)), want):
            np.testing.assert_array_equal(np.asarray(got), expected)


def test_top_k_and_top_p_keep_what_the_reference_keeps(tail_sums):
    logits = 3 * jax.random.normal(jax.random.key(0), (4, 300)).at[2, 10:].set(-jnp.inf).at[3].set(1.0)
    limits = jnp.array([300, 40, 20, 300]), jnp.array([0.9, 0.7, 1e-6, 0.5]), jnp.array([0.0, 0.0, 0.0, 0.1])
    kernels = dataclasses.replace(SERVING, tail_sums=tail_sums, search_ways=WAYS)
    kept = sampler.truncate(logits, *limits, kernels)
    np.testing.assert_array_equal(np.asarray(kept), np.asarray(sampler.truncate(logits, *limits, SERVING)))
    assert 1 < np.isfinite(np.asarray(kept))[0].sum() < 300
