"""Trains `builtin:tales`, the small Llama that ships with jaxllm, and writes it as a Hugging Face folder.

    python tools/train_tales.py --corpus ../shared/corpus --minutes 75
    python tools/train_tales.py --init jaxllm/builtin/tales --seed 1 --steps 2000   # go on from weights, with a fresh schedule
    python tools/train_tales.py --minutes 0        # only export what the checkpoint holds

The loss goes through `jaxllm.models.decoder.whole` and `unembed`: the forward that serves is the forward that learns. A
run that was stopped goes on from its checkpoint. The seed and the number of steps fix the start, the order of the data and
the rates.
"""
import argparse
import dataclasses
import functools
import hashlib
import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, muon
from safetensors import safe_open
from tales_export import export
from tales_text import read_tales
from tales_tokenizer import END, train_tokenizer

from jaxllm import load_params
from jaxllm.models import decoder
from jaxllm.models.llama import read_config
from pallas_kernels.dispatch import REFERENCE

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = ("the-lilac-fairy-book-3454.txt", "the-wonderful-wizard-of-oz-55.txt")
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "vocab_size": 4096, "hidden_size": 256,
    "intermediate_size": 768, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False, "initializer_range": 0.02,
    "bos_token_id": 0, "eos_token_id": 0, "use_cache": True,
}
BATCH_TOKENS = 4096      # of one step
SHORT, LONG = 512, 1024  # tokens in a row: most steps, and the last ones, which reach every position
LONG_FROM = 0.85
PLATEAU = 0.65           # of the steps, at the highest learning rate
QUERY_BLOCK = 256        # queries that share one product with the keys up to theirs
PROBE_ROWS = 32          # rows of LONG tokens of the held-out books that choose the best step
EVERY = 100              # steps between two looks at them


def attend_whole(q, k, v, k_pages, v_pages, ragged, *, scale, window, softcap):
    """What `reference.attend` gives for `contiguous` sequences without window or softcap, in fewer operations.

    Keys are taken as they come and never pass through pages, so nothing is gathered, nor scattered in the backward pass:
    2,700 tokens/s where the reference kernels give 1,300 (this model, 16 x 256 tokens, 2 cores).
    """
    tokens, heads, width = q.shape
    batch, kv_heads = ragged.block_tables.shape[0], k.shape[1]
    length, group = tokens // batch, heads // kv_heads
    q = q.reshape(batch, length, kv_heads, group, width).transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    k = k.reshape(batch, length, kv_heads, width).swapaxes(1, 2)                   # [B, K, T, H]
    v = v.reshape(batch, length, kv_heads, width).swapaxes(1, 2)
    outs = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        score = jnp.einsum("bkgqh,bklh->bkgql", q[:, :, :, start:end], k[:, :, :end])
        seen = jnp.arange(end) <= jnp.arange(start, end)[:, None]
        p = jax.nn.softmax(jnp.where(seen, score * scale, -1e30), axis=-1)
        outs.append(jnp.einsum("bkgql,bklh->bkgqh", p, v[:, :, :end]))
    out = jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)
    return out.reshape(tokens, heads, width), k_pages, v_pages


