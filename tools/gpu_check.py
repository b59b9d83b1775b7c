"""Everything that only a card can tell, in at most nine minutes: bits, time against the floor, and the others' time.

    python tools/gpu_check.py --out FILE.json [--minutes 9]

Each section runs in a process of its own, so that a kernel that hangs or a crash costs its section and no more; what a
section measured before is kept. `--small` runs the same code on shapes that a simulator on a CPU can bear, to test this
file; its times mean nothing and are marked so. No network is used; torch and transformers are used where they are installed.
"""
import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
# Seconds at most, in the order of what is worth most: whether it is right, the model, the kernels, the others.
SECTIONS = {"machine": 40, "bits": 150, "oracle": 90, "model": 170, "kernels": 130, "torch": 120}


class Report:
    """Results of a section, written to its file after each entry."""

    def __init__(self, path, small):
        self.path, self.small, self.entries = Path(path), small, []
        self.calls = {"repeats": 1, "queued": 1} if small else {}  # of seconds_of

    def add(self, name, **values):
        self.entries.append({"name": name, **values})
        self.path.write_text(json.dumps(self.entries))
        print(name, values, flush=True)

    def guard(self, name, function):
        """function() -> dict, or its traceback."""
        try:
            self.add(name, **function())
        except Exception:  # noqa: BLE001  the report goes on and says what happened
            self.add(name, error=traceback.format_exc()[-3000:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--small", action="store_true", help="tiny shapes in the simulator, to test this file on a CPU")
    parser.add_argument("--section", choices=SECTIONS, help="run this one here instead of all in processes of their own")
    options = parser.parse_args()
    if options.section:
        report = Report(options.out, options.small)
        import gpu_check_bits
        import gpu_check_times
        section = getattr(gpu_check_bits if options.section in ("bits", "oracle") else gpu_check_times, options.section)
        if options.small:
            from pallas_kernels import compat
            with compat.interpreting():
                section(report)
        else:
            section(report)
        return 0
    deadline, out = time.monotonic() + 60 * options.minutes - 5, Path(options.out)
    result = {"when": time.strftime("%Y-%m-%d %H:%M:%S"), "small": options.small, "times_mean_something": not options.small, "sections": {}}
    # Weights and pages of the 8B shape take 53 GB: the default share of an 80 GB card would be too small.
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | ({"JAX_PLATFORMS": "cpu", "NPROC": "16"} if options.small else {})
    for name, limit in SECTIONS.items():
        part = out.with_suffix(f".{name}.json")
        part.unlink(missing_ok=True)
        limit, start = min(limit * (4 if options.small else 1), deadline - time.monotonic()), time.monotonic()
        entry = {"status": "no time left"}
        if limit > 10:
            command = [sys.executable, __file__, "--section", name, "--out", str(part)] + ["--small"] * options.small
            try:
                done = subprocess.run(command, env=env, timeout=limit, capture_output=True, text=True)
                entry = {"status": "done" if done.returncode == 0 else f"exit {done.returncode}", "log": "" if done.returncode == 0 else (done.stdout + done.stderr)[-4000:]}
            except subprocess.TimeoutExpired as error:
                entry = {"status": f"stopped after {limit:.0f} s", "log": str(error.stdout or b"")[-2000:]}
        entry |= {"seconds": round(time.monotonic() - start, 1), "entries": json.loads(part.read_text()) if part.exists() else []}
        part.unlink(missing_ok=True)
        result["sections"][name] = entry
        out.write_text(json.dumps(result, indent=1))
        errors = [e["name"] for e in entry["entries"] if "error" in e]
        differing = [e["name"] for e in entry["entries"] if e.get("differing")]
        print(f"{name}: {entry['status']} in {entry['seconds']} s, {len(entry['entries'])} entries, errors {errors}, differing {differing}", flush=True)
    bad = [s for s, e in result["sections"].items() if e["status"] != "done" or any("error" in x or x.get("differing") for x in e["entries"])]
    print("at fault:", bad or "nothing")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
