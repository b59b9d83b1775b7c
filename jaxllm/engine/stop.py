"""When a sequence of tokens ends. Stop texts are found by whoever turns tokens into text. No jax here."""
from jaxllm.engine.request import FinishReason, Sequence


def finish_reason(sequence: Sequence, token: int) -> tuple[FinishReason, int | None] | None:
    """Why the sequence ends with `token`, its newest, and which stop token it was; None if it goes on."""
    request = sequence.request
    if token in request.stop_ids and sequence.output_count >= request.params.min_tokens:
        return FinishReason.STOP, token
    if len(sequence.tokens) >= request.max_total:
        return FinishReason.LENGTH, None
    return None


def banned_next(sequence: Sequence) -> set[int]:
    """Tokens that may not be drawn next: ends under min_tokens, and the last tokens of bad words whose start is there."""
    request = sequence.request
    banned = set(request.stop_ids) if sequence.output_count < request.params.min_tokens else set()
    output = sequence.tokens[len(request.prompt):]
    for *start, last in request.banned:
        if not start or output[-len(start):] == start:
            banned.add(last)
    return banned
