"""Two processes whose masks change train as one does, whole and in shards, and go on from each other's checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from supar_cli.planning import document
from supar_cli.training.trainer import Trainer
from tests.conftest import CHECKOUT, TEXT_BYTES, environment, plan_from, proxy_fields, real_text
from tests.parallel_cases import saved
from tests.test_updates_resume import goes_on
from tests.test_updates_train import TUNED
from tests.updates_cases import HALF, STEPS, fingerprints, losses

AGREE = 1e-5
KINDS: dict[str, dict[str, Any]] = {
    "set": {"method": "set", "every_steps": 2, "min_per_neuron": 2, "moments": "keep"},
    "rigl": {"method": "rigl", "every_steps": 2},
    "gmp": {"method": "gmp", "every_steps": 2},
    "topk": {"method": "topk", "end": 0.75},
}


def plan_of(folder: Path, **updates: Any) -> Any:
    target = {"width": 32, "sparsity": {"density": 0.25, "updates": updates}}
    changes: Any = {"model": {"layers": 1}, "hyperparameters": TUNED, "target": target}
    changes |= {"train": {"steps": STEPS, "batch_size": 4}, "run": {"micro_batch_size": 1, "engine": "dense"}}
    return plan_from(proxy_fields(str(folder / "text.txt"), **changes))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one process finds, under "one", and what `updates_cases` finds, by rank."""
    folder = tmp_path_factory.mktemp("updates")
    (folder / "plans").mkdir()
    (folder / "text.txt").write_bytes(real_text(TEXT_BYTES))
    one: dict[str, Any] = {}
    for name, updates in KINDS.items():
        plan = plan_of(folder, **updates)
        (folder / f"plans/{name}.yaml").write_text(document.write([plan.model_dump()]), "utf-8")
        trainer = Trainer(plan)
        whole = losses(trainer, HALF)
        saved(trainer, folder / "plans" / name)
        one[name] = {"whole": whole + losses(trainer, STEPS), "masks": fingerprints(trainer), "plan": plan}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(CHECKOUT / "tests/updates_cases.py"), "plans"]
    environ = environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, timeout=240)
    assert done.returncode == 0, done.stderr.decode()
    ranks = json.loads(done.stdout)
    ranks[0]["one"], ranks[0]["folder"] = one, folder / "plans"
    return list(ranks)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", KINDS)
class TestTwo:
    def test_train_as_one(self, found: list[dict[str, Any]], name: str, kind: str) -> None:
        one = found[0]["one"][name]
        for rank in found:
            assert rank[name][kind]["whole"] == pytest.approx(one["whole"], abs=AGREE)
            assert rank[name][kind]["masks"] == one["masks"]

    def test_go_on_from_each_others_checkpoints(self, found: list[dict[str, Any]], name: str, kind: str) -> None:
        one = found[0]["one"][name]
        for rank in found:
            for origin in ("restored", "from one"):
                assert rank[name][kind][origin] == pytest.approx(one["whole"][HALF:], abs=AGREE)
        (path,) = sorted((found[0]["folder"] / f"{name}-{kind}").glob("step-*"))
        rest, _ = goes_on(one["plan"], path)
        assert rest == pytest.approx(one["whole"][HALF:], abs=AGREE)


def test_masks_that_stay_would_be_seen(found: list[dict[str, Any]]) -> None:
    """The control: another seed of SET's growth, or another method, is beyond what may differ."""
    one = found[0]["one"]
    assert one["set"]["whole"] != pytest.approx(one["rigl"]["whole"], abs=1e-3)
    other = Trainer(plan_of(found[0]["folder"].parent, **{**KINDS["set"], "every_steps": 3}))
    assert losses(other, STEPS) != pytest.approx(one["set"]["whole"], abs=1e-3)


class TestApart:
    def test_masks_that_differ_by_rank_end_all(self, found: list[dict[str, Any]]) -> None:
        text = "rank 1: the mask of blocks.0.attn.q is not that of rank 0; expected the same everywhere"
        assert [one["grown apart"] for one in found] == [[["SetupError", text, True]] * 2] * 2

    def test_growth_by_a_ranks_own_gradients_too(self, found: list[dict[str, Any]]) -> None:
        for one in found:
            kind, text, is_collective = one["own gradients"]
            assert kind == "SetupError" and "is not that of rank 0" in text and is_collective
