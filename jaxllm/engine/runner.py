"""The device's side of the engine: weights, cache, and the compiled programs of a step.

Three programs, each compiled once for each of few shapes: `forward` (tokens to logits, cache updated in place), `draw`
(logits to tokens) and `score` (hidden states to the logprobs of given tokens). Drawing is a program of its own so that the
host can read the last step's tokens, and build masks and penalties from them, while this step's forward runs.
"""
import contextlib
import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.config import SCRATCH_PAGES, EngineConfig, ModelConfig
from jaxllm.engine import batch as batches
from jaxllm.engine import proof as proofs
from jaxllm.engine import sampler
from jaxllm.engine.batch import Batch
from jaxllm.engine.sampler import Drawn, Features
from jaxllm.engine.scheduler import Plan
from jaxllm.errors import UsageError
from jaxllm.machine import Facts
from jaxllm.models import decoder
from pallas_kernels import probe
from pallas_kernels.dispatch import Kernels

log = logging.getLogger("jaxllm")
SCORE_ROWS = 64  # positions scored by one call of `score`: bounds its [rows, V] logits


@contextlib.contextmanager
def own_configuration():
    """Inside, jax traces and compiles the same way whatever the user has configured; outside nothing has changed."""
    with jax.enable_x64(False), jax.threefry_partitionable(True), jax.default_matmul_precision(None), \
            jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"), jax.debug_nans(False):
        yield


