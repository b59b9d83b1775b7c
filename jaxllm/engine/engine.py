"""The engine: requests in, events out, one step at a time. It speaks token ids.

    plan -> forward dispatched -> last step read -> tokens drawn
The host works one step behind: while the device runs a step, the host reads the tokens of the step before, ends what has
ended, and builds what the next draw needs. A step is read after the next one is planned, so a sequence that ended has one
row too many in flight; its token is dropped.

Any thread may call: one at a time is inside, and whoever waits for events runs the steps. Whatever changes the engine is one
transaction: an exception at any point of it, an interrupt among them, ends all that ran, and nothing it left is used again.
"""
import contextlib
import dataclasses
import math
import threading
from collections.abc import Iterable

from jaxllm.config import EngineConfig
from jaxllm.engine.request import Fault, FinishReason, Request, Sequence, TokenEvent, TokenLogprobs
from jaxllm.engine.runner import Runner, Step, check_held
from jaxllm.engine.sampler import Drawn
from jaxllm.engine.scheduler import Scheduler, Work
from jaxllm.engine.stop import fault_message, finish_reason
from jaxllm.errors import CapacityError, EndedError, UsageError


@dataclasses.dataclass(eq=False)
class Inbox:
    """What a caller has not taken yet of the news of their requests."""

    news: list[TokenEvent] = dataclasses.field(default_factory=list)
    ended: str | None = None  # why no more will come


