"""A tiny model folder in Hugging Face layout, with random weights and a byte-level tokenizer, for tests of the engine."""
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 300
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
    "tie_word_embeddings": True, "rope_theta": 10000.0, "dtype": "float32", "eos_token_id": 256, "hidden_act": "silu",
}


def make_folder(folder: Path, **overrides) -> str:
    """The folder as text, holding config.json and a tokenizer of the 256 bytes, <|end|> (256) and fillers; no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**CONFIG, **overrides}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([f"word{i}" for i in range(257, config["vocab_size"])])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
