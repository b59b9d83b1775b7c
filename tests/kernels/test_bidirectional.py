"""Attention of encoders over packed sequences, in XLA and in Mosaic: right against float64, and blind to its neighbours."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_attention, reference

jitted = partial(jax.jit, static_argnames=("scale", "window", "softcap", "static_bound"))
KERNELS = {"reference": jitted(reference.attend_bidirectional),
           "static_bound": partial(jitted(reference.attend_bidirectional), static_bound=True),
           "mosaic": mosaic_attention.attend_bidirectional}
pytestmark = pytest.mark.usefixtures("interpreted")


def sequences(lengths, heads, kv_heads, width, dtype, seed=0):
    """q, k and v of each sequence."""
    rng = np.random.default_rng(seed)
    return [[np.asarray(jnp.asarray(rng.standard_normal((n, h, width)), dtype)) for h in (heads, kv_heads, kv_heads)] for n in lengths]


def run(kernel, parts, padding=0, **options):
    """The kernel on the packed parts [(q, k, v)] and rows of NaN behind them -> one result for each part, and the padding's."""
    nan = [np.full((padding, *a.shape[1:]), np.nan, a.dtype) for a in parts[0]]
    q, k, v = (jnp.asarray(np.concatenate([part[i] for part in parts] + [nan[i]])) for i in range(3))
    cuts = np.cumsum([len(part[0]) for part in parts])
    starts = jnp.asarray([0, *cuts], jnp.int32)
    return np.split(np.asarray(KERNELS[kernel](q, k, v, starts, **options)), cuts)


def oracle(part, scale, window, softcap):
    """float64 [length, N, H] of one sequence."""
    q, k, v = (a.astype(np.float64) for a in part)
    group = q.shape[1] // k.shape[1]
    score = np.einsum("qnh,knh->nqk", q, np.repeat(k, group, 1)) * scale
    score = score if softcap is None else np.tanh(score / softcap) * softcap
    apart = np.abs(np.arange(len(q))[:, None] - np.arange(len(q)))
    score = np.where(apart <= (len(q) if window is None else window), score, -np.inf)
    p = np.exp(score - score.max(-1, keepdims=True, initial=-1e30))
    return np.einsum("nqk,knh->qnh", p / p.sum(-1, keepdims=True), np.repeat(v, group, 1))


def bits(a):
    return a.view(np.uint16 if a.dtype.itemsize == 2 else np.uint32)


CASES = [  # width, heads, kv_heads, window, softcap, dtype
    (64, 2, 2, None, None, jnp.bfloat16),
    (80, 2, 1, 30, None, jnp.float16),
    (256, 3, 1, 0, 5.0, jnp.bfloat16),
]


@pytest.mark.parametrize("kernel", ["reference", "static_bound", "mosaic"])
@pytest.mark.parametrize("width, heads, kv_heads, window, softcap, dtype", [*CASES, (64, 4, 2, 100, None, jnp.float32)])
def test_packed_sequences_match_float64_and_padding_is_zero(kernel, width, heads, kv_heads, window, softcap, dtype):
    if kernel == "mosaic" and dtype == jnp.float32:
        with pytest.raises(ValueError, match="float32"):
            run(kernel, sequences([3], heads, kv_heads, width, dtype), scale=1.0)
        return
    parts = sequences([1, 7, 8, 150, 0, 33], heads, kv_heads, width, dtype, seed=width)
    options = dict(scale=width ** -0.5, window=window, softcap=softcap)
    *got, padding = run(kernel, parts, padding=5, **options)
    for own, part in zip(got, parts):
        # p and the result are rounded to dtype, sums are float32; v is about 1
        epsilon = max(float(jnp.finfo(dtype).eps), 2.0 ** -20)
        np.testing.assert_allclose(own.astype(np.float64), oracle(part, **options), atol=6 * epsilon)
    assert not padding.view(np.uint8).any()


@pytest.mark.parametrize("kernel, dtype", [("reference", jnp.float32), ("reference", jnp.bfloat16), ("mosaic", jnp.bfloat16)])
@pytest.mark.parametrize("window", [None, 40])
def test_a_sequence_has_the_same_bits_alone_and_anywhere_in_a_packing_of_nan(kernel, dtype, window):
    own, *others = sequences([150, 3, 64], 2, 1, 64, dtype, seed=3)
    poison = [[np.full_like(a, np.nan) for a in part] for part in others]
    options = dict(scale=0.125, window=window)
    alone = bits(run(kernel, [own], **options)[0])
    np.testing.assert_array_equal(bits(run(kernel, [poison[0], own, poison[1]], padding=9, **options)[1]), alone)
    if kernel == "reference":
        np.testing.assert_array_equal(bits(run("static_bound", [*others, own], **options)[2]), alone)


def test_a_window_as_wide_as_the_sequence_is_no_window():
    parts = sequences([140], 1, 1, 64, jnp.bfloat16, seed=4)
    for kernel in ("reference", "mosaic"):
        np.testing.assert_array_equal(bits(run(kernel, parts, scale=0.125, window=139)[0]), bits(run(kernel, parts, scale=0.125)[0]))


def test_the_reference_can_be_differentiated():
    q, k, v = (jnp.asarray(a) for a in sequences([9], 2, 2, 64, jnp.float32)[0])
    loss = lambda k: KERNELS["static_bound"](q, k, v, jnp.asarray([0, 4, 7]), scale=0.125)[:4].sum()
    slope = np.asarray(jax.grad(loss)(k))
    assert np.abs(slope[:4]).min() > 0 and not slope[4:].any()


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (8, 1), (7, 1)])
@pytest.mark.parametrize("window, softcap", [(None, None), (64, None), (None, 20.0), (64, 20.0)])
def test_every_shape(width, heads, kv_heads, window, softcap):
    test_packed_sequences_match_float64_and_padding_is_zero("mosaic", width, heads, kv_heads, window, softcap, jnp.bfloat16)
