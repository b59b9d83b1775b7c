"""What every matmul, gated mlp and sum along a row must do, as functions of the kernels to be tried.

The interpreters fill output buffers with NaN, so what a kernel leaves unwritten shows.
"""
import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.rounding import add

K, N = 320, 136  # two chunks of 256 and 64; a whole column tile and 8 columns of a second
# rows, k, n, dtype, out
SHAPES = [
    (1, K, N, jnp.bfloat16, jnp.float32),
    (70, K, N, jnp.float16, jnp.float16),
    (3, 100, 50, jnp.bfloat16, jnp.bfloat16),  # nothing a multiple of a tile
]
ROWS = [2, 8, 63, 64, 66, 127, 128, 129, 256]
CURVES = [
    ("silu", lambda g: g / (1 + np.exp(-g))),
    ("gelu_tanh", lambda g: 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g ** 3)))),
    ("relu", lambda g: np.maximum(g, 0)),
]
RESIDUALS = [(jnp.bfloat16, jnp.bfloat16), (jnp.float16, jnp.float16), (jnp.bfloat16, jnp.float32)]  # dtype, out
WIDTHS = [80, 576, 4096 + 128 + 72, 128 + 77]  # of a row: less than a warpgroup; pieces and a rest; a whole piece too; an odd one


def operands(rows, k=K, n=N, dtype=jnp.bfloat16, seed=0):
    """x [rows, k], two weights [n, k] and two biases [n]."""
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (rows, k)).astype(dtype)
    w, u = ((jax.random.normal(key, (n, k)) / k ** 0.5).astype(dtype) for key in keys[1:3])
    b, c = (jax.random.normal(key, (n,)).astype(dtype) for key in keys[3:])
    return x, w, u, b, c


def exact(a):
    """float64."""
    return np.asarray(a).astype(np.float64)


def bits(a):
    """Unsigned integers of the same width."""
    return np.asarray(a).view(f"u{a.dtype.itemsize}")


def products_are_those_of_float64(matmul, rows, k, n, dtype, out):
    """One product with a bias."""
    x, w, _, b, _ = operands(rows, k, n, dtype, seed=rows)
    got = exact(matmul(x, w, b, out_dtype=out))
    want = exact(x) @ exact(w).T + exact(b)
    # float32 sums of k products of size about 1/sqrt(k), then one rounding to `out`
    epsilon = max(float(jnp.finfo(out).eps), k * 2.0 ** -24)
    np.testing.assert_allclose(got, want, rtol=epsilon, atol=epsilon * 4)


def a_row_has_the_same_bits_for_every_number_of_rows_and_both_schedules(matmul, dtype=jnp.bfloat16):
    """1 to 130 rows, split and in turn, and row 100 alone."""
    x, w, _, b, _ = operands(130, dtype=dtype)
    want = bits(matmul(x, w, b))
    for rows, split in ((1, True), (1, False), (7, True), (64, False), (65, None), (130, True)):
        np.testing.assert_array_equal(bits(matmul(x[:rows], w, b, split=split)), want[:rows])
    np.testing.assert_array_equal(bits(matmul(x[100:101], w, b)), want[100:101])


def chunk_sums_are_the_products_over_their_chunks_and_add_up_in_ascending_order(parts, matmul, chunk_length):
    """`parts(x, w)`: float32 [chunks, rows, at least n]."""
    x, w, *_ = operands(2)
    chunk, sums = chunk_length(K), parts(x, w)
    for c in range(sums.shape[0]):
        along = slice(c * chunk, (c + 1) * chunk)
        np.testing.assert_array_equal(bits(sums[c, :, :N]), bits(matmul(x[:, along], w[:, along], out_dtype=jnp.float32)))
    np.testing.assert_array_equal(bits(sums[0, :, :N] + sums[1, :, :N]), bits(matmul(x, w, out_dtype=jnp.float32)))


