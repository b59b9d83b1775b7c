"""The command line from outside: output, exit status, one-line errors, and nothing else on standard output."""
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxllm import cli
from tests.tiny import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def run(capsys, folder, tmp_path):
    """Runs a command in this process: (exit status, standard output, standard error)."""
    def call(*args):
        model = ["--model", folder, "--load-format", "dummy", "--max-num-seqs", "4", "--max-num-batched-tokens", "32"]
        options = [*model, "--compile-cache-dir", "off"] if args and args[0] in ("generate", "bench", "fingerprint", "verify") and "--model" not in args else []
        status = cli.main([*args, *options])
        out, err = capsys.readouterr()
        return status, out, err
    return call


def refused(result, status, *words):
    code, out, err = result
    assert code == status and out == ""
    assert err.startswith("jaxllm: error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err


def test_json_holds_what_is_promised_in_the_order_of_the_prompts(run):
    status, out, err = run("generate", "hello", "there", "--format", "json", "--max-tokens", "4", "--logprobs", "2", "--n", "2")
    assert status == 0
    rows = [json.loads(line) for line in out.splitlines()]
    assert [(r["index"], r["prompt"]) for r in rows] == [(0, "hello"), (1, "there")]
    for r in rows:
        assert set(r) == {"index", "prompt", "prompt_token_ids", "outputs", "seed", "system_fingerprint", "reproducible"}
        assert r["system_fingerprint"].startswith("jaxllm-") and isinstance(r["seed"], int)
        assert [o["index"] for o in r["outputs"]] == [0, 1]
        for o in r["outputs"]:
            assert set(o) == {"index", "text", "token_ids", "finish_reason", "stop_reason", "logprobs", "cumulative_logprob"}
            assert len(o["logprobs"]) == len(o["token_ids"])
            assert all(str(token) in row for token, row in zip(o["token_ids"], o["logprobs"]))


def test_text_is_the_completion_alone(run):
    json_out = json.loads(run("generate", "hello", "--max-tokens", "5", "--temperature", "0", "--format", "json")[1])
    status, out, _ = run("generate", "hello", "--max-tokens", "5", "--temperature", "0")
    assert status == 0 and out == json_out["outputs"][0]["text"] + "\n"


def test_the_seed_of_an_answer_replays_it(run, tmp_path):
    rows = [json.loads(line) for line in run("generate", "a", "b", "--format", "json", "--max-tokens", "6", "--seed", "5")[1].splitlines()]
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "b", "seed": rows[1]["seed"]}))
    again = json.loads(run("generate", "--prompts-file", str(file), "--format", "json", "--max-tokens", "6")[1])
    assert again["outputs"] == rows[1]["outputs"]
    other = [json.loads(line) for line in run("generate", "a", "b", "--format", "json", "--max-tokens", "6", "--seed", "6")[1].splitlines()]
    assert [r["seed"] for r in other] != [r["seed"] for r in rows]


def test_a_prompts_file_takes_texts_and_objects_and_lines_have_their_own_parameters(run, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('"plain"\n\n{"prompt": "own", "max_tokens": 2, "ignore_eos": true}\n{"prompt_token_ids": [1, 2]}\n')
    rows = [json.loads(line) for line in run("generate", "--prompts-file", str(file), "--format", "json", "--max-tokens", "3", "--ignore-eos")[1].splitlines()]
    assert [len(r["outputs"][0]["token_ids"]) for r in rows] == [3, 2, 3]
    assert rows[2]["prompt"] is None and rows[2]["prompt_token_ids"] == [1, 2]


@pytest.mark.parametrize("line,words", [
    (b'{"prompt": "x"', ["not JSON"]), (b'\xff\xfe', ["UTF-8"]), (b'[1]', ["list"]), (b'{"text": "x"}', ["no prompt"]),
    (b'{"prompt": "x", "temprature": 1}', ["temprature"]), (b'{"prompt": "x", "temperature": -1}', ["temperature=-1"]),
    (b'{"prompt": 3}', ["must be a text"]), (b'{"prompt": ""}', ["empty"])])
def test_one_bad_line_among_thousands_is_named_before_any_work(run, tmp_path, monkeypatch, line, words):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'"fine"\n' * 2000 + line + b'\n"fine"\n')
    monkeypatch.setattr("jaxllm.llm.LLM.__init__", lambda *a, **k: pytest.fail("the model was loaded"))
    refused(run("generate", "--prompts-file", str(file)), 2, ":2001", *words)


