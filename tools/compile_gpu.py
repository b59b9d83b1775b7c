"""Compiles every kernel and the engine's programs for an NVIDIA card on a machine that has none, and judges them.

    python tools/compile_gpu.py [--card h200|h100|a100|l4] [--model-shape llama3-8b|qwen2.5-0.5b|smollm2-135m ...] [--format json]
                                [--kernels-only | --programs-only] [--all-buckets] [--layers N] [--jobs N]

The engine's programs are those of jaxllm/engine/runner.py, with the shapes of an engine that has the card to itself and the
options an LLM has by default: `forward` for some of its decode and prefill buckets (all of them with --all-buckets), `draw`
for greedy rows, random rows and rows that want everything at once, `score` for prompt logprobs.

Reports for each program seconds, temporaries, aliased bytes and launches, with those of one layer by name; for each kernel
registers, spilled bytes and shared memory; of XLA's own kernels the most, each with --format json. A kernel that asks for more
shared memory than a block may have does not compile.
Exit status 1 on: a compile error, a spill, what ptxas calls a loss of performance, a donated buffer that is copied, a weight that is
copied or padded inside a step, more than 1 GiB of temporaries, an engine program that is not one command buffer, or a compiler
whose reports cannot be read.
"""
import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import compiler_log  # noqa: E402  beside this file

INSTALL = """The CUDA compiler is not installed. In an environment with jax (no GPU, driver or CUDA toolkit is needed):
    pip install --no-deps jax-cuda12-plugin==$JAX jax-cuda12-pjrt==$JAX nvidia-cuda-nvcc-cu12
with $JAX the version that `python -c "import jax; print(jax.__version__)"` prints."""

CARD = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152  shared_memory_per_core: {core_smem}
  threads_per_core_limit: 2048  core_count: {cores}  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}  l2_cache_size: {l2}  clock_rate_ghz: {clock}  device_memory_size: {memory}
  shared_memory_per_block_optin: {smem}  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 9 }}
device_description_str: "{name}"
"""
HOPPER = dict(core_smem=233472, cores=132, fpus=128, l2=62914560, clock=1.98, smem=232448, major=9, minor=0)
CARDS = {
    "h200": dict(name="NVIDIA H200", bandwidth=4800000000000, memory=150000000000, **HOPPER),
    "h100": dict(name="NVIDIA H100 80GB HBM3", bandwidth=3350000000000, memory=85000000000, **HOPPER),
    "a100": dict(name="NVIDIA A100-SXM4-80GB", bandwidth=2039000000000, memory=85000000000, core_smem=167936, cores=108, fpus=64,
                 l2=41943040, clock=1.41, smem=166912, major=8, minor=0),
    "l4": dict(name="NVIDIA L4", bandwidth=300000000000, memory=24000000000, core_smem=102400, cores=58, fpus=128, l2=50331648,
               clock=2.04, smem=101376, major=8, minor=9),
}
SHAPES = {  # width, mlp_width, heads, kv_heads, head_dim, layers, vocabulary, tied, qkv_bias
    "llama3-8b": (4096, 14336, 32, 8, 128, 32, 128256, False, False),
    "qwen2.5-0.5b": (896, 4864, 14, 2, 64, 24, 151936, True, True),
    "smollm2-135m": (576, 1536, 9, 3, 64, 30, 49152, True, False),
}
MOST_TEMPORARIES = 1 << 30
FEWEST_IN_GRAPH = 5  # launches: XLA makes no command buffer of fewer
ROWS, TOKENS, SCORED = (1, 64, 256), (16, 2048, 8192), 2048  # buckets compiled by default; hidden states that are scored
CONTEXT, PAGE = 8192, 16
# What ptxas says of every kernel, Mosaic's, Triton's and XLA's own, the compiler keeps to this log.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TF_CPP_MIN_LOG_LEVEL": "0",
               "TF_CPP_VMODULE": "subprocess_compilation=3"}


@contextlib.contextmanager
def captured(log: list):
    """Inside, what the process writes to its standard output and error is kept; it is appended to `log` at the end."""
    sys.stdout.flush(), sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])
            file.seek(0)
            log.append(file.read().decode(errors="replace"))


def mosaic_kernels(instructions, said: list[dict], known: dict) -> tuple[list[dict], dict[str, str]]:
    """What is known of each Mosaic kernel of a program, and {name of a call: kernel}. ValueError where ptxas said nothing of one.

    A process compiles a kernel once, so `known` keeps what was said of it, by its module; it leaves `said`.
    """
    from jax._src.interpreters import mlir
    from jax._src.lib import mosaic_gpu_dialect
    from jaxlib.mlir import ir
    calls, reports = {}, {}
    for instruction in instructions:
        module = compiler_log.mosaic_module(instruction)
        if module is None:
            continue
        key = hashlib.sha256(module).hexdigest()
        if key not in known:
            context = mlir.make_ir_context()
            mosaic_gpu_dialect.register_dialect(context)
            context.allow_unregistered_dialects = True
            with context:
                launch = compiler_log.launch_of(str(ir.Module.parse(module)))
            at = next((i for i, entry in enumerate(said) if entry["kernel"] == launch["kernel"]), None)
            if at is None:
                raise ValueError(f"ptxas says nothing of the kernel {launch['kernel']}")
            known[key] = said.pop(at) | launch
        calls[instruction.name], reports[key] = known[key]["kernel"], known[key]
    return list(reports.values()), calls


def dumped(folder: Path, *parts: str) -> str:
    """XLA's newest dump of the first of these names that there is: a pass that changes nothing writes nothing."""
    for part in parts:
        if files := sorted(folder.glob(f"*.{part}.txt"), key=lambda file: file.stat().st_mtime):
            return files[-1].read_text()
    raise ValueError(f"XLA dumped no {' and no '.join(parts)}")


