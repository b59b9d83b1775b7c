"""Random damage to safetensors and npz files ends in our errors or in a readable checkpoint, never in another exception."""

import random

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.checkpoint import open_checkpoint
from jaxllm.errors import CheckpointError, UnsupportedError

ARRAYS = {"a": np.arange(5, dtype=np.int16), "b": np.ones((3, 2), np.float32)}
WRITERS = {
    "model.safetensors": lambda path: save_file(ARRAYS, path, metadata={"c": "a"}),
    "plain.npz": lambda path: np.savez(path, **ARRAYS),
    "packed.npz": lambda path: np.savez_compressed(path, **ARRAYS),
}


def damaged(whole: bytes, walk: random.Random) -> bytes:
    """`whole` with a few bytes replaced, cut out, or repeated elsewhere."""
    data = bytearray(whole)
    for _ in range(walk.choice((1, 1, 2, 4))):
        kind, at = walk.randrange(5), walk.randrange(len(data))
        if kind < 3:
            data[at] = walk.choice((0, 1, 0x22, 0x7B, 0x7F, 0xFF, walk.randrange(256)))
        elif kind == 3:
            del data[at : at + walk.choice((1, 2, 8))]
        else:
            begin = walk.randrange(len(data))
            data[at:at] = data[begin : begin + walk.choice((1, 4, 16))]
    return bytes(data)


@pytest.mark.parametrize("name", WRITERS)
def test_damage_ends_in_our_errors_or_in_a_readable_checkpoint(tmp_path, name):
    file = tmp_path / name
    WRITERS[name](file)
    whole, walk = file.read_bytes(), random.Random(11)
    for step in range(400):
        file.write_bytes(damaged(whole, walk))
        try:
            with open_checkpoint(file) as checkpoint:
                for lazy in checkpoint.values():
                    assert lazy.numpy().nbytes == lazy.nbytes
        except (CheckpointError, UnsupportedError) as error:
            assert "\n" not in str(error)
        except Exception as error:
            raise AssertionError(f"step {step} of seed 11 on {name}") from error
