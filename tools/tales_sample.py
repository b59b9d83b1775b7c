"""Prints what a tales model writes, token by token through the same forward and paged cache as the engine.

    python tools/tales_sample.py --model jaxllm/builtin/tales --temperature 0.7 --seed 1 "Once upon a time"
"""
import argparse
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from jaxllm.checkpoint import open_checkpoint
from jaxllm.checkpoint.load import load_params
from jaxllm.models import decoder
from jaxllm.models.llama import RULES, read_config
from pallas_kernels.dispatch import SERVING
from pallas_kernels.ragged import Ragged, contiguous

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ("Once upon a time there was a king who had three daughters.", "The old woman looked at the boy and said:",
           "In a little hut by the sea there lived", "The dragon")


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def one_token(cfg, params, cache, token, position, table, slot):
    """Logits [V] after one token [1] at a position, and the cache with it."""
    ragged = Ragged(position, slot, position + 1, table, None)
    hidden, cache = decoder.forward(cfg, params, cache, token, ragged, kernels=SERVING)
    return decoder.unembed(cfg, params, hidden, kernels=SERVING)[0], cache


def draw(logits, key, temperature, top_p):
    """A token id: the likeliest at temperature 0, otherwise from the smallest set that holds top_p of the mass."""
    if temperature == 0:
        return int(logits.argmax())
    order = jnp.argsort(-logits)
    p = jax.nn.softmax(logits[order] / temperature)
    kept = jnp.where(jnp.cumsum(p) - p < top_p, p, 0)
    return int(order[jax.random.categorical(key, jnp.log(kept))])


def continuation(cfg, params, ids, key, *, temperature, top_p, tokens):
    """The token ids that follow ids, up to the end token or `tokens` of them."""
    layout, pages = contiguous(1, len(ids) + tokens, decoder.PAGE_SIZE)
    cache, new = decoder.empty_cache(cfg, pages, decoder.PAGE_SIZE, params.embedding.dtype), []
    for i in range(len(ids) + tokens):
        token = ids[i] if i < len(ids) else new[-1]
        logits, cache = one_token(cfg, params, cache, jnp.array([token]), layout.positions[i:i + 1], layout.block_tables,
                                  layout.slots[i:i + 1])
        if i + 1 >= len(ids):
            new.append(draw(logits, jax.random.fold_in(key, i), temperature, top_p))
            if new[-1] in cfg.eos_token_ids or len(new) == tokens:
                return new
    return new


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "jaxllm" / "builtin" / "tales")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("prompts", nargs="*", default=PROMPTS)
    args = parser.parse_args()
    cfg = read_config(json.loads((args.model / "config.json").read_text()))
    params = load_params(open_checkpoint(args.model), RULES, decoder.template(cfg, jnp.float32))
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    for prompt in args.prompts:
        ids = tokenizer.encode(prompt).ids
        new = continuation(cfg, params, ids, jax.random.key(args.seed), temperature=args.temperature, top_p=args.top_p,
                           tokens=args.tokens)
        print(f"--- {prompt}|{tokenizer.decode(new)}\n")


if __name__ == "__main__":
    main()