def compiled(name: str, function, arguments, static=None, *, step=False, layers=0, donated=0, known: dict, dump: Path) -> dict:
    """The report on one program, with what is wrong with it in "faults". `function` is jitted or is jitted here."""
    import jax
    for file in dump.iterdir():
        file.unlink()
    log, clock = [], time.perf_counter()
    report = {"program": name, "seconds": 0.0, "faults": []}
    faults = report["faults"]
    try:
        with captured(log):
            function = function if hasattr(function, "lower") else jax.jit(function)
            program = function.lower(*arguments, **static or {}).compile()
    except Exception as error:  # noqa: BLE001  the report names it
        faults.append(f"{type(error).__name__}: {str(error)[:600]}")
        return report
    finally:
        report["seconds"] = round(time.perf_counter() - clock, 2)
    try:
        memory, parts = program.memory_analysis(), compiler_log.computations(program.as_text())
        instructions = list(compiler_log.executed(parts))
        report |= {"temporaries": memory.temp_size_in_bytes, "aliased": memory.alias_size_in_bytes}
        said, by_name = compiler_log.ptxas(log[0]), {i.name: i for i in instructions}
        mosaic, calls = mosaic_kernels(instructions, said, known)
        found = compiler_log.thunks(dumped(dump, "thunk_sequence_after_thunk_passes", "thunk_sequence"),
                                    dumped(dump, "thunk_metadata"))
        triton, report["xla_kernels"], triton_calls = compiler_log.xla_kernels(found, by_name, said)
        report["kernels"] = mosaic + triton
        report |= compiler_log.launches(found, by_name, calls | triton_calls, layers)
    except Exception as error:  # noqa: BLE001  whatever it was, it is no clean report
        faults.append(f"the compiler's report cannot be read: {type(error).__name__}: {error}")
        return report
    if spilled := [kernel for kernel in report["kernels"] + report["xla_kernels"] if kernel["spill_bytes"]]:
        faults.append(f"spills: {spilled}")
    if losses := compiler_log.losses(log[0]):
        faults.append(f"slow: {losses}")
    if memory.temp_size_in_bytes > MOST_TEMPORARIES:
        faults.append(f"{memory.temp_size_in_bytes / 2 ** 30:.2f} GiB of temporaries, the limit is 1")
    if memory.alias_size_in_bytes < donated:
        faults.append(f"{donated - memory.alias_size_in_bytes} bytes of the donated buffers are copied")
    if step:
        if copied := compiler_log.copies(parts, "params") + compiler_log.copies(parts, "cache"):
            faults.append(f"{len(copied)} copies of weights or cache in a step: {copied[:4]}")
        if report["top"] != ["kCommandBuffer"] and not (len(found) < FEWEST_IN_GRAPH and set(report["top"]) <= compiler_log.LAUNCHES):
            faults.append(f"not one command buffer: {report['top'][:12]}")
    return report


