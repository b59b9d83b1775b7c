"""Compiles every kernel and the engine's step programs for an NVIDIA card on a machine that has none, and judges them.

    python tools/compile_gpu.py [--card h200|h100|a100|l4] [--model-shape llama3-8b|qwen2.5-0.5b|smollm2-135m ...] [--format json]
                                [--kernels-only] [--layers N]

Reports seconds, temporaries and aliased bytes for each program, registers, spills and shared memory for each kernel, and
the launches. Exit status 1 on: a compile error, a spill (but for KNOWN_SPILLS), a donated cache that is copied, more than 1 GiB of temporaries,
or a step that is not one command buffer.
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

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
    "h200": CARD.format(name="NVIDIA H200", bandwidth=4800000000000, memory=150000000000, **HOPPER),
    "h100": CARD.format(name="NVIDIA H100 80GB HBM3", bandwidth=3350000000000, memory=85000000000, **HOPPER),
    "a100": CARD.format(name="NVIDIA A100-SXM4-80GB", bandwidth=2039000000000, memory=85000000000, core_smem=167936, cores=108,
                        fpus=64, l2=41943040, clock=1.41, smem=166912, major=8, minor=0),
    "l4": CARD.format(name="NVIDIA L4", bandwidth=300000000000, memory=24000000000, core_smem=102400, cores=58, fpus=128,
                      l2=50331648, clock=2.04, smem=101376, major=8, minor=9),
}
SHAPES = {  # width, mlp_width, heads, kv_heads, head_dim, layers, vocabulary, tied, qkv_bias
    "llama3-8b": (4096, 14336, 32, 8, 128, 32, 128256, False, False),
    "qwen2.5-0.5b": (896, 4864, 14, 2, 64, 24, 151936, True, True),
    "smollm2-135m": (576, 1536, 9, 3, 64, 30, 49152, True, False),
}
KNOWN_SPILLS = {"H=256": 32}  # bytes, by a part of the program's name: open faults (docs/kernels.md) that may not grow
MOST_TEMPORARIES = 1 << 30
ROWS, TOKENS, CONTEXT, PAGE = (1, 64, 256), (16, 2048), 8192, 64  # of the step programs


def respawn() -> None:
    """Runs this file again with what XLA reads before it is imported; exits with the child's status."""
    try:
        import jax_plugins.xla_cuda12  # noqa: F401
    except ImportError:
        print(INSTALL)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as dump:
        env = os.environ | {
            "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTXAS": "1", "COMPILE_GPU_DUMP": dump,
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={dump} --xla_dump_hlo_as_text "
                         "--xla_dump_hlo_pass_re=none",
            # What ptxas says of kernels that XLA compiles, Triton's among them, XLA keeps to its own log.
            "TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "subprocess_compilation=3"}
        sys.exit(subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=env).returncode)


def captured(call):
    """(result or exception, what the process wrote to its standard output and error while `call` ran)."""
    sys.stdout.flush(), sys.stderr.flush()
    with tempfile.TemporaryFile() as log:
        kept = os.dup(1), os.dup(2)
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        try:
            try:
                result = call()
            except Exception as error:  # noqa: BLE001  the report names it
                result = error
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        log.seek(0)
        return result, log.read().decode(errors="replace")


def kernels_of(log: str) -> list[dict]:
    """What ptxas said of each kernel: name, registers, bytes spilled."""
    found = []
    for part in log.split("Compiling entry function '")[1:]:
        registers = re.search(r"Used (\d+) registers", part)
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        found.append({"kernel": part.split("'")[0].removesuffix("_mosaic_gpu_kernel"), "registers": int(registers[1]) if registers else None,
                      "spill_bytes": sum(map(int, spilled.groups())) if spilled else None})
    return found


def launches_of(dump: Path, since: float) -> dict:
    """Top-level thunks of the newest program's sequence, and how many launches stand inside its command buffers."""
    files = [f for f in dump.glob("*thunk_sequence_after_thunk_passes*") if f.stat().st_mtime >= since]
    if not files:
        return {}
    lines = max(files, key=lambda f: f.stat().st_mtime).read_text().splitlines()
    kinds = [(len(line) - len(line.lstrip()), m[1]) for line in lines if (m := re.match(r"\s*\d+: (k\w+)", line))]
    outer = min((depth for depth, _ in kinds), default=0)
    top = [kind for depth, kind in kinds if depth == outer]
    inner: dict[str, int] = {}
    for depth, kind in kinds:
        if depth > outer:
            inner[kind] = inner.get(kind, 0) + 1
    return {"top": top, "inside": inner}


