"""The byte-level BPE tokenizer of `builtin:tales`."""
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"  # token 0: before every tale, so it both begins and ends a text
# Words with the blank before them, contractions, up to three digits, runs of punctuation, of newlines, of blanks.
PIECES = r"'(?:s|t|d|m|re|ve|ll)\b| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n+| +(?=\S)|\s+"


def train_tokenizer(texts: list[str], vocab_size: int, path: Path) -> Tokenizer:
    """A tokenizer of `vocab_size` tokens trained on texts, which puts END before a text; kept at `path` and read again."""
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A {END} $B", special_tokens=[(END, tokenizer.token_to_id(END))])
    tokenizer.save(str(path))
    return tokenizer
