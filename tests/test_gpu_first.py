"""The first call on a GPU, rehearsed on a CPU: what it says and writes; wrong products, faults, hangs and deaths fail it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import CHECKOUT, environment, run_on_simulated_cuda
from tests.gpu_first import STAGES, plan_groups

FAULTS = """
import os, sys, time
from tests import gpu_first

def wrong(session):
    from supar_cli.sparse.linear import Dense
    from tests import gpu_stages
    forward = Dense.forward
    Dense.forward = lambda engine, x, values: 1.02 * forward(engine, x, values)
    session.is_cpu, session.device = True, "cpu"
    gpu_stages.engines(session)

def raises(session):
    session.check("before", 1.0, most=2.0)
    raise RuntimeError("planted")

def hangs(session):
    session.note("before", "seen")
    time.sleep(60)

def dies(session):
    os._exit(9)

gpu_first.STAGES |= {name: gpu_first.Stage("__main__", limit_s) for name, limit_s in
                     {"wrong": 60, "raises": 20, "hangs": 4, "dies": 20}.items()}
if __name__ == "__main__":
    sys.exit(gpu_first.main(sys.argv[1:]))
"""


def called(script: Path, out: Path, *flags: str) -> tuple[int, dict[str, list[dict[str, Any]]], str]:
    """The exit status, the rows by stage of the file that was written, and what was printed."""
    command = [sys.executable, str(script), "--out", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(OMP_NUM_THREADS="1"), timeout=120)
    found = json.loads((out / "gpu_first.json").read_text("utf-8"))
    return done.returncode, {name: stage["rows"] for name, stage in found["stages"].items()}, done.stdout


def test_a_rehearsal_passes_and_writes_what_it_prints(tmp_path: Path) -> None:
    flags = ("--cpu", "--stage", "facts", "--stage", "engines")
    status, rows, said = called(CHECKOUT / "tests/gpu_first.py", tmp_path, *flags)
    assert status == 0 and list(rows) == ["facts", "engines"]
    lines = said.splitlines()
    assert len(lines) == sum(map(len, rows.values())) + 1 and lines[-1].startswith("8 passed, 0 failed, in ")
    for name, found in rows.items():
        for row in found:
            assert any(line.startswith(row["result"]) and name in line and row["what"] in line for line in lines)
    errors = [row for row in rows["engines"] if row["what"].startswith("largest error")]
    assert [row["result"] for row in errors] == ["PASS"] * 4 and max(row["value"] for row in errors) < 6e-3
    assert rows["engines"][-1] == {
        "result": "NOTE",
        "what": "tf32",
        "value": "needs CUDA of capability 8.0",
        "wanted": "",
    }


def test_what_is_wrong_breaks_hangs_or_dies_fails_and_ends_no_other_stage(tmp_path: Path) -> None:
    script = tmp_path / "faults.py"
    script.write_text(FAULTS)
    # the stages are not timed: they run at once, as on a GPU
    status, rows, _ = called(script, tmp_path, *(f"--stage={name}" for name in ("wrong", "raises", "hangs", "dies")))
    assert status == 1
    failed = [row for row in rows["wrong"] if row["result"] == "FAIL"]
    assert [row["what"].split(",")[0] for row in failed] == ["largest error of Y"] * 4
    assert all(0.019 < row["value"] < 0.021 for row in failed)
    assert [row["result"] for row in rows["raises"]] == ["PASS", "FAIL"]
    assert rows["raises"][1]["value"].endswith("RuntimeError: planted")
    assert [(row["result"], row["value"]) for row in rows["hangs"]] == [("NOTE", "seen"), ("FAIL", "no end after 4 s")]
    assert [row["value"] for row in rows["dies"]] == ["its process died, exit status 9"]


def test_what_a_rehearsal_leaves_out_runs_on_the_shadow_device() -> None:
    """Its figures of speed and memory mean nothing; its waits do."""
    stages = {found["case"]: found for found in run_on_simulated_cuda("gpu_shadowed")}
    rows = {(name, row["what"]): row for name, found in stages.items() for row in found["rows"]}
    broken = {key: row["value"] for key, row in rows.items() if row["what"].endswith("broke")}
    assert set(stages) == {"facts", "waits", "layers", "model"} and not broken
    assert stages["waits"]["modes"] == [1, 0] * 3  # CUDA's debug mode is on in the counted steps, and off again
    for steps in ("eager", "one graph"):
        (counted,) = (row["value"] for (_, what), row in rows.items() if what == f"what 8 steps wait for, {steps}")
        assert sum(counted.values()) == 8 and all(place.startswith("event at step.py:") for place in counted)
    planted = rows["waits", "what 8 steps wait for, a loss that is read"]["value"]
    assert sorted(planted.values()) == [8, 8] and any(place.startswith("wait at trainer.py:") for place in planted)
    assert rows["waits", "waits that are seen of 8 steps whose loss is read"]["result"] == "PASS"
    assert sum(what.endswith("÷ plain layer") for _, what in rows) == 3
    assert any(what.startswith("peak memory ÷ its estimate") for _, what in rows)


def test_nothing_runs_beside_a_stage_that_measures_time() -> None:
    at_once, alone = plan_groups(list(STAGES), is_cpu=False)
    assert {name for (name,) in alone} == {"facts", "layers", "model", "proxy"}
    assert {name for group in at_once + alone for name in group} == set(STAGES)
    assert plan_groups(["facts", "waits"], is_cpu=True) == ([], [["facts", "waits"]])  # one import of torch for all
