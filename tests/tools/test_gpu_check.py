"""tools/gpu_check.py runs from end to end where there is no card: on tiny shapes, in the simulator."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "gpu_check.py"
NAMES = {
    "machine": {"versions", "copy", "xla matmul"},
    "bits": {"matmul 136x320", "gated silu", "residual", "several products", "product, residual and norm", "rows", "tails",
             "attention (64, 3, 16, None, None)", "encoder attention (64, 1, None)", "grouped ([1, 0, 9], 136, 320)"},
    "oracle": {"matmul 1x136x320", "rows 576", "attention (64, 3, 16, None, None)", "encoder attention (64, 1, None, None)",
               "grouped matmul ([1, 0, 9], 136, 320)"},
    "kernels": {"matmul 1x136x320", "tree (1, 136, 320)"},
    "model": {"mosaic decode 1 rows, context 20", "mosaic prefill 24", "mosaic draw everything 2 rows"},
}


def run(*arguments):
    return subprocess.run([sys.executable, str(SCRIPT), "--small", *arguments], capture_output=True, text=True)


def test_a_section_writes_what_it_measured(tmp_path):
    done = run("--section", "machine", "--out", str(tmp_path / "machine.json"))
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "machine.json").read_text())
    assert {entry["name"] for entry in entries} == NAMES["machine"] and not any("error" in entry for entry in entries), entries


@pytest.mark.slow
def test_every_section_runs_and_finds_no_bit_that_differs(tmp_path):
    done = run("--minutes", "60", "--out", str(tmp_path / "all.json"))
    assert done.returncode == 0 and done.stdout.rstrip().endswith("at fault: nothing"), done.stdout + done.stderr
    result = json.loads((tmp_path / "all.json").read_text())
    assert not result["times_mean_something"]
    assert {section["status"] for section in result["sections"].values()} == {"done"}
    for section, names in NAMES.items():
        assert names <= {entry["name"] for entry in result["sections"][section]["entries"]}
