import json
import subprocess
import sys

import pytest
from makers import MAKERS, byte_level, metaspace, save, with_begin

from jaxllm.errors import CheckpointError, UnsupportedError, UsageError
from jaxllm.text.tokenizer import load_tokenizer

CHATML = ("{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] | trim + '</s>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}")
TALK = [{"role": "user", "content": "Who goes there?"}]


@pytest.mark.parametrize("name", MAKERS)
def test_ids_and_text_equal_those_of_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = save(with_begin(MAKERS[name]()), tmp_path)
    ours, theirs = load_tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for text in ("Once upon a time,  there was\n a king", "日本 😀 naïve", "<|turn|>the king</s>", ""):
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert (ours.bos_token_id, ours.eos_token_id, len(ours)) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))


@pytest.mark.parametrize("begin", [True, False])
def test_tokenizer_json_alone_says_whether_texts_begin_with_bos(begin, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = save(with_begin(byte_level()) if begin else byte_level(), tmp_path, add_bos_token=not begin, add_eos_token=True)
    ids = load_tokenizer(folder).encode("the king")
    assert ids == transformers.PreTrainedTokenizerFast.from_pretrained(folder).encode("the king")
    assert (ids[0] == 1) == begin


def test_padding_and_truncation_of_the_file_are_off(tmp_path):
    raw = byte_level()
    raw.enable_truncation(3)
    raw.enable_padding(length=50)
    assert len(load_tokenizer(save(raw, tmp_path)).encode("there was a king who had three")) > 3
    assert len(load_tokenizer(tmp_path).encode("a")) == 1


def test_tokens_that_only_the_config_names_are_known(tmp_path):
    folder = save(byte_level(), tmp_path, eos_token={"content": "<|end|>"}, extra_special_tokens=["<|img|>"],
                  added_tokens_decoder={"400": {"content": "<think>", "special": False}})
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("<think>") == [400]
    assert tokenizer.decode([400, tokenizer.eos_token_id, *tokenizer.encode("<|img|>")]) == "<think>"


def test_token_text_of_part_of_a_character_is_the_replacement_character(tmp_path):
    tokenizer = load_tokenizer(save(byte_level(), tmp_path))
    assert {tokenizer.token_text(i) for i in tokenizer.encode("😀")} == {"�"}
    assert tokenizer.token_text(tokenizer.eos_token_id) == "</s>"


def test_fingerprint_follows_the_contents(tmp_path):
    first = load_tokenizer(save(byte_level(), tmp_path / "a"))
    again = load_tokenizer(save(byte_level(), tmp_path / "b"))
    other = load_tokenizer(save(byte_level(), tmp_path / "c", add_bos_token=True))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_chat_writes_the_begin_token_once(tmp_path):
    folder = save(with_begin(metaspace()), tmp_path, chat_template="{{ bos_token }}" + CHATML)
    ids = load_tokenizer(folder).apply_chat(TALK)
    assert ids.count(1) == 1 and ids[0] == 1


def test_chat_text_follows_the_template_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = save(byte_level(), tmp_path, chat_template=CHATML)
    ours, theirs = load_tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    talk = [*TALK, {"role": "assistant", "content": "  nobody <b> "}, {"role": "user", "content": "Go on"}]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=prompt)
        assert ours.decode(ours.apply_chat(talk, add_generation_prompt=prompt), False) == expected


def test_chat_continues_the_last_message(tmp_path):
    tokenizer = load_tokenizer(save(byte_level(), tmp_path, chat_template=CHATML))
    talk = [*TALK, {"role": "assistant", "content": "It is"}]
    ids = tokenizer.apply_chat(talk, add_generation_prompt=False, continue_final_message=True)
    assert tokenizer.decode(ids, False).endswith("<|turn|>assistant\nIt is")
    with pytest.raises(UsageError, match="exclude each other"):
        tokenizer.apply_chat(talk, continue_final_message=True)


