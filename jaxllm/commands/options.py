"""What commands share: the parser, the options that describe a model and its engine, and the LLM they make."""
import argparse
import json

from jaxllm.errors import UsageError

DEFAULT_MODEL = "builtin:tales"


class Parser(argparse.ArgumentParser):
    """Reports misuse on one line, as every other error."""

    def error(self, message):
        raise UsageError(f"{message} (see: {self.prog} --help)")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that `make_llm` reads."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=DEFAULT_MODEL, metavar="DIR|HF-ID|builtin:NAME", help="default: %(default)s")
    group.add_argument("--tokenizer", metavar="DIR", help="default: the model's")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "float", "bfloat16", "float16", "half"], help="default: the checkpoint's own")
    group.add_argument("--load-format", default="auto", choices=["auto", "safetensors", "pt", "npz", "orbax", "dummy"],
                       help="dummy: random weights from config.json alone")
    group.add_argument("--pt-load-map-location", type=_map_location, default="cpu", metavar="DEVICE|JSON",
                       help="where .pt and .bin storages land, as torch.load's map_location (default: %(default)s)")
    group.add_argument("--hf-overrides", type=_json_object, metavar="JSON", help="laid over config.json")
    group = parser.add_argument_group("engine")
    group.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt and output together")
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="most sequences in one step")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="most tokens in one step")
    group.add_argument("--kv-cache-memory-bytes", type=int, metavar="N", help="default: 1 GiB on a CPU")
    group.add_argument("--gpu-memory-utilization", type=float, default=0.9, metavar="F", help="default: %(default)s")
    group.add_argument("--no-prefix-caching", action="store_true")
    group.add_argument("--kernels", default="auto", help="default: the best that this device takes")
    group.add_argument("--fast", action="store_true", help="give up that bits do not depend on the batch (see: jaxllm bench reproducible)")
    group.add_argument("--strict", action="store_true", help="compile and prove every program first; refuse to start if one fails")
    group.add_argument("--portable", action="store_true", help="sums in the order that every processor seen so far has (CPU, float32 and float16)")
    group.add_argument("--compile-cache-dir", metavar="DIR",
                       help="compiled programs are kept here; 'off': nowhere (default: $JAXLLM_CACHE_DIR, else ~/.cache/jaxllm)")


def _map_location(text: str):
    from jaxllm.checkpoint.map_location import parse_map_location
    return parse_map_location(text)


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"key\": 1}}'")
    return value


def make_llm(args, **more):
    """The LLM that the model and engine options describe. `more` may say `reproducible` itself."""
    from jaxllm.llm import LLM
    if args.fast and (args.strict or args.portable):
        raise UsageError("--fast gives up what --strict and --portable ask for; leave one of them out")
    more.setdefault("reproducible", "strict" if args.strict else not args.fast)
    return LLM(args.model, tokenizer=args.tokenizer, dtype=args.dtype, load_format=args.load_format, hf_overrides=args.hf_overrides,
               max_model_len=args.max_model_len, max_num_seqs=args.max_num_seqs, max_num_batched_tokens=args.max_num_batched_tokens,
               kv_cache_memory_bytes=args.kv_cache_memory_bytes, gpu_memory_utilization=args.gpu_memory_utilization,
               enable_prefix_caching=not args.no_prefix_caching, kernels=args.kernels,
               pt_load_map_location=args.pt_load_map_location, portable=args.portable and more["reproducible"] is not False,
               compile_cache_dir=args.compile_cache_dir, **more)


