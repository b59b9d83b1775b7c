"""A request on its way back: the engine's events folded into the answer that the caller sees."""
from jaxllm.engine.request import Request, TokenEvent, TokenLogprobs
from jaxllm.outputs import CompletionOutput, Logprob, RequestOutput
from jaxllm.text.stream import TextStream


class Answer:
    """The output of one request as far as it has come. tokenizer None: no text; eos_token_ids: tokens that end a text, which have no
    stop_reason."""

    def __init__(self, request: Request, prompt: str | None, tokenizer, eos_token_ids: tuple[int, ...]):
        p = request.params
        self._request, self._tokenizer, self._eos = request, tokenizer, () if p.ignore_eos else eos_token_ids
        outputs = [CompletionOutput(i, "", [], 0.0 if p.logprobs is not None else None, [] if p.logprobs is not None else None,
                                    logits_digests=[] if p.logits_digest else None)
                   for i in range(p.n)]
        self.output = RequestOutput(request.id, prompt, list(request.prompt), outputs, False, request.seed)
        self._streams = [TextStream(tokenizer, request.prompt, stop=p.stop, include_stop_str_in_output=p.include_stop_str_in_output,
                                    skip_special_tokens=p.skip_special_tokens,
                                    spaces_between_special_tokens=p.spaces_between_special_tokens, min_tokens=p.min_tokens)
                         if p.detokenize else None
                         for _ in range(p.n)]

    @property
    def request(self) -> Request:
        return self._request

    def take(self, event: TokenEvent) -> str:
        """Folds an event in; the new text. A choice that ends at a stop text is finished before the engine knows."""
        out, stream = self.output.outputs[event.choice], self._streams[event.choice]
        if out.finished():
            return ""
        if event.token is not None:
            out.token_ids.append(event.token)
        if event.logprobs is not None:
            out.cumulative_logprob += event.logprobs.logprob
            out.logprobs.append(self._logprobs(event.token, event.logprobs))
        if event.logits_digest is not None:
            out.logits_digests.append(event.logits_digest)
        if event.prompt_logprobs is not None:
            self.output.prompt_logprobs = [None] + [
                self._logprobs(token, lp) for token, lp in zip(self._request.prompt[1:], event.prompt_logprobs, strict=True)]
        self.output.num_cached_tokens = max(self.output.num_cached_tokens, event.cached_tokens)
        if event.finish_reason is not None:
            out.finish_reason, out.error = str(event.finish_reason), event.error
            out.stop_reason = None if event.stop_reason in self._eos else event.stop_reason
        delta = ""
        if stream is not None:
            left_out = event.token is None or event.finish_reason == "stop" and not self._request.params.include_stop_str_in_output
            delta = stream.push([] if left_out else [event.token], final=event.finish_reason is not None)
            out.text = stream.text
            if stream.stopped_by is not None:
                out.finish_reason, out.stop_reason, out.error = "stop", stream.stopped_by, None
        return delta

    def _logprobs(self, token: int, lp: TokenLogprobs) -> dict[int, Logprob]:
        text = self._tokenizer.token_text if self._tokenizer is not None else lambda _: None
        table = {token: Logprob(lp.logprob, lp.rank, text(token))}
        for rank, (other, logprob) in enumerate(lp.top, 1):
            if other != token:
                table[other] = Logprob(logprob, rank, text(other))
        return table
