"""Sampling and training in one JAX program: REINFORCE on the built-in model, with no mismatch between sampler and trainer.

At each step the engine samples, the plain function `jaxllm.logprobs` scores the same tokens, and the two are asserted to be
the same bits before the gradient of that function moves the weights. The reward is the share of tokens that hold a letter.
"""
import jax
import jax.numpy as jnp

import jaxllm
from jaxllm import LLM, SamplingParams

LEARNING_RATE, LENGTH, CHOICES, STEPS = 3e-3, 12, 4, 3


def reward(text, letter="e"):
    """The share of characters that are `letter`."""
    return text.count(letter) / max(len(text), 1)


def loss(params, cfg, sequences, start, advantages):
    """Minus the advantage-weighted log-probability of the sampled tokens, and those log-probabilities."""
    scores = [jaxllm.logprobs((cfg, params), ids)[start:] for ids in sequences]
    return -sum(a * s.sum() for a, s in zip(advantages, scores)) / len(sequences), scores


if __name__ == "__main__":
    llm = LLM("builtin:tales", dtype="float32", max_num_seqs=8)
    for step in range(STEPS):
        sampling = SamplingParams(n=CHOICES, max_tokens=LENGTH, temperature=1.0, logprobs=0, ignore_eos=True, seed=step)
        output = llm.generate("Once upon a time", sampling)[0]
        rewards = jnp.array([reward(o.text) for o in output.outputs])
        sequences = [jnp.array(output.prompt_token_ids + o.token_ids) for o in output.outputs]
        start = len(output.prompt_token_ids)
        (_, scores), gradient = jax.value_and_grad(loss, has_aux=True)(
            llm.params, llm.model_config, sequences, start, rewards - rewards.mean())
        for score, o in zip(scores, output.outputs):
            assert score.tolist() == [row[t].logprob for t, row in zip(o.token_ids, o.logprobs)], "sampler and trainer differ"
        llm.update_params(jax.tree.map(lambda w, g: w - LEARNING_RATE * g, llm.params, gradient))
        print(f"step {step}: reward {rewards.mean():.3f}, sampler and trainer agree to the bit on {CHOICES * LENGTH} tokens")
