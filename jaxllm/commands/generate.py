"""`jaxllm generate`: write on from one prompt or many."""
import dataclasses
import json
import math
import sys

from jaxllm.commands.options import add_model_options, make_llm
from jaxllm.errors import JaxllmError, UsageError, about

DEFAULT_MAX_TOKENS = 256

SAMPLING = {  # option -> (type, metavar, help); the SamplingParams field has the same name
    "max-tokens": (int, "N", f"default: {DEFAULT_MAX_TOKENS}"), "min-tokens": (int, "N", "no end before so many"),
    "temperature": (float, "T", "0: the likeliest token"), "top-p": (float, "P", None), "top-k": (int, "K", None),
    "min-p": (float, "P", None), "repetition-penalty": (float, "R", None), "presence-penalty": (float, "X", None),
    "frequency-penalty": (float, "X", None), "n": (int, "N", "independent choices"),
    "logprobs": (int, "K", "report the K likeliest tokens (JSON)"), "prompt-logprobs": (int, "K", "the same for the prompt"),
}


def add_parser(commands, common) -> None:
    """Adds the command to the parser."""
    p = commands.add_parser("generate", parents=[common], allow_abbrev=False, help="write on from a prompt",
                            description="Write on from one prompt or many. Sampling defaults are the model's own.")
    p.add_argument("prompts", nargs="*", metavar="PROMPT", help="-, or none with something piped in: standard input is the prompt")
    p.add_argument("--prompts-file", metavar="F.jsonl|-", help="one JSON text or object with 'prompt' and sampling fields on each line")
    group = p.add_argument_group("sampling")
    for name, (kind, metavar, text) in SAMPLING.items():
        group.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    group.add_argument("--stop", action="append", metavar="TEXT", help="end before this text; may be repeated")
    group.add_argument("--ignore-eos", action="store_true", default=None, help="write on past the end-of-text token")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s; every draw follows from it")
    p.add_argument("--format", choices=["text", "json"], default="text", help="json: one object on each line, in the order given")
    p.add_argument("--record", metavar="LOG.jsonl", help="write each request and its bits here, for `jaxllm verify`")
    p.add_argument("--record-logits", action="store_true", help="with a hash of each whole row of logits, for `jaxllm verify --full-vocab`")
    p.add_argument("--chat-date", metavar="ISO-DATE",
                   help="what the chat template of 'messages' is told is now, as a record's chat_date (default: the clock)")
    add_model_options(p)
    p.set_defaults(run=run_generate)


def run_generate(args) -> int:
    """`jaxllm generate`."""
    from jaxllm.prompts import read_arguments, read_prompts, sampling_of
    from jaxllm.text.chat import read_date
    if args.prompts_file and args.prompts:
        raise UsageError("both PROMPT and --prompts-file are given; give one of them")
    lines = read_prompts(args.prompts_file) if args.prompts_file else read_arguments(args.prompts)
    if not lines:
        raise UsageError('no prompt; give one, as in: jaxllm generate "Once upon a time", or --prompts-file')
    if any(line.prompt == "" for line in lines):
        raise UsageError(f"{next(line.where for line in lines if line.prompt == '')}: the prompt is empty; give at least one character")
    if args.record_logits and not args.record:
        raise UsageError("--record-logits without --record; name the log with --record LOG.jsonl, or leave it out")
    if args.chat_date and all(line.messages is None for line in lines):
        raise UsageError("--chat-date without 'messages': only a chat template reads the date; leave it out, or give messages in --prompts-file")
    now = read_date(args.chat_date)  # one for all conversations
    given = {name: getattr(args, name) for name in (*(n.replace("-", "_") for n in SAMPLING), "stop", "ignore_eos")}
    given = {name: value for name, value in given.items() if value is not None}
    for line in lines:
        sampling_of(line, given)  # every line is checked before the model is loaded
    if args.record:
        _check_log(args.record)
    with make_llm(args, seed=args.seed) as llm:
        own = llm.own_sampling()
        common = {"max_tokens": DEFAULT_MAX_TOKENS} | own | given
        try:
            params = [sampling_of(line, common) for line in lines]
        except UsageError as e:
            raise UsageError(f"{e} (the model's generation_config.json says so)", e.param) if e.param in own and e.param not in given else e
        prompts, dates = zip(*[_prompt_of(llm, line, now) for line in lines])
        stream = _Streamer(lines[0].prompt) if len(lines) == 1 and params[0].n == 1 and args.format == "text" and sys.stdout.isatty() else None
        asked = params
        if args.record:  # a record holds logprobs whether they were asked for or not
            params = [dataclasses.replace(p, logprobs=p.logprobs or 0, logits_digest=p.logits_digest or args.record_logits) for p in params]
        try:
            results = llm.generate(list(prompts), params, use_tqdm=stream is None and sys.stderr.isatty(), on_delta=stream)
        except JaxllmError as e:
            e.where = e.where if e.index is None else lines[e.index].where
            raise
        for result, date in zip(results, dates, strict=True):
            result.chat_date = date
        try:
            if args.record:
                _record(args.record, llm, asked, results)
        finally:  # no answer is lost to a log that cannot be written
            _print(args.format, results, stream)
    return _report_errors(results)