@pytest.mark.parametrize("args,status,words", [
    (["generate"], 2, ["no prompt"]), (["generate", ""], 2, ["empty"]), (["generate", "x", "--n", "0"], 2, ["n=0"]),
    (["generate", "x", "--temperature", "-1"], 2, ["temperature"]), (["generate", "x", "--dtype", "int4"], 2, ["--dtype"]),
    (["generate", "x", "--prompts-file", "y"], 2, ["both"]), (["generate", "--prompts-file", "/nope.jsonl"], 2, ["/nope.jsonl"]),
    (["generate", "x", "--seed", str(2**64)], 2, ["seed"]), (["generate", "x" * 400], 2, ["400 tokens", "256"]),
    (["generate", "x", "--max-model-len", "100000000"], 1, ["max_model_len"]), (["generate", "x", "--model", "/nope"], 1, ["/nope"]),
    (["generate", "x", "--model", "builtin:nope"], 2, ["builtin:tales"]), (["generate", "x", "--hf-overrides", "[]"], 2, ["JSON object"]),
    (["generate", "x", "--kernels", "mosaic"], 2, ["mosaic"]), (["generate", "x", "--pt-load-map-location", "{"], 2, ["pt"]),
    (["frobnicate"], 2, ["frobnicate"]), ([], 2, ["COMMAND"]), (["inspect", "/nope"], 1, ["/nope"]), (["bench", "latency", "--runs", "0"], 2, ["runs"])])
def test_misuse_is_one_line_with_its_status(run, args, status, words):
    refused(run(*args), status, *words)


def test_an_error_that_comes_later_names_the_line_too(run, tmp_path):
    file = tmp_path / "p.jsonl"
    for line, words in ((json.dumps("x" * 400), "400 tokens"), ('{"prompt_token_ids": [300]}', "0 to 299"), ('{"prompt": "a", "stop_token_ids": [300]}', "300"),
                        ('{"messages": [{"role": "user", "content": "a"}]}', "no chat template")):
        file.write_text(f'"a"\n\n{line}\n"b"\n')
        refused(run("generate", "--prompts-file", str(file)), 2, f"{file}:3: ", words)


@pytest.mark.parametrize("line", [b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", b'"\\ud83d"', b'{"messages": [{"role": "user", "content": "\\udfff"}]}',
                                  b'{"prompt": "a", "ignore_eos": "no"}', b'{"prompt": "a", "logit_bias": [1]}', b'{"prompt": "a", "stop": 3}', b"[" * 9000])
def test_a_line_that_is_strange_is_one_line_of_error(run, tmp_path, line):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'"fine"\n' + line)
    refused(run("generate", "--prompts-file", str(file)), 2, f"{file}:2: ")


def test_a_byte_order_mark_is_no_part_of_the_first_line(run, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'\xef\xbb\xbf"a"\r\n"b"\r\n')
    rows = [json.loads(line) for line in run("generate", "--prompts-file", str(file), "--format", "json", "--max-tokens", "1")[1].splitlines()]
    assert [r["prompt"] for r in rows] == ["a", "b"]


@pytest.mark.parametrize("raised", [KeyError("x"), AttributeError("no"), ZeroDivisionError(), TypeError("a\nb"), RecursionError("deep"), AssertionError(), StopIteration(),
                                    UnicodeEncodeError("ascii", "é", 0, 1, "no"), type("PanicException", (BaseException,), {})("panic")])
