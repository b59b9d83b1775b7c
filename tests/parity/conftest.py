"""The oracle: transformers on torch in an environment of its own, `.venv-oracle`, which `make parity` makes."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "models"))  # families.py: jaxllm's side of a comparison


@pytest.fixture(scope="session")
def oracle():
    """A function that runs a script of tools/oracle with arguments, and returns what it prints."""
    named = os.environ.get("JAXLLM_ORACLE")
    python = Path(named or ROOT / ".venv-oracle" / "bin" / "python")
    if not python.exists():
        if named:
            pytest.fail(f"JAXLLM_ORACLE names {python}, which does not exist")
        pytest.skip("there is no .venv-oracle; `make parity` makes it and runs these tests")

    def run(script: str, *arguments) -> str:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run([python, ROOT / "tools" / "oracle" / script, *map(str, arguments)], text=True, env=environment,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert done.returncode == 0, f"{script} failed:\n{done.stderr[-4000:]}"
        return done.stdout

    return run
