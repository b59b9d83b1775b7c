"""How a request wants its tokens drawn: vLLM's names, ranges and order of operations, checked when made."""
import dataclasses
import logging
import math
import numbers
from collections.abc import Iterable, Mapping

from jaxllm.errors import UsageError

GREEDY_BELOW = 1e-5   # a temperature under this is greedy
LEAST_TEMPERATURE = 0.01  # a positive one under this divides logits into overflow, so it is raised to this
MOST_CHOICES = 16384
MOST_BIAS = 100.0

log = logging.getLogger("jaxllm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to draw the tokens of one request. Raises UsageError, naming the field, for what cannot be done.

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
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731  (normalising a frozen value once)
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            put(name, [value] if isinstance(value, str) else _list(name, value) or [])
        for name in ("stop_token_ids", "allowed_token_ids"):
            put(name, _list(name, getattr(self, name)))
            for token in getattr(self, name) or ():
                _integer(name, token, 0, None)
        put("stop_token_ids", sorted(set(self.stop_token_ids or [])))
        put("logit_bias", _bias(self.logit_bias))
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if isinstance(value, bool):
                put(name, 1 if value else None)
        if self.top_k == -1:
            put("top_k", 0)
        if self.seed == -1:
            put("seed", None)
        self._check()
        if self.temperature < GREEDY_BELOW:
            if self.n > 1:
                raise UsageError(f"n={self.n} with temperature 0: greedy choices would all be the same; set n=1 or a temperature", "n")
            for name, value in (("temperature", 0.0), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                put(name, value)
        elif self.temperature < LEAST_TEMPERATURE:
            log.warning("temperature %g is raised to %g: a smaller one overflows", self.temperature, LEAST_TEMPERATURE)
            put("temperature", LEAST_TEMPERATURE)

    def _check(self):
        _integer("n", self.n, 1, MOST_CHOICES)
        _integer("max_tokens", self.max_tokens, 1, None, optional=True)
        _integer("min_tokens", self.min_tokens, 0, None)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise UsageError(f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}", "min_tokens")
        _real("temperature", self.temperature, 0, 2)
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
                    raise UsageError(f"{name} holds {text!r}; each entry must be a text of at least one character", name)
        for field in dataclasses.fields(self):
            if field.type is bool and not isinstance(value := getattr(self, field.name), bool):
                raise UsageError(f"{field.name}={value!r}; it must be true or false", field.name)
        if self.stop and not self.detokenize:
            raise UsageError("stop texts need detokenize=True; use stop_token_ids instead", "stop")
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
                raise UsageError(f"{name} names the token {outside[0]}; the vocabulary has 0 to {vocab_size - 1}", name)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value > max_logprobs:
                raise UsageError(f"{name}={value}; at most {max_logprobs} (max_logprobs), or -1 for the whole vocabulary", name)


def _list(name: str, value) -> list | None:
    if value is None:
        return None
    if not isinstance(value, Iterable) or isinstance(value, (str, bytes, Mapping)):
        raise UsageError(f"{name}={value!r:.80}; it must be a list", name)
    return list(value)


def _bias(bias) -> dict[int, float]:
    if not isinstance(bias, Mapping | None):
        raise UsageError(f"logit_bias={bias!r:.80}; it maps token ids to numbers", "logit_bias")
    out = {}
    for key, value in (bias or {}).items():
        try:
            token, value = int(key), float(value)
        except (TypeError, ValueError):
            raise UsageError(f"logit_bias has {key!r}: {value!r}; it maps token ids to numbers", "logit_bias") from None
        if math.isnan(value):
            raise UsageError(f"logit_bias of token {token} is not a number", "logit_bias")
        out[token] = min(max(value, -MOST_BIAS), MOST_BIAS)
    return out


def _integer(name, value, low, high, *, optional=False, note=""):
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UsageError(f"{name}={value!r}; it must be an integer", name)
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name}={value}; it must be {allowed}{note}", name)


def _real(name, value, low, high, *, open_low=False):
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise UsageError(f"{name}={value!r}; it must be a finite number", name)
    if value < low or (open_low and value == low) or (high is not None and value > high):
        low_text = f"more than {low}" if open_low else f"at least {low}"
        raise UsageError(f"{name}={value}; it must be {low_text}" + ("" if high is None else f" and at most {high}"), name)