def rms_norm(x, weight, eps):
    """What `reference.rms_norm` gives in float32, up to the order of its sum."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * weight


TRAINING = dataclasses.replace(REFERENCE, name="training", attend=attend_whole, rms_norm=rms_norm)


def losses(cfg, params, rows, kernels=TRAINING):
    """-log p float32 [B * T] of the tokens that follow each of rows[:, :-1], for rows int32 [B, T + 1]."""
    hidden = decoder.whole(cfg, params, rows[:, :-1], kernels=kernels)
    logits = decoder.unembed(cfg, params, hidden.reshape(-1, hidden.shape[-1]), kernels=kernels)
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, rows[:, 1:].reshape(-1, 1), 1)[:, 0]


def initial(cfg, seed):
    """float32 weights: normal with 0.02, the two projections that write to the residual stream narrower by depth."""
    narrow = 0.02 / math.sqrt(2 * len(cfg.layers))
    leaves, tree = jax.tree_util.tree_flatten_with_path(decoder.template(cfg, jnp.float32))
    made = []
    for i, (path, leaf) in enumerate(leaves):
        name = jax.tree_util.keystr(path)
        key = jax.random.fold_in(jax.random.key(seed), i)
        scale = narrow if ".o.weight" in name or ".down.weight" in name else 0.02
        made.append(jnp.ones(leaf.shape) if leaf.ndim == 1 else scale * jax.random.normal(key, leaf.shape))
    return tree.unflatten(made)


def plateau_end(steps):
    """The step from which a run of `steps` depends on their number; until then a run can still be given another."""
    return int(steps * PLATEAU)


def starting_weights(cfg, args):
    """Fresh weights, or those of `--init` in float32."""
    if args.init is None:
        return initial(cfg, args.seed)
    if not (args.init / "tokenizer.json").is_file():
        raise SystemExit(f"{args.init} is no folder with a model and its tokenizer.json")
    if (args.init / "tokenizer.json").read_bytes() != (args.work / "tokenizer.json").read_bytes():
        raise SystemExit(f"{args.init} has another tokenizer than this corpus gives")
    held, params = load_params(str(args.init), dtype="float32")
    if held.layers != cfg.layers or jax.tree.map(jnp.shape, params) != jax.tree.map(jnp.shape, decoder.template(cfg, jnp.float32)):
        raise SystemExit(f"{args.init} has another shape than CONFIG")
    return params


def earlier_runs(folder):
    """What the weights of `folder` say of the runs that made them; [] without a folder."""
    if folder is None:
        return []
    with safe_open(folder / "model.safetensors", "numpy") as file:
        return json.loads(file.metadata().get("runs", "[]"))


def optimizer(steps, peak, kind="muon"):
    """A warm-up, a plateau, and a cosine to a twentieth over the last third; gradients clipped to norm 1; weight decay.

    Muon (Jordan 2024) for the layers' matrices, with updates scaled to AdamW's size, and AdamW for embedding and norms:
    held-out 4.99 after 60 steps, where AdamW alone gives 5.94.
    """
    def rate(count):
        fall = jnp.clip((count - plateau_end(steps)) / (steps - plateau_end(steps)), 0, 1)
        return peak * jnp.minimum(count / min(100, steps // 10), 1) * (0.525 + 0.475 * jnp.cos(jnp.pi * fall))

    if kind == "adamw":
        inner = optax.adamw(rate, b2=0.95, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    else:
        def dimensions(params):
            return dataclasses.replace(
                jax.tree.map(lambda x: MuonDimensionNumbers() if x.ndim == 2 else None, params), embedding=None)
        inner = muon(rate, weight_decay=0.1, consistent_rms=0.2, adam_b2=0.95, adam_weight_decay=0.0,
                     muon_weight_dimension_numbers=dimensions)
    return optax.chain(optax.clip_by_global_norm(1.0), inner)


def batch_at(stream, step, steps, seed):
    """int32 [B, T + 1] of the token stream for a step, a function of its arguments alone.

    Every epoch cuts the stream at another offset and shuffles the rows.
    """
    first_long = int(steps * LONG_FROM)
    length, since = (SHORT, step) if step < first_long else (LONG, step - first_long)
    rows = BATCH_TOKENS // length
    per_epoch = (len(stream) - 1 - length) // (rows * length)
    epoch, place = divmod(since, per_epoch)
    draw = np.random.default_rng((seed, length, epoch))
    offset = draw.integers(length)
    order = draw.permutation(per_epoch * rows)[place * rows:(place + 1) * rows]
    return np.stack([stream[offset + r * length:offset + (r + 1) * length + 1] for r in order]).astype(np.int32)


def rows_of(stream):
    """int32 [B, LONG + 1] that cover a stream once; each row repeats the last token of the one before as its first."""
    count = (len(stream) - 1) // LONG
    return np.stack([stream[i * LONG:(i + 1) * LONG + 1] for i in range(count)]).astype(np.int32)


def mean_loss(cfg, params, rows, kernels=TRAINING):
    """Nats per token over rows, four at a time."""
    run = jax.jit(lambda p, r: losses(cfg, p, r, kernels).mean())
    used = len(rows) // 4 * 4 or len(rows)
    return float(np.mean([run(params, rows[i:i + 4]) for i in range(0, used, min(4, used))]))


def save(path, **trees):
    """Writes each tree's leaves to one npz, whole or not at all."""
    flat = {f"{name}/{i:04d}": np.asarray(x) for name, tree in trees.items() for i, x in enumerate(jax.tree.leaves(tree))}
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **flat)
    partial.replace(path)


