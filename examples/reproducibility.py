"""The same requests four ways, the same bits: in one call, reversed, one by one, and in a crowd.

The user's own random state is left alone: the two numbers are those that `random` gives without jaxllm.
"""
import dataclasses
import random

from jaxllm import LLM, SamplingParams

prompts = ["Once upon a time", "The king said", "A little girl", "Far away in a wood"]
params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=32, logprobs=0)


def bits(output):
    """Tokens and logprobs of an output, exactly."""
    choice = output.outputs[0]
    return choice.token_ids, [row[token].logprob.hex() for token, row in zip(choice.token_ids, choice.logprobs)]


if __name__ == "__main__":
    random.seed(42)
    expected = [random.random() for _ in range(2)]
    random.seed(42)
    before = random.random()
    llm = LLM("builtin:tales", seed=42)
    together = llm.generate(prompts, params)
    seeded = [dataclasses.replace(params, seed=o.seed) for o in together]  # each answer says the seed that replays it
    reverse = llm.generate(prompts[::-1], seeded[::-1])[::-1]
    alone = [llm.generate(prompt, p)[0] for prompt, p in zip(prompts, seeded)]
    crowd = llm.generate(prompts + ["The fox went"] * 12, seeded + [params] * 12)[:len(prompts)]
    for output in together:
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
    for name, outputs in (("reversed", reverse), ("one by one", alone), ("in a crowd", crowd)):
        assert [bits(o) for o in outputs] == [bits(o) for o in together], name
        print(f"{name}: the same tokens and logprob bits")
    assert [before, random.random()] == expected
    print("random numbers of the user's own:", expected)
