"""`jaxllm doctor` and the golden bits: they say what this machine does, whatever it does."""
import json

import pytest

from jaxllm import doctor, golden, machine
from jaxllm.cli import main
from tests.tiny import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


def test_a_report_says_what_was_shown_and_fits_a_screen(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "SECONDS", 0.1)
    monkeypatch.setattr(doctor, "LIMITS", {"max_model_len": 256, "max_num_seqs": 2, "max_num_batched_tokens": 16})
    monkeypatch.setattr(golden, "compare", lambda _: {"made_on": "another", "equal": False, "models": {}, "operations": ["exp"]})
    assert main(["doctor", "--model", folder, "--load-format", "dummy", "--dtype", "float32", "--json", "--compile-cache-dir", str(tmp_path)]) == 0
    report = json.loads(capsys.readouterr().out)
    levels = report["dtypes"]["float32"]
    assert report["proven"] and levels["R1"] and levels["R2"] and levels["R5"] and levels["comparisons"] > 100
    assert report["device"] == machine.processor() and report["cache"]["folder"] == str(tmp_path) and report["cache"]["bytes"] > 0
    screen = doctor.render(report)
    assert "R2 proven" in screen and "OTHER bits" in screen and "exp" in screen and len(screen.splitlines()) < 30
    levels["R2"], levels["R2_differs"] = False, ["alone: request 3"]
    assert "R2 FAILED" in doctor.render(report) and "alone: request 3" in doctor.render(report)


def test_doctor_refuses_a_dtype_that_it_does_not_know(capsys):
    assert main(["doctor", "--dtype", "float32,int4"]) == 2 and "int4" in capsys.readouterr().err


def test_operations_are_held_against_the_golden_ones():
    """On the processor that made them they are equal; on another this only says what differs."""
    made = json.loads(golden.FILE.read_text())
    here = golden.operations()
    differ = [name for name, value in made["operations"].items() if here[name] != value]
    print(f"golden bits of {made['processor']}, here {machine.processor()}: operations that differ: {differ or 'none'}")
    assert set(here) == set(made["operations"]) and set(made["models"]) == set(golden.MODELS)
    products = {value for name, value in here.items() if name.startswith("product") and name not in ("product, stream", "product, plain")}
    assert len(products) == 1, "forms that ask a library for no more than a chain agree on every machine that has consistent arithmetic"
    if made["processor"] == machine.processor():
        assert differ == []


def test_the_processor_is_named_and_the_host_is_not():
    import socket
    said = machine.processor()
    assert said and socket.gethostname() not in said and "\n" not in said


def test_facts_outlive_a_damaged_file_and_a_folder_that_cannot_be_written(tmp_path):
    facts = machine.Facts(tmp_path / "new")
    facts.put(["a", 1], [1, 2])
    assert machine.Facts(tmp_path / "new").get(["a", 1]) == [1, 2] and facts.get(["a", 2]) is None
    (tmp_path / "new" / "facts.json").write_text("[1")
    assert machine.Facts(tmp_path / "new").get(["a", 1]) is None
    (tmp_path / "file").write_text("")
    blocked = machine.Facts(tmp_path / "file" / "below")
    blocked.put("b", True)
    assert blocked.get("b") is True