def _report_errors(results) -> int:
    """The exit status: 1 where a choice ended with an error, which is told on standard error."""
    errors = [(index, o) for index, result in enumerate(results) for o in result.outputs if o.error is not None]
    for index, output in errors:
        print(f"jaxllm: error: prompt {index + 1}, choice {output.index}: {output.error}", file=sys.stderr)
    return 1 if errors else 0


def _print(form: str, results, stream) -> None:
    if stream is not None:
        stream.end()
    elif form == "json":
        escaped = (sys.stdout.encoding or "").lower() not in ("utf-8", "utf8")
        for index, result in enumerate(results):
            print(json.dumps(as_json(index, result), ensure_ascii=escaped, allow_nan=False))
    else:
        _print_texts(results)


def _check_log(path: str) -> None:
    try:
        open(path, "a").close()
    except OSError as e:
        raise UsageError(f"cannot write the log {path}: {e.strerror}") from e


def _record(path: str, llm, asked, results) -> None:
    """Appends the requests to the log, and takes off the results what was not asked for."""
    from jaxllm.record import entry
    try:
        with open(path, "a", encoding="utf-8") as log:
            for index, (params, result) in enumerate(zip(asked, results, strict=True)):
                log.write(json.dumps(entry(index, llm, params, result)) + "\n")
    except OSError as e:
        raise UsageError(f"cannot write the log {path}: {e.strerror}") from e
    finally:
        for params, result in zip(asked, results, strict=True):
            for output in result.outputs:
                if params.logprobs is None:
                    output.logprobs = output.cumulative_logprob = None
                if not params.logits_digest:
                    output.logits_digests = None


def _prompt_of(llm, line, now):
    """(prompt, the date that its chat template read or None) of a line."""
    if line.messages is None:
        return line.prompt, None
    with about(line.where):
        ids, date = llm.get_tokenizer().chat_prompt(line.messages, chat_date=now)
    return {"prompt_token_ids": ids}, date


class _Streamer:
    """Writes new text to the terminal as it comes, after the prompt (on standard error: it is not a result)."""

    def __init__(self, prompt):
        self._prompt = prompt if isinstance(prompt, str) else ""

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


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def as_json(index: int, result) -> dict:
    """A result as the object that --format json prints."""
    def table(row):
        # JSON has no -inf, which is what a logit of -inf gives
        return None if row is None else {str(t): {"logprob": _number(lp.logprob), "rank": lp.rank, "decoded_token": lp.decoded_token}
                                         for t, lp in row.items()}
    out = {
        "index": index, "prompt": result.prompt, "prompt_token_ids": result.prompt_token_ids,
        "outputs": [{"index": o.index, "text": o.text, "token_ids": o.token_ids, "finish_reason": o.finish_reason,
                     "stop_reason": o.stop_reason, "logprobs": o.logprobs and [table(row) for row in o.logprobs],
                     "cumulative_logprob": _number(o.cumulative_logprob)} for o in result.outputs],
        "seed": result.seed, "system_fingerprint": result.system_fingerprint, "reproducible": result.reproducible,
    }
    for shown, o in zip(out["outputs"], result.outputs):
        if o.error is not None:
            shown["error"] = o.error
        if o.logits_digests is not None:
            shown["logits_digests"] = o.logits_digests
    if result.chat_date is not None:
        out["chat_date"] = result.chat_date
    if result.prompt_logprobs is not None:
        out["prompt_logprobs"] = [table(row) for row in result.prompt_logprobs]
    return out
