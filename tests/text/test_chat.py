"""Chat templates: the same token ids as transformers gives, what is refused, and limits to what a template may take."""
import dataclasses
import json
import time

import numpy as np
import pytest
from makers import byte_level, save
from templates import OPTIONS, SHAPES, TALKS

from jaxllm.errors import CapacityError, CheckpointError, JaxllmError, UnsupportedError, UsageError
from jaxllm.text.tokenizer import load_tokenizer

TEXTS_ALONE = {"chatml", "chatml_with_a_default_system", "instructions", "headers", "macros", "documents", "alternating", "generation", "thinking", "whole"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(byte_level(), tmp_path_factory.mktemp("chat"), unk_token="<unk>", image_token="<img>", extra_special_tokens={"think_token": "<think>"})


@pytest.fixture(scope="module")
def ours(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    return pytest.importorskip("transformers").PreTrainedTokenizerFast.from_pretrained(folder)


@pytest.mark.parametrize("shape", SHAPES)
def test_published_shapes_give_the_ids_that_transformers_gives(ours, theirs, shape):
    compared = 0
    for name, talk in TALKS.items():
        if name == "parts" and shape in TEXTS_ALONE:
            continue  # transformers prints a Python list there: see the next test
        for options in OPTIONS.values():
            options = {"add_generation_prompt": False, "chat_template": SHAPES[shape], **options}
            try:
                expected = theirs.apply_chat_template(talk, return_dict=False, **options)
            except Exception:  # jinja2's, TypeError, ValueError: what transformers cannot render is refused
                with pytest.raises(UsageError):
                    ours.apply_chat(talk, **options)
                continue
            assert ours.apply_chat(talk, **options) == expected, (name, options)
            compared += 1
    assert compared >= 4


def test_a_template_that_takes_texts_alone_gets_parts_joined_by_newlines(ours):
    assert ours.decode(ours.apply_chat(TALKS["parts"], chat_template=SHAPES["macros"]), False) == "<|turn|>user  A \nB</s><unk>"


@pytest.mark.parametrize("field", ["content", "reasoning_content", "thinking", True])
def test_any_field_of_the_last_message_can_be_continued(ours, theirs, field):
    talk = [*TALKS["one"], {"role": "assistant", "content": "so ", "reasoning_content": "hm  "}]
    template = "{% for m in messages %}[{{ m.role }}|{{ m.reasoning_content | trim }}|{{ m.content }}]{% endfor %}"
    options = {"chat_template": template, "add_generation_prompt": False, "continue_final_message": field}
    assert ours.apply_chat(talk, **options) == theirs.apply_chat_template(talk, return_dict=False, **options)
    with pytest.raises(UsageError, match="'mood'"):
        ours.apply_chat(talk, **{**options, "continue_final_message": "mood"})


def test_several_templates_in_one_folder_are_chosen_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers")
    listed = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
    layouts = {"listed": (listed, {}), "text": ("C", {}), "file": ("C", {"chat_template.jinja": "F"}),
               "file over a list": (listed, {"chat_template.jinja": "F"}),
               "folder": (None, {"chat_template.jinja": "F", "additional_chat_templates/tool_use.jinja": "FT"}),
               "older": ("C", {"chat_template.json": json.dumps({"chat_template": "J"})})}
    for name, (declared, files) in layouts.items():
        folder = save(byte_level(), tmp_path / name.replace(" ", ""), **({"chat_template": declared} if declared else {}))
        for file, content in files.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(content)
        ours, theirs = load_tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        for options in ({}, {"tools": []}, {"chat_template": "rag"}, {"chat_template": "tool_use"}):
            options = {"add_generation_prompt": False, **options}
            assert ours.apply_chat(TALKS["one"], **options) == theirs.apply_chat_template(TALKS["one"], return_dict=False, **options), (name, options)


def test_messages_may_be_objects_with_fields_and_numbers_numpys(ours):
    @dataclasses.dataclass
    class Message:
        role: str
        content: str
        count: object = None
    template = "{{ messages | tojson }}{{ level | tojson }}"
    said = ours.decode(ours.apply_chat([Message("user", "a", np.int64(3))], chat_template=template, level=np.float32(0.5)), False)
    assert said == '[{"role": "user", "content": "a", "count": 3}]0.5'
    with pytest.raises(UsageError, match=r"messages\[0\] holds a ndarray"):
        ours.apply_chat([Message("user", "a", np.zeros(3))], chat_template=template)


@pytest.mark.parametrize("options, words", [
    ({"tools": [print]}, "builtin_function"), ({"tools": {"a": 1}}, "tools holds dict"), ({"documents": ["x"]}, "documents holds str"),
    ({"chat_template": 3}, "chat_template is a int"), ({"chat_template": "x" * (1 << 17) + "x"}, "characters"), ({"mood": object()}, "object")])
def test_what_a_template_cannot_be_given_is_refused_by_name(ours, options, words):
    with pytest.raises(UsageError, match=words):
        ours.apply_chat(TALKS["one"], **{"chat_template": "x", **options})


@pytest.mark.parametrize("part", [{"type": "image"}, {"type": "input_audio"}, {"type": "video_url"}, {"image_url": "x"}])
def test_media_are_refused_even_where_the_template_would_take_them(ours, part):
    with pytest.raises(UnsupportedError, match=r"messages\[0\].content\[0\]"):
        ours.apply_chat([{"role": "user", "content": [part]}], chat_template=SHAPES["parts_alone"])


@pytest.mark.parametrize("declared", [[{"template": "x"}], [{"name": "default"}], ["x"], 3, [{"name": ["a"], "template": "x"}], [{"name": "a", "template": None}]])
def test_a_template_entry_without_a_name_or_a_text_is_one_line(tmp_path, declared):
    with pytest.raises(CheckpointError, match=r"tokenizer_config.json.*chat_template\[0\]"):
        load_tokenizer(save(byte_level(), tmp_path, chat_template=declared))


GREEDY = {
    "repeat": "{{ 'a' * 2000000000 }}", "repeat a list": "{{ ([1] * 2000000000) | length }}", "power": "{{ 10 ** (10 ** 9) }}", "large power": "{{ 10 ** (10 ** 8) }}", "square": "{% set n = namespace(a=3) %}{% for i in range(60) %}{% set n.a = n.a * n.a %}{% endfor %}",
    "width": "{{ '%2000000000d' % 1 }}", "digits": "{{ '%.2000000000f' % 1.5 }}", "digits given": "{{ '%.*f' % (2000000000, 1.5) }}",
    "width given": "{{ '%*d' % (2000000000, 1) }}", "format": "{{ '{:>2000000000}'.format(1) }}", "format given": "{{ '{:>{}}'.format(1, 2000000000) }}",
    "filter format": "{{ '%2000000000d' | format(1) }}", "ljust": "{{ 'a'.ljust(2000000000) }}", "center": "{{ 'a' | center(2000000000) }}",
    "indent": "{{ 'a\n' | indent(2000000000) }}", "tojson": "{{ [[1]] | tojson(indent=2000000000) }}", "bytes": "{{ (1).to_bytes(2000000000) }}",
    "batch": "{{ [1] | batch(2000000000, 1) | list }}", "round": "{{ 1.5 | round(1000000000, 'ceil') }}", "large round": "{{ 1.5 | round(10000000, 'ceil') }}", "slices": "{{ [1] | slice(10000000) | list }}", "letters": "{{ ('日' * 16000000) | list | length }}",
    "words": "{{ ('日本 ' * 5000000).split(' ') | length }}", "sum of lists": "{{ ([[1]] * 500000) | sum(start=[]) | length }}",
    "sum of mapped lists": "{{ ([[1]] * 99999) | map('list') | sum(start=[]) | length }}",
    "hexadecimal": "{{ (('f' * 10000000) | int(0, 16)) % 7 }}", "punycode": "{{ ('é' * 1000000).encode('punycode') }}",
    "backwards": "{% set a = 'a' * 8000000 %}{{ a.rfind('b' ~ a[:4000000]) }}", "slices of a text": "{% set a = 'a' * 16000000 %}" + "{% set b = a[1:] %}" * 99,
    "pieces of a text": "{% set a = 'ab ' * 1000000 %}" + "".join(f"{{% set b{i} = a.split(' ') %}}" for i in range(99)),
    "lipsum": "{{ lipsum(100000000) }}", "date": "{{ strftime_now('%999Y' * 2000000) }}",
    "tabs": "{{ ('\t' * 100000).expandtabs(100000) }}", "replace": "{% set a = 'a' * 100000 %}{{ a.replace('a', a) }}", "replace filter": "{% set a = 'a' * 100000 %}{{ a | replace('a', a) }}",
    "translate": "{% set a = 'a' * 100000 %}{{ a.translate({97: a}) }}",
    "join": "{% set a = 'a' * 100000 %}{{ a.join(a) }}", "join filter": "{% set a = 'a' * 100000 %}{{ ([1] * 100000) | join(a) }}", "join map": "{% set a = 'a' * 100000 %}{{ range(99999) | map('replace', '', a) | join }}",
    "doubled text": "{% set n = namespace(a='a') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}{{ n.a | length }}",
    "doubled sum": "{% set n = namespace(a='a') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
    "doubled block": "{% set n = namespace(a='a') %}{% for i in range(60) %}{% set n.a %}{{ n.a }}{{ n.a }}{% endset %}{% endfor %}",
    "doubled list": "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
    "doubled tuple": "{% set n = namespace(a=(1, 2)) %}{% for i in range(60) %}{% set n.a = (n.a, n.a) %}{% endfor %}{{ n.a == n.a }}",
    "doubled dict": "{% set n = namespace(a={}) %}{% for i in range(60) %}{% set n.a = {'x': n.a, 'y': n.a} %}{% endfor %}{{ n.a | tojson }}",
    "doubled namespace": "{% set n = namespace(a=namespace()) %}{% for i in range(60) %}{% set n.a = namespace(x=n.a, y=n.a) %}{% endfor %}{{ n.a }}",
    "many pieces": "{% set a = 'a' * 1000000 %}{% for i in range(100000) %}{{ a }}{% endfor %}", "kept": "{% set n = namespace(a=[]) %}{% for i in range(9999) %}{% set n.a = n.a + ['a' * 10000000 ~ i] %}{% endfor %}",
}
SLOW = {"loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "named loops": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
        "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "blocks": "{% block a %}{% for i in range(99999) %}{{ self.b() }}{% endfor %}{% endblock %}{% block b %}{% for i in range(999) %}{% endfor %}{% endblock %}",
        "recursive": "{% for x in [[1] * 9] * 9 recursive %}{% if x is iterable %}{{ loop(x) }}{% else %}{{ loop([1] * 9) }}{{ loop([[1]] * 9) }}{% endif %}{% endfor %}"}


@pytest.mark.parametrize("name", GREEDY)
def test_a_template_cannot_take_memory_out_of_proportion(ours, name):
    start = time.monotonic()
    with pytest.raises(JaxllmError) as caught:
        ours.apply_chat(TALKS["one"], chat_template=GREEDY[name])
    assert isinstance(caught.value, CapacityError) or name == "lipsum"
    assert time.monotonic() - start < 10 and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SLOW)
def test_a_template_cannot_take_time_without_end(ours, name, monkeypatch):
    monkeypatch.setattr("jaxllm.text.sandbox.SECONDS", 0.2)
    with pytest.raises(JaxllmError) as caught:
        ours.apply_chat(TALKS["one"], chat_template=SLOW[name])
    assert "seconds" in str(caught.value) or name == "recursive"


def test_a_callers_own_functions_reach_the_template_and_data_is_plain(ours):
    said = ours.decode(ours.apply_chat(TALKS["one"], chat_template="{{ strftime_now('%d') }}{{ level }}", strftime_now=str.upper, level=np.int64(3)), False)
    assert said == "%D3"


def test_a_long_conversation_is_within_the_limits(ours):
    talk = [{"role": ("user", "assistant")[i % 2], "content": "a word " * 100} for i in range(300)]
    for shape in ("chatml", "thinking", "parts_or_text", "whole"):
        assert len(ours.apply_chat(talk, chat_template=SHAPES[shape])) > 30_000
