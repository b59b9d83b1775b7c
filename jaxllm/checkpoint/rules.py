"""Rules that carry tensors of a checkpoint to leaves of a parameter pytree, as data: source, target, transform.

    RULES = (
        Rule("model.embed_tokens.weight", "embed"),
        Rule("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attention.q"),
        Rule("model.layers.{i}.self_attn.qkv_proj.weight", "layers.{i}.attention.k", Slice(0, 3072, 4096)),
        Rule("model.layers.{i}.mlp.experts.{e}.w1.weight", "layers.{i}.moe.gate", Stack()),
        Ignore("model.layers.{i}.self_attn.rotary_emb.inv_freq"),
    )

`{i}` stands for one whole integer component. One source may feed several targets (each takes a slice); several sources
may feed one target, as a tuple of patterns with Concat, or through a placeholder that the target lacks with Stack.
`match` resolves rules against names; it reads no data and never imports jax.
"""

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import product

from jaxllm.checkpoint.transforms import Concat, Identity, Reshape, Slice, Stack, Transform, Transpose, chain_of

__all__ = ["Concat", "Identity", "Ignore", "Match", "Reshape", "Rule", "Slice", "Stack", "Transform", "Transpose", "match"]

log = logging.getLogger("jaxllm.checkpoint")
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Rule:
    """One line of a weight table.

    `transform` is one transform or a tuple of them, applied left to right; a Concat or Stack comes last. `optional`:
    the template may lack the target, and the source is then left out by this rule's name (an lm_head that is tied).
    """

    source: str | tuple[str, ...]
    target: str
    transform: Transform | tuple[Transform, ...] = Identity()
    optional: bool = False

    def __post_init__(self):
        chain = chain_of(self.transform)
        joins = [step for step in chain if isinstance(step, Concat | Stack)]
        extra = set(PLACEHOLDER.findall("".join(self.sources))) - set(PLACEHOLDER.findall(self.target))
        if any(set(PLACEHOLDER.findall(source)) != set(PLACEHOLDER.findall(self.sources[0])) for source in self.sources):
            raise ValueError(f"{self}: all sources need the same placeholders")
        if set(PLACEHOLDER.findall(self.target)) - set(PLACEHOLDER.findall(self.sources[0])):
            raise ValueError(f"{self}: the target has a placeholder that no source fills")
        if joins and (len(joins) > 1 or chain[-1] is not joins[0]):
            raise ValueError(f"{self}: a Concat or Stack comes once, and last")
        if (len(self.sources) > 1) != any(isinstance(step, Concat) for step in joins):
            raise ValueError(f"{self}: several source patterns and Concat go together")
        if len(extra) != (1 if any(isinstance(step, Stack) for step in joins) else 0):
            raise ValueError(f"{self}: Stack needs exactly one placeholder that the target lacks, and nothing else may have one")

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.source,) if isinstance(self.source, str) else tuple(self.source)


@dataclass(frozen=True)
class Ignore:
    """Source tensors that are deliberately not used; `{i}` is an integer, `*` part of a component, `**` anything."""

    pattern: str

    def matches(self, name: str) -> bool:
        return _ignore_regex(self.pattern).fullmatch(name) is not None


# What trainers save beside the weights in one file; these top-level keys and everything under them are left out by name.
TRAINING_STATE = tuple(
    Ignore(f"{key}{under}")
    for key in ("optimizer", "optimizer_*", "optimizers", "optim", "optim_*", "opt_state", "*scheduler", "*schedulers", "*scheduler_*")
    + ("scaler", "scaler_*", "grad_scaler", "*rng_state", "*rng_states", "*rng_tracker_*", "callbacks", "loops", "epoch", "step")
    + ("global_step", "global_steps", "iteration", "iter", "loss", "best_loss", "best_*metric", "lr", "learning_rate")
    for under in (".**", "")
)
# Tables of the rotary embedding that older code saved as buffers, under whatever module held them. They are computed from the
# config; transformers and vLLM leave them out as well.
ROTARY_BUFFERS = tuple(
    Ignore(f"{under}{module}.{buffer}")
    for module in ("rotary_emb", "rotary_embedding", "rotary_pos_emb", "rotary", "rope")
    for buffer in ("inv_freq", "original_inv_freq", "long_inv_freq", "cos_cached", "sin_cached", "cos", "sin", "freqs", "freqs_cis", "cos_sin_cache")
    for under in ("**.", "")
)
LEFT_OUT = TRAINING_STATE + ROTARY_BUFFERS


