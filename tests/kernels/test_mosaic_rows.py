"""Norms and sums along a row on Hopper, simulated, on the list of matmul_cases.py."""
import matmul_cases as cases
import pytest

from pallas_kernels import mosaic_rows as rows

pytestmark = pytest.mark.usefixtures("interpreted")


@pytest.mark.parametrize("width", cases.WIDTHS)
def test_rows_match_float64_and_do_not_see_each_other(width):
    cases.rows_match_float64_and_do_not_see_each_other(rows, width)


def test_log_sum_exp_of_large_and_absent_logits():
    cases.log_sum_exp_of_large_and_absent_logits(rows.log_sum_exp)
