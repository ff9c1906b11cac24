"""PPO's return over the last 10 of 25 iterations, over the learning rate: dense, and at density 1/8 under SμPar and SP.

`python -m tests.measure_ppo` appends a line for each run that it has no record of to tests/evidence/ppo_25_records.jsonl.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from supar_cli.files import append_lines, read_jsonl, template
from supar_cli.planning import document, templates
from supar_cli.planning.problems import parse
from supar_cli.planning.sweep import Sweep
from tests.conftest import CHECKOUT

RECORDS = CHECKOUT / "tests/evidence/ppo_25_records.jsonl"
STEPS, LAST, SEEDS, OCTAVES = 25, 10, range(201, 211), range(-9, -4)


def returns_of(finished: list[tuple[int, float]]) -> float:
    """The mean over the last iterations of the mean return of the episodes that finished in each."""
    by_iteration = [[total for at, total in finished if at == one] for one in range(STEPS - LAST, STEPS)]
    return float(np.mean([np.mean(each) for each in by_iteration if each]))


def main() -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("ppo", template("own/ppo.py"))
    assert spec is not None and spec.loader is not None
    ppo: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ppo)
    (read,) = document.read(templates.text("ppo"), "ppo")
    read.data["train"]["steps"], read.data["over"]["lr"] = STEPS, [2.0**octave for octave in OCTAVES]
    study, here = parse(Sweep, read), tempfile.mkdtemp()
    Path(here, "ppo-layout.yaml").write_bytes(template("own/ppo-layout.yaml").read_bytes())
    os.chdir(here)
    done = {record["run"] for record in read_jsonl(RECORDS, "run")}
    (dense, sparse), (supar, sp, *_) = study.levels, study.all_arms
    for index, octave in enumerate(OCTAVES):
        for seed in SEEDS:
            for arm, level in ((supar, dense), (supar, sparse), (sp, sparse)):
                plan = study.plan(arm, level, index, seed)
                if plan.hash() in done:
                    continue
                finished = ppo.train(plan)
                failed = any(math.isnan(total) for _, total in finished)
                about = {"run": plan.hash(), "arm": arm, "density": level.density, "octave": octave, "seed": seed}
                record = {**about, "return": None if failed else returns_of(finished)}
                append_lines(RECORDS, json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
