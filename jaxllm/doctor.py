"""What this machine promises, shown on the machine itself: `jaxllm doctor`."""
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import jax

from jaxllm import functional, machine
from jaxllm.fingerprint import package_version
from jaxllm.llm import LLM
from jaxllm.sampling_params import SamplingParams

SECONDS = 10.0   # of the measurement of what the promise costs, all dtypes together
LIMITS = {"max_model_len": 256, "max_num_seqs": 8, "max_num_batched_tokens": 64}
TOKENS = 12      # drawn by each request


def examine(model: str, dtypes: Iterable[str], *, load_format: str = "auto", cache_dir=None, portable: bool = True) -> dict:
    """A report of the machine and of each dtype: {"proven": all that is promised held, "dtypes": {name: levels}, ...}.

    R1: a new process gives the same bits; R2: whole logit rows and logprobs alone and in company, in two orders, with a warm cache
    and without; R5: the engine's logprobs and the plain function's. portable: whether this CPU has the recorded float32 bits (R6).
    """
    first = jax.devices()[0]
    report = {"jaxllm": package_version(), **machine.surroundings(), "devices": [str(d) for d in jax.devices()], "model": model,
              "dtypes": {}}
    del report["code"]
    dtypes = list(dtypes)
    for dtype in dtypes:
        report["dtypes"][dtype] = _levels(model, dtype, load_format, cache_dir, SECONDS / len(dtypes))
    if portable and first.platform == "cpu":
        from jaxllm import golden
        report["R6"] = golden.compare(cache_dir)
    folder = Path(machine.DEFAULT_FOLDER if cache_dir in (None, "off") else cache_dir).expanduser()
    report["cache"] = {"folder": str(folder), "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())}
    report["proven"] = all(levels["R1"] and levels["R2"] and levels["R5"] is not False and not levels["unproven"]
                           for levels in report["dtypes"].values())
    return report


def _requests(vocab: int) -> list[tuple[dict, SamplingParams]]:
    """Greedy requests and random ones: short, longer than a split, with a common prefix."""
    shared = [(i * 31 + 5) % vocab for i in range(140)]
    prompts = [[3 % vocab], shared, shared[:20], [(i * 7) % vocab for i in range(33)]] * 2
    draws = [{"temperature": 0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}]
    common = dict(max_tokens=TOKENS, logprobs=1, ignore_eos=True, logits_digest=True, detokenize=False)
    return [({"prompt_token_ids": p}, SamplingParams(**draws[i // 4], **common, seed=i)) for i, p in enumerate(prompts)]


def _bits(output) -> list:
    return [(o.token_ids, o.logits_digests, [row[t].logprob.hex() for t, row in zip(o.token_ids, o.logprobs)]) for o in output.outputs]


def _answers(llm, requests, size: int) -> list:
    return [_bits(o) for start in range(0, len(requests), size)
            for o in llm.generate([p for p, _ in requests[start:start + size]], [s for _, s in requests[start:start + size]])]


def _levels(model: str, dtype: str, load_format: str, cache_dir, seconds: float) -> dict:
    with LLM(model, dtype=dtype, load_format=load_format, compile_cache_dir=cache_dir, skip_tokenizer_init=True, **LIMITS) as llm:
        requests = _requests(llm.model_config.vocab_size)
        together = _answers(llm, requests, len(requests))
        others = {"in threes, reversed": _answers(llm, requests[::-1], 3)[::-1]}
        llm.reset_prefix_cache()
        others["alone"] = _answers(llm, requests, 1)
        differ = [f"{way}: request {i}" for way, answers in others.items() for i, (a, b) in enumerate(zip(together, answers)) if a != b]
        twin = _in_new_process(model, dtype, load_format, cache_dir)
        rows = sum(len(tokens) for answer in together for tokens, _, _ in answer)
        cost = _cost(llm, model, dtype, load_format, cache_dir, seconds)
        return {"kernels": llm.kernels.name, "reasons": list(llm.kernels.reasons), "sums": llm.kernels.sums,
                "forms": {f"{k}x{n}": dict(table) for (k, n), table in llm.kernels.forms.products}, "unproven": list(llm.unproven),
                "R1": twin == json.loads(json.dumps(together)), "R2": not differ, "R2_differs": differ,
                "R5": _plain_agrees(llm, requests, together), "comparisons": rows * (len(others) + 1) + llm.proof_comparisons,
                "cost": cost}


def _plain_agrees(llm, requests, answers) -> bool | None:
    """R5, on a CPU: on a card the plain function has the engine's bits with the engine's own kernels, which is not tried here."""
    if jax.default_backend() != "cpu":
        return None
    for (prompt, _), answer in list(zip(requests, answers))[:2]:
        tokens, _, logprobs = answer[0]
        plain = functional.logprobs(llm, prompt["prompt_token_ids"] + tokens)
        if [float(x).hex() for x in plain[-len(tokens):]] != logprobs:
            return False
    return True


def _in_new_process(model, dtype, load_format, cache_dir) -> list:
    code = ("import json, sys; from jaxllm import doctor; "
            "print(json.dumps(doctor.answers(*json.loads(sys.argv[1]))))")
    arguments = json.dumps([model, dtype, load_format, None if cache_dir is None else str(cache_dir), LIMITS])
    done = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else [done.stderr[-500:]]


def answers(model: str, dtype: str, load_format: str, cache_dir, limits: dict) -> list:
    """The bits of the requests, together: what another process must give."""
    with LLM(model, dtype=dtype, load_format=load_format, compile_cache_dir=cache_dir, skip_tokenizer_init=True, **limits) as llm:
        requests = _requests(llm.model_config.vocab_size)
        return _answers(llm, requests, len(requests))


def _cost(llm, model, dtype, load_format, cache_dir, seconds: float) -> float | None:
    """The share of `--fast`'s tokens per second that the promise costs here, both in turn for so many seconds; negative: it is faster."""
    greedy = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    requests = [(p, greedy) for p, _ in _requests(llm.model_config.vocab_size)]
    with LLM(model, dtype=dtype, load_format=load_format, params=llm.params, reproducible=False, compile_cache_dir=cache_dir,
             skip_tokenizer_init=True, **LIMITS) as fast:
        best = {}
        begin = time.perf_counter()
        for turn in range(1000):
            for engine in (llm, fast):
                engine.reset_prefix_cache()
                start = time.perf_counter()
                engine.generate([p for p, _ in requests], [s for _, s in requests])
                if turn:  # the first compiles
                    best[engine] = min(best.get(engine, 1e9), time.perf_counter() - start)
            begin = time.perf_counter() if not turn else begin
            if turn > 1 and time.perf_counter() - begin > seconds:
                break
        return 1 - best[fast] / best[llm]


def render(report: dict) -> str:
    """The report on one screen."""
    lines = [f"jaxllm {report['jaxllm']}, jax {report['jax']}, jaxlib {report['jaxlib']}{', XLA_FLAGS ' + report['xla_flags'] if report['xla_flags'] else ''}",
             f"device     {report['device']} ({report['platform']}; {', '.join(report['devices'])})",
             f"model      {report['model']}", ""]
    said = {True: "proven", False: "FAILED", None: "not tried"}
    for dtype, levels in report["dtypes"].items():
        lines += [f"{dtype:10} R1 {said[levels['R1']]}, R2 {said[levels['R2']]}, R5 {said[levels['R5']]}: {levels['comparisons']} comparisons of whole rows",
                  f"{'':10} kernels {levels['kernels']}: {levels['sums']}",
                  f"{'':10} costs {levels['cost']:+.1%} of the speed of --fast"]
        lines += [f"{'':10} {fault}" for fault in [*levels["unproven"], *levels["R2_differs"][:5]]]
        forms = {}
        for shape, table in levels["forms"].items():
            forms.setdefault(" ".join(f"{name}<={rows}" for rows, name in table.items()), []).append(shape)
        lines += [f"{'':10}   {', '.join(shapes)}: {table}" for table, shapes in forms.items()]
    if "R6" in report:
        r6 = report["R6"]
        differ = ", ".join(r6["operations"]) or "none"
        lines += ["", f"R6         float32 with --portable, against {r6['made_on']}: {'the same bits' if r6['equal'] else 'OTHER bits'}; "
                      f"operations that differ: {differ}"]
    cache = report["cache"]
    lines += [f"cache      {cache['folder']}, {cache['bytes'] / 1e6:,.0f} MB", "",
              "all that is promised here is proven" if report["proven"] else "NOT PROVEN: see above; LLM(reproducible=\"strict\") refuses this machine"]
    return "\n".join(lines)
