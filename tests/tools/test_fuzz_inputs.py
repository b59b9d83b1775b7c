"""Damaged inputs give an answer or a one-line error within a second: a few of the cases that tools/fuzz_inputs.py makes."""
import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "fuzz_inputs.py"
spec = importlib.util.spec_from_file_location("fuzz_inputs", SCRIPT)
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)
COUNT = {"config": 400, "generation_config": 400, "tokenizer_config": 300, "prompts": 150}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_damaged_inputs_give_an_answer_or_a_one_line_error_within_a_second(name):
    found, answers = fuzz.findings(name, COUNT[name], seed=7)
    assert found == []
    assert answers > 20 and COUNT[name] - answers > 20


def test_the_fuzzer_finds_a_traceback_a_long_error_and_a_hang(monkeypatch):
    def reads(answer):
        monkeypatch.setitem(fuzz.TARGETS, "bad", fuzz.Target([{"a": 1}], ("b",), lambda _: lambda raw: raw != b'{"a": 1}' and answer()))
        return fuzz.findings("bad", 1, seed=0)

    def raises(error):
        raise error

    def line(answer):
        (found,), answers = reads(answer)
        return found

    assert "KeyError" in line(lambda: raises(KeyError("a")))
    assert "several lines" in line(lambda: raises(fuzz.JaxllmError("a\nb")))
    assert "several lines" in line(lambda: raises(fuzz.JaxllmError("a" * 2001)))
    assert "1.0 s" in line(lambda: fuzz.time.sleep(1.01))
    assert reads(lambda: raises(fuzz.JaxllmError("one line"))) == ([], 0) and reads(lambda: None) == ([], 1)
