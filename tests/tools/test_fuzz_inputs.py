"""Damaged inputs give an answer or a one-line error within a second: a few of the cases that tools/fuzz_inputs.py makes."""
import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "fuzz_inputs.py"
spec = importlib.util.spec_from_file_location("fuzz_inputs", SCRIPT)
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_damaged_inputs_give_an_answer_or_a_one_line_error_within_a_second(name):
    assert fuzz.findings(name, 400, seed=7) == []


def test_the_fuzzer_finds_a_traceback_a_long_error_and_a_hang(monkeypatch):
    def reads(answer):
        target = fuzz.TARGETS["config"]
        calls = iter(range(10))
        bad = fuzz.Target(target.wholes, target.keys, target.prepare, lambda *_: answer() if next(calls) else None)
        monkeypatch.setitem(fuzz.TARGETS, "bad", bad)
        return fuzz.findings("bad", 1, seed=0)

    def raises(error):
        raise error

    assert "KeyError" in reads(lambda: raises(KeyError("a")))[0]
    assert "several lines" in reads(lambda: raises(fuzz.JaxllmError("a\nb")))[0]
    assert "1.0 s" in reads(lambda: fuzz.time.sleep(1.01))[0]
    assert reads(lambda: raises(fuzz.JaxllmError("one line"))) == [] == reads(lambda: None)
