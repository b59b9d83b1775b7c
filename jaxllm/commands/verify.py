"""`jaxllm verify`: replay a log and compare it bit for bit."""
import sys

from jaxllm.commands.options import add_model_options, make_llm
from jaxllm.errors import UsageError


def add_parser(commands, common) -> None:
    """Adds the command to the parser."""
    p = commands.add_parser("verify", parents=[common], allow_abbrev=False, help="replay a log of requests and compare the bits",
                            description="Replays what `generate --record` wrote, and counts the requests whose tokens are the same, and whose "
                                        "logprobs are, bit for bit. Exit status 0 only if all of them are.")
    p.add_argument("log", metavar="LOG.jsonl")
    p.add_argument("--shuffle", action="store_true", help="in a random order")
    p.add_argument("--batch-sizes", default="all", metavar="1,7,32", help="requests at a time; several are tried one after the other")
    p.add_argument("--full-vocab", action="store_true",
                   help="compare the logits of the whole vocabulary too, by their hashes: the log needs `generate --record-logits`")
    p.add_argument("--seed", type=int, default=0, help="of the shuffle (default: %(default)s)")
    add_model_options(p)
    p.set_defaults(run=run, model=None)


def run(args) -> int:
    """`jaxllm verify`."""
    from jaxllm.record import KINDS, read_log, replay
    entries, warnings = read_log(args.log)
    for warning in warnings:
        print(f"jaxllm: {warning}", file=sys.stderr)
    sizes = [len(entries)] if args.batch_sizes == "all" else _sizes(args.batch_sizes)
    recorded = {(e["model"], e["dtype"]) for _, e in entries}
    if len(recorded) > 1:
        raise UsageError(f"{args.log} holds requests to {len(recorded)} models or dtypes; verify one model's at a time")
    (model, dtype), = recorded
    args.model, args.dtype = args.model or model, dtype if args.dtype == "auto" else args.dtype
    bare = next((line for line, e in entries if any("logits_digests" not in o for o in e["outputs"])), None)
    if args.full_vocab and bare is not None:
        raise UsageError(f"{args.log}:{bare}: no logits_digests, which --full-vocab compares; record with --record-logits, "
                         "or leave --full-vocab out")
    tokens = sum(len(o["token_ids"]) for _, e in entries for o in e["outputs"])
    clean = True
    with make_llm(args) as llm:
        _explain(llm, [e for _, e in entries])
        kinds = [kind for kind in KINDS if kind != "logits" or args.full_vocab]
        print(f"{'batch':>6} {'requests':>9} {'tokens':>8}", *(f"{'same ' + kind:>13}" for kind in kinds), " first difference")
        for size in sizes:
            results = list(replay(llm, entries, batch_size=size, shuffle_seed=args.seed if args.shuffle else None, kinds=kinds))
            first = min((r.first for r in results if r.first), key=lambda d: d.line, default=None)
            clean = clean and first is None
            print(f"{size:>6} {len(entries):>9} {tokens:>8}", *(f"{sum(r.equal[kind] for r in results):>13}" for kind in kinds),
                  "", _place(first), flush=True)
        for fault in llm.unproven:
            print(f"jaxllm: not reproducible on this machine: the bits of {fault} depend on the batch", file=sys.stderr)
        clean = clean and not llm.unproven
    return 0 if clean else 1


def _place(first) -> str:
    """Where the first difference is, and what became what there."""
    if first is None:
        return "none"
    (token, now), (logprob, after), (row, other) = first.tokens, first.logprobs, first.logits
    rows = "" if None in (row, other) else ", from the same logits" if row == other else f", from the logits {row} and {other}"
    return (f"line {first.line}, choice {first.choice}, token {first.position}: "
            f"{token} ({_number(logprob)}) became {now} ({_number(after)}){rows}")


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


def _explain(llm, entries: list[dict]) -> None:
    """Says of each fingerprint in the log that is not this LLM's which parts of it differ."""
    mine, short = llm.fingerprint_parts, llm.system_fingerprint
    for recorded, theirs in {e["system_fingerprint"]: e["fingerprint_parts"] for e in entries if e["system_fingerprint"] != short}.items():
        differ = [f"{name}: {theirs.get(name)} then, {mine.get(name)} now" for name in sorted(set(mine) | set(theirs)) if mine.get(name) != theirs.get(name)]
        print(f"jaxllm: the log is of {recorded}, this is {short}: equality was never promised between them "
              f"({'; '.join(differ) or 'by name alone'})", file=sys.stderr)
