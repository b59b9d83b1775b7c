"""Loading holds one tensor in host memory beside the map, measured in processes of their own."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.checkpoint import Rule, load, open_checkpoint
from jaxllm.checkpoint.load import load_params

TENSORS, MIB = 24, 1 << 20

SCRIPT = r"""
import re, sys
import jax, jax.numpy as jnp, numpy as np
from jaxllm.checkpoint import Rule, open_checkpoint
from jaxllm.checkpoint.load import load_params

def peak():
    # Not getrusage: its maximum outlives exec, and would be that of the test runner.
    return int(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1]) * 1024

rows = 4 << 20
template = {"layers": [jax.ShapeDtypeStruct((rows,), jnp.dtype(sys.argv[2]))] * int(sys.argv[3])}
away = jax.device_put(np.zeros(1))  # stands for a device: the host keeps nothing of what was placed
before = peak()
with open_checkpoint(sys.argv[1]) as checkpoint:
    load_params(checkpoint, [Rule("layers.{i}.w", "layers.{i}")], template, place=lambda path, array: away)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("container", ["safetensors", "npz"])
def test_host_peak_is_the_largest_tensor(tmp_path, container, dtype):
    tensors = {f"layers.{i}.w": np.zeros(4 * MIB, jax.numpy.bfloat16) for i in range(TENSORS)}  # 8 MiB each, 192 in all
    if container == "safetensors":
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        np.savez(tmp_path / "model.npz", **{name: value.astype(np.float16) for name, value in tensors.items()})
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path), dtype, str(TENSORS)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    # The tensor as it is mapped (8 MiB), cast (16 MiB), its threads' chunks, and 40 MiB for what Python and JAX take.
    assert int(done.stdout) < 80 * MIB


def test_a_device_that_is_not_the_host_gets_the_map_itself_and_the_host_a_copy(tmp_path, monkeypatch):
    save_file({"a": np.arange(1 << 16, dtype=np.float32)}, tmp_path / "model.safetensors")
    template, seen = {"a": jax.ShapeDtypeStruct((1 << 16,), np.float32)}, []

    def place(path, array):
        seen.append(array)
        return jax.device_put(array)

    for answers, writeable in (([False, False], [False]), ([False, True], [False, True]), ([True], [True])):
        seen.clear()
        left = list(answers)
        monkeypatch.setattr(load, "_is_host", lambda device: left.pop(0))
        with open_checkpoint(tmp_path) as checkpoint:
            params = load_params(checkpoint, (Rule("a", "a"),), template, place=place)
        assert params["a"].tolist() == list(range(1 << 16)) and left == []
        assert [array.flags.writeable for array in seen] == writeable  # the map is read-only, our buffers are not