def load(path, **trees):
    """The trees as saved, shaped like those given."""
    with np.load(path) as file:
        return [jax.tree.unflatten(jax.tree.structure(tree), [jnp.asarray(file[k]) for k in sorted(file.files)
                                                              if k.startswith(f"{name}/")]) for name, tree in trees.items()]


def read_corpus(folder, work):
    """(training, {book: held-out}) token streams and the bytes of each held-out book, and the tokenizer behind them.

    In a stream every tale follows an END token, which is also what the tokenizer puts before a prompt.
    """
    books = sorted(folder.glob("*.txt"))
    missing = [name for name in HELD_OUT if not (folder / name).exists()]
    if missing or len(books) <= len(HELD_OUT):
        raise SystemExit(f"{folder} holds {len(books)} books and lacks {missing or 'books to train on'}")
    tales = {book.name: read_tales(book) for book in books}
    training = [tale for name, group in tales.items() if name not in HELD_OUT for tale in group]
    tokenizer = train_tokenizer(training, CONFIG["vocab_size"], work / "tokenizer.json")

    def stream(group):
        return np.concatenate([e.ids for e in tokenizer.encode_batch(group)] + [[tokenizer.token_to_id(END)]]).astype(np.int32)

    held = {name: (stream(tales[name]), sum(len(t.encode()) for t in tales[name])) for name in HELD_OUT}
    facts = {"books": [b.name for b in books if b.name not in HELD_OUT], "tales": len(training),
             "sha256": hashlib.sha256("\0".join(training).encode()).hexdigest()[:16]}
    return stream(training), held, tokenizer, facts


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, default=ROOT.parent / "shared" / "corpus")
    parser.add_argument("--out", type=Path, default=ROOT / "jaxllm" / "builtin" / "tales")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "tales", help="checkpoints and the tokenizer")
    parser.add_argument("--minutes", type=float, default=75, help="sets the number of steps; 0 exports the checkpoint")
    parser.add_argument("--steps", type=int, help="the number of steps itself, for a run that can be repeated")
    parser.add_argument("--init", type=Path, help="a folder whose weights to start from, of the same shape and tokenizer")
    parser.add_argument("--note", default="", help="what a reader of the model card should know of this run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak", type=float, default=4e-3, help="highest learning rate")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    return parser.parse_args()


