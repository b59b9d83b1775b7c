"""The engine: requests in, events out, one step at a time. It speaks token ids.

    plan -> forward dispatched -> last step read -> tokens drawn
The host works one step behind: while the device runs a step, the host reads the tokens of the step before, ends what has
ended, and builds what the next draw needs. A step is read after the next one is planned, so a sequence that ended has one
row too many in flight; its token is dropped.
"""
from jaxllm.config import EngineConfig
from jaxllm.engine.request import FinishReason, Request, Sequence, TokenEvent, TokenLogprobs
from jaxllm.engine.runner import Runner, Step
from jaxllm.engine.sampler import Drawn
from jaxllm.engine.scheduler import Scheduler, Work
from jaxllm.engine.stop import finish_reason
from jaxllm.errors import CapacityError, UsageError


class Engine:
    """One model's continuous batching. One thread at a time may use it."""

    def __init__(self, runner: Runner, config: EngineConfig):
        if config.num_pages < config.pages_per_seq:
            raise CapacityError(f"the KV cache has {config.num_pages} pages and one sequence of {config.max_model_len} tokens needs "
                                f"{config.pages_per_seq}; lower max_model_len or give the cache more memory")
        if config.max_num_batched_tokens < config.max_num_seqs:
            raise UsageError(f"max_num_batched_tokens={config.max_num_batched_tokens} is less than max_num_seqs={config.max_num_seqs}: "
                             "a step must hold one token of every sequence", "max_num_batched_tokens")
        self.runner, self.config = runner, config
        self.scheduler = Scheduler(config)
        self.sequences: dict[str, list[Sequence]] = {}
        self.prompt_logprobs: dict[Sequence, list[TokenLogprobs]] = {}
        self.in_flight: Step | None = None
        self.steps = 0

    def check(self, request: Request) -> None:
        """Raises UsageError when the request could never run."""
        if request.id in self.sequences:
            raise UsageError(f"a request with the id {request.id!r} is already running", "request_id")
        if not request.prompt:
            raise UsageError("the prompt is empty; it must have at least one token", "prompt")
        if len(request.prompt) >= self.config.max_model_len:
            raise UsageError(f"the prompt has {len(request.prompt)} tokens and max_model_len is {self.config.max_model_len}, which must "
                             "hold the prompt and at least one more; shorten the prompt or raise max_model_len", "prompt")

    def add(self, request: Request) -> None:
        """The request joins the line. Raises UsageError when it could never run."""
        self.check(request)
        self.sequences[request.id] = self.scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """The request's choices end now and their pages are free for the next step; unknown ids are ignored."""
        for sequence in list(self.sequences.get(request_id, ())):
            self._finish(sequence, FinishReason.ABORT)

    def stop(self, request_id: str, choice: int) -> None:
        """One choice ends now, because a stop text was found in it."""
        for sequence in list(self.sequences.get(request_id, ())):
            if sequence.choice == choice:
                self._finish(sequence, FinishReason.STOP)

    @property
    def busy(self) -> bool:
        return not self.scheduler.idle or self.in_flight is not None

    def step(self) -> list[TokenEvent]:
        """One step dispatched and the one before it read: the news of the latter."""
        plan = self.scheduler.plan()
        step = self.runner.forward(plan) if plan is not None else None
        events = self._read(self.in_flight) if self.in_flight is not None else []
        if step is not None:
            self.runner.draw(step)
            self.steps += 1
        self.in_flight = step
        if not self.busy:
            self.scheduler.check()
        return events

    def _read(self, step: Step) -> list[TokenEvent]:
        drawn, scored = self.runner.read(step)
        for index, first, count, logprobs in scored:
            self._collect_prompt(step.plan.work[index], first, count, logprobs)
        events = []
        for i, work in enumerate(step.plan.work):
            sequence = work.sequence
            if not work.samples or sequence.finish_reason is not None:
                continue
            token = int(drawn.tokens[i])
            self.scheduler.read(sequence, token)
            ended = finish_reason(sequence, token)
            wants_prompt = sequence.output_count == 1 and sequence.request.params.prompt_logprobs is not None
            events.append(TokenEvent(
                sequence.request.id, sequence.choice, token, _token_logprobs(drawn, i, sequence.request.params.logprobs),
                ended and ended[0], ended and ended[1],
                prompt_logprobs=tuple(self.prompt_logprobs.pop(sequence, ())) if wants_prompt else None,
                cached_tokens=sequence.cached_tokens,
                logits_digest="{:08x}{:08x}".format(*drawn.digests[i].tolist()) if sequence.request.params.logits_digest else None))
            if ended:
                self._finish(sequence, ended[0])
        return events

    def _collect_prompt(self, work: Work, first: int, count: int, drawn: Drawn) -> None:
        sequence = work.sequence
        if sequence.output_count or sequence.finish_reason is not None:
            return  # a preempted sequence computes its prompt again
        known = self.prompt_logprobs.setdefault(sequence, [None] * (len(sequence.request.prompt) - 1))
        wanted = sequence.request.params.prompt_logprobs
        known[first:first + count] = [_token_logprobs(drawn, row, wanted) for row in range(count)]

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(sequence, reason)
        self.prompt_logprobs.pop(sequence, None)
        siblings = self.sequences[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self.sequences[sequence.request.id]

    def reset_prefix_cache(self) -> None:
        """No later request reuses what was computed until now."""
        self.scheduler.pool.forget_all()


def _token_logprobs(drawn: Drawn, row: int, wanted: int | None) -> TokenLogprobs | None:
    if wanted is None:
        return None
    count = len(drawn.top_ids[row]) if wanted < 0 else wanted
    return TokenLogprobs(float(drawn.logprobs[row]), int(drawn.ranks[row]),
                         tuple(zip(drawn.top_ids[row][:count].tolist(), drawn.top_logprobs[row][:count].tolist())))
