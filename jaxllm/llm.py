"""The front door in Python: `LLM(model).generate(prompts, sampling_params)`.

    from jaxllm import LLM, SamplingParams
    llm = LLM("builtin:tales")
    print(llm.generate("Once upon a time", SamplingParams(max_tokens=50))[0].outputs[0].text)
"""
import dataclasses
import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import jax

from jaxllm import fingerprint as fingerprints
from jaxllm import machine
from jaxllm.answers import Answer
from jaxllm.config import EngineConfig
from jaxllm.engine.cache import cache_bytes, plan_cache
from jaxllm.engine.engine import Engine
from jaxllm.engine.request import Request, derived_seed
from jaxllm.engine.runner import Runner, compilation_cache, own_configuration
from jaxllm.errors import UnsupportedError, UsageError, about
from jaxllm.fields import known_ids
from jaxllm.loading import load_model, own_sampling, shapes
from jaxllm.models.decoder import product_shapes
from jaxllm.outputs import RequestOutput
from jaxllm.prompts import in_tokens
from jaxllm.sampling_params import SamplingParams
from jaxllm.text.chat import read_date
from jaxllm.text.tokenizer import load_tokenizer
from pallas_kernels import dispatch
from pallas_kernels.reference import ASSUMED

log = logging.getLogger("jaxllm")

Prompt = str | dict | Sequence[int]
OnDelta = Callable[[RequestOutput, int, str], None]  # (the request so far, choice, new text)

DEFAULTS = {"cpu": {"max_num_seqs": 64, "max_num_batched_tokens": 512}, "gpu": {"max_num_seqs": 256, "max_num_batched_tokens": 8192}}


