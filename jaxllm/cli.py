"""The command line. Modules are imported by the command that needs them, so that --help and errors come at once.

Standard output carries results alone; progress, warnings and errors go to standard error. Exit status: 0 done, 1 failed,
2 used wrongly, 130 interrupted.
"""
import argparse
import json
import logging
import os
import sys
from pathlib import Path

from jaxllm.errors import JaxllmError, UsageError

INTERRUPTED = 130
DEFAULT_MODEL = "builtin:tales"
DEFAULT_MAX_TOKENS = 256


class Parser(argparse.ArgumentParser):
    """Reports misuse on one line, as every other error."""

    def error(self, message):
        raise UsageError(f"{message} (see: {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    logging.basicConfig(level=logging.WARNING, format="jaxllm: %(message)s", stream=sys.stderr)
    try:
        args = build_parser().parse_args(argv)
        if args.verbose:
            logging.getLogger("jaxllm").setLevel(logging.INFO)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        print("jaxllm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone; there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except JaxllmError as e:
        if debug:
            raise
        print(f"jaxllm: error: {_one_line(e)}", file=sys.stderr)
        return e.exit_status
    except (OSError, MemoryError, RuntimeError, ValueError) as e:
        if debug:
            raise
        print(f"jaxllm: error: {type(e).__name__}: {_one_line(e)} (--debug shows where)", file=sys.stderr)
        return 1


def _one_line(e: BaseException) -> str:
    return " ".join(str(e).split())


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version
    try:
        return version("jaxllm")
    except PackageNotFoundError:
        return "0+unknown"


def cache_home() -> Path:
    """Where compiled programs are kept: JAXLLM_CACHE_DIR, else XDG_CACHE_HOME/jaxllm, else ~/.cache/jaxllm."""
    if folder := os.environ.get("JAXLLM_CACHE_DIR"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxllm"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="jaxllm", description="Language-model inference in pure JAX: the same request gives the same bits.",
                    allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"jaxllm {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    common.add_argument("--verbose", action="store_true", help="log what is loaded and chosen")
    _generate_parser(commands, common)
    _bench_parser(commands, common)
    _fingerprint_parser(commands, common)
    return parser


def _model_options(parser: argparse.ArgumentParser, model: str | None = DEFAULT_MODEL) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=model, metavar="DIR|HF-ID|builtin:NAME", help="default: %(default)s")
    group.add_argument("--tokenizer", metavar="DIR", help="default: the model's")
    group.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"], help="default: the checkpoint's own")
    group.add_argument("--load-format", default="auto", choices=["auto", "safetensors", "pt", "dummy"],
                       help="dummy: random weights from config.json alone")
    group.add_argument("--hf-overrides", type=_json_object, metavar="JSON", help="laid over config.json")
    group = parser.add_argument_group("engine")
    group.add_argument("--max-model-len", type=int, metavar="N", help="longest prompt and output together")
    group.add_argument("--max-num-seqs", type=int, metavar="N", help="most sequences in one step")
    group.add_argument("--max-num-batched-tokens", type=int, metavar="N", help="most tokens in one step")
    group.add_argument("--kv-cache-memory-bytes", type=int, metavar="N", help="default: 1 GiB on a CPU")
    group.add_argument("--gpu-memory-utilization", type=float, default=0.9, metavar="F", help="default: %(default)s")
    group.add_argument("--no-prefix-caching", action="store_true")
    group.add_argument("--kernels", default="auto", help="default: the best that this device takes")
    group.add_argument("--compile-cache-dir", metavar="DIR", help="default: $JAXLLM_CACHE_DIR, else ~/.cache/jaxllm; 'off': none")


def _json_object(text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"key\": 1}}'")
    return value


def make_llm(args, **more):
    """The LLM that the model and engine options describe."""
    from jaxllm.llm import LLM
    folder = args.compile_cache_dir or str(cache_home())
    return LLM(args.model, tokenizer=args.tokenizer, dtype=args.dtype, load_format=args.load_format, hf_overrides=args.hf_overrides,
               max_model_len=args.max_model_len, max_num_seqs=args.max_num_seqs, max_num_batched_tokens=args.max_num_batched_tokens,
               kv_cache_memory_bytes=args.kv_cache_memory_bytes, gpu_memory_utilization=args.gpu_memory_utilization,
               enable_prefix_caching=not args.no_prefix_caching, kernels=args.kernels,
               compile_cache_dir=None if folder == "off" else folder, **more)


# -- generate -------------------------------------------------------------------------------------------------------

SAMPLING = {  # option -> (type, metavar, help); the SamplingParams field has the same name
    "max-tokens": (int, "N", f"default: {DEFAULT_MAX_TOKENS}"), "min-tokens": (int, "N", "no end before so many"),
    "temperature": (float, "T", "0: the likeliest token"), "top-p": (float, "P", None), "top-k": (int, "K", None),
    "min-p": (float, "P", None), "repetition-penalty": (float, "R", None), "presence-penalty": (float, "X", None),
    "frequency-penalty": (float, "X", None), "n": (int, "N", "independent choices"),
    "logprobs": (int, "K", "report the K likeliest tokens (JSON)"), "prompt-logprobs": (int, "K", "the same for the prompt"),
}


def _generate_parser(commands, common) -> None:
    p = commands.add_parser("generate", parents=[common], allow_abbrev=False, help="write on from a prompt",
                            description="Write on from one prompt or many. Sampling defaults are the model's own.")
    p.add_argument("prompts", nargs="*", metavar="PROMPT")
    p.add_argument("--prompts-file", metavar="F.jsonl|-", help="one JSON text or object with 'prompt' and sampling fields on each line")
    group = p.add_argument_group("sampling")
    for name, (kind, metavar, text) in SAMPLING.items():
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="write on past the end-of-text token")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s; every draw follows from it")
    p.add_argument("--format", choices=["text", "json"], default="text", help="json: one object on each line, in the order given")
    _model_options(p)
    p.set_defaults(run=run_generate)


def run_generate(args) -> int:
    """`jaxllm generate`."""
    from jaxllm.prompts import PromptLine, read_prompts, sampling_of
    from jaxllm.sampling_params import SamplingParams
    if args.prompts_file and args.prompts:
        raise UsageError("both PROMPT and --prompts-file are given; give one of them")
    if args.prompts_file:
        lines = read_prompts(args.prompts_file)
    else:
        lines = [PromptLine(text, None, {}, f"prompt {i}") for i, text in enumerate(args.prompts, 1)]
    if not lines:
        raise UsageError('no prompt; give one, as in: jaxllm generate "Once upon a time", or --prompts-file')
    if any(line.prompt == "" for line in lines):
        raise UsageError(f"{next(line.where for line in lines if line.prompt == '')}: the prompt is empty; give at least one character")
    given = {name: getattr(args, name) for name in (*(n.replace("-", "_") for n in SAMPLING), "stop", "ignore_eos")}
    given = {name: value for name, value in given.items() if value is not None}
    for line in lines:
        sampling_of(line, given)  # every line is checked before the model is loaded
    with make_llm(args, seed=args.seed) as llm:
        default = llm.get_default_sampling_params()
        common = {name: getattr(default, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
        common |= {"max_tokens": DEFAULT_MAX_TOKENS} | given
        params = [sampling_of(line, common) for line in lines]
        prompts = [_prompt_of(llm, line) for line in lines]
        stream = _Streamer(args.prompts) if len(lines) == 1 and params[0].n == 1 and args.format == "text" and sys.stdout.isatty() else None
        results = llm.generate(prompts, params, use_tqdm=stream is None and sys.stderr.isatty(), on_delta=stream)
        if stream is not None:
            stream.end()
        elif args.format == "json":
            for index, result in enumerate(results):
                print(json.dumps(as_json(index, result), ensure_ascii=False))
        else:
            _print_texts(results)
    return 0


def _prompt_of(llm, line):
    if line.messages is None:
        return line.prompt
    return {"prompt_token_ids": llm.get_tokenizer().apply_chat(line.messages)}


class _Streamer:
    """Writes new text to the terminal as it comes, after the prompt (on standard error: it is not a result)."""

    def __init__(self, prompts):
        self._prompt = prompts[0] if prompts else ""

    def __call__(self, output, choice, delta):
        if self._prompt:
            print(f"\033[1m{self._prompt}\033[0m", end="", file=sys.stderr, flush=True)
            self._prompt = ""
        print(delta, end="", flush=True)

    def end(self):
        print(flush=True)


def _print_texts(results) -> None:
    several = len(results) > 1 or len(results[0].outputs) > 1
    for index, result in enumerate(results):
        for output in result.outputs:
            if several:
                print(f"--- {index}.{output.index}")
            print(output.text)


def as_json(index: int, result) -> dict:
    """A result as the object that --format json prints."""
    def table(row):
        return None if row is None else {str(t): {"logprob": lp.logprob, "rank": lp.rank, "decoded_token": lp.decoded_token}
                                         for t, lp in row.items()}
    out = {
        "index": index, "prompt": result.prompt, "prompt_token_ids": result.prompt_token_ids,
        "outputs": [{"index": o.index, "text": o.text, "token_ids": o.token_ids, "finish_reason": o.finish_reason,
                     "stop_reason": o.stop_reason, "logprobs": o.logprobs and [table(row) for row in o.logprobs],
                     "cumulative_logprob": o.cumulative_logprob} for o in result.outputs],
        "seed": result.seed, "system_fingerprint": result.system_fingerprint,
    }
    if result.prompt_logprobs is not None:
        out["prompt_logprobs"] = [table(row) for row in result.prompt_logprobs]
    return out


# -- bench, fingerprint ----------------------------------------------------------------------------------------------

def _bench_parser(commands, common) -> None:
    p = commands.add_parser("bench", parents=[common], allow_abbrev=False, help="measure speed and memory on this machine")
    p.add_argument("what", choices=["throughput", "latency"], help="throughput: many requests at once; latency: one batch, step by step")
    p.add_argument("--input-len", type=int, default=64, metavar="N", help="default: %(default)s")
    p.add_argument("--output-len", type=int, default=64, metavar="N", help="default: %(default)s")
    p.add_argument("--num-prompts", type=int, default=16, metavar="N", help="throughput: requests (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=1, metavar="N", help="latency: requests at once (default: %(default)s)")
    p.add_argument("--runs", type=int, default=3, metavar="N", help="medians are over so many (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--format", choices=["text", "json"], default="text")
    _model_options(p)
    p.set_defaults(run=run_bench)


def run_bench(args) -> int:
    """`jaxllm bench`."""
    from jaxllm import bench
    for name in ("input_len", "output_len", "num_prompts", "batch_size", "runs"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name)}; it must be at least 1")
    with make_llm(args, seed=args.seed, skip_tokenizer_init=True) as llm:
        count = args.num_prompts if args.what == "throughput" else args.batch_size
        report = bench.generation(llm, args.what, count=count, input_len=args.input_len, output_len=args.output_len, runs=args.runs)
    print(json.dumps(report) if args.format == "json" else bench.table(report))
    return 0


def _fingerprint_parser(commands, common) -> None:
    p = commands.add_parser("fingerprint", parents=[common], allow_abbrev=False, help="what this model's bits depend on",
                            description="Prints the system_fingerprint and its parts: equal fingerprints promise equal bits.")
    p.add_argument("--format", choices=["text", "json"], default="text")
    _model_options(p)
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


if __name__ == "__main__":
    sys.exit(main())
