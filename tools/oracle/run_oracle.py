"""What transformers on torch says of a checkpoint: logits and greedy tokens, in float32, with eager attention.

    run_oracle.py FOLDER PROMPTS.json OUT.npz [FOLDER PROMPTS.json OUT.npz]... [--tokens 64]

PROMPTS.json is a list of lists of token ids. OUT.npz holds for the i-th prompt logits_i float32 [T, V] and tokens_i [64].
"""
import argparse
import json

import numpy as np
import torch
import transformers
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.llama import modeling_llama


def load(folder: str) -> torch.nn.Module:
    """The model of a folder in float32 with eager attention.

    transformers gives its Llama no partial rotation. Its GLM has one with the same halves, so that is lent to Llama.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    if (config.rope_parameters or {}).get("partial_rotary_factor", 1.0) != 1.0:
        modeling_llama.apply_rotary_pos_emb = modeling_glm4_moe.apply_rotary_pos_emb
        partial = modeling_glm4_moe.Glm4MoeRotaryEmbedding.compute_default_rope_parameters
        modeling_llama.LlamaRotaryEmbedding.compute_default_rope_parameters = staticmethod(partial)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits_of(model: torch.nn.Module, prompt: list[int]) -> np.ndarray:
    """Logits float32 [T, V] of a prompt."""
    return model(torch.tensor([prompt]), use_cache=False).logits[0].float().numpy()


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int], count: int) -> tuple[np.ndarray, float]:
    """`count` greedy tokens through the cached generation, and the smallest lead of a winner over the second."""
    ids, cache, tokens, lead = torch.tensor([prompt]), None, [], float("inf")
    for _ in range(count):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache, (first, second) = out.past_key_values, out.logits[0, -1].topk(2).values
        lead = min(lead, float(first - second))
        tokens.append(int(out.logits[0, -1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return np.array(tokens, np.int32), lead


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("triples", nargs="+", metavar="FOLDER PROMPTS.json OUT.npz")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    if len(args.triples) % 3:
        parser.error("FOLDER, PROMPTS.json and OUT.npz come in threes")
    for folder, prompts, out in zip(args.triples[::3], args.triples[1::3], args.triples[2::3]):
        model, answers = load(folder), {}
        with open(prompts, encoding="utf-8") as file:
            for i, prompt in enumerate(json.load(file)):
                answers[f"logits_{i}"] = logits_of(model, prompt)
                if args.tokens:
                    answers[f"tokens_{i}"] = greedy(model, prompt, args.tokens)[0]
        np.savez(out, **answers)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
