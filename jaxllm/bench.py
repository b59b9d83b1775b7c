"""Speed and memory of this machine, measured: never a test, always with the machine's own ceiling from the same run."""
import itertools
import os
import resource
import statistics
import subprocess
import sys
import threading
import time

import numpy as np

from jaxllm.loading import weight_bytes
from jaxllm.sampling_params import SamplingParams

GB = 1e9
PROBE_BYTES = 512 << 20  # beyond every cache


def read_bandwidth(threads: int, passes: int = 5) -> float:
    """Bytes per second that `threads` cores read from memory together: the median of sums over fresh arrays."""
    parts = [np.ones(PROBE_BYTES // threads // 4, np.float32) for _ in range(threads)]
    rates = []
    for _ in range(passes):
        workers = [threading.Thread(target=np.dot, args=(part, part)) for part in parts]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        rates.append(PROBE_BYTES / (time.perf_counter() - start))
    return statistics.median(rates)


def machine_bandwidth() -> float:
    """`read_bandwidth` of all usable cores, in a process of its own, so that its arrays do not count as ours."""
    code = f"from jaxllm.bench import read_bandwidth; print(read_bandwidth({usable_cores()}))"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _prompts(count: int, length: int, vocab: int, salt: int) -> list[dict]:
    """Random prompts, new for each salt, so that no run finds the prefix of another."""
    rng = np.random.default_rng([salt, count, length])
    return [{"prompt_token_ids": rng.integers(0, vocab, length).tolist()} for _ in range(count)]


def _seconds(llm, count: int, input_len: int, tokens: int, salt: int) -> float:
    """Seconds that `count` greedy requests of `tokens` tokens each take together."""
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
    prompts = _prompts(count, input_len, llm.model_config.vocab_size, salt)
    start = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - start


def _rounded(report: dict) -> dict:
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in report.items()}


def generation(llm, what: str, *, count: int, input_len: int, output_len: int, runs: int) -> dict:
    """Rates of `count` greedy requests: prefill, decode and both together, medians over runs, beside the memory bandwidth.

    Decode is what a run with all tokens takes beyond a run with one token each.
    """
    salt = itertools.count()

    def seconds(tokens: int) -> float:
        return _seconds(llm, count, input_len, tokens, next(salt))

    llm.system_fingerprint  # hashes the weights once, outside the clock
    start = time.perf_counter()
    seconds(output_len)
    first_run = time.perf_counter() - start
    seconds(1)
    before = machine_bandwidth()
    first = statistics.median(seconds(1) for _ in range(runs))
    full = statistics.median(seconds(output_len) for _ in range(runs))
    bandwidth = statistics.median([before, machine_bandwidth()])
    steps = max(output_len - 1, 1)
    step_s = (full - first) / steps if output_len > 1 else None
    weights = weight_bytes(llm.params)
    report = {
        "bench": what, "model": llm.model, "dtype": str(llm.params.embedding.dtype), "kernels": llm.kernels.name,
        "requests": count, "input_len": input_len, "output_len": output_len, "runs": runs,
        "first_run_s": first_run, "first_token_s": first, "total_s": full,
        "prefill_tokens_per_s": count * input_len / first, "output_tokens_per_s": count * output_len / full,
        "decode_step_ms": step_s and step_s * 1e3, "decode_tokens_per_s": step_s and count / step_s,
        "weight_bytes": weights, "machine_read_gb_per_s": bandwidth / GB,
        "decode_weight_gb_per_s": step_s and weights / step_s / GB,
        "decode_share_of_bandwidth": step_s and weights / step_s / bandwidth,
        "peak_host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "kv_cache_bytes": sum(a.nbytes for a in (*llm._runner.cache.k, *llm._runner.cache.v)),
        "compiled_programs": llm._runner.compiled_programs(),
    }
    return _rounded(report)


def reproducibility(llm, fast, *, input_len: int, output_len: int, rows: tuple[int, ...], runs: int) -> dict:
    """What equal bits cost: the rates of `llm` beside those of `fast`, the same model made with reproducible=False.

    Both run in turn, so that a machine that drifts slows both; medians over runs. A cost is the share of fast's rate that is lost.
    """
    salt, report = itertools.count(), {
        "bench": "reproducible", "model": llm.model, "dtype": str(llm.params.embedding.dtype),
        "kernels": llm.kernels.name, "fast_kernels": fast.kernels.name, "input_len": input_len, "output_len": output_len, "runs": runs}
    rates = {}
    for count in rows:
        taken = {tokens: {"": [], "fast_": []} for tokens in (1, output_len)}
        for run in range(runs + 1):
            for tokens, seconds in taken.items():
                for name, engine in (("", llm), ("fast_", fast)):
                    seconds[name].append(_seconds(engine, count, input_len, tokens, next(salt)))
        for name in ("", "fast_"):
            first, full = (statistics.median(taken[tokens][name][1:]) for tokens in (1, output_len))  # the first run compiles
            rates[f"{name}prefill_{count}"] = count * input_len / first
            rates[f"{name}decode_{count}"] = count * (output_len - 1) / (full - first)
    for what in [f"{kind}_{count}" for count in rows for kind in ("prefill", "decode")]:
        report |= {f"{what}_tokens_per_s": rates[what], f"{what}_fast_tokens_per_s": rates[f"fast_{what}"],
                   f"{what}_cost": 1 - rates[what] / rates[f"fast_{what}"]}
    return _rounded(report)


def table(report: dict) -> str:
    """A report for the eye."""
    return "\n".join(f"{name:28} {value:,}" if isinstance(value, (int, float)) else f"{name:28} {value}" for name, value in report.items())