def compiled(name: str, function, arguments, *, donate=(), step=False, cache_bytes=0, dump: Path) -> dict:
    """The report on one program, with what is wrong with it in "faults"."""
    import jax
    start, clock = time.time(), time.perf_counter()
    card = jax.tree.leaves(arguments)[0].sharding.mesh.abstract_mesh

    def compile_it():
        with jax.sharding.use_abstract_mesh(card):  # Triton's lowering asks it which card to compile for
            return jax.jit(function, donate_argnums=donate).lower(*arguments).compile()
    result, log = captured(compile_it)
    report = {"program": name, "seconds": round(time.perf_counter() - clock, 2), "faults": []}
    if isinstance(result, Exception):
        return report | {"faults": [f"{type(result).__name__}: {str(result)[:600]}"]}
    memory = result.memory_analysis()
    report |= {"temporaries": memory.temp_size_in_bytes, "aliased": memory.alias_size_in_bytes, "kernels": kernels_of(log),
               "launches": launches_of(dump, start - 1)}
    text = result.as_text()
    report["mosaic_calls"] = text.count('custom_call_target="mosaic_gpu')
    shared = [int(n) for n in re.findall(r"shared_memory(?:_bytes)?[\" =:]+(\d+)", text)]
    if shared:
        report["shared_memory"] = max(shared)
    allowed = next((most for part, most in KNOWN_SPILLS.items() if part in report["program"]), 0)
    spilled = [k for k in report["kernels"] if (k["spill_bytes"] or 0) > allowed]
    if spilled:
        report["faults"].append(f"spills: {spilled}")
    if "xla.gpu.triton" in text and not report["kernels"]:
        report["faults"].append("no word of ptxas on the Triton kernels in XLA's log")
    if memory.temp_size_in_bytes > MOST_TEMPORARIES:
        report["faults"].append(f"{memory.temp_size_in_bytes / 2 ** 30:.2f} GiB of temporaries, the limit is 1")
    if memory.alias_size_in_bytes < cache_bytes:
        report["faults"].append(f"{cache_bytes - memory.alias_size_in_bytes} bytes of the donated cache are copied")
    if step and report["launches"].get("top") not in (None, ["kCommandBuffer"]):
        report["faults"].append(f"not one command buffer: {report['launches']['top'][:12]}")
    return report


