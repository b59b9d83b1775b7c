"""The reference's reduction tree on the CPU: one order of sums, whatever the number of rows and the kind of step."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import reference
from pallas_kernels.ragged import Ragged
from pallas_kernels.rounding import add

SHAPES = [(576, 192), (1536, 576), (2100, 96)]  # K, N: of small models, and one that needs three chains
COUNTS = [*range(1, 41), 64, 100, 257]


def bits(a):
    a = np.asarray(a)
    return a.view(np.uint16 if a.dtype.itemsize == 2 else np.uint32)


def operands(k, n, dtype, rows=512):
    keys = jax.random.split(jax.random.key(k), 2)
    return jax.random.normal(keys[0], (rows, k)).astype(dtype), (jax.random.normal(keys[1], (n, k)) / k ** 0.5).astype(dtype)


@pytest.mark.parametrize("k, n", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rows_of_a_product_have_the_same_bits_for_every_number_of_rows(k, n, dtype):
    x, w = operands(k, n, dtype)
    product = jax.jit(lambda x: reference.matmul(x, w, out_dtype=jnp.float32))
    want = bits(product(x))
    for rows in COUNTS:
        np.testing.assert_array_equal(bits(product(x[:rows])), want[:rows], err_msg=f"{rows} rows")
    np.testing.assert_array_equal(bits(product(x[300:301])), want[300:301], err_msg="row 300 alone")


@pytest.mark.parametrize("k, n", SHAPES)
def test_a_float32_product_is_an_ascending_chain_of_fused_multiply_adds_by_chunks(k, n):
    x, w = operands(k, n, jnp.float32, rows=4)
    wide_x, wide_w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    total = None
    for start in range(0, k, reference.CHAIN_CHUNK):
        chain = np.zeros((4, n), np.float32)
        for i in range(start, min(start + reference.CHAIN_CHUNK, k)):
            # a float64 holds the product of two float32 exactly, so that one rounding is left, as in a fused multiply-add
            chain = (wide_x[:, i:i + 1] * wide_w[:, i] + chain).astype(np.float32)
        total = chain if total is None else total + chain
    np.testing.assert_array_equal(bits(reference.matmul(x, w)), bits(total))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("k, n", [*SHAPES, (33, 512), (896, 4864), (1024, 80)])
def test_products_made_for_few_rows_change_no_bit(k, n, dtype):
    x, w = operands(k, n, dtype, rows=32)
    bias = w[:, 0] * 3
    few, plain = (jax.jit(partial(reference.matmul, **how)) for how in ({"product": reference.product_of_few_rows}, {}))
    for rows in (1, 2, 15, 16, 17):
        np.testing.assert_array_equal(bits(few(x[:rows], w, bias)), bits(plain(x[:rows], w, bias)), err_msg=f"{rows} rows")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_residual_given_to_a_product_has_the_bits_of_the_sum_after_it(dtype):
    x, w = operands(576, 192, dtype, rows=9)
    bias, residual = w[:, 0] * 3, 3 * x[:, :192]
    inside = jax.jit(lambda x, r: reference.matmul(x, w, bias, residual=r))
    product, outside = jax.jit(lambda x: reference.matmul(x, w, bias)), jax.jit(add)
    for rows in (1, 2, 9):
        np.testing.assert_array_equal(bits(inside(x[:rows], residual[:rows])), bits(outside(residual[:rows], product(x[:rows]))))


@pytest.mark.parametrize("width", [64, 576, 5000])
def test_norms_and_softmax_sums_do_not_see_other_rows(width):
    x = jax.random.normal(jax.random.key(width), (64, width)) * 3
    weight = jnp.linspace(0.5, 1.5, width)
    functions = {"rms_norm": jax.jit(lambda x: reference.rms_norm(x, weight, 1e-5)), "log_sum_exp": jax.jit(reference.log_sum_exp),
                 "row_sum": jax.jit(reference.row_sum)}
    for name, function in functions.items():
        want = bits(function(x))
        for rows in (1, 2, 3, 7, 16, 33):
            np.testing.assert_array_equal(bits(function(x[:rows])), want[:rows], err_msg=f"{name}, {rows} rows")


@pytest.mark.parametrize("dtype, window, softcap", [
    (jnp.float32, None, None), (jnp.float32, 50, None), (jnp.bfloat16, 50, 5.0), (jnp.float32, None, 5.0),
])
def test_decode_prefill_and_chunked_prefill_have_the_same_bits(dtype, window, softcap):
    length, page_size, kv_heads, group, width = 300, 16, 2, 3, 64
    keys = jax.random.split(jax.random.key(1), 4)
    pages = -(-length // page_size)
    k_pages, v_pages = (jax.random.normal(key, (2 * pages, page_size, kv_heads, width)).astype(dtype) for key in keys[:2])
    q = jax.random.normal(keys[2], (length, kv_heads * group, width)).astype(dtype)
    table = jax.random.permutation(keys[3], 2 * pages).astype(jnp.int32).reshape(2, pages)

    def attend(parts, decode=False, static_bound=False):
        position = jnp.concatenate([jnp.arange(a, b) for _, a, b in parts]).astype(jnp.int32)
        starts = None if decode else jnp.asarray(np.cumsum([0] + [b - a for _, a, b in parts]), jnp.int32)
        ragged = Ragged(position, position, jnp.asarray([b for _, _, b in parts], jnp.int32),
                        table[jnp.asarray([s for s, _, _ in parts])], starts)
        return bits(jax.jit(lambda q: reference.attention(q, k_pages, v_pages, ragged, scale=0.125, window=window, softcap=softcap,
                                                          static_bound=static_bound))(q[position]))

    whole = attend([(0, 0, length)])
    np.testing.assert_array_equal(attend([(0, 0, length)], static_bound=True), whole)
    first, second = attend([(0, 0, 77)]), attend([(1, 20, 60), (0, 77, length)])
    np.testing.assert_array_equal(np.concatenate([first, second[40:]]), whole)
    for t in (0, 127, 128, 299):
        np.testing.assert_array_equal(attend([(0, t, t + 1)], decode=True)[0], whole[t], err_msg=f"token {t} alone")
    crowd = attend([(0, t, t + 1) for t in (299, 3, 128)] + [(1, 9, 10)], decode=True)
    np.testing.assert_array_equal(crowd[:3], whole[np.array([299, 3, 128])])


def test_a_nan_past_the_end_of_a_sequence_or_in_a_page_that_is_not_its_own_changes_no_bit():
    k_pages, v_pages = (jax.random.normal(jax.random.key(i), (6, 16, 2, 64)) for i in range(2))
    q = jax.random.normal(jax.random.key(2), (40, 2, 64))
    poison = lambda pages: pages.at[2, 8:].set(jnp.nan).at[3:].set(jnp.nan)  # the sequence has 40 tokens in pages 0, 1 and 2
    for rows, starts in ((slice(0, 40), jnp.asarray([0, 40])), (slice(39, 40), None)):
        position = jnp.arange(40, dtype=jnp.int32)[rows]
        ragged = Ragged(position, position, jnp.asarray([40], jnp.int32), jnp.asarray([[0, 1, 2, 3, 4, 5]], jnp.int32), starts)
        want, got = (reference.attention(q[rows], *pages, ragged, scale=0.125)
                     for pages in ((k_pages, v_pages), (poison(k_pages), poison(v_pages))))
        np.testing.assert_array_equal(bits(got), bits(want))
        assert jnp.isfinite(want).all()
