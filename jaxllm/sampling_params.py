"""How a request wants its tokens drawn: vLLM's names, ranges and order of operations, checked when made and again when used."""
import dataclasses
import logging
import math
import operator
from collections.abc import Iterable, Mapping

from jaxllm.errors import UsageError

GREEDY_BELOW = 1e-5   # a temperature under this is greedy
LEAST_TEMPERATURE = 0.01  # a positive one under this divides logits into overflow, so it is raised to this
MOST_CHOICES = 16384
MOST_BIAS = 100.0
LARGEST_REAL = 3.4e38  # what float32 holds

log = logging.getLogger("jaxllm")


@dataclasses.dataclass(kw_only=True, slots=True)
class SamplingParams:
    """How to draw the tokens of one request. Raises UsageError, naming the field, for what cannot be done.

    Fields may be changed afterwards: each call of generate takes a copy, checked again (`clone`). Numbers and lists may be
    NumPy's or JAX's.

    Logits are edited in this order: allowed_token_ids, bad_words, min_tokens and logit_bias, penalties (repetition,
    frequency, presence), temperature, min_p, top_k, top_p. Reported logprobs are those of the model, before any edit.
    """

    n: int = 1                                # independent choices; each has a key of its own
    max_tokens: int | None = 16               # None: as many as the context holds
    min_tokens: int = 0                       # end-of-sequence and stop ids cannot be drawn before this many
    temperature: float = 1.0                  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0                            # 0 or -1: all
    min_p: float = 0.0                        # relative to the likeliest token, after the temperature
    repetition_penalty: float = 1.0           # over prompt and output
    presence_penalty: float = 0.0             # over output
    frequency_penalty: float = 0.0            # over output
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    stop: str | list[str] | None = None       # not part of the text unless include_stop_str_in_output
    stop_token_ids: list[int] | None = None   # part of token_ids, not of the text
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    seed: int | None = None                   # None or -1: derived from the engine's seed and the request's identity
    logprobs: int | None = None               # likeliest tokens to report beside the drawn one; -1: the vocabulary
    prompt_logprobs: int | None = None
    logits_digest: bool = False               # report a hash of each whole row of logits drawn from; the prompt's rows have none
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True

    def __post_init__(self):
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else _listed(name, value))
        self.stop_token_ids = sorted(set(token_ids("stop_token_ids", [] if self.stop_token_ids is None else self.stop_token_ids)))
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = token_ids("allowed_token_ids", self.allowed_token_ids)
        self.logit_bias = _bias(self.logit_bias)
        for name in ("logprobs", "prompt_logprobs"):
            if isinstance(getattr(self, name), bool):
                setattr(self, name, 1 if getattr(self, name) else None)
        for field in dataclasses.fields(self):
            setattr(self, field.name, _scalar(getattr(self, field.name)))
        if self.top_k == -1:
            self.top_k = 0
        if self.seed == -1:
            self.seed = None
        self._check()
        if self.temperature < GREEDY_BELOW:
            if self.n > 1:
                raise UsageError(f"n={self.n} with temperature 0: greedy choices would all be the same; set n=1 or a temperature", "n")
            self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, 0, 0.0
        elif self.temperature < LEAST_TEMPERATURE:
            log.warning("temperature %g is raised to %g: a smaller one overflows", self.temperature, LEAST_TEMPERATURE)
            self.temperature = LEAST_TEMPERATURE

    def clone(self) -> "SamplingParams":
        """A copy that shares nothing with this one, checked again."""
        return dataclasses.replace(self)

    def _check(self):
        _integer("n", self.n, 1, MOST_CHOICES)
        _integer("max_tokens", self.max_tokens, 1, None, optional=True)
        _integer("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(f"min_tokens={_shown(self.min_tokens)} is more than max_tokens={self.max_tokens}", "min_tokens")
        _real("temperature", self.temperature, 0, None)
        _real("top_p", self.top_p, 0, 1, open_low=True)
        _integer("top_k", self.top_k, 0, None, note=" (0 or -1: no limit)")
        _real("min_p", self.min_p, 0, 1)
        _real("repetition_penalty", self.repetition_penalty, 0, None, open_low=True)
        _real("presence_penalty", self.presence_penalty, -2, 2)
        _real("frequency_penalty", self.frequency_penalty, -2, 2)
        _integer("seed", self.seed, -2**63, 2**63 - 1, optional=True)
        _integer("logprobs", self.logprobs, -1, None, optional=True, note=" (-1: the whole vocabulary)")
        _integer("prompt_logprobs", self.prompt_logprobs, -1, None, optional=True, note=" (-1: the whole vocabulary)")
        for name in ("stop", "bad_words"):
            for text in getattr(self, name):
                if not isinstance(text, str) or not text:
                    raise UsageError(f"{name} holds {text!r:.80}; each entry must be a text of at least one character", name)
                check_text(text, name)
        for field in dataclasses.fields(self):
            if field.type is bool and not isinstance(value := getattr(self, field.name), bool):
                raise UsageError(f"{field.name}={_shown(value)}; it must be true or false", field.name)
        if self.stop and not self.detokenize:
            raise UsageError("stop texts need detokenize=True; use stop_token_ids instead", "stop")
        for name in ("stop_token_ids", "allowed_token_ids"):
            for token in getattr(self, name) or ():
                _integer(name, token, 0, None)
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise UsageError("allowed_token_ids is empty; name at least one token or leave it out", "allowed_token_ids")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def check_against(self, vocab_size: int, max_logprobs: int) -> None:
        """Raises UsageError for a token id outside the model's vocabulary or more logprobs than the engine gives."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            outside = [t for t in getattr(self, name) or () if not 0 <= t < vocab_size]
            if outside:
                raise UsageError(f"{name} names the token {_shown(outside[0])}; the vocabulary has 0 to {vocab_size - 1}", name)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value > max_logprobs:
                raise UsageError(f"{name}={_shown(value)}; at most {max_logprobs} (max_logprobs), or -1 for the whole vocabulary", name)


def token_ids(name: str, value) -> list[int]:
    """The token ids in a list, a tuple or an array of NumPy's or JAX's, as Python's integers."""
    items = value.tolist() if callable(getattr(value, "tolist", None)) else value
    if isinstance(items, (str, bytes, bytearray, memoryview, Mapping)) or not isinstance(items, Iterable):
        raise UsageError(f"{name} is a {type(value).__name__}; it must be a list of token ids, or an array of one dimension", name)
    items = [item if type(item) is int else _scalar(item) for item in items]
    for item in items:
        if type(item) is not int:
            raise UsageError(f"{name} holds {_shown(item)}; token ids are integers", name)
    return items


def check_text(text: str, name: str) -> None:
    """Raises UsageError for a text that is none: with half of a surrogate pair, as broken JSON and file names have them."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise UsageError(f"{name}: character {e.start} is U+{ord(text[e.start]):04X}, half of a surrogate pair, and no text; "
                         "write the whole character", name) from None


def _shown(value) -> str:
    """The value for a message; Python refuses to write an integer of more than 4300 digits."""
    return f"{value!r:.80}" if type(value) is not int or value.bit_length() < 256 else f"an integer of {value.bit_length()} bits"


def _scalar(value):
    """A number of NumPy's or JAX's as Python's own, anything else as it is."""
    if isinstance(value, bool) or value is None or type(value) in (int, float, str, list, dict) or getattr(value, "shape", None) != ():
        return value
    return value.item()


def _listed(name: str, value) -> list:
    value = value.tolist() if callable(getattr(value, "tolist", None)) else value
    if value is not None and (isinstance(value, (bytes, bytearray, Mapping)) or not isinstance(value, Iterable)):
        raise UsageError(f"{name}={_shown(value)}; it must be a text or a list of texts", name)
    return list(value or [])


def _bias(bias) -> dict[int, float]:
    if bias is not None and not isinstance(bias, Mapping):
        raise UsageError(f"logit_bias={_shown(bias)}; it maps token ids to numbers", "logit_bias")
    out = {}
    for key, value in (bias or {}).items():
        try:
            token, number = int(key) if isinstance(key, str) else operator.index(key), float(value)  # JSON has texts for keys
            if isinstance(key, bool) or isinstance(value, (bool, str)) or math.isnan(number):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise UsageError(f"logit_bias has {key!r:.40}: {value!r:.40}; it maps token ids to numbers", "logit_bias") from None
        out[token] = min(max(number, -MOST_BIAS), MOST_BIAS)
    return out


def _integer(name, value, low, high, *, optional=False, note=""):
    if value is None and optional:
        return
    if type(value) is not int:
        raise UsageError(f"{name}={_shown(value)}; it must be an integer", name)
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name}={_shown(value)}; it must be {allowed}{note}", name)


def _real(name, value, low, high, *, open_low=False):
    if type(value) not in (int, float) or not abs(value) < LARGEST_REAL:
        raise UsageError(f"{name}={_shown(value)}; it must be a finite number", name)
    if value < low or (open_low and value == low) or (high is not None and value > high):
        low_text = f"more than {low}" if open_low else f"at least {low}"
        raise UsageError(f"{name}={_shown(value)}; it must be {low_text}" + ("" if high is None else f" and at most {high}"), name)
