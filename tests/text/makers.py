"""Small tokenizers of the three kinds in the field, made on the spot."""
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["Once upon a time there was a king who had three daughters.", "The youngest daughter was the fairest of them all.",
          "\"Who goes there?\" said the king; nobody answered.", "naïve café, Straße, smörgåsbord", "日本語のテキストと漢字かな交じり文",
          "def f(x):\n    return x + 1\n\n", "1234 5678 and 90", "привет мир", "don't do not I'm you've"] * 4
SPECIAL = ["<unk>", "<s>", "</s>", "<|turn|>"]


def byte_level(vocab_size: int = 400) -> Tokenizer:
    """A BPE over bytes, as GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metaspace(vocab_size: int = 500) -> Tokenizer:
    """A BPE over characters with bytes to fall back on and a mark for spaces, as Llama 2 and Mistral have it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False,
                                  special_tokens=SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)])
    tokenizer.train_from_iterator([word for line in CORPUS if line.isascii() for word in line.split()], trainer)
    return plain_bytes(tokenizer)


def plain_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with its byte tokens in the vocabulary alone: training had put them among the added tokens."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(state))


def unigram(vocab_size: int = 300) -> Tokenizer:
    """A Unigram model with the Metaspace decoder, as T5 and XLM-R have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def word_piece(vocab_size: int = 300) -> Tokenizer:
    """WordPiece, as BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=SPECIAL,
                                                                    show_progress=False))
    return tokenizer


MAKERS = {"byte_level": byte_level, "metaspace": metaspace, "unigram": unigram, "word_piece": word_piece}


def with_begin(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with <s> before every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **config) -> Path:
    """The folder, holding tokenizer.json and a tokenizer_config.json with these settings."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
