"""Write tests/data/pt: small files that torch itself saved, and expected.json with the bytes torch reads from them.

Run in the oracle's environment (torch 2.13.0, transformers): python tools/make_pt_goldens.py [FOLDER]
The product never imports torch; its tests read these files and compare bytes.
"""

import collections
import io
import json
import sys
import zipfile
from pathlib import Path

import torch

DTYPES = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool complex64 complex128"
NEWER_DTYPES = "uint16 uint32 uint64 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"


def values(dtype: torch.dtype, count: int = 6) -> torch.Tensor:
    """`count` values of `dtype` whose bytes all differ where the type lets them."""
    raw = torch.arange(count * dtype.itemsize, dtype=torch.int64).add(17).to(torch.uint8)
    return raw % 2 == 1 if dtype == torch.bool else raw.view(dtype)


def every_dtype() -> dict:
    return {name: values(getattr(torch, name)) for name in f"{DTYPES} {NEWER_DTYPES}".split()}


def views() -> dict:
    base = torch.arange(48, dtype=torch.float32)
    grid = base[:24].view(4, 6)
    return {
        "base": base,
        "transposed": grid.t(),
        "strided": base[1:40:3],
        "rows": grid[::2, 1:5],
        "expanded": base[5:6].expand(3, 4),
        "scalar": torch.tensor(3.5),
        "scalar_of_base": base[7],
        "empty": torch.zeros(0, 5),
        "empty_strided": base[10:10],
        "channels_last": torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }


def tied() -> dict:
    embed = torch.nn.Embedding(5, 4)
    torch.manual_seed(0)
    embed.weight.data.normal_()
    head = torch.nn.Linear(4, 5, bias=False)
    head.weight = embed.weight
    module = torch.nn.ModuleDict({"embed": embed, "lm_head": head})
    return module.state_dict()


def nested() -> dict:
    inner = collections.OrderedDict((f"module.layers.{i}.weight", torch.full((2, 2), float(i))) for i in range(2))
    return {
        "state_dict": inner,
        "epoch": 3,
        "loss": 0.25,
        "config": {"name": "tiny", "sizes": torch.Size([2, 3]), "device": torch.device("cuda:0"), "dtype": torch.float16},
        "optimizer": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
    }


def parameters() -> dict:
    plain = torch.nn.Parameter(torch.arange(4.0), requires_grad=True)
    tagged = torch.nn.Parameter(torch.arange(3.0), requires_grad=False)
    tagged.note = "kept out"
    buffer = torch.arange(2)
    buffer.note = "kept out"
    return {"plain": plain, "tagged": tagged, "buffer": buffer, "list": [torch.ones(1), (torch.zeros(2),)]}


def rewritten(data: bytes, compression: int = zipfile.ZIP_STORED, big_endian: bool = False) -> bytes:
    """The torch zip file `data` packed anew: deflated, or with float32 storages and the byte order of a big-endian machine."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w", compression) as target:
        for name in source.namelist():
            content = source.read(name)
            if big_endian and name.endswith("/byteorder"):
                content = b"big"
            elif big_endian and "/data/" in name:
                content = b"".join(content[i : i + 4][::-1] for i in range(0, len(content), 4))
            target.writestr(zipfile.ZipInfo(name), content, compression)
    return out.getvalue()


def saved(value: object, **options) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


def flat(value: object, path: tuple[str, ...] = ()) -> dict:
    if isinstance(value, torch.Tensor):
        value = value.detach()
        dense = value.contiguous()
        raw = dense.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return {".".join(path): {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "hex": raw.hex()}}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {name: entry for key, child in pairs for name, entry in flat(child, (*path, str(key))).items()}


def tiny_llama(folder: Path) -> None:
    """A two-layer Llama as transformers writes it: safetensors in shards, and the same as sharded .bin files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32, tie_word_embeddings=True
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "llama-safetensors", max_shard_size="4KB")
    # transformers 5 writes safetensors alone; this is the layout that transformers 4 wrote with safe_serialization=False.
    target = folder / "llama-bin"
    target.mkdir(exist_ok=True)
    state = model.state_dict()
    names = list(state)
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        torch.save({name: state[name] for name in shard}, target / file)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in state.values())}, "weight_map": weight_map}
    (target / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=1))
    torch.save({"not": "weights"}, target / "training_args.bin")
    config.save_pretrained(target)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1] / "tests/data/pt")
    folder.mkdir(parents=True, exist_ok=True)
    old_format = {"_use_new_zipfile_serialization": False}
    files: dict[str, bytes] = {}
    for name, value in (("dtypes", every_dtype()), ("views", views()), ("tied", tied()), ("nested", nested()), ("parameters", parameters())):
        files[f"{name}.pt"] = saved(value)
        if name != "dtypes":
            files[f"{name}-legacy.pt"] = saved(value, **old_format)
    older = {name: values(getattr(torch, name)) for name in DTYPES.split() if "float8" not in name}
    files["dtypes-legacy.pt"] = saved(older, **old_format)
    for protocol in (3, 4, 5):
        files[f"tied-protocol{protocol}.pt"] = saved(tied(), pickle_protocol=protocol)
        files[f"tied-legacy-protocol{protocol}.pt"] = saved(tied(), pickle_protocol=protocol, **old_format)
    files["views-deflated.pt"] = rewritten(files["views.pt"], zipfile.ZIP_DEFLATED)
    files["views-big-endian.pt"] = rewritten(files["views.pt"], big_endian=True)
    # The flag follows the key: q NN is a memo write, 0x88 is True. Torch wrote little-endian values also where it is False.
    legacy = files["views-legacy.pt"]
    at = legacy.index(b"little_endian") + len(b"little_endian") + 2
    assert legacy[at] == 0x88
    files["views-legacy-big-endian-header.pt"] = legacy[:at] + b"\x89" + legacy[at + 1 :]
    files["single-tensor.pt"] = saved(torch.arange(5, dtype=torch.int16))
    tiny_llama(folder)
    # From here on torch believes that storages lie on two GPUs.
    torch.serialization.register_package(1, lambda storage: f"cuda:{len(storage) // 8 % 2}", lambda storage, location: None)
    files["cuda.pt"] = saved({"one": torch.arange(2.0), "zero": torch.arange(4.0)})
    files["cuda-legacy.pt"] = saved({"one": torch.arange(2.0), "zero": torch.arange(4.0)}, **old_format)
    expected = {}
    for name, data in files.items():
        (folder / name).write_bytes(data)
        loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)  # our own files
        expected[name] = flat({"tensor": loaded} if isinstance(loaded, torch.Tensor) else loaded)
    refused = {
        "quantised.pt": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "sparse.pt": torch.eye(3).to_sparse(),
        "conjugate.pt": {"c": torch.ones(2, dtype=torch.complex64).conj()},
        "module.pt": torch.nn.Linear(2, 2),
        "complex32.pt": torch.ones(2, dtype=torch.complex32),
        "namespace.pt": {"args": __import__("argparse").Namespace(lr=1)},
    }
    (folder / "refused").mkdir(exist_ok=True)
    for name, value in refused.items():
        (folder / "refused" / name).write_bytes(saved(value))
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "refused" / "torchscript.pt"))
    (folder / "expected.json").write_text(json.dumps(expected, indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n")


if __name__ == "__main__":
    main()