@dataclass(frozen=True)
class Fill:
    """One target leaf, the source tensors that fill it in order, and the transforms between."""

    target: str
    sources: tuple[str, ...]
    chain: tuple[Transform, ...]


@dataclass(frozen=True)
class Match:
    """The outcome of matching: what fills what, what was ignored by which pattern, and what fits nowhere."""

    fills: tuple[Fill, ...]
    ignored: Mapping[str, str]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    clashes: tuple[str, ...] = ()
    prefix: str = ""
    variants: Mapping[str, str] = field(default_factory=dict)


def match(rules: Iterable[Rule | Ignore], names: Iterable[str], targets: Iterable[str]) -> Match:
    """How `names` fill `targets` under `rules`, prefixes of wrappers found and named in the log; nothing is raised."""
    rules, names, targets = tuple(rules), tuple(names), tuple(targets)
    table = _Table(tuple(rule for rule in rules if isinstance(rule, Rule)))
    strip, add = _prefix(table, names)
    ignores = tuple(rule for rule in rules if isinstance(rule, Ignore))
    wanted, parts = set(targets), {}
    ignored, unexpected, variants = {}, [], {}
    for name in names:
        forms = _forms(name, strip, add)
        known = next((form for form in forms if form in table), None)
        if known is None:
            by = next((rule.pattern for rule in ignores if any(rule.matches(form) for form in forms)), None)
            by = by or next((rule.pattern for rule in LEFT_OUT for form in _unwrapped(name, strip) if rule.matches(form)), None)
            if by is None:
                unexpected.append(name)
            else:
                ignored[name] = by
            continue
        variants[name] = known
        used = False
        for rule, position, values in table[known]:
            target = _substitute(rule.target, values)
            if target in wanted:
                order = (position, *(values[key] for key in values if key not in PLACEHOLDER.findall(rule.target)))
                parts.setdefault(target, {}).setdefault(rule, []).append((order, name))
                used = True
        if not used:
            optional = next((rule for rule, _, _ in table[known] if rule.optional), None)
            if optional is None:
                unexpected.append(name)
            else:
                ignored[name] = f"{known} (its target is not in this model)"
    fills, clashes = [], []
    for target, by_rule in parts.items():
        if len(by_rule) > 1:
            clashes.append(f"{target} is filled by {_and(entries[0][1] for entries in by_rule.values())}")
        rule, entries = next(iter(by_rule.items()))
        entries.sort()
        orders = [order for order, _ in entries]
        if len(set(orders)) < len(orders):
            clashes.append(f"{target} is filled by {_and(name for _, name in entries)}")
        elif len(rule.sources) > len(orders) or (len(orders[0]) > 1 and [order[1] for order in orders] != list(range(len(orders)))):
            clashes.append(f"{target} lacks parts: only {_and(name for _, name in entries)} of {_and(rule.sources)}")
        fills.append(Fill(target, tuple(name for _, name in entries), chain_of(rule.transform)))
    missing = tuple(target for target in targets if target not in parts)
    changes = [f"{prefix!r} {verb}" for prefix, verb in ((strip, "removed"), (add, "added")) if prefix]
    if changes:
        log.info("tensor names are read with the prefix %s", " and ".join(changes))
    for pattern, count in Counter(ignored.values()).items():
        log.info("%d tensors ignored by rule %s", count, pattern)
    return Match(tuple(fills), ignored, missing, tuple(unexpected), tuple(clashes), strip, variants)


def sources(rules: Iterable[Rule | Ignore], names: Iterable[str], targets: Iterable[str]) -> dict[str, str]:
    """For each of these targets, which one tensor each fills, the name that does; without those that none fills."""
    names = tuple(names)
    table = _Table(tuple(rule for rule in rules if isinstance(rule, Rule)))
    strip, add = _prefix(table, names)
    found = {}
    for name in names:
        known = next((form for form in _forms(name, strip, add) if form in table), None)
        found |= {rule.target: name for rule, _, _ in table[known] if rule.target in targets} if known else {}
    return found


