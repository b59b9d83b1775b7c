"""Products of a mixture of experts, in XLA and in Mosaic: a row has the bits of the plain product with its expert's weights."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_grouped, mosaic_matmul, reference

pytestmark = pytest.mark.usefixtures("interpreted")
K, N = 320, 136  # two chunks of 256 and 64; a whole column tile and 8 columns of a second


def bits(a):
    a = np.asarray(a)
    return a.view(np.uint16 if a.dtype.itemsize == 2 else np.uint32)


def operands(sizes, extra, dtype, k=K, n=N, seed=0):
    """Rows by expert and `extra` rows of NaN, weights in which an expert without rows is NaN, and sizes."""
    keys = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(keys[0], (sum(sizes) + extra, k)).at[sum(sizes):].set(jnp.nan).astype(dtype)
    empty = jnp.asarray(sizes)[:, None, None] == 0
    w, u = (jnp.where(empty, jnp.nan, jax.random.normal(key, (len(sizes), n, k)) / k ** 0.5).astype(dtype) for key in keys[1:])
    return x, w, u, jnp.asarray(sizes, jnp.int32)


def by_expert(sizes, plain):
    """plain(rows of an expert, expert) of every expert with rows, one after another."""
    cuts = np.cumsum([0, *sizes])
    return np.concatenate([bits(plain(slice(cuts[e], cuts[e + 1]), e)) for e, size in enumerate(sizes) if size])


@pytest.mark.parametrize("dtype, sizes, extra", [
    (jnp.float32, [3, 0, 1, 40], 2), (jnp.bfloat16, [3, 0, 1, 40], 2), (jnp.bfloat16, [0, 1], 0), (jnp.float16, [70], 0),
])
def test_in_the_reference_a_row_has_the_bits_of_its_experts_product(dtype, sizes, extra):
    x, w, u, sizes_ = operands(sizes, extra, dtype)
    for out in (dtype, jnp.float32):
        got = bits(jax.jit(lambda x, w, s: reference.grouped_matmul(x, w, s, out_dtype=out))(x, w, sizes_))
        plain = jax.jit(lambda x, w: reference.matmul(x, w, out_dtype=out))
        np.testing.assert_array_equal(got[:sum(sizes)], by_expert(sizes, lambda rows, e: plain(x[rows], w[e])))
        assert not got[sum(sizes):].any()
    got = bits(jax.jit(lambda x, w, u, s: reference.grouped_gated_mlp(x, w, u, s, "silu"))(x, w, u, sizes_))
    plain = jax.jit(lambda x, w, u: reference.gated_mlp(x, w, u, "silu"))
    np.testing.assert_array_equal(got[:sum(sizes)], by_expert(sizes, lambda rows, e: plain(x[rows], w[e], u[e])))


def test_the_reference_in_three_chains_has_the_bits_of_its_experts_product():
    x, w, _, sizes = operands([1, 5, 0, 33], 1, jnp.float32, k=2100, n=96)
    got = bits(jax.jit(reference.grouped_matmul)(x, w, sizes))
    np.testing.assert_array_equal(got[:39], by_expert([1, 5, 0, 33], lambda rows, e: jax.jit(reference.matmul)(x[rows], w[e])))


@pytest.mark.parametrize("dtype, sizes, extra, k, n", [
    (jnp.bfloat16, [3, 0, 9, 66], 5, K, N),   # an expert of more than one tile, whose rows begin at no eighth
    (jnp.float16, [0, 1, 2, 0], 0, 100, 50),  # nothing a multiple of a tile
])
def test_in_mosaic_a_row_has_the_bits_of_its_experts_product_in_both_schedules(dtype, sizes, extra, k, n):
    x, w, _, sizes_ = operands(sizes, extra, dtype, k, n)
    want = by_expert(sizes, lambda rows, e: mosaic_matmul.matmul(x[rows], w[e]))
    for split in (False, True):
        got = bits(mosaic_grouped.grouped_matmul(x, w, sizes_, split=split))
        np.testing.assert_array_equal(got[:sum(sizes)], want)
        assert not got[sum(sizes):].any()


def test_in_mosaic_two_computing_groups_share_an_experts_weights_and_change_no_bit():
    sizes = [60, 75]
    x, w, *_ = operands(sizes, 0, jnp.bfloat16, k=64, n=72)
    got = bits(mosaic_grouped.grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32), split=False))
    np.testing.assert_array_equal(got, by_expert(sizes, lambda rows, e: mosaic_matmul.matmul(x[rows], w[e])))


def test_a_product_of_experts_is_that_of_float64():
    x, w, _, sizes = operands([2, 0, 3], 0, jnp.bfloat16)
    wide = np.asarray(x).astype(np.float64), np.asarray(w).astype(np.float64)
    want = np.concatenate([wide[0][:2] @ wide[1][0].T, wide[0][2:] @ wide[1][2].T])
    for kernel in (reference.grouped_matmul, mosaic_grouped.grouped_matmul):
        # float32 sums of K products of size about 1/sqrt(K)
        np.testing.assert_allclose(np.asarray(kernel(x, w, sizes, out_dtype=jnp.float32)), want, atol=K * 2.0 ** -24, rtol=K * 2.0 ** -24)


@pytest.mark.parametrize("activation", ["silu", "gelu"])  # gelu has no kernel of its own
def test_in_mosaic_a_gated_mlp_of_experts_has_the_bits_of_its_experts_own(activation):
    sizes = [1, 0, 10]
    x, gate, up, sizes_ = operands(sizes, 1, jnp.bfloat16, n=72, seed=2)
    got = bits(mosaic_grouped.grouped_gated_mlp(x, gate, up, sizes_, activation))
    want = by_expert(sizes, lambda rows, e: mosaic_matmul.gated_mlp(x[rows], gate[e], up[e], activation))
    np.testing.assert_array_equal(got[:11], want)
    assert not got[11:].any()


def test_a_row_keeps_its_bits_when_other_experts_get_more_rows():
    x, w, _, sizes = operands([4, 4, 4], 0, jnp.bfloat16, seed=3)
    more = jnp.concatenate([x[:4]] * 5 + [x[4:]])
    for kernel in (jax.jit(reference.grouped_matmul), mosaic_grouped.grouped_matmul):
        few = bits(kernel(x, w, sizes))
        np.testing.assert_array_equal(bits(kernel(more, w, sizes.at[0].set(20)))[20:], few[4:])


def test_sizes_that_add_up_to_more_than_the_rows_are_cut_off():
    x, w, *_ = operands([3, 2], 0, jnp.bfloat16)
    for kernel in (reference.grouped_matmul, mosaic_grouped.grouped_matmul):
        want = kernel(x, w, jnp.asarray([3, 2], jnp.int32))
        np.testing.assert_array_equal(bits(kernel(x, w, jnp.asarray([3, 900], jnp.int32))), bits(want))


def test_no_rows_at_all_give_zeros():
    x, w, _, sizes = operands([0, 0], 4, jnp.bfloat16)
    for kernel in (reference.grouped_matmul, mosaic_grouped.grouped_matmul):
        assert not bits(kernel(x, w, sizes)).any()


def test_the_reference_can_be_differentiated():
    x, w, _, sizes = operands([2, 1], 0, jnp.float32)
    slope = jax.grad(lambda w: reference.grouped_matmul(x, w, sizes).sum())(w)
    np.testing.assert_allclose(np.asarray(slope[1]), np.broadcast_to(np.asarray(x[2]), (N, K)), rtol=1e-6)