def a_residual_has_the_bits_of_the_sum_after_the_product_in_both_schedules(matmul, dtype, out):
    """And, where the product is rounded, not those of one sum in float32."""
    x, w, _, b, _ = operands(67, dtype=dtype, seed=11)
    residual = 3 * jax.random.normal(jax.random.key(12), (67, N)).astype(out)
    want = bits(add(residual, matmul(x, w, b, out_dtype=out)))
    for rows, split in ((67, False), (3, True)):
        got = matmul(x[:rows], w, b, residual=residual[:rows], out_dtype=out, split=split)
        np.testing.assert_array_equal(bits(got), want[:rows])
    if out != jnp.float32:
        assert (want != bits((residual + matmul(x, w, b, out_dtype=jnp.float32)).astype(out))).any()


def gated_mlp_is_that_of_float64_and_a_row_alone_is_the_row_in_a_crowd(gated_mlp, activation, curve):
    """With both biases; 66 rows, and the first alone."""
    x, gate, up, b, c = operands(66, seed=3)
    many = gated_mlp(x, gate, up, activation, gate_bias=b, up_bias=c)
    want = curve(exact(x) @ exact(gate).T + exact(b)) * (exact(x) @ exact(up).T + exact(c))
    np.testing.assert_allclose(exact(many), want, rtol=2.0 ** -8, atol=1e-4)
    np.testing.assert_array_equal(bits(gated_mlp(x[:1], gate, up, activation, gate_bias=b, up_bias=c)), bits(many)[:1])


def an_activation_without_a_kernel_keeps_the_promise_through_xla(gated_mlp):
    """gelu with erf."""
    x, gate, up, *_ = operands(66, seed=4)
    many, one = gated_mlp(x, gate, up, "gelu"), gated_mlp(x[:1], gate, up, "gelu")
    np.testing.assert_array_equal(bits(one), bits(many)[:1])


def every_number_of_rows(matmul, rows):
    """Four chunks of 640 and less."""
    x, w, *_ = operands(256, k=2112, n=264, seed=9)
    np.testing.assert_array_equal(bits(matmul(x[:rows], w)), bits(matmul(x, w))[:rows])


def rows_match_float64_and_do_not_see_each_other(kernels, width):
    """log_sum_exp and rms_norm of the module `kernels` over six rows, and over one of them alone."""
    keys = jax.random.split(jax.random.key(width), 2)
    x = jax.random.normal(keys[0], (3, 2, width)) * 3
    weight = jax.random.normal(keys[1], (width,)).astype(jnp.bfloat16)
    wide = exact(x)
    got = kernels.log_sum_exp(x)
    # at most width / 128 + 12 float32 additions deep
    np.testing.assert_allclose(np.asarray(got), np.log(np.exp(wide).sum(-1)), rtol=1e-5, atol=1e-5 * width ** 0.5)
    np.testing.assert_array_equal(bits(got)[1, 1], bits(kernels.log_sum_exp(x[1:2, 1]))[0])
    short = x.astype(jnp.bfloat16)
    got = kernels.rms_norm(short, weight, 1e-5)
    want = exact(short) / np.sqrt((exact(short) ** 2).mean(-1, keepdims=True) + 1e-5) * exact(weight)
    np.testing.assert_allclose(exact(got), want, rtol=2.0 ** -8)  # one rounding to bfloat16
    np.testing.assert_array_equal(bits(got)[1, 1], bits(kernels.rms_norm(short[1:2, 1], weight, 1e-5))[0])


def log_sum_exp_of_large_and_absent_logits(log_sum_exp):
    """-inf but for one, or for two that are equal."""
    x = jnp.full((2, 300), -jnp.inf).at[0, 7].set(1e4).at[1, 3:5].set(-1e4)
    np.testing.assert_allclose(np.asarray(log_sum_exp(x)), [1e4, -1e4 + np.log(2)], rtol=1e-6)
