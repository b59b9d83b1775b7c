import random

import pytest
from makers import MAKERS, SPECIAL, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxllm.text import tokenizer as text_tokenizer
from jaxllm.text.stream import TextStream
from jaxllm.text.tokenizer import load_tokenizer

TEXTS = ["Once upon a time there was a king.", "family 👨‍👩‍👧‍👦 and flag 🏴󠁧󠁢󠁳󠁣󠁴󠁿, thumbs 👍🏽 up", "日本語のテキスト、漢字かな交じり文。",
         "e\u0301 a\u0308 combining, Straße naïve", "tabs\tand\nlines\n\n  and  spaces   ", "\ufffd is a character too \ufffd\ufffd", "I'm sure , isn't it ?"]


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request, tmp_path_factory):
    return load_tokenizer(save(MAKERS[request.param](), tmp_path_factory.mktemp(request.param)))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return load_tokenizer(save(MAKERS["byte_level"](), tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory):
    return load_tokenizer(save(MAKERS["metaspace"](), tmp_path_factory.mktemp("metaspace")))


def deltas(stream, ids, size=1):
    """What push returns for the ids in groups of `size`, the last one final."""
    groups = [ids[i:i + size] for i in range(0, len(ids), size)]
    return [stream.push(group) for group in groups] + [stream.push([], final=True)]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_deltas_join_to_the_decoded_text(tokenizer, text, size):
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    assert "".join(deltas(stream, ids, size)) == tokenizer.decode(ids) == stream.text
    assert (stream.stopped_by, stream.tokens_used) == (None, len(ids))


@pytest.mark.parametrize("text", [t for t in TEXTS if "\ufffd" not in t])
@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
def test_no_delta_holds_part_of_a_character(request, name, text):
    tokenizer = request.getfixturevalue(name)
    parts = deltas(TextStream(tokenizer), tokenizer.encode(text))
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) == text


@pytest.mark.parametrize("skip", [True, False])
def test_random_tokens_decode_as_the_whole_does(tokenizer, skip):
    for seed in range(300):
        draw = random.Random(seed)
        ids = [draw.randrange(tokenizer.vocab_size + 3) for _ in range(draw.randrange(1, 60))]
        stream = TextStream(tokenizer, skip_special_tokens=skip)
        assert "".join(deltas(stream, ids, draw.randrange(1, 6))) == tokenizer.decode(ids, skip), f"seed {seed}"


def test_random_bytes_decode_as_the_whole_does(byte_level, metaspace):
    spelled = byte_level.encode("".join(chr(c) for c in range(0x80, 0x800, 7)))
    runs = [metaspace.backend.token_to_id(f"<0x{b:02X}>") for b in (0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0x41, 0xFF)]
    for seed in range(400):
        draw = random.Random(seed)
        for tokenizer, pool in ((byte_level, spelled), (metaspace, [*runs * 4, *metaspace.encode("the king ▁ a")])):
            ids = [draw.choice(pool) for _ in range(40)]
            parts = deltas(TextStream(tokenizer), ids, draw.randrange(1, 4))
            assert "".join(parts) == tokenizer.decode(ids), f"seed {seed}"


def test_text_continues_the_prompt(tokenizer):
    prompt, rest = "Once upon a time", " there was a king"
    ids, prompt_ids = tokenizer.encode(prompt + rest), tokenizer.encode(prompt)
    assert ids[:len(prompt_ids)] == prompt_ids
    stream = TextStream(tokenizer, prompt_ids)
    assert "".join(deltas(stream, ids[len(prompt_ids):])) == rest


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
def test_character_begun_in_the_prompt_ends_in_the_output(request, name):
    tokenizer = request.getfixturevalue(name)
    ids = tokenizer.encode("so 😀😀 it is")
    cut = len(tokenizer.encode("so 😀")) + 2
    assert tokenizer.decode(ids[:cut]).endswith("\ufffd")
    assert "".join(deltas(TextStream(tokenizer, ids[:cut]), ids[cut:])) == "😀 it is"


def test_stop_string_across_three_tokens_never_shows(byte_level):
    ids = byte_level.encode("the king xyzw daughters")
    pieces = [byte_level.token_text(i) for i in ids]
    assert pieces.index("z") - pieces.index("y") == 1  # x, y, z and w are tokens of their own
    stream = TextStream(byte_level, stop=["xyz"])
    parts = deltas(stream, ids)
    assert "".join(parts) == stream.text == "the king "
    assert stream.stopped_by == "xyz" and ids[:stream.tokens_used] == ids[:pieces.index("z") + 1]


def test_stop_inside_a_token_cuts_the_token(byte_level):
    ids = byte_level.encode("three daughters")
    inside = next(t for t in (byte_level.token_text(i) for i in ids) if len(t) > 3)[1:3]
    stream = TextStream(byte_level, stop=inside)
    assert "".join(deltas(stream, ids)) == "three daughters"[:"three daughters".index(inside)]


def test_first_stop_to_be_complete_wins_however_tokens_are_pushed(byte_level):
    ids = byte_level.encode("one two three")
    for size in (1, 2, 3, 50):
        for stop, expected, text in ((["three", "two"], "two", "one "), (["e two three", "two"], "two", "one "),
                                     (["wo", "two"], "two", "one "), (["o", "one"], "o", "")):
            stream = TextStream(byte_level, stop=stop)
            assert "".join(deltas(stream, ids, size)) == text and stream.stopped_by == expected, (size, stop)


