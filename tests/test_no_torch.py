import subprocess
import sys

SCRIPT = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise AssertionError(f"something imports {name}")

sys.meta_path.insert(0, Refuse())
count = 0
for package in ("jaxllm", "pallas_kernels"):
    module = importlib.import_module(package)
    for info in pkgutil.walk_packages(module.__path__, package + "."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
            count += 1
print(count, "torch" in sys.modules)
"""


def test_every_module_imports_where_importing_torch_raises():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, torch = done.stdout.split()
    assert int(count) > 20 and torch == "False"
