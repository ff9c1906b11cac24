"""Memory of a start: what is drawn and measured of a wide sparse layer stays far below one number a position."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from supar_cli.planning import document
from tests.conftest import environment, plan_from, proxy_fields

MIB = 2**20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux counts it")

PEAK = """
import sys
from pathlib import Path

def peak_kib():  # of this process alone; what getrusage says begins at its parent's
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
"""
RISE = (
    PEAK
    + """
import numpy as np
from supar_cli.sparse import masks
from supar_cli.streams import stream

shape, kept = (8192, 8192), 8192 * 64
masks.draw("w", masks.WantedMask((64, 64), 64, (1,)), 1 / 64, 0)
before = peak_kib()
if sys.argv[1] == "whole":
    keys = stream(0, "mask:w").random_raw(shape[0] * shape[1])
    mask = masks.Mask.of(keys <= np.partition(keys, kept - 1)[kept - 1])
else:
    pattern, draw = sys.argv[1].split()
    mask = masks.draw("w", masks.WantedMask(shape, kept, (1,), pattern, draw=draw), kept / 2**26, 0)
assert mask.count == kept
print(peak_kib() - before)
"""
)
RUN = (
    PEAK
    + """
from supar_cli.cli.app import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print("PEAK", peak_kib(), file=sys.stderr)
"""
)


def rise(what: str) -> int:
    """Bytes by which the peak of a process rises as it draws a mask of 8192×8192 at density 1/128."""
    run = [sys.executable, "-c", RISE, what]
    done = subprocess.run(run, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), check=True)
    return 1024 * int(done.stdout)


@pytest.mark.parametrize("what", ["exact positions", "exact live", "fixed_fan_in live"])
def test_a_mask_is_drawn_in_a_few_bits_a_position(what: str) -> None:
    """Its 8 MiB, twice while they are joined, and chunks; 17 to 24 MiB measured."""
    assert 8 * MIB < rise(what) < 40 * MIB


def test_all_keys_at_once_would_be_seen() -> None:
    assert rise("whole") > 1000 * MIB


def test_a_whole_tiny_run_of_a_wide_layer(tmp_path: Path) -> None:
    """`supar train` of one layer of width 4096 for one step, an engine measured, an evaluation and a checkpoint.

    201 million positions; .8 GiB measured, .4 of them the libraries. A number a position in float32 would be .75 more.
    """
    (tmp_path / "text.txt").write_bytes(b"a few words of text. " * 200)
    fields = proxy_fields(
        str(tmp_path / "text.txt"),
        model={"layers": 1, "heads": 1},
        target={"width": 4096, "sparsity": {"sparsity": 0.992}},
        train={"steps": 1, "batch_size": 8, "eval_batches": 1},
    )
    (tmp_path / "plan.yaml").write_text(document.write([plan_from(fields).model_dump()]))
    env = environment(OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(tmp_path / "cache"))
    run = [sys.executable, "-c", RUN, "train", "plan.yaml"]
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert list(tmp_path.glob("runs/*/checkpoints/step-00000001/manifest.json")), done.stderr
    assert "of its rows, measured now" in done.stderr
    assert 1024 * int(done.stderr.rpartition("PEAK ")[2]) < 1100 * MIB, done.stderr
