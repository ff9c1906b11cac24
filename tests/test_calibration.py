"""`supar sweep --calibrate`: the planted exponent is found, verified and used; the dense runs of arms that prune."""

from __future__ import annotations

from math import log2
from pathlib import Path
from typing import Any

import pytest

import supar_cli
from supar_cli.experiments import curves
from supar_cli.jobs import runs
from supar_cli.planning import advice, document
from supar_cli.planning.advice import density_exponent
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy

from .conftest import proxy_fields
from .planted_losses import TRUE, plant, planted
from .test_sweep import sweep_of
from .test_sweep_study import RUN, Supar

PROXY: dict[str, Any] = {
    "model": {"family": "gpt2", "width": 32, "layers": 1, "heads": 2, "context": 16, "vocab": 256},
    "hyperparameters": {"lr": 2.0**-7, "weight_decay": 0.0},
    "target": {"width": None, "sparsity": {}},
}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    return plant(monkeypatch)


@pytest.fixture
def tuned(tmp_path: Path, text_file: Path) -> Path:
    path = tmp_path / "tuned.yaml"
    path.write_text(document.write([proxy_fields("text.txt", **PROXY)]))
    return path


def proxy_of(path: Path) -> Proxy:
    return parse(Proxy, document.read_file(str(path))[0])


