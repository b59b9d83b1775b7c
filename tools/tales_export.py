"""Writes a trained `builtin:tales` as a Hugging Face folder: weights in bfloat16, configs, tokenizer and model card."""
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tales_tokenizer import END

from jaxllm.checkpoint.rules import Rule
from jaxllm.models.llama import RULES

GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LARGEST = 12_000_000  # bytes of the whole folder

TITLES = {"11": "Alice's Adventures in Wonderland (Lewis Carroll)", "1597": "Andersen's Fairy Tales",
          "7885": "Celtic Fairy Tales (Joseph Jacobs)", "7439": "English Fairy Tales (Joseph Jacobs)",
          "2591": "Grimms' Fairy Tales (translated by Edgar Taylor and Marian Edwardes)",
          "7128": "Indian Fairy Tales (Joseph Jacobs)", "14241": "More English Fairy Tales (Joseph Jacobs)",
          "55": "The Wonderful Wizard of Oz (L. Frank Baum)"}


def published_names(layers: int) -> dict[str, str]:
    """The Hugging Face name of each leaf path, from the rules that read it back."""
    return {rule.target.format(i=i): rule.source.format(i=i) for rule in RULES if isinstance(rule, Rule) for i in range(layers)}


def title(book: str) -> str:
    """A book's title from its file name, name-of-the-book-NUMBER.txt."""
    name, _, number = book.removesuffix(".txt").rpartition("-")
    return TITLES.get(number) or name.replace("-", " ").title() + " (Andrew Lang)"


def export(out: Path, config, params, tokenizer, card: dict) -> None:
    """Fills `out`; raises SystemExit when it would hold more than LARGEST bytes."""
    out.mkdir(parents=True, exist_ok=True)
    names = published_names(config["num_hidden_layers"])
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    tensors = {names[jax.tree_util.keystr(path, simple=True, separator=".")]: np.asarray(leaf.astype(jnp.bfloat16))
               for path, leaf in leaves}
    # The runs behind the weights travel with them, so that a run that goes on from here can tell the whole story.
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt", "runs": json.dumps(card["runs"])})
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"))
    write = {
        "config.json": config,
        "generation_config.json": GENERATION,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END, "pad_token": END,
            "model_max_length": config["max_position_embeddings"], "clean_up_tokenization_spaces": False},
        "special_tokens_map.json": {"bos_token": END, "eos_token": END, "pad_token": END},
    }
    for name, content in write.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    parameters = sum(leaf.size for _, leaf in leaves)
    (out / "README.md").write_text(model_card(config, parameters, card), encoding="utf-8")
    size = sum(file.stat().st_size for file in out.iterdir())
    if size > LARGEST:
        raise SystemExit(f"{out} holds {size} bytes, allowed are {LARGEST}")


def model_card(config, parameters: int, card: dict) -> str:
    """The README.md of the folder: what the model is, what it learned from, how well, how to make it again, and its limits."""
    rows = []
    for name, (nats, tokens, size) in card["held_out"].items():
        rows.append(f"| {title(name)} | {tokens:,} | {nats:.3f} | {nats * tokens / size / math.log(2):.3f} |")
    books = "\n".join(f"- {title(name)}" for name in card["books"])
    runs = card["runs"]
    commands = "\n".join(
        f"    python tools/train_tales.py --corpus FOLDER_OF_BOOKS --steps {run['steps']} --seed {run['seed']} --peak {run['peak']} "
        f"--work build/run{i} --out run{i}" + (f" --init run{i - 1}" if i > 1 else "") for i, run in enumerate(runs, 1))
    history = "\n".join(
        f"| {i} | {run['steps']} | {run['step']} | {run['held_out']:.3f} | {run['step'] * card['batch_tokens'] / card['tokens']:.1f} | "
        f"{run['minutes']:.0f} | {run.get('note', '')} |" for i, run in enumerate(runs, 1))
    return CARD.format(
        parameters=parameters, layers=config["num_hidden_layers"], width=config["hidden_size"], mlp=config["intermediate_size"],
        long_percent=card["long_percent"], commands=commands, history=history, short=card["rows"][0], long=card["rows"][1],
        batch=card["batch_tokens"], peak=runs[-1]["peak"],
        heads=config["num_attention_heads"], kv=config["num_key_value_heads"], head=config["head_dim"],
        vocab=config["vocab_size"], context=config["max_position_embeddings"], end=END, books=books, rows="\n".join(rows),
        tales=card["tales"], tokens=card["tokens"], hash=card["sha256"],
        held="` and `".join(card["held_out"]), temperature=GENERATION["temperature"], top_p=GENERATION["top_p"])


CARD = """---
license: apache-2.0
language: en
pipeline_tag: text-generation
---
# tales

A language model of {parameters:,} parameters that continues fairy tales in English. It ships with jaxllm as `builtin:tales`, so
that a first command, a test or a demonstration has a real model without a download.

    jaxllm generate "Once upon a time there was a king who had three daughters."

## What it is

A `LlamaForCausalLM`: {layers} layers of width {width} (MLP {mlp}), {heads} query and {kv} key/value heads of {head}, rotary
positions, {vocab} tokens, embedding and output shared, {context} tokens of context, weights in bfloat16.

The tokenizer is a byte-level BPE of {vocab} tokens trained on the same tales; it can write any text. `{end}` (token 0)
stands before every tale of the training text, so it both begins and ends a text: the tokenizer puts it before a prompt,
as the training did, and the model writes it when a tale is over. Suggested sampling: temperature {temperature},
top_p {top_p} (`generation_config.json`).

## What it learned from

{tales} tales, {tokens:,} tokens, from books published before 1929 and in the public domain:

{books}

The books were cut at their headings into tales. Titles, tables of contents, prefaces, notes, footnote marks and italics
were dropped, wrapped lines joined into paragraphs (separated by an empty line; verses keep their lines), and dialogue put between
double quotes in every book. `tools/tales_text.py` does it; the cleaned text hashes to {hash}.

## How well

Two books were never seen in training. Loss on their cleaned text, with the weights as shipped (rounded to bfloat16) and sums
in float32, in separate windows of {long} tokens:

| held-out book | tokens | nats per token | bits per byte |
|---|---|---|---|
{rows}

## How to make it again

    pip install -e ".[train]"
{commands}

Each step takes {batch:,} tokens in rows of {short}, the last {long_percent} % of the steps in rows of {long}; Muon for the layers'
matrices, AdamW for the embedding and the norms; the rate rises to {peak}, stays there, and falls over the last third as a cosine
to a twentieth; weight decay 0.1, gradients clipped to norm 1, no dropout. A run that goes on from another's weights starts
with a fresh optimizer and a fresh schedule. The step with the lowest loss on a sample of the held-out books is kept:

| run | steps | kept | held-out | passes over the text | minutes, on a share of 2 CPU cores | |
|---|---|---|---|---|---|---|
{history}

That choice and the choice of Muon are all that those books influenced. They are
`{held}`.
The loss goes through `jaxllm.models.decoder.forward`, the function that serves.

## What it is not for

It knows tales and nothing else: no facts, no instructions, no chat, no language but English. Its sentences are grammatical more
often than its plots hold together; it forgets who is who within a page, and it can repeat phrases of the books it learned from.
The books are of their time, and so are their kings, stepmothers, strangers and villains: what the model writes carries the
same prejudices. Do not use it where an answer has to be right, or unread by children.
"""