def test_included_stop_string_ends_the_text(byte_level):
    ids = byte_level.encode("the king xyzw daughters")
    stream = TextStream(byte_level, stop=["xyz", "nowhere"], include_stop_str_in_output=True)
    parts = deltas(stream, ids)
    assert "".join(parts) == stream.text == "the king xyz" and stream.stopped_by == "xyz"


def test_beginning_of_a_stop_string_is_returned_when_it_does_not_end(byte_level):
    ids = byte_level.encode("aaaab aab")
    stream = TextStream(byte_level, stop=["aac", "aabb"])
    parts = deltas(stream, ids)
    assert "".join(parts) == "aaaab aab" and parts[-1] == "aab"  # held back until the end


def test_stop_inside_the_first_min_tokens_does_not_count(byte_level):
    ids = byte_level.encode("x y x y")
    count = len(byte_level.encode("x y"))
    stream = TextStream(byte_level, stop="y", min_tokens=count)
    assert "".join(deltas(stream, ids)) == "x y x " and stream.tokens_used == len(ids)


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_random_stops_cut_as_a_search_in_the_whole_text_does(tokenizer, size, include):
    for seed in range(200):
        draw = random.Random(seed)
        ids = [draw.randrange(len(SPECIAL), tokenizer.vocab_size) for _ in range(30)]
        whole = tokenizer.decode(ids)
        stops = [whole[i:i + draw.randrange(1, 8)] for i in (draw.randrange(len(whole)) for _ in range(3))] + ["never there"]
        ends = [(whole.find(s) + len(s), whole.find(s), s) for s in stops if s in whole]
        end, start, stop = min(ends)
        stream = TextStream(tokenizer, stop=stops, include_stop_str_in_output=include)
        parts = deltas(stream, ids, size)
        assert ("".join(parts), stream.stopped_by) == (whole[:end if include else start], stop), f"seed {seed}"
        used = tokenizer.decode(ids[:stream.tokens_used])
        assert stop in used or "\ufffd" in used, f"seed {seed}"


def cut_at_a_stop(pieces, stops, include, min_tokens):
    """(text, stop, tokens used) by searching the text so far after each piece: the stop that ends first, of two the longer."""
    text = ""
    for count, piece in enumerate(pieces, 1):
        known, text = len(text), text + piece
        ends = [(at + len(stop), at, stop) for stop in stops for at in range(len(text))
                if text.startswith(stop, at) and at + len(stop) > known and count > min_tokens]
        if ends:
            end, at, stop = min(ends)
            return text[:end if include else at], stop, count
    return text, None, len(pieces)


@pytest.mark.parametrize("include", [True, False])
def test_any_cut_into_tokens_stops_where_a_search_in_the_text_does(include):
    """Few letters, so that stops overlap each other, themselves and the joints between tokens."""
    spelled = ["a", "b", "é", "ab", "ba", "aé", "éab", "baa", "abab", "éé"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    as_bytes = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)[0][0] for text in spelled]
    vocabulary = list(dict.fromkeys([*as_bytes, *letters]))
    backend = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(vocabulary)}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = text_tokenizer.Tokenizer(backend, special={}, templates={}, files=(), name="few letters")
    draw = random.Random(1)
    for trial in range(2000):
        ids = [draw.randrange(len(spelled)) for _ in range(draw.randint(1, 12))]
        pieces = [spelled[i] for i in ids]
        stops = ["".join(draw.choices("abé", k=draw.randint(1, 7))) for _ in range(draw.randint(1, 3))]
        min_tokens = draw.choice([0, 0, 0, 1, 2, 5])
        stream = TextStream(tokenizer, stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens)
        parts = deltas(stream, ids, draw.randint(1, 4))
        found = (stream.text, stream.stopped_by, stream.tokens_used)
        assert found == cut_at_a_stop(pieces, stops, include, min_tokens), f"trial {trial}: {pieces} {stops} {min_tokens}"
        assert "".join(parts) == stream.text


def test_special_tokens_are_left_out_or_shown(tokenizer):
    ids = [tokenizer.bos_token_id, *tokenizer.encode("the king"), tokenizer.backend.token_to_id("<|turn|>"),
           tokenizer.eos_token_id]
    assert "".join(deltas(TextStream(tokenizer), ids)) == tokenizer.decode(ids)
    assert "<|turn|>" not in tokenizer.decode(ids)
    shown = "".join(deltas(TextStream(tokenizer, skip_special_tokens=False), ids))
    assert shown == tokenizer.decode(ids, skip_special_tokens=False) and "<|turn|>" in shown


def test_spaces_between_special_tokens_can_be_left_out(tmp_path):
    tokenizer = load_tokenizer(save(MAKERS["word_piece"](), tmp_path))
    ids = [*tokenizer.encode("the king"), tokenizer.backend.token_to_id("<|turn|>"), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith("<|turn|> </s>")
    stream = TextStream(tokenizer, skip_special_tokens=False, spaces_between_special_tokens=False)
    assert "".join(deltas(stream, ids)).endswith("<|turn|></s>")


def test_cost_of_a_token_does_not_grow_with_the_text(tokenizer, monkeypatch):
    """Counts the tokens that pass through the decoder instead of the seconds."""
    ids = tokenizer.encode("the king 😀 said nothing , " * 200)
    decoded = []
    stream = TextStream(tokenizer)
    if hasattr(stream._decode, "_text"):
        plain = stream._decode._text
        monkeypatch.setattr(stream._decode, "_text", lambda part: decoded.append(len(part)) or plain(part))
    deltas(stream, ids)
    assert sum(decoded) <= 12 * len(ids)