def test_whatever_is_raised_the_shell_sees_one_line(run, monkeypatch, raised):
    def fail(*a, **k):
        raise raised
    monkeypatch.setattr("jaxllm.llm.LLM.__init__", fail)
    refused(run("generate", "x", "--max-tokens", "1"), 1, type(raised).__name__, "--debug")


class Piped(io.TextIOWrapper):
    def __init__(self, data):
        super().__init__(io.BytesIO(data), "utf-8")


@pytest.mark.parametrize("arguments, piped, prompts", [
    ([], b"hello\n", ["hello"]), (["-"], b"hello\r\n", ["hello"]), (["a", "-"], "é\n\n".encode(), ["a", "é\n"]), ([], b"\xef\xbb\xbfhi", ["hi"]), (["a"], b"hello", ["a"])])
def test_standard_input_is_a_prompt(run, monkeypatch, arguments, piped, prompts):
    monkeypatch.setattr(sys, "stdin", Piped(piped))
    rows = [json.loads(line) for line in run("generate", *arguments, "--format", "json", "--max-tokens", "1")[1].splitlines()]
    assert [r["prompt"] for r in rows] == prompts


@pytest.mark.parametrize("arguments, piped, words", [([], b"", "no prompt"), ([], b"\n", "no prompt"), (["-"], b"\n", "standard input: the prompt is empty"),
                                                     (["-", "-"], b"a", "twice"), (["-"], b"\xff", "standard input: byte 0"), (["\udcff"], b"", "prompt 1")])
def test_a_bad_standard_input_is_refused(run, monkeypatch, arguments, piped, words):
    monkeypatch.setattr(sys, "stdin", Piped(piped))
    refused(run("generate", *arguments), 2, words)


def test_an_answer_is_not_lost_to_a_terminal_without_its_letters(folder):
    """In processes of their own, with an encoding that has no letter of the answer; `python -m jaxllm` is the command too."""
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    more = ["generate", "-", "--model", folder, "--load-format", "dummy", "--max-tokens", "8", "--temperature", "3", "--ignore-eos"]
    outputs = []
    for form in ("text", "json"):
        process = subprocess.run([sys.executable, "-m", "jaxllm", *more, "--format", form], input="é".encode(), capture_output=True, env=environment, timeout=100)
        assert process.returncode == 0 and process.stderr == b""
        outputs.append(process.stdout.decode("ascii"))
    row = json.loads(outputs[1])
    assert row["prompt"] == "é" and outputs[0].rstrip("\n") == row["outputs"][0]["text"].encode("ascii", "backslashreplace").decode().rstrip("\n")


