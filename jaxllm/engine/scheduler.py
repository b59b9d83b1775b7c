"""Which tokens run in the next step: token-budgeted continuous batching with chunked prefill. No jax here.

`plan` counts tokens as computed when it hands them out, because the device runs steps in order; the host may read a
step's tokens after the next step was planned. A sequence that turns out to have ended meanwhile has run one row too many,
which is dropped.
"""
import dataclasses
from collections import deque

from jaxllm.config import EngineConfig
from jaxllm.engine.pages import PagePool
from jaxllm.engine.request import FinishReason, Request, Sequence


@dataclasses.dataclass(frozen=True)
class Work:
    """`count` tokens of one sequence from `start` on; the last one's logits are sampled if `samples`."""

    sequence: Sequence
    start: int
    count: int
    samples: bool
    slot: int
    pages: tuple[int, ...]   # as they were when the step was planned: the sequence may lose them before it is over
    token_pending: bool      # the last of the tokens is on the device only


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step. `decode`: every sequence runs exactly one token."""

    work: tuple[Work, ...]

    @property
    def decode(self) -> bool:
        return all(w.count == 1 for w in self.work)

    @property
    def tokens(self) -> int:
        return sum(w.count for w in self.work)


class Scheduler:
    """Sequences waiting and running, and the pages they hold."""

    def __init__(self, config: EngineConfig):
        self.config = config
        self.pool = PagePool(config.num_pages, config.page_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first; the newest is preempted first
        self.slots = list(range(config.max_num_seqs))[::-1]
        self.preemptions = 0

    def add(self, request: Request) -> list[Sequence]:
        """The sequences of a request, one for each choice, at the end of the line."""
        sequences = [Sequence(request, choice, list(request.prompt)) for choice in range(request.params.n)]
        self.waiting.extend(sequences)
        return sequences

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def plan(self) -> Plan | None:
        """The next step, or None when nothing can run before the step in flight is read."""
        budget, work, preempted = self.config.max_num_batched_tokens, {}, False

        def hand_out(sequence: Sequence, count: int) -> None:
            nonlocal budget
            work[sequence] = self._work(sequence, count)
            budget -= count

        # Decodes first, so that a long prompt never makes a running text wait.
        for sequence in sorted(self.running, key=lambda s: s.total - s.computed > 1):
            if sequence.slot is None or budget == 0 or sequence.total >= sequence.request.max_total:
                continue  # preempted just now, nothing left to give, or its last token is in flight
            count = min(sequence.total - sequence.computed, budget)
            while sequence.slot is not None and not self._grow(sequence, sequence.computed + count):
                victim = self.running[-1]
                dropped = work.pop(victim, None)
                if dropped is not None:
                    budget += dropped.count
                    victim.pending -= dropped.samples
                    self.pool.forget(victim.pages[dropped.start // self.config.page_size:])  # will not be written
                self._preempt(victim)
                preempted = True
            if sequence.slot is not None:
                hand_out(sequence, count)
        while self.waiting and self.slots and budget > 0 and not preempted:
            sequence = self.waiting[0]
            if sequence.pending or not self._admit(sequence, budget):
                break  # a token in flight is not known to the host yet, so its keys cannot be computed again
            self.waiting.popleft()
            hand_out(sequence, min(sequence.total - sequence.computed, budget))
        return Plan(tuple(work.values())) if work else None

    def _work(self, sequence: Sequence, count: int) -> Work:
        start = sequence.computed
        sequence.computed += count
        samples = sequence.computed == sequence.total
        work = Work(sequence, start, count, samples, sequence.slot, tuple(sequence.pages), samples and sequence.pending > 0)
        sequence.pending += samples
        self._remember(sequence)  # already now: a step writes before it reads, so its own sequences may share pages
        return work

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Whether the sequence now holds pages for `tokens` tokens."""
        missing = -(-tokens // self.config.page_size) - len(sequence.pages)
        pages = self.pool.allocate(missing) if missing > 0 else []
        if pages is None:
            return False
        sequence.pages.extend(pages)
        return True

    def _admit(self, sequence: Sequence, budget: int) -> bool:
        """Whether the sequence got a slot and pages for its first chunk, known prefixes held instead of computed."""
        size = self.config.page_size
        known = []
        if self.config.enable_prefix_caching and sequence.request.params.prompt_logprobs is None:
            # The last token is always computed: its logits are needed.
            known = self.pool.match(sequence.tokens[:sequence.total - 1], sequence.request.cache_salt)
        self.pool.hold(known)
        sequence.pages, sequence.computed = list(known), len(known) * size
        if not self._grow(sequence, min(sequence.total, sequence.computed + budget)):
            self.pool.release(sequence.pages)
            sequence.pages, sequence.computed = [], 0
            return False
        sequence.hashed = len(known)
        sequence.digest = self.pool.known[known[-1]].digest if known else b""
        sequence.cached_tokens = min(sequence.computed, len(sequence.request.prompt))
        sequence.slot = self.slots.pop()
        self.running.append(sequence)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """The sequence goes back to the head of the line and will be computed again."""
        self._leave(sequence)
        sequence.computed = 0
        sequence.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.pages)
        self.slots.append(sequence.slot)
        sequence.pages, sequence.slot, sequence.hashed, sequence.digest = [], None, 0, b""

    def read(self, sequence: Sequence, token: int) -> None:
        """A token drawn on the device is known now; pages it completes are remembered."""
        sequence.tokens.append(token)
        sequence.pending -= 1
        self._remember(sequence)

    def _remember(self, sequence: Sequence) -> None:
        if not self.config.enable_prefix_caching or sequence.slot is None:
            return
        size = self.config.page_size
        while (sequence.hashed + 1) * size <= min(sequence.computed, len(sequence.tokens)):
            start = sequence.hashed * size
            sequence.digest = self.pool.remember(sequence.pages[sequence.hashed], sequence.digest,
                                                 tuple(sequence.tokens[start:start + size]), sequence.request.cache_salt)
            sequence.hashed += 1

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """The sequence is over; its pages and its slot are free in the next plan."""
        if sequence.finish_reason is not None:
            return
        sequence.finish_reason = reason
        if sequence.slot is not None:
            if reason is FinishReason.ERROR:  # a NaN may reach back to earlier tokens of its step: nobody is to find them
                self.pool.forget(sequence.pages)
            else:
                self._remember(sequence)
            self._leave(sequence)
        else:
            self.waiting.remove(sequence)

    def check(self) -> None:
        """Raises RuntimeError unless pages and slots add up."""
        self.pool.check([s.pages for s in self.running])
        used = [s.slot for s in self.running]
        if sorted(used + self.slots) != list(range(self.config.max_num_seqs)):
            raise RuntimeError(f"slots do not add up: {used} used, {self.slots} free")
        if any(s.pages or s.slot is not None for s in self.waiting):
            raise RuntimeError("a waiting sequence holds pages")
