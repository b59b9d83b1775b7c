"""A request, the sequences it becomes, and what the engine reports of them. No jax here."""
import dataclasses
import enum
import hashlib

from jaxllm.sampling_params import SamplingParams

SEED_BITS = 53  # of a derived seed: what JSON readers keep exactly


class FinishReason(enum.StrEnum):
    STOP = "stop"      # an end-of-sequence token, a stop token, or a stop text
    LENGTH = "length"  # max_tokens or max_model_len
    ABORT = "abort"
    ERROR = "error"


class Fault(enum.IntEnum):
    """Why no token can be drawn from a row of logits; 0: one can."""

    LOGITS = 1    # NaN, infinity, or -inf everywhere, as the model gave them
    EMPTY = 2     # masks and bans leave no token
    OVERFLOW = 3  # finite as the model gave them, and not after the request's penalties and temperature


@dataclasses.dataclass(frozen=True)
class Request:
    """What a caller asked for, in token ids."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    seed: int                              # params.seed, or the one derived for it
    max_total: int                         # tokens at which the sequence ends, prompt included
    stop_ids: frozenset[int] = frozenset()  # drawn, they end the sequence; masked while under min_tokens
    banned: tuple[tuple[int, ...], ...] = ()  # bad words as tokens: the last is banned where the others precede it
    cache_salt: str = ""                   # requests share prefixes only under the same salt


def derived_seed(engine_seed: int, identity: str) -> int:
    """The seed of a request that names none: a function of the engine's seed and the request's identity alone."""
    digest = hashlib.blake2b(f"{engine_seed}\0{identity}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


@dataclasses.dataclass(eq=False)
class Sequence:
    """One choice of a request on its way through the engine."""

    request: Request
    choice: int
    tokens: list[int]                    # prompt and output so far, as far as the host has read them
    pages: list[int] = dataclasses.field(default_factory=list)
    computed: int = 0                    # tokens whose keys and values are written or dispatched; the only progress counter
    pending: int = 0                     # tokens drawn on the device and not read yet: the steps in flight, at most 2
    slot: int | None = None              # row of the device's per-sequence state while running
    hashed: int = 0                      # full pages that the pool remembers
    digest: bytes = b""                  # hash of the last of them
    cached_tokens: int = 0               # prompt tokens found in the prefix cache at the last admission
    preemptions: int = 0
    finish_reason: FinishReason | None = None

    @property
    def total(self) -> int:
        """Tokens known to the host or waiting on the device."""
        return len(self.tokens) + self.pending

    @property
    def output_count(self) -> int:
        return len(self.tokens) - len(self.request.prompt)


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """The model's own log-probability of one token, and of the likeliest tokens at its place."""

    logprob: float
    rank: int                              # 1: the likeliest
    top: tuple[tuple[int, float], ...]     # (token id, logprob), likeliest first


@dataclasses.dataclass(frozen=True)
class TokenEvent:
    """One step's news of one choice: at most one token, and the finish reason with the last."""

    request_id: str
    choice: int
    token: int | None
    logprobs: TokenLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None                                  # the stop token that ended it
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None        # with the first token, positions 1.. of the prompt
    cached_tokens: int = 0
    logits_digest: str | None = None                                # of the whole row that the token was drawn from
    error: str | None = None                                        # with the finish reason ERROR, which has no token
