"""What a log of requests holds and what `jaxllm verify` finds in it, each kind of bits on its own."""
import contextlib
import io
import json
from pathlib import Path

import pytest

from jaxllm import cli
from tests.test_cli import folder, refused, run  # noqa: F401  (fixtures)
from tests.tiny import make_folder

COLUMNS = ("batch", "requests", "tokens", "same tokens", "same logprobs", "same logits")


@pytest.fixture(scope="module")
def recorded(folder, tmp_path_factory):  # noqa: F811
    """The text of a log, with hashes of logits, and what the command that wrote it printed."""
    path, out = tmp_path_factory.mktemp("log") / "log.jsonl", io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["generate", "a", "bc", "def", "--max-tokens", "6", "--temperature", "0.9", "--ignore-eos", "--format", "json",
                         "--record", str(path), "--record-logits", "--model", folder, "--load-format", "dummy", "--max-num-seqs", "4",
                         "--compile-cache-dir", "off"]) == 0
    return path.read_text(), out.getvalue()


@pytest.fixture
def log(recorded, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(recorded[0])
    return path


def edit(log, change):
    """Applies change(entry of the second line) to the log."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    change(rows[1])
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(out):
    """[{column: number, "first": text}] of what verify printed."""
    head, *lines = out.splitlines()
    names = [name for name in COLUMNS if name in head]
    return [dict(zip(names, map(int, parts)), first=parts[len(names)]) for parts in (line.split(None, len(names)) for line in lines)]


def test_whole_rows_of_logits_are_recorded_and_compared_in_any_company(run, log, recorded):  # noqa: F811
    assert "logits_digests" not in recorded[1], "they were asked for the log alone"
    outputs = [o for line in log.read_text().splitlines() for o in json.loads(line)["outputs"]]
    assert len({d for o in outputs for d in o["logits_digests"]}) == 18
    assert all(len(d) == 16 and int(d, 16) >= 0 for o in outputs for d in o["logits_digests"])
    status, out, err = run("verify", str(log), "--full-vocab", "--batch-sizes", "1,2,3", "--shuffle")
    assert status == 0 and err == ""
    assert [tuple(row.values()) for row in table(out)] == [(size, 3, 18, 3, 3, 3, "none") for size in (1, 2, 3)]


def logits(entry):
    entry["outputs"][0]["logits_digests"][4] = "0123456789abcdef"


def logprob(entry):
    entry["outputs"][0]["logprobs"][3] = (float.fromhex(entry["outputs"][0]["logprobs"][3]) * (1 - 2**-24)).hex()


def token(entry):
    entry["outputs"][0]["token_ids"][2] ^= 1


def ending(entry):
    entry["outputs"][0]["finish_reason"] = "stop"


@pytest.mark.parametrize("changes,same,place", [
    ([logits], (3, 3, 2), "token 4:"), ([logprob], (3, 2, 3), "token 3:"), ([token], (2, 3, 3), "token 2:"),
    ([ending], (2, 3, 3), "token 6: stop (ended) became length"), ([logits, logprob, token], (2, 2, 2), "token 2:")])
def test_each_kind_of_bits_is_counted_on_its_own(run, log, changes, same, place):  # noqa: F811
    for change in changes:
        edit(log, change)
    status, out, _ = run("verify", str(log), "--full-vocab")
    row, = table(out)
    assert status == 1 and tuple(row[name] for name in COLUMNS[3:]) == same
    assert row["first"].startswith("line 2, choice 0, " + place), row["first"]
    status, out, _ = run("verify", str(log))
    row, = table(out)
    assert status == (0 if changes == [logits] else 1), "rows of logits are compared only where --full-vocab asks"
    assert "same logits" not in row and tuple(row[name] for name in COLUMNS[3:5]) == same[:2]


def test_the_first_difference_says_whether_the_model_or_the_draw_parted(run, log):  # noqa: F811
    kept = log.read_text()
    edit(log, token)
    assert "from the same logits" in run("verify", str(log), "--full-vocab")[1]
    log.write_text(kept)
    edit(log, logits)
    assert "from the logits 0123456789abcdef and " in run("verify", str(log), "--full-vocab")[1]


def test_a_log_without_digests_is_as_good_as_ever_and_full_vocab_says_what_it_lacks(run, log):  # noqa: F811
    edit(log, lambda entry: entry["outputs"][0].pop("logits_digests"))
    refused(run("verify", str(log), "--full-vocab"), 2, ":2:", "--record-logits")
    assert run("verify", str(log))[0] == 0


def test_the_hashes_of_logits_need_a_log(run):  # noqa: F811
    refused(run("generate", "a", "--record-logits"), 2, "--record")


def test_who_asks_for_digests_in_a_prompts_file_gets_them_and_records_them(run, tmp_path):  # noqa: F811
    file, log = tmp_path / "p.jsonl", tmp_path / "log.jsonl"
    file.write_text('{"prompt": "a", "logits_digest": true}\n"b"\n')
    _, out, _ = run("generate", "--prompts-file", str(file), "--max-tokens", "3", "--format", "json", "--record", str(log))
    rows = [json.loads(line) for line in out.splitlines()]
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert rows[0]["outputs"][0]["logits_digests"] == entries[0]["outputs"][0]["logits_digests"]
    assert [set(o) for r in (rows[1], entries[1]) for o in r["outputs"] if "logits_digests" in o] == []
    assert run("verify", str(log))[0] == 0


@pytest.mark.parametrize("change,words", [
    (lambda e: e["outputs"][0].update(digests=[]), ["outputs[0]", "unknown field 'digests'"]),
    (lambda e: e["outputs"][0].pop("finish_reason"), ["outputs[0]", "'finish_reason' is missing"]),
    (lambda e: e["outputs"][0]["logits_digests"].pop(), ["logits_digests", "5 for 6 tokens"]),
    (lambda e: e["outputs"][0]["logprobs"].__setitem__(0, "x"), ["logprobs", '"x"', "float"]),
    (lambda e: e["outputs"][0]["token_ids"].__setitem__(0, "x"), ["token_ids", '"x"', "integer"]),
    (lambda e: e["outputs"][0]["logits_digests"].__setitem__(0, "12"), ["logits_digests", '"12"', "16"]),
    (lambda e: e["outputs"].append(e["outputs"][0]), ["outputs", "holds 2", "n=1"]),
    (lambda e: e.update(outputs=3), ["outputs", "int"]), (lambda e: e.update(chat_date=3), ["chat_date", "int"]),
    (lambda e: e.update(chat_day="x"), ["unknown field 'chat_day'"]), (lambda e: e["sampling"].update(ignore_eos=1), ["ignore_eos=1"]),
    (lambda e: e["sampling"].update(stop=3), ["stop=3"]), (lambda e: e["sampling"].update(max_tokens=0), ["max_tokens=0"])])
def test_a_damaged_log_is_one_line_that_names_line_and_field(run, log, change, words):  # noqa: F811
    edit(log, change)
    refused(run("verify", str(log), "--full-vocab"), 2, ":2:", *words)


def test_each_other_fingerprint_of_a_log_is_explained_before_the_comparison(run, log):  # noqa: F811
    def other(entry):
        entry.update(system_fingerprint="jaxllm-0-other", fingerprint_parts={**entry["fingerprint_parts"], "device": "abacus"})
    edit(log, other)
    status, out, err = run("verify", str(log))
    assert status == 0 and err.count("\n") == 1 and "jaxllm-0-other" in err and "device: abacus then, " in err


@pytest.fixture
def chats(tmp_path):
    """(folder of a tokenizer whose chat template reads the date, a prompts file with a conversation, a text and a conversation)."""
    dated = make_folder(tmp_path / "dated")
    (Path(dated) / "chat_template.jinja").write_text("Today is {{ strftime_now('%d %b %Y, %H:%M:%S.%f') }}. {{ messages[0].content }}")
    file = tmp_path / "chats.jsonl"
    file.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n"plain"\n{"messages": [{"role": "user", "content": "ho"}]}\n')
    return dated, file


def test_the_date_of_a_chat_is_recorded_and_the_recorded_date_gives_the_same_prompts(run, chats, tmp_path):  # noqa: F811
    dated, file = chats
    command = ["generate", "--prompts-file", str(file), "--tokenizer", dated, "--max-tokens", "3", "--format", "json", "--record"]
    entries = lambda name: [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
    status, out, _ = run(*command, str(tmp_path / "now.jsonl"))
    now = entries("now.jsonl")
    assert status == 0 and "chat_date" not in now[1] and now[0]["chat_date"] == now[2]["chat_date"]
    assert [json.loads(line).get("chat_date") for line in out.splitlines()] == [e.get("chat_date") for e in now]
    assert run(*command, str(tmp_path / "again.jsonl"), "--chat-date", now[0]["chat_date"])[0] == 0
    assert entries("again.jsonl") == now
    assert run(*command, str(tmp_path / "later.jsonl"), "--chat-date", "2031-05-04")[0] == 0
    later = entries("later.jsonl")
    assert later[0]["prompt_token_ids"] != now[0]["prompt_token_ids"] and later[0]["chat_date"] == "2031-05-04T00:00:00"
    assert run("verify", str(tmp_path / "later.jsonl"), "--tokenizer", dated)[0] == 0


def test_a_date_that_is_none_or_that_nobody_reads_is_refused(run, chats):  # noqa: F811
    refused(run("generate", "--prompts-file", str(chats[1]), "--chat-date", "soon"), 2, "chat_date='soon'", "ISO 8601")
    refused(run("generate", "a", "--chat-date", "2031-05-04"), 2, "--chat-date", "messages")
