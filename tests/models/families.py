"""What the tests of goldens and the live parity tests share: jaxllm's side of a comparison."""
import functools

import jax
import numpy as np

from jaxllm import LLM, SamplingParams
from jaxllm.loading import load_model
from jaxllm.models import decoder

TOLERANCE = 1e-4  # of logits of about 10: float32 keeps 1e-6 of that, and two or three layers of sums add up


def load(folder, *, overrides: dict | None = None, max_model_len: int | None = None):
    """The model of a folder in float32."""
    return load_model(str(folder), dtype="float32", hf_overrides=overrides, max_model_len=max_model_len)


@functools.partial(jax.jit, static_argnums=0)
def _logits(cfg, params, tokens):
    return decoder.unembed(cfg, params, decoder.whole(cfg, params, tokens[None])[0])


def logits_of(model, prompt, room: int = 64) -> np.ndarray:
    """Logits float32 [T, V] of a sequence, through the model as a function.

    The sequence is padded by `room`, so that one compiled program serves the prompt and what `greedy` adds to it.
    """
    tokens = np.zeros(len(prompt) + room, np.int32)
    tokens[:len(prompt)] = prompt
    return np.asarray(_logits(model.cfg, model.params, tokens))[:len(prompt)]


def greedy(model, prompt, count: int = 64) -> list[int]:
    """`count` greedy tokens after the prompt, each from a pass over the whole sequence."""
    tokens = list(prompt)
    for left in range(count, 0, -1):
        tokens.append(int(logits_of(model, tokens, left)[-1].argmax()))
    return tokens[len(prompt):]


def through_the_engine(folder, prompt, count: int = 64) -> tuple[list[int], list[float]]:
    """`count` greedy tokens and their logprobs from LLM.generate, the prompt prefilled in chunks of 32."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=0, detokenize=False)
    with LLM(str(folder), dtype="float32", skip_tokenizer_init=True, max_model_len=len(prompt) + count, max_num_seqs=2,
             max_num_batched_tokens=32, kv_cache_memory_bytes=2 ** 23) as llm:
        output = llm.generate({"prompt_token_ids": list(map(int, prompt))}, params)[0].outputs[0]
    tokens = list(output.token_ids)
    return tokens, [step[token].logprob for step, token in zip(output.logprobs, tokens, strict=True)]
