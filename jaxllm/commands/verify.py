"""`jaxllm verify`: replay a log and compare it bit for bit."""
import sys

from jaxllm.commands.options import add_model_options, make_llm
from jaxllm.errors import UsageError


def add_parser(commands, common) -> None:
    """Adds the command to the parser."""
    p = commands.add_parser("verify", parents=[common], allow_abbrev=False, help="replay a log of requests and compare the bits",
                            description="Replays what `generate --record` wrote. Exit status 0 only if every token and logprob is equal.")
    p.add_argument("log", metavar="LOG.jsonl")
    p.add_argument("--shuffle", action="store_true", help="in a random order")
    p.add_argument("--batch-sizes", default="all", metavar="1,7,32", help="requests at a time; several are tried one after the other")
    p.add_argument("--seed", type=int, default=0, help="of the shuffle (default: %(default)s)")
    add_model_options(p)
    p.set_defaults(run=run, model=None)


def run(args) -> int:
    """`jaxllm verify`."""
    from jaxllm.record import read_log, replay
    entries, warnings = read_log(args.log)
    for warning in warnings:
        print(f"jaxllm: {warning}", file=sys.stderr)
    sizes = [len(entries)] if args.batch_sizes == "all" else _sizes(args.batch_sizes)
    recorded = {(e["model"], e["dtype"]) for _, e in entries}
    if len(recorded) > 1:
        raise UsageError(f"{args.log} holds requests to {len(recorded)} models or dtypes; verify one model's at a time")
    (model, dtype), = recorded
    args.model, args.dtype = args.model or model, dtype if args.dtype == "auto" else args.dtype
    tokens = sum(len(o["token_ids"]) for _, e in entries for o in e["outputs"])
    wrong = 0
    with make_llm(args) as llm:
        mine, theirs = llm.system_fingerprint, sorted({e["system_fingerprint"] for _, e in entries})
        if theirs != [mine]:
            _explain(llm.fingerprint_parts, entries[0][1]["fingerprint_parts"], mine, theirs)
        print(f"{'batch':>6} {'requests':>9} {'tokens':>8} {'equal':>7}  first difference")
        for size in sizes:
            differences = [d for _, d in replay(llm, entries, batch_size=size, shuffle_seed=args.seed if args.shuffle else None) if d]
            wrong += len(differences)
            first = min(differences, key=lambda d: d.line, default=None)
            said = "none" if first is None else (
                f"line {first.line}, choice {first.choice}, token {first.position}: "
                f"{first.tokens[0]} ({_number(first.logprobs[0])}) became {first.tokens[1]} ({_number(first.logprobs[1])})")
            print(f"{size:>6} {len(entries):>9} {tokens:>8} {len(entries) - len(differences):>7}  {said}", flush=True)
    return 1 if wrong else 0


def _number(text: str | None) -> str:
    return "ended" if text is None else f"{float.fromhex(text):.9g}"


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise UsageError(f"--batch-sizes {text}; give numbers of at least 1, such as 1,7,32")
    return sizes


def _explain(mine: dict, theirs: dict, short: str, recorded: list[str]) -> None:
    differ = [f"{name}: {theirs.get(name)} then, {mine.get(name)} now" for name in sorted(set(mine) | set(theirs)) if mine.get(name) != theirs.get(name)]
    print(f"jaxllm: the log is of {', '.join(recorded)}, this is {short}: equality was never promised between them "
          f"({'; '.join(differ) or 'other lines differ'})", file=sys.stderr)