class Engine:
    """One model's continuous batching. `lock` is held inside each method; hold it to do several as one."""

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
        self.inboxes: dict[str, Inbox] = {}
        self.prompt_logprobs: dict[Sequence, list[TokenLogprobs]] = {}
        self.in_flight: Step | None = None
        self.steps = 0
        self.lock = threading.RLock()
        self.broken: str | None = None  # what a transaction that did not end says of itself

    def check(self, request: Request) -> None:
        """Raises UsageError when the request could never run."""
        if request.id in self.sequences:
            raise UsageError(f"a request with the id {request.id!r} is already running", "request_id")
        if not request.prompt:
            raise UsageError("the prompt is empty; it must have at least one token", "prompt")
        if len(request.prompt) >= self.config.max_model_len:
            raise UsageError(f"the prompt has {len(request.prompt)} tokens and max_model_len is {self.config.max_model_len}, which must "
                             "hold the prompt and at least one more; shorten the prompt or raise max_model_len", "prompt")

    # -- the transaction ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self):
        """A change of the engine, whole or undone by whoever is next: then nobody's request is left in it.

        The mark is set before and taken off after, so that no interrupt comes too early, too late, or while one is undone.
        """
        self._mend()
        self.broken = "it was interrupted"
        try:
            yield
        except BaseException as e:
            self.broken = f"{type(e).__name__}: {e}"
            raise
        self.broken = None

    def _mend(self) -> None:
        """After a transaction that did not end: no request, no page held or remembered, and an empty cache."""
        if self.broken is not None:
            self._end_all(f"a step that they shared with another call did not end ({self.broken}); call again")
            if self.runner.params is not None:
                self.runner.renew()
            self.broken = None

    def _open(self) -> None:
        """Raises UsageError once the engine is closed; else it is whole."""
        if self.runner.params is None:
            raise UsageError("this LLM is closed; make a new one")
        self._mend()

    def ready(self) -> None:
        """Raises UsageError when it is closed, or others have deleted its weights."""
        with self.lock:
            self._open()
            check_held(self.runner.params)

    def _end_all(self, why: str) -> None:
        for inbox in self.inboxes.values():
            inbox.ended = why
        self.scheduler, self.in_flight = Scheduler(self.config), None
        self.sequences, self.inboxes, self.prompt_logprobs = {}, {}, {}

    # -- requests -----------------------------------------------------------------------------------------------------

    def add(self, *requests: Request) -> Inbox:
        """The requests join the line, all or none: where their news come. Raises UsageError when one could never run."""
        with self.lock:
            self.ready()
            for request in requests:
                self.check(request)
            with self._transaction():
                inbox = Inbox()
                for request in requests:
                    self.sequences[request.id], self.inboxes[request.id] = self.scheduler.add(request), inbox
                return inbox

    def abort(self, request_ids: Iterable[str]) -> None:
        """The requests' choices end now and their pages are free for the next step; unknown ids are ignored."""
        with self.lock, self._transaction():
            for sequence in [s for request_id in request_ids for s in self.sequences.get(request_id, ())]:
                self._finish(sequence, FinishReason.ABORT)

    def stop(self, request_id: str, choice: int) -> None:
        """One choice ends now, because a stop text was found in it."""
        with self.lock, self._transaction():
            for sequence in list(self.sequences.get(request_id, ())):
                if sequence.choice == choice:
                    self._finish(sequence, FinishReason.STOP)

    @property
    def busy(self) -> bool:
        return not self.scheduler.idle

    def events(self, inbox: Inbox) -> list[TokenEvent]:
        """The news of a caller's requests; where there are none yet, after a step. EndedError when none will come."""
        with self.lock:
            if not inbox.news and inbox.ended is None:
                self.step()
            if inbox.ended is not None:
                raise EndedError(f"the requests of this call were ended: {inbox.ended}")
            news, inbox.news = inbox.news, []
            return news

    def step(self) -> list[TokenEvent]:
        """One step dispatched and the one before it read: the news of the latter, which are in their inboxes too."""
        with self.lock, self._transaction():
            plan = self.scheduler.plan()
            step = self.runner.forward(plan) if plan is not None else None
            events = self._read(self.in_flight) if self.in_flight is not None else []
            self.in_flight = None
            if step is not None and self.busy:  # or all of its rows have ended just now
                self.runner.draw(step)
                self.in_flight = step
                self.steps += 1
            return events

    def _read(self, step: Step) -> list[TokenEvent]:
        drawn, scored = self.runner.read(step)
        events = []
        for index, first, count, logprobs in scored:
            work = step.plan.work[index]
            position = self._collect_prompt(work, first, count, logprobs)
            if position is not None:
                self._fail(work.sequence, fault_message(work.sequence, Fault.LOGITS, position), events)
        for i, work in enumerate(step.plan.work):
            sequence = work.sequence
            if not work.samples or sequence.finish_reason is not None:
                continue
            if drawn.faults[i]:
                self._fail(sequence, fault_message(sequence, drawn.faults[i]), events)
                continue
            token = int(drawn.tokens[i])
            self.scheduler.read(sequence, token)
            ended = finish_reason(sequence, token)
            wants_prompt = sequence.output_count == 1 and sequence.request.params.prompt_logprobs is not None
            self._tell(events, TokenEvent(
                sequence.request.id, sequence.choice, token, _token_logprobs(drawn, i, sequence.request.params.logprobs),
                ended and ended[0], ended and ended[1],
                prompt_logprobs=tuple(self.prompt_logprobs.pop(sequence, ())) if wants_prompt else None,
                cached_tokens=sequence.cached_tokens,
                logits_digest="{:08x}{:08x}".format(*drawn.digests[i].tolist()) if sequence.request.params.logits_digest else None))
            if ended:
                self._finish(sequence, ended[0])
        return events

    def _tell(self, events: list[TokenEvent], event: TokenEvent) -> None:
        events.append(event)
        self.inboxes[event.request_id].news.append(event)

    def _fail(self, sequence: Sequence, error: str, events: list[TokenEvent]) -> None:
        """The sequence ends with an error, and no other does."""
        self._tell(events, TokenEvent(sequence.request.id, sequence.choice, None, finish_reason=FinishReason.ERROR, error=error))
        self._finish(sequence, FinishReason.ERROR)

    def _collect_prompt(self, work: Work, first: int, count: int, drawn: Drawn) -> int | None:
        """Keeps the logprobs of prompt tokens from position `first` + 1 on; the first position that has none, if its logits are not finite."""
        sequence = work.sequence
        if sequence.output_count or sequence.finish_reason is not None:
            return None  # a preempted sequence computes its prompt again
        known = self.prompt_logprobs.setdefault(sequence, [None] * (len(sequence.request.prompt) - 1))
        wanted = sequence.request.params.prompt_logprobs
        known[first:first + count] = [_token_logprobs(drawn, row, wanted) for row in range(count)]
        return next((first + row + 1 for row in range(count) if math.isnan(known[first + row].logprob)), None)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        self.scheduler.finish(sequence, reason)
        self.prompt_logprobs.pop(sequence, None)
        siblings = self.sequences[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self.sequences[sequence.request.id], self.inboxes[sequence.request.id]
        if not self.busy:
            self.in_flight = None  # nobody is left to read it
            self.scheduler.check()

    # -- housekeeping -------------------------------------------------------------------------------------------------

    def reset_prefix_cache(self) -> None:
        """No later request reuses what was computed until now."""
        with self.lock, self._transaction():
            self.scheduler.pool.forget_all()

    def update_params(self, params, origin) -> None:
        """Serves other weights of the same shapes; what was cached of the old ones is forgotten. UsageError while requests run."""
        with self.lock:
            self._open()
            if self.busy:
                raise UsageError("requests are running; update the weights between calls", "params")
            with self._transaction():
                self.scheduler.pool.forget_all()
                self.runner.take(params, origin)

    def warmup(self) -> int:
        """Compiles the programs of every step shape; the number of programs there are now."""
        with self.lock:
            self._open()
            with self._transaction():
                return self.runner.warmup()

    def close(self) -> None:
        """Frees the device; whatever runs has ended."""
        with self.lock:
            self._end_all("this LLM was closed")
            self.runner.close()


def _token_logprobs(drawn: Drawn, row: int, wanted: int | None) -> TokenLogprobs | None:
    if wanted is None:
        return None
    count = len(drawn.top_ids[row]) if wanted < 0 else wanted
    return TokenLogprobs(float(drawn.logprobs[row]), int(drawn.ranks[row]),
                         tuple(zip(drawn.top_ids[row][:count].tolist(), drawn.top_logprobs[row][:count].tolist())))
