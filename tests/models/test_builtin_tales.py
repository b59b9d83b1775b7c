"""The shipped model loads as a Hugging Face folder, is small, and has learned what tales sound like."""
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.checkpoint import open_checkpoint
from jaxllm.checkpoint.load import load_params
from jaxllm.models import decoder
from jaxllm.models.registry import family
from jaxllm.text.tokenizer import load_tokenizer

FOLDER = Path(jaxllm.__file__).parent / "builtin" / "tales"
END = "<|endoftext|>"
LENGTH = 160  # tokens of every row below, so that one program serves them all

# Written for this test, so that no book holds it.
TALE = """There was once a poor miller who had three sons, and when he grew old he called them to him and said: "My dear \
children, I have nothing to leave you but the mill, the donkey, and the cat. Go out into the world, and whoever brings home \
the most beautiful ring shall have the mill."

The eldest set out at once, and he had not gone far when he met an old woman sitting by the side of the road. "Give me a \
piece of bread," said she, "for I am very hungry." But he would not even look at her, and went on his way."""
BEGINNINGS = {  # and the word that must be the likeliest; measured: 0.78, 0.63, 0.46, 0.39, 0.31, the next 0.02 to 0.12
    "Once upon a": " time",
    '"I am not afraid of you," said': " the",
    "There was once a king who had three": " sons",
    "They walked and walked, till at": " last",
    "So they were married, and lived happily ever": " after",
}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(FOLDER)


@pytest.fixture(scope="module")
def log_probs(tokenizer):
    """(texts) -> for each, its token ids and float32 log-probabilities [tokens, V] of what follows each of them."""
    config = json.loads((FOLDER / "config.json").read_text())
    module = family(config)
    cfg = module.read_config(config)
    params = load_params(open_checkpoint(FOLDER), module.RULES, decoder.template(cfg, jnp.float32))
    run = jax.jit(lambda p, ids: jax.nn.log_softmax(decoder.unembed(cfg, p, decoder.whole(cfg, p, ids)[0])))

    def of(texts):
        for text in texts:
            ids = tokenizer.encode(text)
            assert len(ids) <= LENGTH
            yield ids, np.asarray(run(params, jnp.array([ids + [0] * (LENGTH - len(ids))])))[:len(ids)]

    return of


def nats_per_token(pair):
    ids, rows = pair
    return -float(rows[np.arange(len(ids) - 1), ids[1:]].mean())


def test_the_folder_is_complete_and_at_most_12_mb():
    names = {file.name for file in FOLDER.iterdir()}
    assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors", "special_tokens_map.json",
                     "tokenizer.json", "tokenizer_config.json"}
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 12_000_000


def test_every_weight_is_bfloat16_and_there_are_3_to_6_million():
    checkpoint = open_checkpoint(FOLDER)
    assert {str(tensor.dtype) for tensor in checkpoint.values()} == {"bfloat16"}
    assert 3_000_000 <= sum(int(np.prod(tensor.shape)) for tensor in checkpoint.values()) <= 6_000_000


@pytest.mark.parametrize("text", [
    "", " ", "\n", TALE, 'He said:  "No!"\r\n\tand\n\n\nleft. ', "naïve café — “quotes” …", "日本語 и русский, Ελληνικά",
    "a dragon 🐉 and a family 👩‍👩‍👧", "\x00\x7f\ufeff\u2028", "0123456789 1893"])
def test_the_tokenizer_round_trips_any_text_and_begins_it_with_the_end_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 0
    assert tokenizer.decode([0], skip_special_tokens=False) == END
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]


def test_the_vocabulary_has_one_row_of_the_embedding_each(tokenizer):
    assert len(tokenizer) == json.loads((FOLDER / "config.json").read_text())["vocab_size"]


def test_transformers_reads_config_and_tokenizer_the_same_way(tokenizer):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig
    config, other = AutoConfig.from_pretrained(FOLDER), AutoTokenizer.from_pretrained(FOLDER)
    assert config.architectures == ["LlamaForCausalLM"] and config.tie_word_embeddings and config.head_dim == 64
    assert other(TALE)["input_ids"] == tokenizer.encode(TALE)
    assert other.eos_token_id == config.eos_token_id == 0 and other.model_max_length == config.max_position_embeddings
    sampling = GenerationConfig.from_pretrained(FOLDER)
    assert sampling.do_sample and 0 < sampling.temperature <= 1 and 0 < sampling.top_p <= 1


def test_a_tale_it_never_saw_is_likely_and_its_words_out_of_order_are_not(log_probs):
    # Measured: 2.70 and 7.74. A uniform guess is 8.32; the held-out books, less plain than this tale, are at 3.98 and 4.07.
    words = TALE.split()
    shuffled = " ".join(np.random.default_rng(0).permutation(words))
    told, mixed = map(nats_per_token, log_probs([TALE, shuffled[:400]]))
    assert told < 3.0
    assert mixed > told + 4.0


def test_the_likeliest_next_word_is_the_one_every_tale_would_use(log_probs, tokenizer):
    found = {text: tokenizer.decode([int(rows[-1].argmax())])
             for text, (_, rows) in zip(BEGINNINGS, log_probs(BEGINNINGS), strict=True)}
    assert found == BEGINNINGS
