"""When a sequence of tokens ends, and why it cannot go on. Stop texts are found by whoever turns tokens into text. No jax here."""
from jaxllm.engine.request import Fault, FinishReason, Sequence


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


def fault_message(sequence: Sequence, fault: int, position: int | None = None) -> str:
    """What a request is told whose next token cannot be drawn; `position` of the prompt instead, where that was scored."""
    p = sequence.request.params
    where = f"at token {sequence.output_count} of the output" if position is None else f"at token {position} of the prompt"
    if fault == Fault.LOGITS:
        return f"{where} the model's logits are not finite; look for NaN and infinity in its weights, or choose a dtype of wider range"
    if fault == Fault.OVERFLOW:
        return (f"{where} the model's logits are finite, and with repetition_penalty={p.repetition_penalty} and "
                f"temperature={p.temperature} no longer; choose values nearer to 1")
    given = {"allowed_token_ids": p.allowed_token_ids is not None, "bad_words": bool(p.bad_words),
             "min_tokens": sequence.output_count < p.min_tokens}
    return f"{where} no token is left to draw: {' with '.join(name for name, is_given in given.items() if is_given)} leaves none; allow more"
