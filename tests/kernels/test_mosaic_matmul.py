"""The Hopper matmul, simulated, on the list of matmul_cases.py. Fresh shared memory is NaN too."""
import jax.numpy as jnp
import matmul_cases as cases
import pytest

from pallas_kernels import mosaic_matmul as mm

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("rows, k, n, dtype, out", cases.SHAPES)
def test_products_are_those_of_float64(rows, k, n, dtype, out):
    cases.products_are_those_of_float64(mm.matmul, rows, k, n, dtype, out)


def test_a_row_has_the_same_bits_for_every_number_of_rows_and_both_schedules():
    cases.a_row_has_the_same_bits_for_every_number_of_rows_and_both_schedules(mm.matmul)


def test_chunk_sums_are_the_products_over_their_chunks_and_add_up_in_ascending_order():
    cases.chunk_sums_are_the_products_over_their_chunks_and_add_up_in_ascending_order(
        lambda x, w: mm.launch(x, [w], [], jnp.float32, groups=1, stages=2, split=True), mm.matmul, mm.chunk_length)


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


def test_float32_is_refused_by_name():
    with pytest.raises(ValueError, match="float32"):
        mm.matmul(jnp.zeros((1, 64)), jnp.zeros((64, 64)))


@pytest.mark.slow
@pytest.mark.parametrize("rows", cases.ROWS)
def test_every_number_of_rows(rows):
    cases.every_number_of_rows(mm.matmul, rows)
