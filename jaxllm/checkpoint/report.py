"""The one error of a load that does not fit: what is missing, unexpected and wrong-shaped, long lists folded."""

import re
from collections.abc import Iterable

from jaxllm.checkpoint.rules import Match

GROUPS_SHOWN = 6


def mismatch_report(where: str, found: Match, misfits: Iterable[str]) -> str:
    """One line that names all that does not fit, layers folded into layers.{0..31}, and says what to do."""
    parts = []
    sections = (
        ("missing", found.missing),
        ("unexpected", found.unexpected),
        ("wrong shape or dtype", tuple(misfits)),
        ("filled twice or in part", found.clashes),
    )
    for title, items in sections:
        if items:
            groups = fold(items)
            shown = ", ".join(groups[:GROUPS_SHOWN]) + (f" and {len(groups) - GROUPS_SHOWN} more kinds" if len(groups) > GROUPS_SHOWN else "")
            parts.append(f"{len(items)} {title}: {shown}")
    prefix = f" (prefix {found.prefix!r} removed)" if found.prefix else ""
    return (
        f"the checkpoint {where} does not fit the model{prefix}: {'; '.join(parts)}; "
        "check that config.json belongs to these weights, or that a tensor is not of another model"
    )


def fold(items: Iterable[str]) -> list[str]:
    """Names that differ in numbers alone as one, such as layers.{0..31}.mlp.up (32), in order of first sight."""
    groups: dict[str, list[str]] = {}
    for item in items:
        groups.setdefault(re.sub(r"(?<![\w\[])\d+(?=\.)", "#", item), []).append(item)
    folded = []
    for pattern, members in groups.items():
        if len(members) == 1:
            folded.append(members[0])
            continue
        columns = list(zip(*(re.findall(r"(?<![\w\[])\d+(?=\.)", member) for member in members), strict=True))
        text = pattern
        for column in columns:
            numbers = sorted({int(number[:18]) for number in column})
            text = text.replace("#", str(numbers[0]) if len(numbers) == 1 else f"{{{numbers[0]}..{numbers[-1]}}}", 1)
        folded.append(f"{text} ({len(members)})")
    return folded