def model_config(shape: str, layers: int | None):
    """The ModelConfig of a shape, with its own number of layers or fewer."""
    from jaxllm.config import LayerSpec, ModelConfig, RopeSpec
    width, mlp, heads, kv_heads, head, depth, vocab, tied, bias = SHAPES[shape]
    spec = LayerSpec(RopeSpec(tuple(500000.0 ** (-2 * i / head) for i in range(head // 2))))
    return ModelConfig("LlamaForCausalLM", vocab, width, mlp, heads, kv_heads, head, 1e-5, CONTEXT, (spec,) * (layers or depth),
                       tied=tied, qkv_bias=bias)


def draws(vocab: int, rows: int, config, every: bool):
    """(name, inputs, features) of draws as the engine builds them, from requests that want them; `every`: also one for truncation."""
    from jaxllm.engine import batch
    from jaxllm.engine.request import Request, Sequence
    from jaxllm.engine.scheduler import Work
    from jaxllm.sampling_params import SamplingParams
    wanted = {"greedy": SamplingParams(temperature=0), "random": SamplingParams(),
              "everything": SamplingParams(top_k=50, top_p=0.9, min_p=0.01, presence_penalty=0.5, repetition_penalty=1.1,
                                           logit_bias={5: 1.0}, allowed_token_ids=[1, 2, 3], logprobs=5)}
    if every:
        wanted["truncated"] = SamplingParams(top_k=50, top_p=0.9)
    for name, params in wanted.items():
        request = Request("0", (1, 2, 3), params, seed=0, max_total=16)
        work = Work(Sequence(request, 0, [1, 2, 3, 4]), start=3, count=1, samples=True, slot=0, pages=(0,), token_pending=False)
        yield name, *batch.sampling_inputs((work,), rows, vocab, config)


def engine_programs(shape: str, card: str, array, kernels, layers: int | None, all_buckets: bool):
    """(name, jitted function, arguments, static arguments, layers, donated bytes) of what an engine of a shape runs."""
    import jax
    import jax.numpy as jnp

    from jaxllm.config import EngineConfig
    from jaxllm.engine import batch, runner
    from jaxllm.engine.cache import plan_cache
    from jaxllm.llm import DEFAULTS
    from jaxllm.models import decoder
    on_card = lambda tree: jax.tree.map(lambda a: array(a.shape, a.dtype), tree)
    size = lambda tree: sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(tree))
    cfg = model_config(shape, layers)
    params, counts = on_card(decoder.template(cfg, jnp.bfloat16)), DEFAULTS["gpu"]
    pages, length = plan_cache(cfg, 2, int(0.9 * CARDS[card]["memory"]) - size(params), max_model_len=None,
                               max_num_seqs=counts["max_num_seqs"], page_size=PAGE)
    config = EngineConfig(max_model_len=length, num_pages=pages, page_size=PAGE, **counts)
    cache = jax.eval_shape(lambda: decoder.empty_cache(cfg, config.cache_pages, PAGE, jnp.bfloat16))
    cache, last, programs = on_card(cache), array((config.max_num_seqs,), jnp.int32), runner.programs(cfg, kernels)
    for kind, buckets, some in (("decode", batch.decode_buckets(config), ROWS), ("prefill", batch.prefill_buckets(config), TOKENS)):
        for t in buckets if all_buckets else [t for t in buckets if t in some]:
            step = on_card(batch.padding(t, kind == "decode", config))
            yield f"{shape} {kind} {t}", programs.forward, (params, cache, last, step), {}, len(cfg.layers), size(cache)
    vocab = cfg.vocab_size
    for rows in batch.decode_buckets(config) if all_buckets else (ROWS[0], ROWS[-1]):
        for name, inputs, features in draws(vocab, rows, config, all_buckets):
            logits = array((rows, vocab), jnp.float32)
            yield f"{shape} draw {name} {rows}", programs.draw, (logits, last, on_card(inputs)), {"features": features}, 0, size(last)
    places = array((runner.SCORE_ROWS,), jnp.int32)
    hidden = array((SCORED, cfg.width), jnp.bfloat16)
    yield f"{shape} score {SCORED}", programs.score, (params, hidden, places, places), {"top": config.max_logprobs}, 0, 0


class Compiler:
    """What one process holds: the card's description, and every program that the options ask for."""

    def __init__(self, options):
        self.dump = Path(tempfile.mkdtemp(dir=options.scratch))
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={self.dump} --xla_dump_hlo_as_text --xla_dump_hlo_pass_re=none"
        os.environ |= ENVIRONMENT | {"XLA_FLAGS": flags}
        card = CARDS[options.card]
        with captured([]):  # a log of what was found where
            import jax
            from jax.experimental import topologies
            from jax.sharding import NamedSharding, PartitionSpec

            from pallas_kernels import dispatch
            topology = topologies.get_topology_desc(platform="cuda", target_config=CARD.format(**card), topology="1x1x1")
        mesh = topologies.make_mesh(topology, (1,), ("x",))
        self.mesh, sharding = mesh.abstract_mesh, NamedSharding(mesh, PartitionSpec())
        array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        choose = lambda head_dim: dispatch.choose("gpu", "{major}.{minor}".format(**card), head_dim, "bfloat16", PAGE)
        self.programs, self.known = [], {}
        if not options.kernels_only:
            for shape in options.model_shape:
                kernels = choose(SHAPES[shape][4])
                for name, function, arguments, static, layers, donated in engine_programs(shape, options.card, array, kernels,
                                                                                          options.layers, options.all_buckets):
                    self.programs.append((name, function, arguments, static, dict(step=True, layers=layers, donated=donated)))
        chosen = choose(128)
        if not options.programs_only and chosen.name in ("mosaic", "triton"):
            kernels = importlib.import_module(f"{chosen.name}_programs").programs(array)
            self.programs += [(name, function, arguments, {}, {}) for name, function, arguments in kernels]
        self.said = {"jax": jax.__version__, "card": options.card, "kernels": chosen.name, "reasons": chosen.reasons}

    def compile(self, index: int) -> dict:
        import jax

        from jaxllm.engine.runner import own_configuration
        name, function, arguments, static, more = self.programs[index]
        with own_configuration(), jax.sharding.use_abstract_mesh(self.mesh):  # Triton's lowering asks it which card to compile for
            return compiled(name, function, arguments, static, **more, known=self.known, dump=self.dump)


_own: list = []  # the Compiler of a worker process


def _start(options) -> None:
    _own.append(Compiler(options))


def _listed() -> tuple[dict, list[str]]:
    return _own[0].said, [name for name, *_ in _own[0].programs]


def _compile(index: int) -> dict:
    return _own[0].compile(index)


def line(report: dict) -> str:
    """One program, its kernels and its layer's launches as text."""
    mebibytes = lambda key: f"{report.get(key, 0) / 2 ** 20:8.1f} MiB {key}"
    text = (f"{'FAULT' if report['faults'] else 'ok':5} {report['seconds']:6.2f} s  {mebibytes('temporaries')}  {mebibytes('aliased')}  "
            f"{report['program']}")
    for kernel in report.get("kernels", []):
        text += (f"\n      {kernel['kernel']}: {kernel['registers']} registers, {kernel['spill_bytes']} bytes spilled, "
                 f"{kernel['shared_memory']} bytes of shared memory")
    if own := report.get("xla_kernels"):
        most = {key: max(kernel[key] for kernel in own) for key in ("registers", "spill_bytes", "shared_memory")}
        text += (f"\n      {len(own)} kernels of XLA's own: at most {most['registers']} registers, {most['spill_bytes']} bytes spilled, "
                 f"{most['shared_memory']} bytes of shared memory")
    if report.get("per_layer"):
        text += (f"\n      {report['launches']} launches in {'+'.join(report['top'][:4])}, {report['per_layer']} a layer; "
                 f"one layer: {', '.join(report['one_layer'])}")
    return text + "".join(f"\n      FAULT {fault}" for fault in report["faults"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="h200", help="(h200)")
    parser.add_argument("--model-shape", choices=SHAPES, nargs="*", default=["llama3-8b", "smollm2-135m"],
                        help="(llama3-8b smollm2-135m)")
    parser.add_argument("--format", choices=("text", "json"), default="text", help="(text)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--kernels-only", action="store_true", help="each kernel as a program of its own, over dtypes, widths and schedules")
    only.add_argument("--programs-only", action="store_true", help="the engine's programs")
    parser.add_argument("--all-buckets", action="store_true", help="every bucket of an engine; without it a few of each kind")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a quick look")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile (2)")
    parser.add_argument("--match", default="", help="only programs whose name contains this")
    options = parser.parse_args()
    # of a package that is not there a module cannot even be looked for
    if not all(importlib.util.find_spec(name) for name in ("jax_plugins", "jax_plugins.xla_cuda12")):
        print(INSTALL)
        return 2
    context = multiprocessing.get_context("spawn")  # jax reads its environment when it is imported, in each process anew
    with tempfile.TemporaryDirectory(prefix="compile_gpu") as options.scratch, concurrent.futures.ProcessPoolExecutor(
            options.jobs, mp_context=context, initializer=_start, initargs=(options,)) as pool:
        said, names = pool.submit(_listed).result()
        print(f"jax {said['jax']}, {said['card']}: {said['kernels']}: {'; '.join(said['reasons'])}", file=sys.stderr)
        wanted = [(i, name) for i, name in enumerate(names) if options.match in name]
        futures = [(name, pool.submit(_compile, i)) for i, name in wanted]
        reports = []
        for name, future in futures:
            try:
                report = future.result()
            except concurrent.futures.process.BrokenProcessPool:
                report = {"program": name, "seconds": 0.0, "faults": ["the compiler's process ended"]}
            reports.append(report)
            if options.format == "text":
                print(line(report), flush=True)
    bad = [report for report in reports if report["faults"]]
    if options.format == "json":
        print(json.dumps(said | {"programs": reports, "ok": not bad}, indent=1))
    else:
        print(f"{len(reports)} programs, {len(bad)} at fault" + "".join(f"\n  {report['program']}" for report in bad))
    return 1 if bad or not reports else 0


if __name__ == "__main__":
    sys.exit(main())