def test_half_a_model_is_refused_by_what_is_missing(run, tmp_path, folder):
    (tmp_path / "config.json").write_text((Path(folder) / "config.json").read_text())
    refused(run("generate", "x", "--model", str(tmp_path)), 1, str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    refused(run("generate", "x", "--model", str(tmp_path)), 1, "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    refused(run("generate", "x", "--model", str(tmp_path)), 1, "model-00001-of-00002.safetensors")
    (tmp_path / "config.json").write_text("{")
    refused(run("generate", "x", "--model", str(tmp_path)), 1, "config.json")


def test_debug_shows_the_traceback(folder):
    with pytest.raises(Exception, match="nope"):
        cli.main(["generate", "x", "--model", "/nope", "--debug"])


def test_a_bench_reports_rates_and_the_machines_own_ceiling(run):
    status, out, _ = run("bench", "latency", "--input-len", "8", "--output-len", "4", "--runs", "1", "--format", "json")
    report = json.loads(out)
    assert status == 0 and report["requests"] == 1
    assert report["prefill_tokens_per_s"] > 0 and report["machine_read_gb_per_s"] > 0 and report["peak_host_bytes"] > 0


def test_fingerprint_prints_its_parts(run):
    status, out, _ = run("fingerprint", "--format", "json")
    parts = json.loads(out)
    assert status == 0 and {"system_fingerprint", "jax", "jaxlib", "dtype", "kernels", "weights", "tokenizer"} <= set(parts)


@pytest.fixture
def log(run, tmp_path):
    path = tmp_path / "log.jsonl"
    status, out, _ = run("generate", "a", "bc", "def", "--max-tokens", "6", "--temperature", "0.9", "--top-p", "0.9", "--format", "json", "--record", str(path))
    assert status == 0 and all(json.loads(line)["outputs"][0]["logprobs"] is None for line in out.splitlines())
    return path


def test_a_record_is_verified_in_any_company_and_a_changed_bit_is_found(run, log):
    status, out, err = run("verify", str(log), "--batch-sizes", "1,3", "--shuffle")
    assert status == 0 and err == "" and len(out.splitlines()) == 3 and out.count("none") == 2
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    value = float.fromhex(rows[1]["outputs"][0]["logprobs"][2])
    rows[1]["outputs"][0]["logprobs"][2] = np.nextafter(np.float32(value), np.float32(0)).item().hex()
    log.write_text("".join(json.dumps(r) + "\n" for r in rows))
    status, out, _ = run("verify", str(log))
    assert status == 1 and "line 2, choice 0, token 2" in out


def test_a_log_that_cannot_be_written_is_said_at_once_and_costs_no_answer(run, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("jaxllm.llm.LLM.__init__", lambda *a, **k: pytest.fail("the model was loaded"))
        refused(run("generate", "x", "--record", str(tmp_path)), 2, f"cannot write the log {tmp_path}")

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("jaxllm.record.entry", full)
    status, out, err = run("generate", "x", "--max-tokens", "2", "--format", "json", "--record", str(tmp_path / "log"))
    assert status == 2 and "No space left" in err and err.count("\n") == 1
    assert len(json.loads(out)["outputs"][0]["token_ids"]) == 2 and json.loads(out)["outputs"][0]["logprobs"] is None


def test_another_fingerprint_is_said_and_compared_all_the_same(run, log):
    log.write_text(log.read_text().replace(jax.__version__, "0.1.2").replace('"jaxllm-', '"other-'))
    status, out, err = run("verify", str(log))
    assert status == 0 and "never promised" in err and "0.1.2 then" in err


def test_a_log_cut_off_in_a_line_loses_only_that_line(run, log):
    log.write_text(log.read_text()[:-40])
    status, out, err = run("verify", str(log))
    assert status == 0 and ":3: cut off" in err and " 2 " in out


@pytest.mark.parametrize("old,new,words", [('"version": 1', '"version": 9', [":1", "version", "9"]), ('"seed"', '"sead"', [":1", "sead"]),
                                           ('"top_p"', '"top_pp"', [":1", "top_pp"]), ("{", "[", [":1", "JSON"])])
def test_a_log_that_is_not_ours_is_refused_by_line_and_field(run, log, old, new, words):
    log.write_text(log.read_text().replace(old, new, 1))
    refused(run("verify", str(log)), 2, *words)


def command(folder, *more):
    return [sys.executable, "-m", "jaxllm.cli", "generate", "hello", "--model", folder, "--load-format", "dummy", "--ignore-eos", *more]


def test_text_streams_on_a_terminal(folder):
    master, slave = pty.openpty()
    process = subprocess.Popen(command(folder, "--max-tokens", "200"), stdout=slave, stderr=subprocess.PIPE, env={**os.environ, "TERM": "xterm"})
    os.close(slave)
    pieces = []
    while True:
        try:
            piece = os.read(master, 1 << 16)
        except OSError:  # Linux says EIO when the other side has gone
            break
        if not piece:
            break
        pieces.append(piece)
    assert process.wait(60) == 0
    process.stderr.close()
    assert len(pieces) > 3


def test_ctrl_c_ends_with_130_and_no_traceback(folder):
    process = subprocess.Popen(command(folder, "--max-tokens", "240", "--n", "64", "--format", "json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
