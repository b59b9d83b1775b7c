"""The matmul of Ampere and Ada, interpreted, on the list of matmul_cases.py."""
import jax.numpy as jnp
import matmul_cases as cases
import pytest

pytest.importorskip("jax.experimental.pallas.triton")
from pallas_kernels import triton_matmul as mm  # noqa: E402

pytestmark = pytest.mark.usefixtures("interpreted_triton")


@pytest.mark.parametrize("rows, k, n, dtype, out", [*cases.SHAPES, (20, 300, 70, jnp.float32, jnp.float32)])
def test_products_are_those_of_float64(rows, k, n, dtype, out):
    cases.products_are_those_of_float64(mm.matmul, rows, k, n, dtype, out)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_row_has_the_same_bits_for_every_number_of_rows_and_both_schedules(dtype):
    cases.a_row_has_the_same_bits_for_every_number_of_rows_and_both_schedules(mm.matmul, dtype)


def test_chunk_sums_are_the_products_over_their_chunks_and_add_up_in_ascending_order():
    cases.chunk_sums_are_the_products_over_their_chunks_and_add_up_in_ascending_order(
        lambda x, w: mm._call(x, [w], [], jnp.float32, split=True), mm.matmul, mm.chunk_length)


@pytest.mark.parametrize("dtype, out", cases.RESIDUALS)
def test_a_residual_has_the_bits_of_the_sum_after_the_product_in_both_schedules(dtype, out):
    cases.a_residual_has_the_bits_of_the_sum_after_the_product_in_both_schedules(mm.matmul, dtype, out)


@pytest.mark.parametrize("activation, curve", cases.CURVES)
def test_gated_mlp_is_that_of_float64_and_a_row_alone_is_the_row_in_a_crowd(activation, curve):
    cases.gated_mlp_is_that_of_float64_and_a_row_alone_is_the_row_in_a_crowd(mm.gated_mlp, activation, curve)


def test_an_activation_without_a_kernel_keeps_the_promise_through_xla():
    cases.an_activation_without_a_kernel_keeps_the_promise_through_xla(mm.gated_mlp)


def test_dtypes_that_differ_or_have_no_product_are_refused_by_name():
    with pytest.raises(ValueError, match="float16"):
        mm.matmul(jnp.zeros((1, 64), jnp.float16), jnp.zeros((64, 64)))
    with pytest.raises(ValueError, match="int8"):
        mm.matmul(jnp.zeros((1, 64), jnp.int8), jnp.zeros((64, 64), jnp.int8))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_chunk_is_several_steps_so_that_no_product_accumulates_on_the_sum_of_the_chunks_before_it(dtype):
    for k in (1, 300, 2047, 2048, 20000):
        assert mm.chunk_length(k) % mm.step_length(dtype) == 0 and mm.chunk_length(k) >= 2 * mm.step_length(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("rows", cases.ROWS)
def test_every_number_of_rows(rows):
    cases.every_number_of_rows(mm.matmul, rows)
