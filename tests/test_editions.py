"""Plans that supar wrote before the second edition of its rules, at a changed FFN ratio, the only place where editions differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from supar_cli.experiments.check_plans import sweeps_of
from supar_cli.planning import document
from supar_cli.planning.plan import Plan, read_plan
from supar_cli.planning.transfer import transfer

from .conftest import Called
from .test_plan import GOLDEN, GPT2, TRAIN, plan, proxy

Supar = Callable[..., Called]

OPTIMIZERS = ("adamw", "sgd")
TARGET = {"width": 256, "ffn_width": 2048, "sparsity": {"density": 0.5}}  # FFN ratio 4 → 8


def file_of(optimizer: str) -> Path:
    return GOLDEN / "edition-1" / f"gpt2-{optimizer}-ffn-ratio.yaml"


def old_plan(optimizer: str) -> Plan:
    return read_plan(file_of(optimizer))


def sections(optimizer: str) -> dict[str, Any]:
    return {"model": {**GPT2, "bias": True}, "train": {**TRAIN, "optimizer": optimizer}, "target": TARGET}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_edition_1_makes_older_plans_again_with_their_hash(optimizer: str) -> None:
    made = proxy(**sections(optimizer))
    one, two = (transfer(made, made.target, edition=edition, draw="positions") for edition in (1, 2))  # type: ignore[arg-type]
    assert [made.parameterization.edition for made in (old_plan(optimizer), one, two)] == [1, 1, 2]
    assert one == old_plan(optimizer)
    written = yaml.safe_load(file_of(optimizer).read_text("utf-8"))
    assert one.hash() == document.content_hash({key: written[key] for key in written if key not in ("run", "meta")})
    rows = zip(one.tensors, two.tensors, strict=True)
    moved = {t.name for t, other in rows if (t.init_std, t.lr, t.eps) != (other.init_std, other.lr, other.eps)}
    sites = {"adamw": ["down"], "sgd": ["down", "up", "up.bias"]}[optimizer]
    assert moved == {f"blocks.{block}.mlp.{site}" for block in (0, 1) for site in sites}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_unchanged_ffn_ratio_has_the_rules_of_today(optimizer: str) -> None:
    target = {"width": 256, "sparsity": {"density": 0.5}}
    made = proxy(**{**sections(optimizer), "target": target})
    one, two = (transfer(made, made.target, edition=edition) for edition in (1, 2))  # type: ignore[arg-type]
    assert one.tensors == two.tensors == plan(**{**sections(optimizer), "target": target}).tensors
    assert one.hash() == two.hash()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_explain_has_the_rules_of_the_plans_edition(supar_here: Supar, optimizer: str, tmp_path: Path) -> None:
    called = supar_here("explain", str(file_of(optimizer)))
    assert called.status == 0 and "edited" not in called.out
    assert {"adamw": "ε/m_d = 1e-08/4 = 2.5e-09", "sgd": "η/m_ρ = 0.015625/0.5 = 0.03125"}[optimizer] in called.out
    (tmp_path / "today.yaml").write_text(document.write([plan(**sections(optimizer)).model_dump()]), "utf-8")
    called = supar_here("explain", "today.yaml")
    assert called.status == 0 and "edited" not in called.out
    worked = {"adamw": "ε/m_out = 1e-08/2 = 5e-09", "sgd": "η·m_fan_out/(m_d·m_ρ) = 0.015625·4/(2·0.5) = 0.0625"}
    assert worked[optimizer] in called.out
    text = (tmp_path / "today.yaml").read_text("utf-8")
    key, says = {"adamw": ("m_out: 2.0", "m_out 3.0, the shapes give 2.0"), "sgd": ("m_fan_out: 4.0", "m_fan_out 3.0")}[
        optimizer
    ]
    (tmp_path / "today.yaml").write_text(text.replace(key, key[:-3] + "3.0", 1), "utf-8")
    assert f"edited: the plan has {says}" in supar_here("explain", "today.yaml").out


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_check_holds_a_plan_against_a_reference_of_its_own_edition(optimizer: str) -> None:
    sweeps = sweeps_of(old_plan(optimizer), seeds=1, steps=1, batch_size=1)
    ((dense, own),) = next(sweep.plans for sweep in sweeps if sweep.label == "the plan over density")
    assert dense.parameterization.edition == own.parameterization.edition == 1
