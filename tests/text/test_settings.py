"""What the files beside a tokenizer.json say: the ids and texts of transformers' AutoTokenizer, and refusals by file and key."""
import json
import logging
import random

import pytest
from makers import SPECIAL, byte_level, metaspace, save

from jaxllm.errors import CheckpointError
from jaxllm.text.tokenizer import load_tokenizer

TEXTS = ["Once upon  a <|x|>time <think> the</s> king<|turn|>\n there <s>12 a<unk>b", "  lead<|y|>é ﬁ 日本 e\u0301 <img> it's I'M", "<|x|><|y|><think><img> z"]
NEW = ["<|x|>", "<|y|>", "<think>", "<img>", "the"]


def folder_of(draw, raw, folder):
    """A folder with a random selection of what people's folders hold."""
    size, chance = raw.get_vocab_size(), lambda p: draw.random() < p

    def token(content, typed):
        flags = {"lstrip": chance(0.3), "rstrip": chance(0.3), "normalized": False, "single_word": False}
        return draw.choice([content, {**typed, "content": content, **flags}])
    config = {name: draw.choice([None, token(draw.choice([*NEW, *SPECIAL[:3]]), {"__type": "AddedToken", "special": True})])
              for name in ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token") if chance(0.4)}
    config |= {"image_token": "<img>"} if chance(0.3) else {}
    config |= {"extra_special_tokens": draw.choice([["<|x|>", "<think>"], {"think_token": "<think>", "x": "<|x|>"}])} if chance(0.3) else {}
    config |= {"additional_special_tokens": ["<|y|>"]} if chance(0.2) else {}
    config |= {name: chance(0.5) for name in ("split_special_tokens", "add_prefix_space", "legacy", "add_bos_token", "add_eos_token") if chance(0.3)}
    if chance(0.5):
        ids = sorted(draw.sample(range(size, size + 6), k=3)) if chance(0.5) else range(size, size + 3)
        rows = [*enumerate(SPECIAL), *zip(ids, draw.sample(NEW, k=3))]
        config["added_tokens_decoder"] = {str(i): {"content": c, "lstrip": chance(0.2), "rstrip": False, "normalized": False, "single_word": False,
                                                   "special": chance(0.6)} for i, c in rows}
    elif chance(0.5):
        (folder / "added_tokens.json").write_text(json.dumps({c: size + i for i, c in enumerate(draw.sample(NEW, k=2))}))
        config = {key: value for key, value in config.items() if not isinstance(value, dict) or key == "extra_special_tokens"}
    if chance(0.5):
        beside = {name: token(draw.choice([*NEW, "<s>", "</s>"]), {}) for name in ("bos_token", "eos_token", "pad_token") if chance(0.5)}
        beside |= {"additional_special_tokens": ["<|x|>", "<img>"]} if chance(0.5) else {}
        (folder / "special_tokens_map.json").write_text(json.dumps(beside))
    config["tokenizer_class"] = draw.choice(["PreTrainedTokenizerFast", "LlamaTokenizer", "LlamaTokenizerFast",
                                             *(["Qwen2Tokenizer", "GPT2TokenizerFast"] if raw.decoder.__getstate__().count(b"ByteLevel") else [])])
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    kinds = ["llama", "mistral", *(["qwen2", "qwen3"] if "Qwen2Tokenizer" in config["tokenizer_class"] else [])]
    (folder / "config.json").write_text(json.dumps({"model_type": draw.choice(kinds)}))


@pytest.mark.parametrize("maker", [byte_level, metaspace])
def test_whatever_a_folder_holds_ids_and_texts_are_those_of_transformers(tmp_path, maker):
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    draw, raw = random.Random(12), maker()
    for trial in range(60):
        folder = tmp_path / str(trial)
        folder.mkdir()
        folder_of(draw, raw, folder)
        ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
        said = {file.name: file.read_text() for file in folder.iterdir() if file.name != "tokenizer.json"}
        assert (ours.special, ours.eos_token_id) == (theirs.special_tokens_map, theirs.eos_token_id), said
        for text in TEXTS:
            ids = theirs.encode(text)
            assert ours.encode(text) == ids, said
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False), said


@pytest.mark.parametrize("name, content", [
    ("added_tokens.json", {"<|im_end|>": 400}), ("special_tokens_map.json", {"additional_special_tokens": ["<|im_end|>"]}),
    ("tokenizer_config.json", {"extra_special_tokens": ["<|im_end|>"]}), ("tokenizer_config.json", {"extra_special_tokens": {"end_token": "<|im_end|>"}}),
    ("tokenizer_config.json", {"additional_special_tokens": ["<|im_end|>"]}), ("tokenizer_config.json", {"eos_token": "<|im_end|>"}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"400": {"content": "<|im_end|>"}}})])
def test_a_token_that_one_file_alone_names_is_one_token(tmp_path, name, content):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(json.dumps(content))
    assert load_tokenizer(tmp_path).encode("<|im_end|>") == [400]


@pytest.mark.parametrize("name, content, words", [
    ("added_tokens.json", {"<x>": "7"}, "'<x>' is '7'"), ("added_tokens.json", {"<x>": -1}, "'<x>' is -1"), ("added_tokens.json", {"<x>": 1 << 40}, "'<x>'"),
    ("added_tokens.json", ["<x>"], "an object is needed"), ("special_tokens_map.json", {"eos_token": 7}, "eos_token is 7"),
    ("tokenizer_config.json", {"eos_token": 7}, "eos_token is 7"), ("tokenizer_config.json", {"pad_token": ["<p>"]}, "pad_token is"),
    ("tokenizer_config.json", {"bos_token": {"content": 3}}, "bos_token is"), ("tokenizer_config.json", {"bos_token": {"content": "<b>", "lstrip": 1}}, "bos_token is"),
    ("tokenizer_config.json", {"extra_special_tokens": "<x>"}, "extra_special_tokens is"), ("tokenizer_config.json", {"extra_special_tokens": [3]}, "extra_special_tokens is 3"),
    ("tokenizer_config.json", {"extra_special_tokens": {"messages": "<x>"}}, "'messages'"), ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "'x'"), ("tokenizer_config.json", {"added_tokens_decoder": {"-1": {"content": "a"}}}, "'-1'"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"99999999999": {"content": "a"}}}, "99999999999"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"400": {}}}, r"added_tokens_decoder\[400\]"), ("tokenizer_config.json", {"added_tokens_decoder": {"400": "a"}}, "'400'"),
    ("tokenizer_config.json", {"tokenizer_class": 3}, "tokenizer_class"), ("tokenizer_config.json", {"split_special_tokens": "no"}, "split_special_tokens"),
    ("tokenizer_config.json", {"add_prefix_space": "no", "tokenizer_class": "GPT2Tokenizer"}, "add_prefix_space")])
def test_what_is_not_of_its_type_is_refused_by_file_and_key(tmp_path, name, content, words):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_ids_that_the_files_give_and_the_tokenizer_does_not_are_warned_of(tmp_path, caplog):
    (save(byte_level(), tmp_path) / "added_tokens.json").write_text(json.dumps({"<x>": 500}))
    with caplog.at_level(logging.WARNING, "jaxllm"):
        assert load_tokenizer(tmp_path).encode("<x>") == [400]  # as in transformers: tokens follow one another
    assert "'<x>' is 400 in the tokenizer and 500" in caplog.text