class _Table:
    """Names to the rules that read them, without trying every pattern on every name (18k names in a large MoE)."""

    def __init__(self, rules: tuple[Rule, ...]):
        self.entries: dict[str, list[tuple[Rule, int, tuple[str | None, ...]]]] = {}
        self.heads: Counter[str] = Counter()
        for rule in rules:
            for position, source in enumerate(rule.sources):
                pieces = source.split(".")
                keys = tuple(_placeholder(piece, rule) for piece in pieces)
                shape = ".".join("{}" if key else piece for key, piece in zip(keys, pieces, strict=True))
                self.entries.setdefault(shape, []).append((rule, position, tuple(key for key in keys if key)))
                if len(pieces) > 1 and not keys[0]:
                    self.heads[pieces[0]] += 1

    def __contains__(self, name: str) -> bool:
        return bool(self[name])

    def __getitem__(self, name: str) -> list[tuple[Rule, int, dict[str, int]]]:
        pieces = name.split(".")
        numbers = [index for index, piece in enumerate(pieces) if piece.isascii() and piece.isdigit()][:4]
        found = []
        for wild in product((True, False), repeat=len(numbers)):
            shown = list(pieces)
            values = []
            for index, is_wild in zip(numbers, wild, strict=True):
                if is_wild:
                    values.append(int(pieces[index][:18]))
                    shown[index] = "{}"
            for rule, position, keys in self.entries.get(".".join(shown), ()):
                pairs = list(zip(keys, values, strict=True))
                if all(dict(pairs)[key] == value for key, value in pairs):  # a placeholder named twice means one number
                    found.append((rule, position, dict(pairs)))
            if found:
                break
        return found


def _placeholder(piece: str, rule: Rule) -> str | None:
    whole = PLACEHOLDER.fullmatch(piece)
    if whole is None and ("{" in piece or "}" in piece):
        raise ValueError(f"{rule}: a placeholder is a whole component, such as layers.{{i}}.mlp")
    return whole[1] if whole else None


def _forms(name: str, strip: str, add: str) -> tuple[str, ...]:
    stripped = name.removeprefix(strip)
    return tuple(dict.fromkeys((add + stripped, stripped, name)))


def _unwrapped(name: str, strip: str) -> list[str]:
    """The name, and what is left of it without the outer parts of the prefix: training state lies beside the model."""
    forms = [name]
    for piece in re.findall(r"[^.]+\.", strip):
        if not forms[-1].startswith(piece):
            break
        forms.append(forms[-1].removeprefix(piece))
    return forms


def _prefix(table: _Table, names: tuple[str, ...]) -> tuple[str, str]:
    """The (removed, added) prefix under which most names are known; ("", "") wins ties, shorter prefixes win next.

    Prefixes to remove are the heads seen in the names, up to four components (state_dict.model.module.model.);
    prefixes to add are the heads of the rules ("model." when a base model was saved without its head).
    """
    score: Counter[tuple[str, str]] = Counter({("", ""): sum(name in table for name in names)})
    if score["", ""] == len(names):
        return "", ""
    adds = ("", *(f"{head}." for head, count in table.heads.items() if count > 1))
    for name in names:
        pieces = name.split(".")
        for depth in range(min(5, len(pieces))):
            strip = "".join(f"{piece}." for piece in pieces[:depth])
            for add in adds:
                if (strip or add) and strip != add and add + name[len(strip) :] in table:
                    score[strip, add] += 1
    # Names that need no prefix stay known whichever is chosen, so a prefix is worth what it adds or replaces.
    best = max(score.values())
    return min((pair for pair, count in score.items() if count == best), key=lambda pair: (len(pair[0]) + len(pair[1]), pair))


def _substitute(pattern: str, values: Mapping[str, int]) -> str:
    return PLACEHOLDER.sub(lambda found: str(values[found[1]]), pattern)


@cache
def _ignore_regex(pattern: str) -> re.Pattern:
    pieces = re.split(r"(\{\w+\}|\*\*|\*)", pattern)
    wild = {"**": ".*", "*": "[^.]*"}
    return re.compile("".join(wild.get(piece) or (r"\d+" if PLACEHOLDER.fullmatch(piece) else re.escape(piece)) for piece in pieces))


def _and(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
