"""Norms and sums along a row on Ampere and Ada, interpreted, on the list of matmul_cases.py."""
import matmul_cases as cases
import pytest

pytest.importorskip("jax.experimental.pallas.triton")
from pallas_kernels import triton_rows as rows  # noqa: E402

pytestmark = pytest.mark.usefixtures("interpreted_triton")


@pytest.mark.parametrize("width", cases.WIDTHS)
def test_rows_match_float64_and_do_not_see_each_other(width):
    cases.rows_match_float64_and_do_not_see_each_other(rows, width)


def test_log_sum_exp_of_large_and_absent_logits():
    cases.log_sum_exp_of_large_and_absent_logits(rows.log_sum_exp)
