"""Many prompts at once, as a script written for vLLM would do it: only the import differs."""
from jaxllm import LLM, SamplingParams

prompts = ["Once upon a time there was a king", "The old woman said", "In a dark forest", "The fox"]
params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=40)

if __name__ == "__main__":
    llm = LLM(model="builtin:tales")
    for output in llm.generate(prompts, params):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r} (seed {output.seed})")
