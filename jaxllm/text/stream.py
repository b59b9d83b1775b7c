"""Text out of a growing list of token ids, in whole characters, ended by stop strings.

Decoding token by token is wrong: a character may lie across tokens, and a token's text may depend on its neighbours.
Two decoders cover the field, and both give what `Tokenizer.decode` gives for all tokens at once:
  byte-level vocabularies (GPT-2, Llama 3, Qwen): bytes through an incremental UTF-8 decoder;
  everything else (SentencePiece, WordPiece): the last few tokens are decoded with and without the new one. A run of
  byte tokens <0xNN> is held back until it ends, since one bad byte in it changes the text of the whole run.
Both look at a bounded number of tokens for each new one, so the cost is linear in the output.
"""
import codecs
import json
import re
from collections.abc import Sequence

CONTEXT = 4         # tokens of the window that are kept before new ones: enough for any joint between neighbours
PRIME = 16          # tokens of the prompt that are looked at, for the same reason
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextStream:
    """One output's text. A token that ends the request without belonging to its text (eos) is not to be pushed."""

    def __init__(self, tokenizer, prompt_token_ids: Sequence[int] = (), *, stop: Sequence[str] | str = (),
                 include_stop_str_in_output: bool = False, skip_special_tokens: bool = True,
                 spaces_between_special_tokens: bool = True, min_tokens: int = 0):
        """`min_tokens`: stop strings that end in the text of the first so many tokens do not count."""
        self.stopped_by: str | None = None  # the stop string that ended the text
        self.tokens_used = 0                # pushed tokens that belong to the output
        self._stop = (stop,) if isinstance(stop, str) else tuple(stop)
        self._include = include_stop_str_in_output
        self._min_tokens = min_tokens
        self._pieces: list[str] = []        # what push has returned
        self._held = ""                     # decoded, not returned: the beginning of what may become a stop string
        self._tail = ""                     # the last characters returned, for stop strings that are never held back
        self._reach = max((len(s) for s in self._stop), default=1) - 1
        self._ended = False
        kind = _ByteLevel if _decoder_kinds(tokenizer.backend) == {"ByteLevel"} else _Window
        self._decode = kind(tokenizer, list(prompt_token_ids[-PRIME:]), skip_special_tokens, spaces_between_special_tokens)

    @property
    def text(self) -> str:
        """All that push has returned, joined."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def push(self, token_ids: Sequence[int], *, final: bool = False) -> str:
        """The text that has become certain with these tokens; with `final`, all that is left.

        After a stop string has matched, tokens past it are left out of `tokens_used` and add nothing.
        """
        out = []
        for token_id in token_ids:
            if self._ended:
                break
            self.tokens_used += 1
            new = self._decode.push(token_id)
            if new:
                out.append(self._take(new))
        if final and not self._ended:
            rest = self._decode.flush()
            out.append(self._take(rest) if rest else "")
            if not self._ended:
                out.append(self._held)
                self._held, self._ended = "", True
        delta = "".join(out)
        if delta:
            self._pieces.append(delta)
        return delta

    def _take(self, new: str) -> str:
        """The part of the held and the new text that can no longer belong to a stop string."""
        if not self._stop:
            return new
        known = self._tail + self._held
        text = known + new
        match = _first_match(text, self._stop, len(known))
        if match is not None and self.tokens_used > self._min_tokens:
            start, self.stopped_by = match
            end = start + len(self.stopped_by) if self._include else start
            self._held, self._ended = "", True
            return text[len(self._tail):max(end, len(self._tail))]
        hold = 0 if self._include else _longest_beginning(text, self._stop, self._reach)
        ready = text[len(self._tail):len(text) - hold]
        self._held = text[len(text) - hold:] if hold else ""
        if self._include:
            self._tail = text[max(0, len(text) - self._reach):]
        return ready


def _first_match(text: str, stops: Sequence[str], known: int) -> tuple[int, str] | None:
    """Where the stop string begins that is complete first in text, among those that end after `known` characters.

    Which one wins depends on the text alone, not on how tokens cut it; of two that end together, the longer.
    """
    best = None
    for stop in stops:
        start = text.find(stop, max(0, known + 1 - len(stop)))
        if start >= 0 and (best is None or (start + len(stop), start) < (best[0] + len(best[1]), best[0])):
            best = start, stop
    return best


def _longest_beginning(text: str, stops: Sequence[str], reach: int) -> int:
    """The length of the longest end of text that begins a stop string: at most `reach`, the longest stop less one."""
    for length in range(min(reach, len(text)), 0, -1):
        end = text[-length:]
        if any(len(stop) > length and stop.startswith(end) for stop in stops):
            return length
    return 0


def _decoder_kinds(backend) -> set[str]:
    """The kinds of decoder in a tokenizer, those of a sequence listed apart; empty when it has none."""
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    parts = state["decoders"] if state["type"] == "Sequence" else [state]
    return {part["type"] for part in parts}


def _byte_of_character() -> dict[str, int]:
    """Byte-level vocabularies spell each byte as one printable character: itself, or one past 255 in order (GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(other)}