class LLM:
    """A model, its tokenizer and an engine. Any thread may call: calls that come together run together, each as if alone.

    model: a folder in Hugging Face layout, a Hugging Face id, or "builtin:tales". dtype "auto" is the checkpoint's own,
    else a name ("bfloat16", "half") or a NumPy or JAX dtype.
    `close` or leaving a `with` block frees the device.
    params: its weights, as `jaxllm.load_params` returns or another LLM's `.params`; then none are read. reproducible True: each
    program proves before it serves that a row's bits do not depend on the batch, or `unproven` and every answer say so; "strict":
    all programs are compiled and proven now, and UnsupportedError is raised if one fails; False: a request's bits may depend on its
    batch, for what speed `jaxllm bench reproducible` shows. portable: sums in the order that the libraries of all processors seen
    so far have, float32 and float16 on a CPU alone (docs/reproducibility.md says what it costs).
    max_model_len None: the model's, or what the cache holds. kv_cache_memory_bytes None: 1 GiB on a CPU, on a GPU what
    gpu_memory_utilization leaves. compile_cache_dir: where compiled programs are kept between processes; None: nowhere, unless
    JAX itself is configured to. What was found out about this machine is kept there too, or with None in ~/.cache/jaxllm; "off": nothing
    is kept. The user's random state and JAX configuration are left as they are.
    """

    def __init__(self, model: str, *, dtype="auto", seed: int = 0, max_model_len: int | None = None,
                 max_num_seqs: int | None = None, max_num_batched_tokens: int | None = None, enable_prefix_caching: bool = True,
                 kv_cache_memory_bytes: int | None = None, gpu_memory_utilization: float = 0.9, load_format: str = "auto",
                 pt_load_map_location="cpu", tokenizer: str | None = None, skip_tokenizer_init: bool = False,
                 hf_overrides: dict | None = None, page_size: int = 16, max_logprobs: int = 20, kernels: str = "auto",
                 reproducible: bool | str = True, portable: bool = False, params=None, compile_cache_dir: str | Path | None = None):
        _check_options(seed=seed, max_model_len=max_model_len, max_num_seqs=max_num_seqs, page_size=page_size,
                       max_num_batched_tokens=max_num_batched_tokens, gpu_memory_utilization=gpu_memory_utilization,
                       kv_cache_memory_bytes=kv_cache_memory_bytes, max_logprobs=max_logprobs)
        if reproducible not in (True, False, "strict"):
            raise UsageError(f"reproducible={reproducible!r}; it must be True, False or \"strict\"", "reproducible")
        self.model = str(model)
        self._loaded = load_model(self.model, dtype=dtype, load_format=load_format, hf_overrides=hf_overrides,
                                  max_model_len=max_model_len, pt_load_map_location=pt_load_map_location, params=params)
        cfg, params = self._loaded.cfg, self._loaded.params
        self._loaded = dataclasses.replace(self._loaded, params=None)  # the runner holds them, and lets them go
        self.tokenizer = None if skip_tokenizer_init else load_tokenizer(tokenizer or self._loaded.path)
        device = jax.devices()[0]
        defaults = DEFAULTS.get(device.platform, DEFAULTS["gpu"])
        tokens = max_num_batched_tokens or max(defaults["max_num_batched_tokens"], max_num_seqs or 0)
        seqs = max_num_seqs or min(defaults["max_num_seqs"], tokens)  # of two options that conflict, the engine complains
        self._dtype = weight = params.embedding.dtype
        num_pages, length = plan_cache(
            cfg, weight.itemsize, kv_cache_memory_bytes or cache_bytes(device, gpu_memory_utilization),
            max_model_len=max_model_len, max_num_seqs=seqs, page_size=page_size)
        if max_model_len is None and length < cfg.max_position:
            log.warning("max_model_len is %d: the KV cache holds no more (the model allows %d)", length, cfg.max_position)
        self.config = EngineConfig(
            max_model_len=length, max_num_seqs=seqs, num_pages=num_pages, page_size=page_size, seed=seed,
            max_num_batched_tokens=tokens, enable_prefix_caching=enable_prefix_caching, max_logprobs=max_logprobs)
        self._cache_dir = Path(compile_cache_dir).expanduser() if compile_cache_dir not in (None, "off") else None
        facts = machine.facts(compile_cache_dir)
        try:
            self.kernels = dispatch.choose(device.platform, getattr(device, "compute_capability", None), cfg.head_dim, weight,
                                           page_size, want=kernels, reproducible=bool(reproducible),
                                           forms=self._forms(device, str(weight), bool(reproducible), portable, facts))
        except ValueError as e:
            raise UsageError(str(e), "kernels") from e
        log.info("kernels: %s (%s)", self.kernels.name, "; ".join(self.kernels.reasons))
        self._runner = Runner(cfg, params, self.config, self.kernels, compile_cache_dir=self._cache_dir,
                              facts=facts if reproducible else None, origin=fingerprints.Origin(self._loaded.files))
        self._reproducible = bool(reproducible)
        self._engine = Engine(self._runner, self.config)
        if reproducible == "strict":
            self.warmup()
            if self.unproven:
                self.close()
                raise UnsupportedError(f"reproducible=\"strict\", and on this machine the bits of {'; '.join(self.unproven)} depend on the "
                                       "batch; use another dtype or kernels, or reproducible=True to run with that said in every answer")
        self._named: tuple[fingerprints.Origin | None, dict[str, str]] = None, {}  # weights, and the parts of their fingerprint
        self._calls = itertools.count()

    def _forms(self, device, dtype: str, reproducible: bool, portable: bool, facts: machine.Facts):
        """The forms of the model's products on a CPU; assumed where nothing is promised, and on a card, whose kernels have none."""
        if portable and (device.platform != "cpu" or dtype == "bfloat16" or not reproducible):
            raise UsageError(f"portable=True with dtype {dtype} on {device.platform}, reproducible={reproducible}; it needs float32 or "
                             "float16 on a CPU, and a reproducible engine", "portable")
        if device.platform != "cpu" or not reproducible:
            return ASSUMED
        with own_configuration(), compilation_cache(self._cache_dir):
            found = machine.forms(product_shapes(self.model_config), dtype, portable, facts)
        if portable and not found.proven:
            raise UnsupportedError(f"portable=True, and this machine does not have the order {found.law} for the shapes of this model in "
                                   f"{dtype}; leave portable out")
        return found

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def model_config(self):
        """The model as data: a jaxllm.config.ModelConfig."""
        return self._loaded.cfg

    @property
    def params(self):
        """The weights, the pytree that `jaxllm.models.decoder.forward` takes."""
        return self._runner.params

    @cached_property
    def _eos(self) -> tuple[int, ...]:
        """The tokens that end a text: those of config.json, generation_config.json and the tokenizer."""
        own, cfg = self.tokenizer and self.tokenizer.eos_token_id, self.model_config
        return tuple(dict.fromkeys(cfg.eos_token_ids + known_ids(own, "the end token", cfg.vocab_size, "the tokenizer")))

    def get_tokenizer(self):
        """The tokenizer; raises UsageError when it was left out."""
        if self.tokenizer is None:
            raise UsageError("this LLM was made with skip_tokenizer_init=True; give prompt_token_ids and detokenize=False", "prompt")
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for; SamplingParams() where it is silent."""
        with about(self._loaded.path / "generation_config.json"):
            return SamplingParams(**self.own_sampling())

    def own_sampling(self) -> dict:
        """The fields of SamplingParams that the model's generation_config.json sets, to be laid under a caller's own."""
        return own_sampling(self._loaded.generation_config)

    @property
    def fingerprint_parts(self) -> dict[str, str]:
        """What equal bits depend on, by name: versions, processor or card, dtype, kernels, order of sums, weights, tokenizer."""
        return self._parts_now(self._lasting_parts())

    def _parts_now(self, lasting: dict[str, str]) -> dict[str, str]:
        said = "as asked, no" if not self._reproducible else "no: " + "; ".join(self.unproven) if self.unproven else "yes"
        return lasting | {"reproducible": said}

    def _lasting_parts(self) -> dict[str, str]:
        """The parts that stay as long as the weights do; computed once for these."""
        origin, params = self._runner.origin, self.params
        known, parts = self._named
        if known is origin:
            return parts
        parts = fingerprints.parts(dtype=str(self._dtype), kernels=self.kernels, model=fingerprints.config_hash(self.model_config),
                                   weights=origin.hash(params, self._cache_dir and self._cache_dir / "weights.json"), reproducible="",
                                   tokenizer=self.tokenizer.fingerprint() if self.tokenizer else "none")
        self._named = origin, parts
        return parts

    @property
    def reproducible(self) -> bool:
        """Whether bits do not depend on the batch, as far as every program that has run so far has shown."""
        return self._reproducible and not self.unproven

    @property
    def unproven(self) -> list[str]:
        """What the start-up proof found to depend on the batch, and could not mend: nothing, on a sound machine."""
        return self._runner.unproven

    @property
    def proof_comparisons(self) -> int:
        """Rows of logits and draws that the start-up proof has compared in this process; 0 where all was proven before."""
        return self._runner.proof.comparisons if self._runner.proof else 0

    @property
    def system_fingerprint(self) -> str:
        """Equal fingerprints promise equal bits."""
        return fingerprints.fingerprint(self.fingerprint_parts)

    # -- requests ---------------------------------------------------------------------------------------------------

    def generate(self, prompts: Prompt | Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
                 *, use_tqdm: bool = False, on_delta: OnDelta | None = None) -> list[RequestOutput]:
        """One RequestOutput for each prompt, in the order given.

        A prompt is a text, {"prompt": text}, {"prompt_token_ids": ids}, or a list of these; sampling_params is one for all, one
        for each, or None for the model's own. on_delta is called with each piece of new text as it comes. use_tqdm shows
        progress on stderr. Raises UsageError before any work if one of the prompts cannot run. A request that cannot go on ends with
        the finish_reason "error" and says why, alone. on_delta may not call generate itself; another thread may meanwhile.
        """
        tokens = in_tokens(prompts, lambda text: self.get_tokenizer().encode(text), self.model_config.vocab_size)
        return self._run(tokens, sampling_params, use_tqdm, on_delta)

    def chat(self, messages: Sequence[dict] | Sequence[Sequence[dict]], sampling_params=None, *, use_tqdm: bool = False,
             on_delta: OnDelta | None = None, chat_template: str | None = None, add_generation_prompt: bool = True,
             continue_final_message: bool | str = False, tools: list[dict] | None = None,
             chat_template_kwargs: dict | None = None) -> list[RequestOutput]:
        """One RequestOutput for each conversation; `messages` is one list of {"role", "content"} or a list of such lists.

        Templates render as in transformers (docs/checkpoints.md). chat_template_kwargs reach the template, `documents` among them;
        "chat_date" is what a template that reads the date is told is now (ISO 8601 text; default: the clock). The output's chat_date
        says what it was.
        """
        if not messages or not isinstance(messages, (list, tuple)):
            raise UsageError("messages is empty or no list; give at least one message", "messages")
        conversations = messages if isinstance(messages[0], (list, tuple)) else [messages]
        options = dict(chat_template=chat_template, add_generation_prompt=add_generation_prompt, tools=tools,
                       continue_final_message=continue_final_message) | (chat_template_kwargs or {})
        options["chat_date"] = read_date(options.get("chat_date"))  # one for all conversations
        prompts = []
        for index, conversation in enumerate(conversations):
            with about(f"messages[{index}]" if len(conversations) > 1 else None, index):
                prompts.append(self.get_tokenizer().chat_prompt(conversation, **options))
        outputs = self._run([(None, ids) for ids, _ in prompts], sampling_params, use_tqdm, on_delta)
        for output, (_, date) in zip(outputs, prompts, strict=True):
            output.chat_date = date
        return outputs

    def _request(self, id_: str, identity: str, ids: list[int], params: SamplingParams) -> Request:
        cfg = self.model_config
        params.check_against(cfg.vocab_size, self.config.max_logprobs)
        if params.detokenize and self.tokenizer is None:
            params = dataclasses.replace(params, detokenize=False)
        longest = self.config.max_model_len
        eos = () if params.ignore_eos else self._eos
        return Request(
            id_, tuple(ids), params, params.seed if params.seed is not None else derived_seed(self.config.seed, identity),
            max_total=longest if params.max_tokens is None else min(longest, len(ids) + params.max_tokens),
            stop_ids=frozenset(eos) | frozenset(params.stop_token_ids),
            banned=tuple(self._bad_words(params.bad_words)) if params.bad_words else ())

    def _bad_words(self, words) -> Iterator[tuple[int, ...]]:
        """The token sequences of bad words, as they stand at the start of a text and after a space."""
        tokenizer = self.get_tokenizer()
        for word in words:
            plain = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
            spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
            if plain:
                yield plain
            if spaced and spaced != plain:
                yield spaced

    def _run(self, prompts, sampling_params, use_tqdm, on_delta) -> list[RequestOutput]:
        self._engine.ready()
        if self._calling():
            raise UsageError("generate or chat was called by the on_delta of a call to the same LLM; return from it first, or call from "
                             "another thread", "on_delta")
        params = self._params(sampling_params, len(prompts))
        self._lasting_parts()  # hashed before anything runs: what fails there costs no finished answer
        call = next(self._calls)
        lives: dict[str, Answer] = {}
        for index, ((text, ids), p) in enumerate(zip(prompts, params, strict=True)):
            with about(f"prompts[{index}]" if len(prompts) > 1 else None, index):
                request = self._request(f"{call}-{index}", str(index), ids, p)
                self._engine.check(request)
            lives[request.id] = Answer(request, text, self.tokenizer, self._eos)
        order = list(lives.values())
        show = None
        try:
            with self._engine.lock:  # once they run, nobody changes the weights
                inbox, parts = self._engine.add(*[live.request for live in order]), self._lasting_parts()
            if use_tqdm and order:
                from jaxllm.progress import Progress
                show = Progress(len(order))
            while lives:
                for event in self._engine.events(inbox):
                    live = lives.get(event.request_id)
                    if live is None:  # it had ended at a stop text
                        continue
                    delta = live.take(event)
                    if event.finish_reason is None and live.output.outputs[event.choice].finished():
                        self._engine.stop(event.request_id, event.choice)
                    if on_delta is not None:
                        on_delta(live.output, event.choice, delta)
                    if show is not None:
                        show.token(event)
                    if all(o.finished() for o in live.output.outputs):
                        live.output.finished = True
                        del lives[event.request_id]
                        if show is not None:
                            show.request()
        finally:
            self._engine.abort(lives)  # interrupted: nothing of this call stays behind
            if show is not None:
                show.close()
        fingerprint, reproducible = fingerprints.fingerprint(self._parts_now(parts)), self.reproducible
        for live in order:
            live.output.system_fingerprint, live.output.reproducible = fingerprint, reproducible
        return [live.output for live in order]

    def _calling(self) -> bool:
        """Whether this thread is inside a call already. Read off its stack, so that no interrupt can leave a wrong answer behind."""
        frame = inspect.currentframe().f_back.f_back
        while frame and not (frame.f_code is LLM._run.__code__ and frame.f_locals["self"] is self):
            frame = frame.f_back
        return frame is not None

    def _params(self, given, count: int) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given.clone()] * count  # a copy, since fields may have been changed, and may be while this runs
        if not isinstance(given, (list, tuple)) or not all(isinstance(each, SamplingParams) for each in given):
            raise UsageError(f"sampling_params is a {type(given).__name__}; it must be a SamplingParams or a list of them", "sampling_params")
        if len(given) != count:
            raise UsageError(f"{count} prompts and {len(given)} sampling_params; give one for all or one for each", "sampling_params")
        out = []
        for index, each in enumerate(given):
            with about(f"sampling_params[{index}]", index):
                out.append(each.clone())
        return out

    # -- housekeeping -----------------------------------------------------------------------------------------------

    def update_params(self, params, version: str | None = None) -> None:
        """Serves other weights of the same shapes from now on, without a recompile; what was cached of the old ones is forgotten.

        version: what the fingerprint calls them. Without one they are hashed, which reads all of them on the host. Arrays of numpy
        are copied to the device. UsageError while requests run.
        """
        if self.params is None:
            raise UsageError("this LLM is closed; make a new one")
        try:
            same = shapes(params) == shapes(self.params)
        except (AttributeError, TypeError) as e:
            raise UsageError(f"params is not a pytree of arrays: {e}", "params") from e
        if not same:
            raise UsageError("params differs in structure, shapes or dtypes from this LLM's; make a new LLM for another model", "params")
        self._engine.update_params(params, fingerprints.Origin(version=version))

    def reset_prefix_cache(self) -> None:
        """Later requests compute their prompts afresh."""
        self._engine.reset_prefix_cache()

    def warmup(self) -> int:
        """Compiles the programs of every step shape; the number of programs there are now."""
        return self._engine.warmup()

    def close(self) -> None:
        """Frees the device memory of weights and cache. The LLM cannot be used afterwards; closing twice is fine.

        Calls of other threads end with an EndedError.
        """
        self._engine.close()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def _check_options(**options) -> None:
    for name, value in options.items():
        if value is None:
            continue
        real = name == "gpu_memory_utilization"
        if isinstance(value, bool) or not isinstance(value, (int, float) if real else int):
            raise UsageError(f"{name}={value!r}; it must be {'a number' if real else 'an integer'}", name)
    if not 0 < options["gpu_memory_utilization"] <= 1:
        raise UsageError(f"gpu_memory_utilization={options['gpu_memory_utilization']}; it must be more than 0 and at most 1", "gpu_memory_utilization")
    if not -2**63 <= options["seed"] < 2**63:
        raise UsageError(f"seed={options['seed']}; it must fit in 64 bits", "seed")
    if options["page_size"] not in (16, 32, 64, 128):
        raise UsageError(f"page_size={options['page_size']}; it must be 16, 32, 64 or 128", "page_size")
    for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory_bytes"):
        if options[name] is not None and options[name] < 1:
            raise UsageError(f"{name}={options[name]}; it must be at least 1", name)
