"""The Hopper matmul, simulated: right against float64, and one row's bits whatever the number of rows and the schedule.

The simulator fills output buffers and shared memory with NaN, so what a kernel leaves unwritten or reads unwritten shows.
"""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_matmul as mm
from pallas_kernels.rounding import add

pytestmark = pytest.mark.usefixtures("interpreted")
K, N = 320, 136  # two chunks of 256 and 64; a whole column tile and 8 columns of a second


def operands(rows, k=K, n=N, dtype=jnp.bfloat16, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (rows, k)).astype(dtype)
    w, u = ((jax.random.normal(key, (n, k)) / k ** 0.5).astype(dtype) for key in keys[1:3])
    b, c = (jax.random.normal(key, (n,)).astype(dtype) for key in keys[3:])
    return x, w, u, b, c


def exact(a):
    return np.asarray(a).astype(np.float64)


def bits(a):
    return np.asarray(a).view(np.uint16 if a.dtype.itemsize == 2 else np.uint32)


@pytest.mark.parametrize("rows, k, n, dtype, out", [
    (1, K, N, jnp.bfloat16, jnp.float32),
    (70, K, N, jnp.float16, jnp.float16),
    (3, 100, 50, jnp.bfloat16, jnp.bfloat16),  # nothing a multiple of a tile
])
def test_products_are_those_of_float64(rows, k, n, dtype, out):
    x, w, _, b, _ = operands(rows, k, n, dtype, seed=rows)
    got = exact(mm.matmul(x, w, b, out_dtype=out))
    want = exact(x) @ exact(w).T + exact(b)
    # float32 sums of k products of size about 1/sqrt(k), then one rounding to `out`
    epsilon = max(float(jnp.finfo(out).eps), k * 2.0 ** -24)
    np.testing.assert_allclose(got, want, rtol=epsilon, atol=epsilon * 4)


def test_a_row_has_the_same_bits_for_every_number_of_rows_and_both_schedules():
    x, w, _, b, _ = operands(130)
    want = bits(mm.matmul(x, w, b))
    for rows, split in ((1, True), (1, False), (7, True), (64, False), (65, None), (130, True)):
        np.testing.assert_array_equal(bits(mm.matmul(x[:rows], w, b, split=split)), want[:rows])
    np.testing.assert_array_equal(bits(mm.matmul(x[100:101], w, b)), want[100:101])


def test_a_chunk_sum_is_the_product_over_that_chunk_alone():
    x, w, *_ = operands(2)
    chunk = mm.chunk_length(K)
    parts = mm.launch(x, [w], [], jnp.float32, groups=1, stages=2, split=True)
    for c in range(parts.shape[0]):
        along = slice(c * chunk, (c + 1) * chunk)
        alone = mm.matmul(x[:, along], w[:, along], out_dtype=jnp.float32)
        np.testing.assert_array_equal(bits(parts[c, :, :N]), bits(alone))
    np.testing.assert_array_equal(bits(parts[0, :, :N] + parts[1, :, :N]), bits(mm.matmul(x, w, out_dtype=jnp.float32)))


@pytest.mark.parametrize("dtype, out", [(jnp.bfloat16, jnp.bfloat16), (jnp.float16, jnp.float16), (jnp.bfloat16, jnp.float32)])
def test_a_residual_in_the_epilogue_has_the_bits_of_the_sum_after_it_in_both_schedules(dtype, out):
    x, w, _, b, _ = operands(67, dtype=dtype, seed=11)
    residual = 3 * jax.random.normal(jax.random.key(12), (67, N)).astype(out)
    want = bits(add(residual, mm.matmul(x, w, b, out_dtype=out)))
    for rows, split in ((67, False), (3, True)):
        got = mm.matmul(x[:rows], w, b, residual=residual[:rows], out_dtype=out, split=split)
        np.testing.assert_array_equal(bits(got), want[:rows])
    assert (want != bits((jnp.float32(1) * residual + mm.matmul(x, w, b, out_dtype=jnp.float32)).astype(out))).any() or out == jnp.float32, \
        "without the rounding before the sum the bits would be others"


def test_a_residual_of_another_shape_or_dtype_is_refused():
    x, w, *_ = operands(3)
    for wrong in (jnp.zeros((3, N)), jnp.zeros((2, N), jnp.bfloat16)):
        with pytest.raises(ValueError, match="the residual is"):
            mm.matmul(x, w, residual=wrong)


@pytest.mark.parametrize("activation, curve", [
    ("silu", lambda g: g / (1 + np.exp(-g))),
    ("gelu_tanh", lambda g: 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g ** 3)))),
    ("relu", lambda g: np.maximum(g, 0)),
])
def test_gated_mlp_is_that_of_float64_and_a_row_alone_is_the_row_in_a_crowd(activation, curve):
    x, gate, up, b, c = operands(66, seed=3)
    many = mm.gated_mlp(x, gate, up, activation, gate_bias=b, up_bias=c)
    want = curve(exact(x) @ exact(gate).T + exact(b)) * (exact(x) @ exact(up).T + exact(c))
    np.testing.assert_allclose(exact(many), want, rtol=2.0 ** -8, atol=1e-4)
    np.testing.assert_array_equal(bits(mm.gated_mlp(x[:1], gate, up, activation, gate_bias=b, up_bias=c)), bits(many)[:1])


def test_an_activation_without_a_kernel_keeps_the_promise_through_xla():
    x, gate, up, *_ = operands(66, seed=4)
    many, one = mm.gated_mlp(x, gate, up, "gelu"), mm.gated_mlp(x[:1], gate, up, "gelu")
    np.testing.assert_array_equal(bits(one), bits(many)[:1])


def test_float32_is_refused_by_name():
    with pytest.raises(ValueError, match="float32"):
        mm.matmul(jnp.zeros((1, 64)), jnp.zeros((64, 64)))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [2, 8, 63, 64, 66, 127, 128, 129, 256])
def test_every_number_of_rows(rows):
    x, w, *_ = operands(256, k=2112, n=264, seed=9)  # three chunks of 1024
    np.testing.assert_array_equal(bits(mm.matmul(x[:rows], w)), bits(mm.matmul(x, w))[:rows])