class TestCalibration:
    @pytest.mark.parametrize(
        ("arguments", "method", "before"),
        [
            (["--updates", "rigl"], "rigl", 0.9),
            (["--updates", "rigl", "-s", "target.sparsity.updates.exponent=1.3"], "rigl", 1.3),  # wrong by a half
            (["-s", "parameterization.density_exponent=0.5"], "none", 0.5),
            (["--updates", "set"], "set", 1.0),  # right as it is
        ],
    )
    def test_the_planted_exponent_is_found_verified_and_used(
        self,
        supar_here: Supar,
        tuned: Path,
        trained: list[Plan],
        tmp_path: Path,
        arguments: list[str],
        method: str,
        before: float,
    ) -> None:
        original = tuned.read_bytes()
        called = supar_here("sweep", "tuned.yaml", "--calibrate", *arguments, *RUN[:-1], "-o", "new.yaml")
        assert called.status == 0, called.err
        new, true = proxy_of(tmp_path / "new.yaml"), TRUE[None if method == "none" else method]
        known = new.evidence["density_exponent"]
        assert (known["method"], known["before"], known["verified"]) == (method, before, True)
        assert new.parameterization.density_exponent == known["exponent"] == pytest.approx(true, abs=0.15)
        assert known["kept"] is (before == true) and (not known["kept"] or known["exponent"] == before)
        assert abs(known["drift"] - (before - true)) < 0.1 and not set(known["seeds"]) & set(known["fresh_seeds"])
        assert tuned.read_bytes() == original and new.parents["proxy"] == proxy_of(tuned).hash()
        # transfer uses it, and warns of another method or length by name
        given = {"updates": known["method"]} if method != "none" else {}
        plan = supar_cli.transfer(new, density=0.25, **given)
        assert density_exponent(plan) == known["exponent"] and not calibrated_for(plan, new)
        assert "were not measured" not in " ".join(advice.warnings(plan, evidence=new.evidence))
        assert "steps 12, not 13" in calibrated_for(supar_cli.transfer(new, density=0.25, steps=13, **given), new)
        other = calibrated_for(supar_cli.transfer(new, density=0.25, updates="topk"), new)
        assert f"method {method}, not topk" in other and "moments" in other
        own = {"method": "topk", "exponent": 0.3}
        assert not calibrated_for(supar_cli.transfer(new, density=0.25, updates=own), new)

    def test_an_exponent_in_the_proxys_own_target_makes_way(
        self, supar_here: Supar, tuned: Path, trained: list[Plan], tmp_path: Path
    ) -> None:
        own = {"sparsity": {"density": 0.25, "updates": {"method": "rigl", "exponent": 1.3}}}
        fields = proxy_of(tuned).model_dump() | {"target": own}
        tuned.write_text(document.write([fields]))
        called = supar_here("sweep", "tuned.yaml", "--calibrate", *RUN[:-1], "-o", "new.yaml")
        assert called.status == 0, called.err
        new = proxy_of(tmp_path / "new.yaml")
        known = new.evidence["density_exponent"]
        assert known["before"] == 1.3 != known["exponent"]
        assert density_exponent(supar_cli.transfer(new)) == known["exponent"]

    def test_what_no_exponent_mends_is_not_verified_and_said(
        self, supar_here: Supar, tuned: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """The control: optima of the fresh seeds move as before, whatever β is."""
        monkeypatch.setattr(
            runs,
            "validation_loss",
            lambda plan, folder: (
                planted(plan)
                if plan.train.seed < 4
                else 2.4 + 0.04 * (log2(plan.hyperparameters.lr) + 6.7 + 0.4 * log2(plan.sparsity.density)) ** 2
            ),
        )
        called = supar_here("sweep", "tuned.yaml", "--calibrate", "--updates", "rigl", *RUN[:-1], "-o", "new.yaml")
        new = proxy_of(tmp_path / "new.yaml")
        assert called.status == 5 and new.evidence["density_exponent"]["verified"] is False
        plan = supar_cli.transfer(new, density=0.25, updates="rigl")
        assert "was not verified on fresh seeds" in calibrated_for(plan, new)

    @pytest.mark.parametrize(
        ("arguments", "what"),
        [
            (["--updates", "gmp", "-s", "target.sparsity.updates.rates_follow=end"], "expected the density now first"),
            (["--over", "density=1,1/2,1/4"], "two densities at least 2 octaves apart"),
            (["--over", "density=1/2,1/16"], "expected 1 and two densities"),
            (["--over", "init_std=x:-1..1/1"], "--over init_std=x:-1..1/1: can't be calibrated"),
            (["--seeds", "1"], "--seeds 1: 1; expected at least 2"),
            (["--parameterization", "sp"], "--parameterization sp: can"),
            (["-o", "tuned.yaml"], "--out tuned.yaml: is the proxy itself"),
            (["--preset", "fig1"], "--preset fig1: can"),
        ],
    )
    def test_refusals(self, supar_here: Supar, tuned: Path, unchanged: Any, arguments: list[str], what: str) -> None:
        unchanged()
        source = [] if "--preset" in arguments else ["tuned.yaml"]
        called = supar_here("sweep", *source, "--calibrate", "--device", "cpu", *arguments)
        assert called.status == 2 and what in " ".join(called.err.split())

    def test_a_dry_run_counts_both_sweeps(self, supar_here: Supar, tuned: Path) -> None:
        called = supar_here("sweep", "tuned.yaml", "--calibrate", "--updates", "set", "--dry-run", "--device", "cuda")
        assert called.status == 0 and called.err.count("at least 36 runs of the sweep's grid") == 2


def calibrated_for(plan: Plan, proxy: Proxy) -> str:
    said = advice.warnings(plan, evidence=proxy.evidence)
    return "; ".join(one for one in said if one.startswith("density_exponent"))


@pytest.mark.usefixtures("trained", "text_file")
def test_arms_that_prune_have_dense_runs_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One for each learning rate and seed, and of equal ones a single one; a run pruned for one arm is not another's."""
    pruned: list[tuple[str, str]] = []

    def prune(source: Path, **options: Any) -> Plan:
        pruned.append((source.name, options["masks_out"].name))
        return dense[source.name]

    dense: dict[str, Plan] = {}
    monkeypatch.setattr(curves, "train", lambda plan, folder: dense.setdefault(folder.name, plan))
    monkeypatch.setattr(curves, "prune", prune)
    arms = {name: {"prune": scale} for name, scale in (("a", "energy"), ("b", "energy"), ("c", "none"))}
    over = {"lr": "x:0..0/1", "density": ["1", "1/4"]}
    changes = {"parameterizations": [], "arms": arms, "over": over, "seeds": 2, "widen": 0}
    monkeypatch.chdir(tmp_path)
    study = sweep_of(**changes, own={"b": {"lr": 0.001}})
    supar_cli.sweep(study, tmp_path / "out", jobs=1)
    assert {plan.hyperparameters.lr for plan in dense.values()} == {0.001, 0.01} and len(dense) == 4
    assert len(pruned) == 6 == len(set(pruned))  # a, b and c, for two seeds
