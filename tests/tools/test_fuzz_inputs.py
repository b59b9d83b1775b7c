"""Mutated input files give an answer or a one-line error of ours: a small count here, more with tools/fuzz_inputs.py."""
import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "fuzz_inputs.py"
spec = importlib.util.spec_from_file_location("fuzz_inputs", SCRIPT)
fuzz_inputs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz_inputs)


@pytest.mark.parametrize("name", fuzz_inputs.TARGETS)
def test_a_mutated_input_gives_an_answer_or_one_line(name, tmp_path):
    results = list(fuzz_inputs.fuzz(fuzz_inputs.TARGETS[name], 150, 1, tmp_path))
    assert [(data, error, wrong) for data, error, wrong in results if wrong] == []
    answers = sum(error is None for _, error, _ in results)
    assert answers > 20 and len(results) - answers > 20


def test_what_is_wrong_is_found(tmp_path):
    def target(folder):
        def attempt(data):
            if data != b'{"a": 1}':
                raise KeyError("a\nb")
        return [{"a": 1}], attempt
    assert "no error of ours" in {wrong for _, _, wrong in fuzz_inputs.fuzz(target, 20, 0, tmp_path)}
