"""A tree saved on four devices comes back on four, on two and on one with the same bits (in a process of its own)."""

import subprocess
import sys

SCRIPT = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file
from jaxllm.checkpoint import Rule, open_checkpoint
from jaxllm.checkpoint.load import load_params
from jaxllm.interop.orbax import restore_params, save_params

folder = sys.argv[1]
values = np.random.default_rng(0).normal(size=(8, 12)).astype(jnp.bfloat16)
over = {n: NamedSharding(Mesh(np.array(jax.devices()[:n]), ("tp",)), PartitionSpec("tp")) for n in (1, 2, 4)}
save_params(folder + "/saved", {"w": jax.device_put(values, over[4])})
for n in (4, 2, 1):
    back = restore_params(folder + "/saved", {"w": jax.ShapeDtypeStruct((8, 12), jnp.bfloat16)}, sharding=over[n])["w"]
    assert len(back.sharding.device_set) == n and np.asarray(back).tobytes() == values.tobytes()
save_file({"w": values}, folder + "/model.safetensors")
with open_checkpoint(folder + "/model.safetensors") as checkpoint:
    template = {"w": jax.ShapeDtypeStruct((8, 12), jnp.bfloat16)}
    placed = load_params(checkpoint, [Rule("w", "w")], template, place=lambda path, array: jax.device_put(array, over[4]))["w"]
    assert len(placed.sharding.device_set) == 4 and np.asarray(placed).tobytes() == values.tobytes()
print("sharded and back")
"""


def test_sharded_save_restore_and_load(tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "sharded and back" in done.stdout, done.stderr[-2000:]
