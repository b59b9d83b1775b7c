"""What a request gives back, under vLLM's names."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Logprob:
    """The model's log-probability of a token, before any edit of the logits."""

    logprob: float
    rank: int | None = None           # 1: the likeliest
    decoded_token: str | None = None


@dataclasses.dataclass
class CompletionOutput:
    """One choice of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None                # of the drawn tokens; None without logprobs
    logprobs: list[dict[int, Logprob]] | None = None       # for each token: itself and the likeliest
    finish_reason: str | None = None                       # stop, length, abort, error; None while it runs
    stop_reason: int | str | None = None                   # the stop token or text that ended it
    error: str | None = None                               # with the finish_reason error: what was wrong, and at which token
    logits_digests: list[str] | None = None                # for each token: 16 hex digits of the logits that it was drawn from

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclasses.dataclass
class RequestOutput:
    """A request and all of its choices."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    seed: int                                              # replays the request alone
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # the first is None: nothing comes before it
    num_cached_tokens: int = 0
    system_fingerprint: str | None = None
    reproducible: bool = True                              # False: asked for, or a program of this machine failed its proof
    chat_date: str | None = None                           # what the chat template was told is now, if it asked; replays the prompt
