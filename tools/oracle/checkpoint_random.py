"""Save random state dicts with torch.save into FOLDER and print, as JSON, what torch.load reads from them.

Sixty files of either format and any pickle protocol: shared storages, strided, expanded, 0-d and empty views, every
dtype, some of them wrapped in "state_dict" or "model".
"""

import json
import random
import sys

import torch

DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64 complex128"
).split()
NOT_IN_STREAMS = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")  # torch itself cannot load these from one


def make(walk: random.Random, pool: list[torch.Tensor]) -> torch.Tensor:
    """A view of a new or an earlier storage of `pool`."""
    if pool and walk.random() < 0.4:
        base = walk.choice(pool)
    else:
        dtype = getattr(torch, walk.choice(DTYPES))
        count = walk.choice((0, 1, 6, 24, 120)) * dtype.itemsize
        base = torch.tensor([walk.randrange(256) for _ in range(count)], dtype=torch.uint8)
        base = base % 2 == 1 if dtype == torch.bool else base.view(dtype)
        pool.append(base)
    n, kind = base.numel(), walk.randrange(6)
    if kind == 0 and n % 6 == 0:
        return base.view(-1, 6).t()
    if kind == 1 and n:
        return base[walk.randrange(n) :: walk.randrange(1, 4)]
    if kind == 2 and n:
        return base[walk.randrange(n)]
    if kind == 3 and n:
        return base[:1].expand(2, 3)
    if kind == 4 and base.dtype in (torch.float32, torch.bfloat16):
        return torch.nn.Parameter(base)
    return base


def raw(tensor: torch.Tensor) -> str:
    dense = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return dense.view(torch.uint8).numpy().tobytes().hex() if dense.numel() else ""


def main() -> None:
    walk, expected = random.Random(7), {}
    for number in range(60):
        pool: list[torch.Tensor] = []
        state = {f"layers.{index}.weight": make(walk, pool) for index in range(walk.randrange(1, 9))}
        value = walk.choice((state, {"state_dict": state, "epoch": 1}, {"model": {"nested": state}}))
        legacy = walk.random() < 0.4 and not any(str(base.dtype).removeprefix("torch.") in NOT_IN_STREAMS for base in pool)
        file = f"{sys.argv[1]}/{number}.pt"
        torch.save(value, file, _use_new_zipfile_serialization=not legacy, pickle_protocol=walk.choice((2, 2, 3, 4, 5)))
        loaded = torch.load(file, weights_only=False)  # our own file
        for _ in range(2):
            loaded = loaded.get("state_dict") or loaded.get("model") or loaded.get("nested") or loaded
        expected[f"{number}.pt"] = {name: [str(t.dtype).removeprefix("torch."), list(t.shape), raw(t)] for name, t in loaded.items()}
    print(json.dumps(expected))


main()
