"""What dry runs say beside what is then measured, at the demo's size: `python -m tests.measure_dry_run [COMMAND …] [--steps N]`.

On a machine that does other things too, the dry run is made before and after the run, and the mean of both is compared.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

UNITS_S = {"s": 1, "m": 60, "h": 3600}
SPEC = ("-s", "model.context=64", "-s", "train.batch_size=16", "-s", "train.eval_every=30", "-s", "search.trials=6")
COMMANDS = {
    "demo": ("demo", "--steps", "STEPS"),
    "tune-proxy": ("tune-proxy", *SPEC, "--steps", "STEPS", "-s", "search.seeds=2", "-s", "search.finalists=1"),
    "train": ("train", "plan.yaml", "--steps", "STEPS"),
    "sweep": ("sweep", "proxy.yaml", "--seeds", "1", "--over", "lr=x:-1..1/1", "--over", "density=1,0.25"),
    "compare": ("compare", "proxy.yaml", "--seeds", "1"),
    "check": ("check", "proxy.yaml", "--width", "128,256,512", "--max-seeds", "4"),
}


def supar(folder: Path, *arguments: str, statuses: tuple[int, ...] = (0, 4, 5)) -> tuple[float, str]:
    """Seconds of a command, and what it writes to stderr."""
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "supar_cli", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode in statuses, done.stderr
    return time.monotonic() - began_s, done.stderr


def seconds(said: str) -> float:
    """The seconds that the last line of a dry run says."""
    (found,) = re.findall(r"^here.*?: (?:at (?:most|least) )?([0-9hms]+)$", said, re.MULTILINE)
    return float(sum(int(count) * UNITS_S[unit] for count, unit in re.findall(r"(\d+)([hms])", found)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commands", nargs="*", default=list(COMMANDS))
    parser.add_argument("--steps", default="120")
    asked = parser.parse_args()
    print(f"{'command':<12}{'said':>8}{'measured':>10}{'ratio':>8}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        short = ("--steps", asked.steps, "-s", "search.trials=1", "-s", "search.lr_fit_octaves=[]")
        supar(folder, "tune-proxy", *SPEC, *short, "-s", "search.finalists=1", "-s", "search.seeds=1", "-q")
        supar(folder, "transfer", "--width", "128", "--sparsity", "0.9375", "-q")
        for command in asked.commands:
            arguments = [asked.steps if part == "STEPS" else part for part in COMMANDS[command]]
            out = ("-o", "other.yaml" if command == "tune-proxy" else f"out-{command}")
            written = sorted(path.name for path in folder.rglob("*"))
            before = seconds(supar(folder, *arguments, *out, "--dry-run")[1])
            assert sorted(path.name for path in folder.rglob("*")) == written, "a dry run has written"
            measured_s = supar(folder, *arguments, *out)[0]
            said_s = (before + seconds(supar(folder, *arguments, *out, "--dry-run")[1])) / 2
            print(f"{command:<12}{said_s:7.0f}s{measured_s:9.0f}s{said_s / measured_s:8.2f}", flush=True)


if __name__ == "__main__":
    main()
