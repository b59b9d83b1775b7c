"""Commands about models and this machine: bench, fingerprint, inspect, convert, models."""
import json
import sys

from jaxllm.commands.options import add_model_options, make_llm
from jaxllm.errors import UsageError


def add_parsers(commands, common) -> None:
    """Adds the commands to the parser."""
    _bench_parser(commands, common)
    _fingerprint_parser(commands, common)
    _inspect_parser(commands, common)
    _convert_parser(commands, common)
    _models_parser(commands, common)


def _bench_parser(commands, common) -> None:
    p = commands.add_parser("bench", parents=[common], allow_abbrev=False, help="measure speed and memory on this machine")
    p.add_argument("what", choices=["throughput", "latency", "load", "reproducible"],
                   help="throughput: many requests at once; latency: one batch; load: weights to the device, beside a plain read; "
                        "reproducible: what equal bits cost, at 16 and 64 requests")
    p.add_argument("--input-len", type=int, default=64, metavar="N", help="default: %(default)s")
    p.add_argument("--output-len", type=int, default=64, metavar="N", help="default: %(default)s")
    p.add_argument("--num-prompts", type=int, default=16, metavar="N", help="throughput: requests (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=1, metavar="N", help="latency: requests at once (default: %(default)s)")
    p.add_argument("--runs", type=int, default=3, metavar="N", help="medians are over so many (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--format", choices=["text", "json"], default="text")
    add_model_options(p)
    p.set_defaults(run=run_bench)


def run_bench(args) -> int:
    """`jaxllm bench`."""
    from jaxllm import bench
    for name in ("input_len", "output_len", "num_prompts", "batch_size", "runs"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}; it must be at least 1")
    if args.what == "load":
        from dataclasses import asdict

        from jaxllm.checkpoint.benchmark import load_benchmark
        from jaxllm.loading import resolve
        report = asdict(load_benchmark(resolve(args.model), args.load_format, repeats=args.runs))
        print(json.dumps(report) if args.format == "json" else bench.table(report))
        return 0
    with make_llm(args, seed=args.seed, skip_tokenizer_init=True) as llm:
        if args.what == "reproducible":
            return _bench_reproducible(args, llm)
        count = args.num_prompts if args.what == "throughput" else args.batch_size
        report = bench.generation(llm, args.what, count=count, input_len=args.input_len, output_len=args.output_len, runs=args.runs)
    print(json.dumps(report) if args.format == "json" else bench.table(report))
    return 0


def _bench_reproducible(args, llm) -> int:
    from jaxllm import bench
    if args.fast:
        raise UsageError("bench reproducible compares the default with --fast; leave --fast out")
    if args.output_len < 2:
        raise UsageError("--output-len 1; bench reproducible needs at least 2, to tell decode from prefill")
    with make_llm(args, seed=args.seed, skip_tokenizer_init=True, reproducible=False, params=llm.params) as fast:
        report = bench.reproducibility(llm, fast, input_len=args.input_len, output_len=args.output_len, rows=(16, 64), runs=args.runs)
    print(json.dumps(report) if args.format == "json" else bench.table(report))
    return 0


def _fingerprint_parser(commands, common) -> None:
    p = commands.add_parser("fingerprint", parents=[common], allow_abbrev=False, help="what this model's bits depend on",
                            description="Prints the system_fingerprint and its parts: equal fingerprints promise equal bits.")
    p.add_argument("--format", choices=["text", "json"], default="text")
    add_model_options(p)
    p.set_defaults(run=run_fingerprint)


def run_fingerprint(args) -> int:
    """`jaxllm fingerprint`."""
    with make_llm(args) as llm:
        parts = {"system_fingerprint": llm.system_fingerprint, **llm.fingerprint_parts}
    if args.format == "json":
        print(json.dumps(parts))
    else:
        for name, value in parts.items():
            print(f"{name:20} {value}")
    return 0


def _inspect_parser(commands, common) -> None:
    p = commands.add_parser("inspect", parents=[common], allow_abbrev=False, help="what a checkpoint holds, without loading it")
    p.add_argument("source", metavar="SRC", help="a folder or a file: safetensors, .bin, .pt, .npz, orbax")
    p.add_argument("--load-format", default="auto", choices=["auto", "safetensors", "pt", "npz", "orbax"])
    p.add_argument("--format", choices=["text", "json"], default="text")
    p.set_defaults(run=run_inspect)


def run_inspect(args) -> int:
    """`jaxllm inspect`."""
    from jaxllm.checkpoint.inspect import inspect_checkpoint, render
    from jaxllm.loading import account
    inspection = inspect_checkpoint(_source(args.source), args.load_format, account)
    if args.format == "json":
        print(inspection.as_json())
    else:
        from rich.console import Console
        render(inspection, Console())
    return 0


def _source(name: str):
    from jaxllm.loading import resolve
    return resolve(name) if name.startswith("builtin:") else name


def _convert_parser(commands, common) -> None:
    p = commands.add_parser("convert", parents=[common], allow_abbrev=False, help="write a checkpoint in another container")
    p.add_argument("source", metavar="SRC")
    p.add_argument("target", metavar="DST", help="a new folder; appears when it is complete, and is resumed if it was cut off")
    p.add_argument("--to", default="safetensors", choices=["safetensors", "orbax", "npz"], help="default: %(default)s")
    p.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"], help="default: as they are")
    p.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="default: %(default)s")
    p.add_argument("--load-format", default="auto", choices=["auto", "safetensors", "pt", "npz", "orbax"])
    p.set_defaults(run=run_convert)


def run_convert(args) -> int:
    """`jaxllm convert`."""
    import contextlib

    from jaxllm.checkpoint.convert import convert
    from jaxllm.checkpoint.progress import progress_bar
    with progress_bar(f"to {args.to}") if sys.stderr.isatty() else contextlib.nullcontext() as progress:
        done = convert(_source(args.source), args.target, args.to, dtype=args.dtype, max_shard_size=args.max_shard_size,
                       load_format=args.load_format, progress=progress)
    print(f"{done.target}: {done.tensors} tensors, {done.nbytes:,} bytes in {len(done.files)} files, {done.bytes_per_s / 1e6:,.0f} MB/s",
          file=sys.stderr)
    if done.left_out:
        print(f"left out: {', '.join(done.left_out)}", file=sys.stderr)
    return 0


def _models_parser(commands, common) -> None:
    p = commands.add_parser("models", parents=[common], allow_abbrev=False, help="what is supported here")
    p.add_argument("--kernels", action="store_true", help="which kernels this device would run, and why")
    p.set_defaults(run=run_models)


def run_models(args) -> int:
    """`jaxllm models`."""
    from jaxllm.layers.rope import SCALINGS
    from jaxllm.loading import BUILTIN
    from jaxllm.models.registry import FAMILIES
    if args.kernels:
        import jax

        from pallas_kernels.dispatch import choose
        device = jax.devices()[0]
        print(f"{device.platform} {device.device_kind}")
        for head_dim in (64, 80, 96, 128, 256):
            for dtype in ("bfloat16", "float16", "float32"):
                kernels = choose(device.platform, getattr(device, "compute_capability", None), head_dim, jax.numpy.dtype(dtype), 16)
                print(f"head_dim {head_dim:3} {dtype:8} {kernels.name}: {'; '.join(kernels.reasons)}")
        return 0
    print("architectures:", ", ".join(FAMILIES))
    print("rope types:   ", ", ".join(SCALINGS))
    print("built in:     ", ", ".join(f"builtin:{p.name}" for p in sorted(BUILTIN.iterdir()) if p.is_dir()))
    return 0
