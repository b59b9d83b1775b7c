"""The scheduler without a device: a fake one draws tokens that only depend on the text so far, so that whatever the
schedule, every request must end with the same tokens. Random walks check the books after each move."""
import random

import pytest

from jaxllm.config import EngineConfig
from jaxllm.engine.request import FinishReason, Request
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.stop import finish_reason
from jaxllm.sampling_params import SamplingParams

STOP = 7


def request(name, prompt, max_tokens, n=1, max_total=None):
    params = SamplingParams(max_tokens=max_tokens, temperature=1.0, n=n)
    return Request(name, tuple(prompt), params, seed=0, max_total=max_total or len(prompt) + max_tokens, stop_ids=frozenset([STOP]))


def next_token(tokens, choice):
    """A stand-in for the model: a function of all tokens so far."""
    return hash((tuple(tokens), choice)) % 50


def expected(req, choice):
    tokens = list(req.prompt)
    while True:
        tokens.append(next_token(tokens, choice))
        if tokens[-1] == STOP or len(tokens) >= req.max_total:
            return tokens


class FakeDevice:
    """Keys and values by page and offset: which token was written there. Reads are checked against the sequence's own text."""

    def __init__(self, scheduler):
        self.scheduler, self.size = scheduler, scheduler.config.page_size
        self.cells = {}
        self.last = {}

    def run(self, plan):
        assert plan.tokens <= self.scheduler.config.max_num_batched_tokens
        texts = {}
        for work in plan.work:  # all writes come before all reads, as in a layer
            known = list(work.sequence.tokens)
            if work.start + work.count > len(known):
                assert work.token_pending
                known.append(self.last[work.slot])
            texts[work] = known
            for position in range(work.start, work.start + work.count):
                self.cells[work.pages[position // self.size], position % self.size] = known[position]
        drawn = {}
        for work in plan.work:
            end = work.start + work.count
            for position in range(end):
                assert self.cells[work.pages[position // self.size], position % self.size] == texts[work][position]
            if work.samples:
                assert end == len(texts[work])
                drawn[work] = self.last[work.slot] = next_token(texts[work][:end], work.sequence.choice)
        return drawn


def drive(config, requests, rng, abort_chance=0.0):
    scheduler = Scheduler(config)
    device = FakeDevice(scheduler)
    todo, sequences, in_flight = list(requests), [], {}
    for _ in range(5000):
        if todo and (scheduler.idle or rng.random() < 0.4):
            sequences += scheduler.add(todo.pop())
        if sequences and rng.random() < abort_chance:
            scheduler.finish(rng.choice(sequences), FinishReason.ABORT) if rng.random() < 0.5 else None
            sequences = [s for s in sequences if s.finish_reason is None] + [s for s in sequences if s.finish_reason is not None]
        plan = scheduler.plan()
        drawn = device.run(plan) if plan else {}
        for work, token in in_flight.items():
            if work.sequence.finish_reason is None:
                scheduler.read(work.sequence, token)
                ended = finish_reason(work.sequence, token)
                if ended:
                    scheduler.finish(work.sequence, ended[0])
        in_flight = drawn
        scheduler.check()
        if not todo and scheduler.idle and not in_flight:
            return scheduler, sequences
    raise AssertionError("the walk did not end")


def config(**changes):
    base = dict(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=16, num_pages=40, page_size=4)
    return EngineConfig(**{**base, **changes})


@pytest.mark.parametrize("seed", range(30))
def test_every_schedule_gives_every_request_its_own_tokens(seed):
    rng = random.Random(seed)
    cfg = config(max_num_seqs=rng.choice([1, 2, 4, 9]), max_num_batched_tokens=rng.choice([9, 16, 64]),
                 num_pages=rng.choice([16, 18, 30, 80]), enable_prefix_caching=rng.random() < 0.7)
    prefix = [rng.randrange(50) for _ in range(12)]
    requests = [request(str(i), (prefix[:rng.randrange(13)] + [rng.randrange(50) for _ in range(rng.randrange(1, 30))]),
                        rng.randrange(1, 22), n=rng.choice([1, 1, 3])) for i in range(12)]
    scheduler, sequences = drive(cfg, requests, rng)
    assert len(sequences) == sum(r.params.n for r in requests), f"seed {seed}"
    for s in sequences:
        assert s.tokens == expected(s.request, s.choice), f"seed {seed}"
    assert scheduler.pool.available == cfg.num_pages


@pytest.mark.parametrize("seed", range(10))
def test_aborts_free_everything_and_disturb_nobody(seed):
    rng = random.Random(seed)
    requests = [request(str(i), [rng.randrange(50) for _ in range(rng.randrange(1, 40))], 20, n=2) for i in range(10)]
    scheduler, sequences = drive(config(num_pages=20), requests, rng, abort_chance=0.2)
    assert scheduler.pool.available == 20 and len(scheduler.slots) == 4
    for s in sequences:
        if s.finish_reason is not FinishReason.ABORT:
            assert s.tokens == expected(s.request, s.choice), f"seed {seed}"


def test_a_small_pool_preempts_the_newest_and_all_still_end():
    requests = [request(str(i), [i] * 20, 40) for i in range(4)]
    scheduler, sequences = drive(config(num_pages=17), requests, random.Random(1))
    assert scheduler.preemptions > 0
    assert all(s.tokens == expected(s.request, 0) for s in sequences)


def test_a_long_prompt_does_not_make_a_running_text_wait():
    scheduler = Scheduler(config())
    short, long = scheduler.add(request("short", [1, 2], 30))[0], None
    plan = scheduler.plan()
    scheduler.read(short, 3)
    long = scheduler.add(request("long", list(range(1, 60)), 3))[0]
    for _ in range(3):
        plan = scheduler.plan()
        work = {w.sequence: w for w in plan.work}
        assert work[short].count == 1 and work[long].count == 15
        scheduler.read(short, 3)


def test_choices_of_one_request_share_the_pages_of_its_prompt_in_the_first_step():
    scheduler = Scheduler(config(max_num_batched_tokens=64))
    sequences = scheduler.add(request("r", range(10, 23), 5, n=3))
    plan = scheduler.plan()
    assert [w.count for w in plan.work] == [13, 1, 1]
    assert sequences[1].pages[:3] == sequences[0].pages[:3] and sequences[1].pages[3] != sequences[0].pages[3]


def test_the_last_token_of_a_cached_prompt_is_computed_again():
    scheduler = Scheduler(config())
    first = scheduler.add(request("a", range(10, 18), 1))[0]
    scheduler.plan()
    scheduler.read(first, 1)
    scheduler.finish(first, FinishReason.LENGTH)
    scheduler.add(request("b", range(10, 18), 1))
    assert [(w.start, w.count) for w in scheduler.plan().work] == [(4, 4)]


def test_nothing_is_planned_while_the_last_tokens_are_in_flight():
    scheduler = Scheduler(config())
    scheduler.add(request("a", [1, 2, 3], 1))
    assert scheduler.plan().tokens == 3
    assert scheduler.plan() is None
