"""One order of each sum, whatever the number of rows and the kind of step: by what the probe found on this machine, and by what it prints."""
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import probe, reference
from pallas_kernels.forms import Forms
from pallas_kernels.ragged import Ragged
from pallas_kernels.rounding import add

SHAPES = [(576, 192), (1536, 576), (2100, 96)]  # K, N: of small models, and one that needs several chunks
COUNTS = [*range(1, 41), 64, 100, 257]


@pytest.fixture(scope="module")
def found():
    """found(dtype) -> the forms of SHAPES on this machine."""
    known = {}

    def of(dtype) -> Forms:
        if dtype not in known:
            known[dtype] = probe.find(probe.Shapes(tuple(SHAPES), 6, 2, 64), dtype)
            print(jnp.dtype(dtype).name, known[dtype])
        assert known[dtype].proven
        return known[dtype]
    return of


def bits(a):
    a = np.asarray(a)
    return a.view(np.uint16 if a.dtype.itemsize == 2 else np.uint32)


def operands(k, n, dtype, rows=512):
    keys = jax.random.split(jax.random.key(k), 2)
    return jax.random.normal(keys[0], (rows, k)).astype(dtype), (jax.random.normal(keys[1], (n, k)) / k ** 0.5).astype(dtype)


def jitted(function, forms):
    return jax.jit(function, compiler_options=forms.compiler_options or None)


@pytest.mark.parametrize("k, n", SHAPES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rows_of_a_product_have_the_same_bits_for_every_number_of_rows(found, k, n, dtype):
    x, w = operands(k, n, dtype)
    forms, bias = found(dtype), w[:, 0] * 3
    product = jitted(lambda x: reference.matmul(x, w, bias, out_dtype=jnp.float32, product=forms.product), forms)
    want = bits(product(x))
    for rows in COUNTS:
        np.testing.assert_array_equal(bits(product(x[:rows])), want[:rows], err_msg=f"{rows} rows")
    np.testing.assert_array_equal(bits(product(x[300:301])), want[300:301], err_msg="row 300 alone")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_residual_given_to_a_product_has_the_bits_of_the_sum_after_it(found, dtype):
    x, w = operands(576, 192, dtype, rows=9)
    bias, residual = w[:, 0] * 3, 3 * x[:, :192]
    matmul = partial(reference.matmul, product=found(dtype).product)
    inside = jitted(lambda x, r: matmul(x, w, bias, residual=r), found(dtype))
    product, outside = jitted(lambda x: matmul(x, w, bias), found(dtype)), jax.jit(add)
    for rows in (1, 2, 9):
        np.testing.assert_array_equal(bits(inside(x[:rows], residual[:rows])), bits(outside(residual[:rows], product(x[:rows]))))


@pytest.mark.parametrize("width", [64, 576, 5000])
def test_norms_and_softmax_sums_do_not_see_other_rows(width):
    x = jax.random.normal(jax.random.key(width), (64, width)) * 3
    weight = jnp.linspace(0.5, 1.5, width)
    functions = {"rms_norm": jax.jit(lambda x: reference.rms_norm(x, weight, 1e-5)), "log_sum_exp": jax.jit(reference.log_sum_exp),
                 "row_sum": jax.jit(reference.row_sum),
                 "silu": jax.jit(reference.ACTIVATIONS["silu"])}
    for name, function in functions.items():
        want = bits(function(x))
        for rows in (1, 2, 3, 7, 16, 33):
            np.testing.assert_array_equal(bits(function(x[:rows])), want[:rows], err_msg=f"{name}, {rows} rows")


@pytest.mark.parametrize("dtype, window, softcap, group, width", [
    (jnp.float32, None, None, 3, 64), (jnp.float32, 50, None, 1, 96), (jnp.bfloat16, 50, 5.0, 3, 64), (jnp.float32, None, 5.0, 3, 80),
    (jnp.bfloat16, None, None, 1, 16), (jnp.float16, None, None, 1, 48),
])
def test_decode_prefill_and_chunked_prefill_have_the_same_bits(dtype, window, softcap, group, width):
    length, page_size, kv_heads = 300, 16, 2
    forms = probe.find(probe.Shapes(((width, width),), kv_heads * group, kv_heads, width), dtype)
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
        return bits(jitted(lambda q: reference.attention(q, k_pages, v_pages, ragged, scale=0.125, window=window, softcap=softcap,
                                                         static_bound=static_bound, forms=forms), forms)(q[position]))

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