@contextlib.contextmanager
def compilation_cache(folder: Path | None):
    """Inside, what jax compiles is kept in `folder` between processes; the user's own setting is back afterwards."""
    if folder is None:
        yield
        return
    from jax.experimental.compilation_cache import compilation_cache as cache
    wanted = {"jax_compilation_cache_dir": str(folder), "jax_enable_compilation_cache": True,
              "jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: getattr(jax.config, name) for name in wanted}
    try:
        for name, value in wanted.items():
            jax.config.update(name, value)
        cache.reset_cache()  # jax opens its cache once; the next compilation opens this one
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        cache.reset_cache()


def forward(params, cache, last_token, batch: Batch, *, cfg: ModelConfig, kernels: Kernels):
    """Hidden states [T, D], logits float32 [S, V] of each sequence's last token, and the cache with the step written."""
    tokens = jnp.where(batch.sources >= 0, last_token[batch.sources], batch.tokens)
    hidden, cache = decoder.forward(cfg, params, cache, tokens, batch.ragged, kernels=kernels)
    last = hidden if batch.rows is None else hidden[batch.rows]
    return hidden, decoder.unembed(cfg, params, last, kernels=kernels), cache


def score(params, hidden, rows, targets, *, cfg: ModelConfig, kernels: Kernels, top: int) -> Drawn:
    """The logprobs of `targets` [R] at the hidden states [T, D] of `rows` [R]."""
    logits = decoder.unembed(cfg, params, hidden[rows], kernels=kernels)
    return sampler.report(logits, targets, top, kernels)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted functions of an engine. Lowered on shapes alone they are compiled for a device that is not there."""

    forward: Callable  # (params, cache, last_token, batch) -> (hidden, logits, cache); `cache` is donated
    draw: Callable     # (logits, last_token, inputs, *, features) -> (Drawn, last_token); `last_token` is donated
    score: Callable    # (params, hidden, rows, targets, *, top) -> Drawn


# Weights and cache fill a card by design; XLA, which counts them, would compute the rotation's tables anew in each layer.
AS_WRITTEN = {"xla_disable_hlo_passes": "rematerialization"}


def programs(cfg: ModelConfig, kernels: Kernels) -> Programs:
    """What a `Runner` of this model runs."""
    options = kernels.compiler_options or None
    return Programs(
        jax.jit(partial(forward, cfg=cfg, kernels=kernels), donate_argnames="cache",
                compiler_options=AS_WRITTEN | kernels.compiler_options),
        jax.jit(partial(sampler.sample, kernels=kernels), static_argnames="features", donate_argnames="last_token",
                compiler_options=options),
        jax.jit(partial(score, cfg=cfg, kernels=kernels), static_argnames="top", compiler_options=options))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _pages(shape: tuple[int, ...], dtype, scratch: int, salt: int) -> jax.Array:
    """Zeroed pages, but the last `scratch` of them, which hold numbers from -1 to 1 in no order."""
    size = scratch * shape[1] * shape[2] * shape[3]
    mixed = (jnp.arange(size, dtype=jnp.uint32) + salt * 7919) * jnp.uint32(2654435761)
    numbers = (mixed >> 16).astype(jnp.float32) / 32768 - 1
    return jnp.zeros(shape, dtype).at[-scratch:].set(numbers.reshape(scratch, *shape[1:]).astype(dtype))


def check_held(params) -> None:
    """Raises UsageError for an array that holds no numbers: traced, or deleted by a jitted function that reused its memory."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        traced = isinstance(leaf, jax.core.Tracer)
        if traced or isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise UsageError(f"the weights' {jax.tree_util.keystr(path)} is {'traced by jax' if traced else 'deleted: it was donated to a jitted function'}; "
                             "give update_params arrays that hold the weights", "params")


@dataclasses.dataclass
class Step:
    """A step on its way: device arrays that are not read yet."""

    plan: Plan
    hidden: jax.Array
    logits: jax.Array
    drawn: Drawn | None = None
    features: Features | None = None
    scored: list[tuple[int, int, int, Drawn]] = dataclasses.field(default_factory=list)  # (work, position, rows, logprobs)


class Runner:
    """Holds weights and cache on the device and runs steps in order. Not thread-safe: one engine owns it.

    `origin` is what its maker calls the weights; it changes in one assignment with them. `unproven` names what the start-up proof found to depend on the batch and could not mend; nothing is proven with facts None.
    """

    def __init__(self, cfg: ModelConfig, params, config: EngineConfig, kernels: Kernels, compile_cache_dir: Path | None = None,
                 facts: Facts | None = None, origin=None):
        self.cfg, self.config, self.kernels = cfg, config, kernels
        self.take(params, origin)
        self._cache_dir, self._compiled = compile_cache_dir, set()
        self._dtype = params.embedding.dtype
        self.renew()
        self._programs = programs(cfg, kernels)
        self._safer: dict[tuple[int, bool], Programs] = {}  # of steps for which the proof asked for safer forms
        about = [repr(cfg), repr(dataclasses.replace(config, seed=0)), str(self._dtype), kernels.name, repr(kernels.forms)]
        self.proof = facts and proofs.Proof(facts, about)
        self.unproven: list[str] = []

    def take(self, params, origin) -> None:
        """Serves these weights from now on. Arrays of the host are copied to the device; UsageError for what is none, or is no more."""
        check_held(params)
        if not all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):  # copied: the caller may write in theirs
            params = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.array(leaf), params)
        self.params, self.origin = params, origin

    def renew(self) -> None:
        """Empty pages and no last tokens: where a step failed, the ones before may be deleted, or wait for what will not come."""
        self.cache = self.last_token = None  # gone before there are new ones, so that these find room
        self.cache = self._empty_cache()
        self.last_token = jnp.zeros(self.config.max_num_seqs, jnp.int32)

    def _empty_cache(self):
        """Pages that hold nothing, and the scratch pages of the proof."""
        with own_configuration(), compilation_cache(self._cache_dir):
            cache = jax.eval_shape(lambda: decoder.empty_cache(self.cfg, self.config.cache_pages, self.config.page_size, self._dtype))
            leaves, tree = jax.tree.flatten(cache)
            return jax.tree.unflatten(tree, [_pages(a.shape, a.dtype, SCRATCH_PAGES, i) for i, a in enumerate(leaves)])

    def forward(self, plan: Plan) -> Step:
        """The step, dispatched; nothing is waited for, but for the proof of a program that runs for the first time."""
        batch = batches.build(plan, self.config)
        self._prove_forward(len(batch.tokens), plan.decode)
        hidden, logits = self._run_forward(batch, plan.decode)
        step = Step(plan, hidden, logits)
        with self._configured("score"):
            self._score_prompts(step)
        return step

    def _run_forward(self, batch: Batch, decode: bool):
        rows = len(batch.tokens)
        with self._configured("forward", rows, decode):
            hidden, logits, self.cache = self._programs_of(rows, decode).forward(self.params, self.cache, self.last_token, batch)
            return hidden, logits

    def draw(self, step: Step) -> None:
        """The tokens of the step's sequences, dispatched."""
        inputs, step.features = batches.sampling_inputs(step.plan.work, step.logits.shape[0], self.cfg.vocab_size, self.config)
        self._prove_draw(step.logits.shape[0], step.features)
        step.drawn = self._run_draw(step.logits, inputs, step.features)
        for leaf in jax.tree.leaves(step.drawn):
            leaf.copy_to_host_async()

    def _run_draw(self, logits, inputs, features: Features) -> Drawn:
        with self._configured("draw", logits.shape, features):
            drawn, self.last_token = self._programs.draw(logits, self.last_token, inputs, features=features)
            return drawn

    # -- the start-up proof ------------------------------------------------------------------------------------------

    def _programs_of(self, rows: int, decode: bool) -> Programs:
        return self._safer.get((rows, decode), self._programs)

    def _prove_forward(self, rows: int, decode: bool) -> None:
        """The program of a step has the bits of those before it: by the next safer forms if need be, or `unproven` says so."""
        def run(program) -> proofs.Bits:
            batch, places = proofs.forward_batch(*program, self.config, self.cfg.vocab_size)
            _, logits = self._run_forward(batch, program[1])
            return proofs.bits_of([np.asarray(logits)], places)

        kernels = self.kernels
        while self.proof and self.proof.differing("forward", (rows, decode), run):
            safer = kernels.safer(rows)
            if safer is None:
                return self._not_proven(f"{'decode' if decode else 'prefill'} steps of {rows} tokens", kernels, rows)
            kernels = safer
            self._compiled.discard(("forward", rows, decode))
            self._safer[rows, decode] = programs(self.cfg, kernels)
            log.info("the start-up proof takes safer forms for %d rows", rows)

    def _prove_draw(self, rows: int, features: Features) -> None:
        def run(rows) -> proofs.Bits:
            logits, inputs, places = proofs.draw_inputs(rows, features, self.cfg.vocab_size, self.config)
            return proofs.bits_of([np.asarray(leaf) for leaf in jax.tree.leaves(self._run_draw(jnp.asarray(logits), inputs, features))], places)

        if self.proof and self.proof.differing(features, rows, run):
            self._not_proven(f"draws of {rows} rows", self.kernels, rows)

    def _not_proven(self, what: str, kernels: Kernels, rows: int) -> None:
        with own_configuration():
            sums = probe.differing(kernels, decoder.product_shapes(self.cfg), self._dtype, rows)
        said = f"{what} ({', '.join(sums) or 'no sum alone: what XLA fuses around them'})"
        if said not in self.unproven:
            self.unproven.append(said)
            log.warning("NOT REPRODUCIBLE: the bits of %s depend on the batch on this machine", said)

    def read(self, step: Step) -> tuple[Drawn, list[tuple[int, int, int, Drawn]]]:
        """What the step drew and scored, as numpy, waited for."""
        return jax.tree.map(np.asarray, step.drawn), [(*at, jax.tree.map(np.asarray, d)) for *at, d in step.scored]

    def _score_prompts(self, step: Step) -> None:
        """Scores each prompt token that the step's positions predict, for the requests that want prompt_logprobs."""
        at = 0
        for i, work in enumerate(step.plan.work):
            request = work.sequence.request
            wanted = request.params.prompt_logprobs
            if wanted is not None:
                top = batches._top_shape(wanted, self.cfg.vocab_size, self.config)
                targets = request.prompt[work.start + 1:work.start + work.count + 1]
                for first in range(0, len(targets), SCORE_ROWS):
                    part = targets[first:first + SCORE_ROWS]
                    rows, ids = np.full(SCORE_ROWS, at, np.int32), np.zeros(SCORE_ROWS, np.int32)
                    rows[:len(part)] = at + first + np.arange(len(part))
                    ids[:len(part)] = part
                    drawn = self._programs.score(self.params, step.hidden, rows, ids, top=top)
                    step.scored.append((i, work.start + first, len(part), drawn))
            at += work.count

    @contextlib.contextmanager
    def _configured(self, *program):
        """jax's configuration for running `program`, with the compilation cache at hand if it has not been compiled yet."""
        with own_configuration(), contextlib.nullcontext() if program in self._compiled else compilation_cache(self._cache_dir):
            yield
        self._compiled.add(program)

    def warmup(self) -> int:
        """Compiles, and proves, forward and greedy and random draws for every shape; the number of programs."""
        shapes = [(n, True) for n in batches.decode_buckets(self.config)] + [(n, False) for n in batches.prefill_buckets(self.config)]
        for tokens, decode in shapes:
            self._prove_forward(tokens, decode)
            batch = batches.padding(tokens, decode, self.config)
            _, logits = self._run_forward(batch, decode)
            for features in (Features(), Features(random=True), Features(random=True, truncated=True)):
                self._prove_draw(logits.shape[0], features)
                inputs, _ = batches.sampling_inputs((), logits.shape[0], self.cfg.vocab_size, self.config)
                drawn = self._run_draw(logits, inputs, features)
        jax.block_until_ready(drawn)
        return sum(self.compiled_programs().values())

    def compiled_programs(self) -> dict[str, int]:
        """How many programs each of the three has been compiled to."""
        return {field.name: sum(getattr(p, field.name)._cache_size() for p in (self._programs, *self._safer.values()))
                for field in dataclasses.fields(Programs)}

    def close(self) -> None:
        """Gives the device memory of cache, weights and programs back."""
        self.params = self.cache = self.last_token = None
        self._programs, self._safer = programs(self.cfg, self.kernels), {}
