"""Norms and sums along a row on Hopper, simulated, on the list of matmul_cases.py."""
import jax
import jax.numpy as jnp
import matmul_cases as cases
import pytest

from pallas_kernels import mosaic_rows as rows

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("width", cases.WIDTHS)
def test_rows_match_float64_and_do_not_see_each_other(width):
    cases.rows_match_float64_and_do_not_see_each_other(rows, width)


def test_log_sum_exp_of_large_and_absent_logits():
    cases.log_sum_exp_of_large_and_absent_logits(rows.log_sum_exp)


@pytest.mark.parametrize("width, padded", [(576, False), (896, False), (64, True), (129, True)])
def test_a_norm_of_aligned_rows_copies_nothing(width, padded):
    x = jax.ShapeDtypeStruct((2, width), jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda x, w: rows.rms_norm(x, w, 1e-5))(x, jax.ShapeDtypeStruct((width,), jnp.bfloat16)))
    assert (" pad[" in text) == padded
