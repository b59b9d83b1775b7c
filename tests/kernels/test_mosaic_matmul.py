"""The Hopper matmul, simulated, on the list of matmul_cases.py. Fresh shared memory is NaN too."""
import jax
import jax.numpy as jnp
import matmul_cases as cases
import numpy as np
import pytest

from pallas_kernels import mosaic_matmul as mm
from pallas_kernels import mosaic_rows

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("rows, k, n, dtype, out", cases.SHAPES)
def test_products_are_those_of_float64(rows, k, n, dtype, out):
    cases.products_are_those_of_float64(mm.matmul, rows, k, n, dtype, out)


def test_a_row_has_the_same_bits_for_every_number_of_rows_and_both_schedules():
    cases.a_row_has_the_same_bits_for_every_number_of_rows_and_both_schedules(mm.matmul)


def test_chunk_sums_are_the_products_over_their_chunks_and_add_up_in_ascending_order():
    cases.chunk_sums_are_the_products_over_their_chunks_and_add_up_in_ascending_order(
        lambda x, w: mm.launch(x, [w], [], jnp.float32, groups=1, stages=2, split=True)[0], mm.matmul, mm.chunk_length)


@pytest.mark.parametrize("dtype, out", cases.RESIDUALS)
def test_a_residual_has_the_bits_of_the_sum_after_the_product_in_both_schedules(dtype, out):
    cases.a_residual_has_the_bits_of_the_sum_after_the_product_in_both_schedules(mm.matmul, dtype, out)


def test_a_residual_of_another_shape_or_dtype_is_refused():
    x, w, *_ = cases.operands(3)
    for wrong in (jnp.zeros((3, cases.N)), jnp.zeros((2, cases.N), jnp.bfloat16)):
        with pytest.raises(ValueError, match="the residual is"):
            mm.matmul(x, w, residual=wrong)


@pytest.mark.parametrize("activation, curve", cases.CURVES)
def test_gated_mlp_is_that_of_float64_and_a_row_alone_is_the_row_in_a_crowd(activation, curve):
    cases.gated_mlp_is_that_of_float64_and_a_row_alone_is_the_row_in_a_crowd(mm.gated_mlp, activation, curve)


def test_an_activation_without_a_kernel_keeps_the_promise_through_xla():
    cases.an_activation_without_a_kernel_keeps_the_promise_through_xla(mm.gated_mlp)


def test_several_products_in_one_launch_have_the_bits_of_each_alone():
    x, *_ = cases.operands(67)
    weights, biases = zip(*((cases.operands(1, n=n, seed=n)[1], cases.operands(1, n=n, seed=n)[3]) for n in (cases.N, 64, 40)))
    biases = biases[0], None, biases[2]
    want = [cases.bits(mm.matmul(x, w, b)) for w, b in zip(weights, biases)]
    for rows, split in ((67, False), (3, True)):
        for got, whole in zip(mm.matmuls(x[:rows], weights, biases, split=split), want, strict=True):
            np.testing.assert_array_equal(cases.bits(got), whole[:rows])


@pytest.mark.parametrize("n, dtype, biased", [(136, jnp.bfloat16, True), (384, jnp.float16, False), (50, jnp.bfloat16, False)])
def test_a_product_its_residual_and_its_norm_have_the_bits_of_the_three_in_both_schedules(n, dtype, biased):
    x, w, _, b, _ = cases.operands(66, n=n, dtype=dtype, seed=n)
    bias = b if biased else None
    residual, norm = (3 * jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate([(66, n), (n,)]))
    want = mm.matmul(x, w, bias, residual=residual)
    normed = mosaic_rows.rms_norm(want, norm, 1e-5)
    for rows, split in ((66, False), (5, True)):
        got = mm.matmul_norm(x[:rows], w, bias, residual=residual[:rows], norm=norm, eps=1e-5, split=split)
        for own, whole in zip(got, (want, normed), strict=True):
            np.testing.assert_array_equal(cases.bits(own), cases.bits(whole)[:rows])


def test_float32_is_refused_by_name():
    with pytest.raises(ValueError, match="float32"):
        mm.matmul(jnp.zeros((1, 64)), jnp.zeros((64, 64)))


@pytest.mark.slow
@pytest.mark.parametrize("rows", cases.ROWS)
def test_every_number_of_rows(rows):
    cases.every_number_of_rows(mm.matmul, rows)