def test_chat_template_from_its_file_by_name_and_by_text(tmp_path):
    folder = save(byte_level(), tmp_path, chat_template=[{"name": "default", "template": "D"},
                                                         {"name": "tool_use", "template": "{{ tools | tojson }}"}])
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer.apply_chat(TALK)) == "D"
    assert tokenizer.decode(tokenizer.apply_chat(TALK, tools=[{"name": "<f>"}])) == '[{"name": "<f>"}]'
    assert tokenizer.decode(tokenizer.apply_chat(TALK, chat_template="tool_use")) == "null"
    assert tokenizer.decode(tokenizer.apply_chat(TALK, chat_template="{{ mood }}!", mood="gay")) == "gay!"
    (folder / "chat_template.jinja").write_text("F{% generation %}G{% endgeneration %}")
    assert load_tokenizer(folder).decode(load_tokenizer(folder).apply_chat(TALK)) == "FG"


def test_message_parts_and_tool_calls_reach_the_template_as_it_expects_them(tmp_path):
    tokenizer = load_tokenizer(save(byte_level(), tmp_path))
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None}]
    assert tokenizer.decode(tokenizer.apply_chat(parts, chat_template="{{ messages[0] | tojson }}")) == \
        '{"role": "user", "content": "a\nb"}'.replace("\n", "\\n")
    call = [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}]
    template = "{{ messages[0].tool_calls[0].function.arguments.x }}"
    assert tokenizer.decode(tokenizer.apply_chat(call, chat_template=template)) == "1"


@pytest.mark.parametrize("messages, options, words", [
    (TALK, {}, "has no chat template"), ([], {}, "at least one"), ([{"content": "x"}], {}, "messages[0]"),
    (TALK, {"chat_template": "{% if %}"}, "not valid Jinja"), (TALK, {"chat_template": "{{ raise_exception('no') }}"}, "refused"),
    (TALK, {"chat_template": "{{ messages[0].role + 1 }}"}, "failed"), ("hello", {}, "messages must be a list"),
    (TALK, {"chat_template": "{{ ''.__class__.__mro__ }}"}, "refused"),
])
def test_bad_chat_says_what_is_wrong(messages, options, words, tmp_path):
    tokenizer = load_tokenizer(save(byte_level(), tmp_path))
    with pytest.raises(UsageError) as caught:
        tokenizer.apply_chat(messages, **options)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_image_parts_are_refused_by_name(tmp_path):
    tokenizer = load_tokenizer(save(byte_level(), tmp_path))
    with pytest.raises(UnsupportedError, match="image_url"):
        tokenizer.apply_chat([{"role": "user", "content": [{"type": "image_url"}]}], chat_template="x")


@pytest.mark.parametrize("content, words", [
    (None, "has no tokenizer"), ("", "not a tokenizer"), ("{}", "not a tokenizer"), ("[1, 2", "not a tokenizer"),
    ("\x00\xff" * 9, "not a tokenizer"), ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    ('{"model": {"type": "BPE", "vocab": 3}}', "not a tokenizer"),
])
def test_missing_and_garbled_files_are_named_on_one_line(content, words, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    assert words in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_half_written_tokenizer_is_an_error(tmp_path):
    file = save(byte_level(), tmp_path) / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="tokenizer.json .* is not a tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["[]", "{", "\x80"])
def test_garbled_settings_are_named(name, content, tmp_path):
    (save(byte_level(), tmp_path) / name).write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=name):
        load_tokenizer(tmp_path)


def test_a_path_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_tokenizer(tmp_path / "absent")


def test_older_folder_without_tokenizer_json_reads_through_transformers(tmp_path):
    made = byte_level()
    state = json.loads(made.to_str())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(state["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "".join(" ".join(m) + "\n" for m in state["merges"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", "unk_token": "<unk>"}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    text = "Once upon a time 日本 😀"
    assert load_tokenizer(tmp_path).encode(text) == made.encode(text).ids


def test_loading_a_tokenizer_json_imports_neither_transformers_nor_torch(tmp_path):
    save(byte_level(), tmp_path, chat_template=CHATML)
    script = (f"import sys; from jaxllm.text.tokenizer import load_tokenizer; t = load_tokenizer({str(tmp_path)!r}); "
              f"t.apply_chat({TALK!r}); print([m for m in ('transformers', 'torch', 'jax') if m in sys.modules])")
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_sentencepiece_file_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    with pytest.raises(CheckpointError, match="pip install sentencepiece"):
        load_tokenizer(tmp_path)
