"""Norms and sums along a row on Ampere and Ada, interpreted, on the list of matmul_cases.py."""
import jax
import matmul_cases as cases
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.triton")
from pallas_kernels import triton_rows as rows  # noqa: E402

pytestmark = pytest.mark.usefixtures("interpreted_triton")


@pytest.mark.parametrize("width", cases.WIDTHS)
def test_rows_match_float64_and_do_not_see_each_other(width):
    cases.rows_match_float64_and_do_not_see_each_other(rows, width)


@pytest.mark.parametrize("width", cases.WIDTHS)
def test_sums_match_float64_and_rows_do_not_see_each_other(width):
    x = jax.random.normal(jax.random.key(width), (3, 2, width)) * 3
    got = rows.row_sum(x)
    # at most width / 128 + 12 float32 additions deep
    np.testing.assert_allclose(np.asarray(got), cases.exact(x).sum(-1), rtol=1e-5, atol=1e-5 * width ** 0.5)
    np.testing.assert_array_equal(cases.bits(got)[1, 1], cases.bits(rows.row_sum(x[1:2, 1]))[0])


def test_log_sum_exp_of_large_and_absent_logits():
    cases.log_sum_exp_of_large_and_absent_logits(rows.log_sum_exp)