class _ByteLevel:
    """Tokens -> bytes -> characters; what is pending is at most three bytes."""

    def __init__(self, tokenizer, prompt: list[int], skip_special: bool, spaces_between: bool):
        self._spell = tokenizer.backend.id_to_token
        self._skip = {i for i, token in tokenizer.added.items() if token.special} if skip_special else set()
        self._byte_of = _byte_of_character()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in prompt:  # so that a character begun in the prompt can end in the output
            self.push(token_id)

    def push(self, token_id: int) -> str:
        spelled = None if token_id in self._skip else self._spell(token_id)
        if not spelled:
            return ""
        try:
            content = bytes(self._byte_of[c] for c in spelled)
        except KeyError:  # an added token is not spelled in bytes
            content = spelled.encode()
        return self._utf8.decode(content)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Window:
    """The difference between the text of the last few tokens with and without the new one."""

    def __init__(self, tokenizer, prompt: list[int], skip_special: bool, spaces_between: bool):
        backend = tokenizer.backend
        self._spell, self._backend = backend.id_to_token, backend
        self._skip = {i for i, token in tokenizer.added.items() if token.special} if skip_special else set()
        self._no_space = set() if spaces_between else set(tokenizer.added)
        kinds = _decoder_kinds(backend)
        self._byte_runs, self._byte_level = "ByteFallback" in kinds, "ByteLevel" in kinds
        self._ids = [i for i in prompt if i not in self._skip and self._spell(i) is not None]
        self._settled = len(self._ids)  # tokens of the window whose text is out
        while self._settled and self._byte_runs and self._is_byte(self._ids[self._settled - 1]):
            self._settled -= 1
        self._shown = self._text(self._ids[:self._settled])
        if self._settled < len(self._ids):
            run = bytes(int(BYTE_TOKEN.fullmatch(self._spell(i))[1], 16) for i in self._ids[self._settled:])
            self._shown += run.decode("utf-8", "ignore")  # whole characters of the prompt are the prompt's
        self._previous: int | None = None

    def _is_byte(self, token_id: int) -> bool:
        return BYTE_TOKEN.fullmatch(self._spell(token_id)) is not None

    def _text(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=False) if ids else ""

    def push(self, token_id: int) -> str:
        if token_id in self._skip or self._spell(token_id) is None:
            return ""
        previous, self._previous = self._previous, token_id
        self._ids.append(token_id)
        if self._byte_runs and self._is_byte(token_id):
            return ""
        text = self._text(self._ids)
        if self._byte_level and text.endswith("�"):
            return ""
        new = self._settle(text)
        if token_id in self._no_space and previous in self._no_space:
            new = self._spell(token_id)
        return new

    def flush(self) -> str:
        return self._settle(self._text(self._ids)) if self._settled < len(self._ids) else ""

    def _settle(self, text: str) -> str:
        """The new part of the window's text; the window then moves on, never into the middle of a run of bytes."""
        new = text[len(self._shown):]
        start = max(0, len(self._ids) - CONTEXT)
        while self._byte_runs and 0 < start < len(self._ids) and self._is_byte(self._ids[start]) \
                and self._is_byte(self._ids[start - 1]):
            start -= 1
        self._ids = self._ids[start:]
        self._settled = len(self._ids)
        self._shown = self._text(self._ids)
        return new