def train(cfg, stream, probe, args, path):
    """Trains to the end of the schedule, leaving the state and the best weights so far at `path` every EVERY steps."""
    params = starting_weights(cfg, args)
    steps = args.steps or 10**6
    state, best, log = optimizer(steps, args.peak, args.optimizer).init(params), params, {
        "step": np.int64(0), "best": np.float64(np.inf), "best_step": np.int64(0), "steps": np.int64(0), "seconds": np.float64(0)}
    if path.exists():
        params, state, best, log = load(path, params=params, state=state, best=best, log=log)
        planned, done = int(log["steps"]), int(log["step"])
        steps = args.steps or planned
        if steps != planned and done > plateau_end(min(steps, planned)):
            raise SystemExit(f"step {done} is past the plateau: a run of {planned} steps cannot become one of {steps}; "
                             f"leave --steps out, or give another --work")
        print(f"going on from step {done} of {steps}")

    @functools.partial(jax.jit, static_argnums=3, donate_argnums=(0, 1))
    def step_of(params, state, rows, steps):
        loss, gradient = jax.value_and_grad(lambda p: losses(cfg, p, rows).mean())(params)
        updates, state = optimizer(steps, args.peak, args.optimizer).update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    if not path.exists() and not args.steps:
        scratch = jax.tree.map(jnp.copy, (params, state))
        for i in range(6):  # the first one compiles
            began = time.monotonic() if i == 1 else began if i else 0
            *scratch, loss = step_of(*scratch, batch_at(stream, i, steps, args.seed), steps)
            loss.block_until_ready()
        each = (time.monotonic() - began) / 5
        steps = int(args.minutes * 60 / each * 0.95)  # looks at the held-out books and longer rows cost the rest
    log = {**log, "steps": np.int64(steps)}
    print(f"{steps} steps of {BATCH_TOKENS} tokens, {steps * BATCH_TOKENS / len(stream):.1f} epochs", flush=True)
    mark, recent = time.monotonic(), []
    for step in range(int(log["step"]), steps):
        params, state, loss = step_of(params, state, batch_at(stream, step, steps, args.seed), steps)
        recent.append(loss)
        if (step + 1) % EVERY and step + 1 != steps:
            continue
        held = mean_loss(cfg, params, probe)
        now = time.monotonic()
        log = {**log, "step": np.int64(step + 1), "seconds": log["seconds"] + (now - mark)}
        print(f"step {step + 1} loss {np.mean(jax.device_get(recent)):.4f} held-out {held:.4f} "
              f"{len(recent) * BATCH_TOKENS / (now - mark):.0f} tokens/s {float(log['seconds']) / 60:.1f} min", flush=True)
        mark, recent = now, []
        if held < log["best"]:
            best, log = jax.tree.map(jnp.copy, params), {**log, "best": np.float64(held), "best_step": np.int64(step + 1)}
        save(path, params=params, state=state, best=best, log=log)


def main():
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    cfg = read_config(CONFIG)
    stream, held, tokenizer, facts = read_corpus(args.corpus, args.work)
    print(f"{facts['tales']} tales, {len(stream)} tokens; held out: {sum(len(s) for s, _ in held.values())}", flush=True)
    path = args.work / "state.npz"
    everywhere = [row for s, _ in held.values() for row in rows_of(s)]
    probe = np.stack(everywhere[::max(1, len(everywhere) // PROBE_ROWS)][:PROBE_ROWS])
    if args.minutes or args.steps:
        train(cfg, stream, probe, args, path)
    shape = initial(cfg, 0)
    with np.load(path) as file:
        log = dict(zip(("best", "best_step", "seconds", "step", "steps"), (file[f"log/{i:04d}"] for i in range(5)), strict=True))
    best, = load(path, best=shape)
    # as shipped: rounded to bfloat16
    best = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), best)
    served, learned = (losses(cfg, best, probe[:1], kernels) for kernels in (REFERENCE, TRAINING))
    apart = float(jnp.abs(served - learned).max())
    if apart > 1e-3:  # 1e-5 is what the two orders of summing leave
        raise SystemExit(f"the training kernels are {apart} nats away from the reference kernels")
    runs = [*earlier_runs(args.init), {
        "steps": int(log["steps"]), "step": int(log["best_step"]), "seed": args.seed, "peak": args.peak,
        "held_out": round(float(log["best"]), 4), "minutes": round(float(log["seconds"]) / 60), "note": args.note}]
    export(args.out, CONFIG, best, tokenizer, {
        **facts, "tokens": len(stream), "runs": runs, "batch_tokens": BATCH_TOKENS, "rows": [SHORT, LONG],
        "long_percent": round(100 * (1 - LONG_FROM)),
        "held_out": {name: (mean_loss(cfg, best, rows_of(s)), len(s), size) for name, (s, size) in held.items()}})
    print(f"{args.out}: held-out {float(log['best']):.4f} at step {int(log['best_step'])}, kernels {apart:.1e} apart")


if __name__ == "__main__":
    main()