def kernel_programs(array):
    """(name, function, arguments) of every kernel, over dtypes, widths and schedules."""
    import jax.numpy as jnp
    from functools import partial

    from pallas_kernels import mosaic_attention as ma
    from pallas_kernels import mosaic_kv, mosaic_matmul as mm, mosaic_rows as mr
    from pallas_kernels.ragged import Ragged
    bf16, f16, i32 = jnp.bfloat16, jnp.float16, jnp.int32
    for m, n, k, dtype in ((1, 4096, 4096, bf16), (64, 4096, 14336, f16), (128, 1024, 4096, bf16), (2048, 4096, 14336, bf16), (8, 128, 896, bf16)):
        yield f"matmul {m}x{n}x{k}", mm.matmul, (array((m, k), dtype), array((n, k), dtype), array((n,), dtype))
    for m in (1, 256):
        yield f"logits {m}x128256x4096", partial(mm.matmul, out_dtype=jnp.float32), (array((m, 4096), bf16), array((128256, 4096), bf16))
    for m, activation in ((1, "silu"), (2048, "silu"), (64, "gelu_tanh"), (2048, "gelu_tanh"), (64, "relu"), (64, "gelu")):
        f = lambda x, g, u, a=activation: mm.gated_mlp(x, g, u, a)
        yield f"gated {activation} {m}", f, (array((m, 4096), bf16), array((14336, 4096), bf16), array((14336, 4096), bf16))
    for width in (64, 128, 576, 4096):
        yield f"rms_norm {width}", partial(mr.rms_norm, eps=1e-5), (array((64, width), bf16), array((width,), bf16))
    yield "log_sum_exp", mr.log_sum_exp, (array((64, 128256), jnp.float32),)
    yield "row_sum", mr.row_sum, (array((64, 896), jnp.float32),)
    pages = array((512, 16, 8, 128), bf16)
    yield "write_kv", mosaic_kv.write_kv, (pages, pages, array((13, 8, 128), bf16), array((13, 8, 128), bf16), array((13,), i32))
    for width in (64, 80, 96, 128, 256):
        for group, page, window, softcap in ((1, 16, None, None), (4, 64, None, None), (8, 32, 1024, None), (7, 16, 1024, 50.0)):
            kv = array((512, page, 4, width), bf16)
            for kind, t, s in (("decode", 4, 4), ("decode in runs", 4, 4), ("prefill", 256, 8)):
                ragged = Ragged(array((t,), i32), array((t,), i32), array((s,), i32), array((s, 4096 // page), i32),
                                array((s + 1,), i32) if kind == "prefill" else None)
                run = {"decode": None, "decode in runs": 2, "prefill": "auto"}[kind]
                f = partial(ma.attention, scale=width ** -0.5, window=window, softcap=softcap, run=run)
                name = f"attention {kind} H={width} G={group} page={page} window={window} softcap={softcap}"
                yield name, f, (array((t, 4 * group, width), bf16), kv, kv, ragged)


def step_programs(shape: str, array, kernels, layers: int | None):
    """(name, function, arguments, donated, cache bytes) of decode and prefill steps: forward, logits, the greedy token."""
    import jax
    import jax.numpy as jnp

    from jaxllm.config import LayerSpec, ModelConfig, RopeSpec
    from jaxllm.models import decoder
    from pallas_kernels.ragged import Ragged
    width, mlp, heads, kv_heads, head, depth, vocab, tied, bias = SHAPES[shape]
    spec = LayerSpec(RopeSpec(tuple(500000.0 ** (-2 * i / head) for i in range(head // 2))))
    cfg = ModelConfig("LlamaForCausalLM", vocab, width, mlp, heads, kv_heads, head, 1e-5, CONTEXT, (spec,) * (layers or depth),
                      tied=tied, qkv_bias=bias)
    on_card = lambda tree: jax.tree.map(lambda a: array(a.shape, a.dtype), tree)
    params = on_card(decoder.template(cfg, jnp.bfloat16))
    page = (1024, PAGE, kv_heads, head)
    cache = decoder.KVCache(*((tuple(array(page, jnp.bfloat16) for _ in cfg.layers),) * 2))
    cache_bytes = sum(a.size * 2 for a in jax.tree.leaves(cache))

    def step(params, cache, tokens, ragged, rows):
        hidden, cache = decoder.forward(cfg, params, cache, tokens, ragged, kernels=kernels)
        logits = decoder.unembed(cfg, params, hidden if rows is None else hidden[rows], kernels=kernels)
        return jnp.argmax(logits, -1), cache

    for kind, counts in (("decode", ROWS), ("prefill", TOKENS)):
        for t in counts:
            s = t if kind == "decode" else min(t, 64)
            i32 = lambda *shape: array(shape, jnp.int32)
            ragged = Ragged(i32(t), i32(t), i32(s), i32(s, CONTEXT // PAGE), None if kind == "decode" else i32(s + 1))
            yield (f"{shape} {kind} {t}", step, (params, cache, i32(t), ragged, None if kind == "decode" else i32(s)), (1,), cache_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="h200")
    parser.add_argument("--model-shape", choices=SHAPES, nargs="*", default=["llama3-8b", "smollm2-135m"])
    parser.add_argument("--format", choices=("text", "json"), default="text")
    parser.add_argument("--kernels-only", action="store_true")
    parser.add_argument("--programs-only", action="store_true")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for a quick look")
    options = parser.parse_args()
    if "COMPILE_GPU_DUMP" not in os.environ:
        respawn()
    dump = Path(os.environ["COMPILE_GPU_DUMP"])
    import jax
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from pallas_kernels import dispatch
    topology = topologies.get_topology_desc(platform="cuda", target_config=CARDS[options.card], topology="1x1x1")
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())
    array = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    capability = {"a100": "8.0", "l4": "8.9"}.get(options.card, "9.0")
    reports = []

    def add(report):
        reports.append(report)
        if options.format == "text":
            print(line(report), flush=True)

    chosen = dispatch.choose("gpu", capability, 128, "bfloat16", PAGE)
    print(f"jax {jax.__version__}, {options.card}: {chosen.name}: {'; '.join(chosen.reasons)}", file=sys.stderr)
    if chosen.name == "triton":
        from triton_programs import triton_programs as programs
    else:
        programs = kernel_programs if chosen.name == "mosaic" else None
    if not options.programs_only and programs:
        for name, function, arguments in programs(array):
            add(compiled(name, function, arguments, dump=dump))
    if not options.kernels_only:
        for shape in options.model_shape:
            kernels = dispatch.choose("gpu", capability, SHAPES[shape][4], "bfloat16", PAGE)
            for name, function, arguments, donate, cache_bytes in step_programs(shape, array, kernels, options.layers):
                add(compiled(name, function, arguments, donate=donate, step=True, cache_bytes=cache_bytes, dump=dump))
    bad = [r for r in reports if r["faults"]]
    if options.format == "json":
        print(json.dumps({"jax": jax.__version__, "card": options.card, "kernels": chosen.name, "reasons": chosen.reasons,
                          "programs": reports, "ok": not bad}, indent=1))
    else:
        print(f"{len(reports)} programs, {len(bad)} at fault")
    return 1 if bad else 0


def line(report: dict) -> str:
    """One program on one line."""
    kernels = report.get("kernels", [])
    registers = max((k["registers"] or 0 for k in kernels), default=0)
    launches = report.get("launches", {})
    text = (f"{'FAULT' if report['faults'] else 'ok':5} {report['seconds']:6.2f} s  {report.get('temporaries', 0) / 2 ** 20:8.1f} MiB  "
            f"{registers:3} registers  {report['program']}")
    if launches.get("inside"):
        text += f"  {'+'.join(launches['top'][:4])} {launches['inside']}"
    return text + "".join(f"\n      {fault}" for fault in report["faults"])


if __name__ == "__main__":
    sys.exit(main())
