"""Writes small random checkpoints of every family and feature in Hugging Face layout.

    make_families.py OUT --size tiny|small [--goldens] [--only NAME]...

--goldens adds expected.npz (prompt, logits, greedy tokens) to each folder. The size `small` also gets prompts.json, and
for `llama` the same weights as sharded safetensors, .bin and sharded .bin.
"""
import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
import run_oracle
import torch
import transformers
from cases import SIZES, cases
from safetensors.torch import load_file, save_file

LEAD = 2e-3      # a greedy winner leads by so much: far above what float32 may differ by (1e-4), so equality is fair
DISTINCT = 16    # of 64 greedy tokens: below, the text has collapsed and shows nothing


def fill(model: torch.nn.Module, seed: int) -> None:
    """None; weights so large that attention picks (scores of about 2), so small that float32 keeps 1e-5 of the logits."""
    draw = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=draw)
        if name.endswith("bias"):
            value = 0.3 * noise
        elif "norm" in name:
            value = 1 + 0.3 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            makes_logits = "lm_head" in name or model.config.tie_word_embeddings
            value = noise * (2 / math.sqrt(weight.shape[1]) if makes_logits else 1)
        else:
            gain = 1.5 if ".q_proj" in name or ".k_proj" in name else 1.2
            value = gain / math.sqrt(weight.shape[1]) * noise
        with torch.no_grad():
            weight.copy_(value.to(torch.bfloat16).float())


def write(case: dict, folder: Path, dtype: torch.dtype, seed: int) -> None:
    """None; the folder holds the case's config.json and model.safetensors."""
    shutil.rmtree(folder, ignore_errors=True)
    config = getattr(transformers, case["family"] + "Config")(**case["config"])
    model = getattr(transformers, case["family"] + "ForCausalLM")(config).float()
    fill(model, seed)
    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    for name in case["tensors"]:
        state = load_file(folder / "model.safetensors")
        state[name] = model.state_dict()[name].clone().contiguous()
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    written = json.loads(file.read_text())
    if case["older"]:
        rope = written.pop("rope_parameters")
        written["rope_theta"] = rope.pop("rope_theta")
        if (partial := rope.pop("partial_rotary_factor", None)) is not None:
            written["partial_rotary_factor"] = partial
        written["rope_scaling"] = None if rope["rope_type"] == "default" else {"type": rope["rope_type"], **rope}
        written["torch_dtype"] = written.pop("dtype")
    for key in case["drop"]:
        written.pop(key)
    written.pop("transformers_version", None)
    file.write_text(json.dumps(written, indent=1, sort_keys=True) + "\n")


def in_other_containers(folder: Path) -> None:
    """None; beside the folder, its weights as sharded safetensors, one .bin and sharded .bin."""
    state = load_file(folder / "model.safetensors")
    names, metadata = sorted(state), {"total_size": sum(t.numel() * t.element_size() for t in state.values())}
    shards = [names[i::3] for i in range(3)]

    def make(suffix, stem, ending, save, index):
        out = folder.with_name(f"{folder.name}{suffix}")
        out.mkdir(exist_ok=True)
        shutil.copy(folder / "config.json", out)
        if not index:
            return save(state, out / f"{stem}.{ending}")
        files = [f"{stem}-{i + 1:05}-of-00003.{ending}" for i in range(3)]
        for file, shard in zip(files, shards):
            save({name: state[name] for name in shard}, out / file)
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        (out / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))

    make("-sharded", "model", "safetensors", lambda tensors, file: save_file(tensors, file, {"format": "pt"}), True)
    make("-bin", "pytorch_model", "bin", torch.save, False)
    make("-sharded-bin", "pytorch_model", "bin", torch.save, True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", choices=SIZES, required=True)
    parser.add_argument("--goldens", action="store_true")
    parser.add_argument("--only", action="append")
    args = parser.parse_args()
    size = SIZES[args.size]
    for name, case in cases(args.size).items():
        if args.only and name not in args.only:
            continue
        folder = args.out / name
        for seed in range(20):
            write(case, folder, getattr(torch, size["dtype"]), seed)
            prompt = np.random.default_rng(seed).integers(0, size["vocab"], size["prompt"]).tolist()
            model = run_oracle.load(str(folder))
            logits = run_oracle.logits_of(model, prompt)
            tokens, lead = run_oracle.greedy(model, prompt, case["greedy"])
            if not case["greedy"] or (lead >= LEAD and len(set(tokens.tolist())) >= DISTINCT):
                break
        else:
            raise SystemExit(f"{name}: no seed gives greedy text that is varied and clear; change the gains in fill()")
        (folder / "prompts.json").write_text(json.dumps([prompt]))
        (folder / "case.json").write_text(json.dumps({"without": case["without"], "greedy": case["greedy"]}) + "\n")
        if args.goldens:
            (folder / "prompts.json").unlink()
            np.savez_compressed(folder / "expected.npz", prompt=np.array(prompt, np.int32), logits=logits, tokens=tokens)
        print(f"{name}: seed {seed}, |logits| up to {abs(logits).max():.1f}, lead {lead:.4f}, distinct {len(set(tokens.tolist()))}", flush=True)
        if args.size == "small" and name == "llama":
            in_other_containers(folder)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    main()
