"""`jaxllm doctor`: what this machine promises, shown on the machine."""
import json

from jaxllm.commands.options import DEFAULT_MODEL
from jaxllm.config import DTYPES
from jaxllm.errors import UsageError


def add_parser(commands, common) -> None:
    """Adds the command to the parser."""
    p = commands.add_parser("doctor", parents=[common], allow_abbrev=False, help="what this machine promises, and whether it is so",
                            description="Shows which promises hold on this machine: R1 (a new process), R2 (any batch), R5 (the plain "
                                        "function), R6 (another processor). Exit status 0 only if all that is promised is proven.")
    p.add_argument("--model", default=DEFAULT_MODEL, metavar="DIR|HF-ID|builtin:NAME", help="default: %(default)s")
    p.add_argument("--dtype", default=",".join(DTYPES), metavar="D[,D]", help="default: %(default)s")
    p.add_argument("--load-format", default="auto", choices=["auto", "safetensors", "pt", "npz", "orbax", "dummy"])
    p.add_argument("--json", action="store_true", help="the report as JSON")
    p.add_argument("--compile-cache-dir", metavar="DIR", help="as for generate")
    p.set_defaults(run=run)


def run(args) -> int:
    """`jaxllm doctor`."""
    dtypes = args.dtype.split(",")
    unknown = [d for d in dtypes if d not in DTYPES]
    if unknown:
        raise UsageError(f"--dtype {args.dtype}: {unknown[0]!r} is not one of {', '.join(DTYPES)}")
    from jaxllm import doctor
    report = doctor.examine(args.model, dtypes, load_format=args.load_format, cache_dir=args.compile_cache_dir)
    print(json.dumps(report) if args.json else doctor.render(report))
    return 0 if report["proven"] else 1
