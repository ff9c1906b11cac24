"""`supar prune`: masks of the largest weights, values with their energy, rates by the run's own rules, round after round."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import supar_cli
from supar_cli.errors import InputError, TransferWarning
from supar_cli.planning.live_counts import GivenMasks
from supar_cli.planning.plan import Plan
from supar_cli.planning.plan_sections import MaskSource, Values
from supar_cli.planning.problems import validate
from supar_cli.planning.pruning import plan_pruned, rules_of
from supar_cli.planning.spec import Proxy
from supar_cli.planning.transfer import transfer
from supar_cli.training import pruning
from supar_cli.training.checkpoint_reader import weights
from supar_cli.training.prepare import make_masks, prepare
from supar_cli.training.trainer import Trainer
from tests.conftest import plan_from, proxy_fields, real_text

pytestmark = pytest.mark.filterwarnings("ignore::supar_cli.errors.TransferWarning")
Arrays = dict[str, np.ndarray]
STEPS = {"steps": 12, "batch_size": 4, "eval_every": 12, "eval_batches": 1}
KEEPING = {"device": "cpu", "checkpoint_every": 4, "keep": 9, "engine": "dense"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(real_text(20_000))
    return path


@pytest.fixture(scope="module")
def plan(text: Path) -> Plan:
    target = {"width": 64, "sparsity": {"density": 1}}
    return plan_from(proxy_fields(str(text), train=STEPS, target=target, run=KEEPING))


@pytest.fixture(scope="module")
def run(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dense run, with the checkpoints of steps 4, 8 and 12."""
    path = tmp_path_factory.mktemp("runs") / "dense"
    supar_cli.train(plan, path)
    return path


@pytest.fixture
def prune(tmp_path: Path) -> Callable[..., Plan]:
    """`prune(run, density=…)`, its files in a folder of their own for each call."""
    made: list[Path] = []

    def call(run: Path, **options: Any) -> Plan:
        made.append(tmp_path / f"pruned-{len(made)}")
        made[-1].mkdir()
        files = {f"{key}_out": made[-1] / f"{key}.safetensors" for key in ("masks", "values")}
        return supar_cli.prune(run, **files, **options)

    return call


def start_of(plan: Plan) -> Arrays:
    """What a plan's tensors start from, whole, dead weights 0."""
    model = prepare(plan, torch.device("cpu"))
    return {row.name: model.weight(row.name).numpy() for row in plan.tensors}


def after(run: Path, step: int) -> Arrays:
    return {n: v.numpy() for n, v in weights(run / f"checkpoints/step-{step:08d}").items()}


def hidden(plan: Plan) -> list[str]:
    return [row.name for row in plan.tensors if row.role == "hidden"]


def largest(trained: Arrays, names: list[str], density: Fraction) -> Arrays:
    """SPEC §10 in numpy: True at the largest weights of some tensors together."""
    sizes = np.abs(np.concatenate([trained[name].ravel() for name in names]))
    alive = np.zeros(sizes.size, bool)
    alive[np.argsort(-sizes, kind="stable")[: round(density * sizes.size)]] = True
    ends = np.cumsum([trained[name].size for name in names])[:-1]
    return {n: part.reshape(trained[n].shape) for n, part in zip(names, np.split(alive, ends), strict=True)}


def assert_pruned(
    plan: Plan, first: Arrays, trained: Arrays, names: list[list[str]], density: Fraction, scale: str
) -> None:
    """A plan starts from the largest weights of `trained`, with their values in `first` times g, and all else as there."""
    alive: Arrays = {}
    for group in names:
        alive |= largest(trained, group, density)
    found, rows = start_of(plan), {row.name: row for row in plan.tensors}
    for name, values in first.items():
        row, size = rows[name], found[name].size
        if name not in alive:
            assert np.array_equal(found[name], values) and (row.kept, row.density) == (size, 1.0)
            continue
        mask = alive[name]
        energy, left = (float((v.astype(np.float64) ** 2).sum()) for v in (values, values[mask]))
        gain = np.sqrt(energy / left) if scale == "energy" else 1.0
        assert gain > 1 or scale == "none"
        assert np.array_equal(found[name], np.where(mask, values * np.float32(gain), np.float32(0)))
        assert row.kept == mask.sum() and row.density == row.because["m_rho"] == row.kept / size
        assert row.because.get("g", 1.0) == pytest.approx(gain, rel=1e-12)
        wanted = energy if scale == "energy" else left
        assert row.init_std == pytest.approx(np.sqrt(wanted / row.kept), rel=1e-6)


CASES: list[dict[str, Any]] = [
    {"density": "1/4"},
    {"density": "1/3", "scale": "none"},
    {"sparsity": 0.875, "rewind": 4},
    {"density": 0.25, "rewind": 12, "scope": "global", "scale": "none"},
    {"density": 0.25, "scope": "global", "rewind": 8},
]


def expected_of(plan: Plan, run: Path, case: dict[str, Any]) -> tuple[Arrays, Arrays, list[list[str]], Fraction, str]:
    rewind, names = case.get("rewind", 0), hidden(plan)
    density = Fraction(str(case["density"])) if "density" in case else 1 - Fraction(str(case["sparsity"]))
    first = after(run, rewind) if rewind else start_of(plan)
    groups = [names] if case.get("scope") == "global" else [[name] for name in names]
    return first, after(run, 12), groups, density, case.get("scale", "energy")


class TestOneRound:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_the_largest_weights_start_from_their_values_times_g(
        self, plan: Plan, run: Path, prune: Callable[..., Plan], case: dict[str, Any]
    ) -> None:
        found = prune(run, **case)
        assert_pruned(found, *expected_of(plan, run, case))
        assert found.train == plan.train and found.meta["pruned"]["rewind"] == case.get("rewind", 0)
        assert set(found.parents) == {"proxy", "plan", "checkpoint"} | ({"rewind"} if "rewind" in case else set())
        assert found.parents["plan"] == plan.hash() and found.parents["proxy"] == plan.parents["proxy"]

    @pytest.mark.parametrize("fault", ["no gain", "1/√density", "smallest", "another step"])
    def test_a_planted_fault_is_seen(
        self, plan: Plan, run: Path, prune: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        energy, keys, state_at = pruning.sum_of_squares, pruning._keys, pruning.state_at
        if fault == "no gain":
            monkeypatch.setattr(pruning, "sqrt", lambda x: 1.0 if x > 1 else float(np.sqrt(x)))
        elif fault == "1/√density":  # the number of weights in place of their energy
            monkeypatch.setattr(pruning, "sum_of_squares", lambda v: energy(torch.where(v != 0, 1.0, 0.0)))
        elif fault == "smallest":
            monkeypatch.setattr(pruning, "_keys", lambda *given: -keys(*given))
        else:
            monkeypatch.setattr("supar_cli.jobs.pruning.state_at", lambda *given: state_at(*given[:3], 4))
        with pytest.raises((AssertionError, InputError)):
            assert_pruned(prune(run, **CASES[0]), *expected_of(plan, run, CASES[0]))

    def test_overrides_of_the_run_stay(self, text: Path, tmp_path: Path, prune: Callable[..., Plan]) -> None:
        target = {"sparsity": {"density": 1, "overrides": {"attn": 1, "blocks.0.mlp.up": 0.5}}}
        own = plan_from(proxy_fields(str(text), train={**STEPS, "steps": 2}, target=target, run=KEEPING))
        supar_cli.train(own, tmp_path / "run")
        for scope in ("tensor", "global"):
            found = prune(tmp_path / "run", density="1/8", scope=scope)
            rows = {row.name: row for row in found.tensors}
            assert all(rows[name].density == 1 for name in hidden(own) if ".attn." in name)
            assert rows["blocks.0.mlp.up"].density == 0.5 and rows["blocks.0.mlp.up"].because["g"] == 1.0
            assert found.sparsity.overrides == own.sparsity.overrides
            free = [rows[f"blocks.{block}.mlp.{part}"] for block, part in ((0, "down"), (1, "up"), (1, "down"))]
            assert sum(row.kept for row in free) * 8 == sum(row.size for row in free)


def test_a_second_round_only_shrinks_masks_and_keeps_the_energy(
    plan: Plan, run: Path, tmp_path: Path, prune: Callable[..., Plan]
) -> None:
    first = prune(run, density="1/4")
    supar_cli.train(first, tmp_path / "first")
    with pytest.warns(TransferWarning, match=r"was pruned before: a second round's rate is not settled.*--calibrate"):
        second = prune(tmp_path / "first", density="1/16", scope="global")
    before, now, start = make_masks(first), make_masks(second), start_of(plan)
    assert sum(mask.count for mask in now.values()) * 16 == sum(mask.size for mask in now.values())
    assert all(not (now[name].alive() & ~before[name].alive()).any() for name in now)
    for name, values in start_of(second).items():
        energy = float(np.square(start[name], dtype=np.float64).sum())
        assert float(np.square(values, dtype=np.float64).sum()) == pytest.approx(energy, rel=1e-5)
    rows = {row.name: row for row in second.tensors}
    assert all(rows[name].lr == pytest.approx(0.005 / rows[name].density, rel=1e-12) for name in now)
    assert Trainer(second).step().loss < 10


RULES: list[dict[str, Any]] = [
    {},
    {"name": "mup"},
    {"name": "sp"},
    {"name": "supar-lr-only", "parameterization": {"weight_decay_rule": "sqrt"}},
    {"name": "supar-init-only"},
    {"train": {"optimizer": "sgd"}, "parameterization": {"weight_decay_rule": "coupled"}},
    {"parameterization": {"density_exponent": 0.7, "depth_rule": "completep"}, "target": {"layers": 3}},
]


@pytest.mark.parametrize("before", [1.0, 0.5])
@pytest.mark.parametrize("case", RULES, ids=str)
def test_rates_are_those_of_a_transfer_to_the_same_masks(text: Path, case: dict[str, Any], before: float) -> None:
    name = case.get("name", "supar")
    changes: dict[str, Any] = {key: value for key, value in case.items() if key not in ("name", "target")}
    proxy = validate(Proxy, proxy_fields(str(text), **changes), "proxy")
    target = proxy.target.override(**case.get("target", {}))
    own = transfer(proxy, target.override(density=before), name)
    live = {row.name: row.size // (3 + at) for at, row in enumerate(own.tensors) if row.role == "hidden"}
    masks = GivenMasks(MaskSource(kind="file", path="m", hash="sha256:m"), live)
    values = Values(source="file", path="v", hash="sha256:v", scale="energy")
    starts = {row.name: (0.1, 1.5 if row.name in live else None) for row in own.tensors}
    found, wanted = (
        plan_pruned(own, masks, values, starts, {}, own.parameterization),
        transfer(proxy, target, name, masks=masks),
    )
    for one, other in zip(found.tensors, wanted.tensors, strict=True):
        assert {**one.because, "g": None} == {**other.because, "g": None}
        for key in ("name", "density", "kept", "lr", "weight_decay", "eps"):
            assert vars(one)[key] == vars(other)[key], (one.name, key)
    assert found.sparsity == wanted.sparsity
    changed = own.model_copy(
        update={"tensors": [row.model_copy(update={"lr": 3 * row.lr}) for row in own.tensors]}  # edited by hand
    )
    again = plan_pruned(changed, masks, values, starts, {}, own.parameterization)
    assert [row.lr for row in again.tensors] == pytest.approx([3 * row.lr for row in found.tensors], rel=1e-12)


def test_another_name_changes_the_rates_alone(plan: Plan, run: Path, prune: Callable[..., Plan]) -> None:
    found, kept = prune(run, density="1/4"), prune(run, density="1/4", parameterization="mup")
    for one, other, before in zip(found.tensors, kept.tensors, plan.tensors, strict=True):
        factor = 4 if one.role == "hidden" else 1
        assert one.lr == factor * before.lr and (other.lr, other.weight_decay) == (before.lr, before.weight_decay)
        assert one.init_std == other.init_std
    with pytest.raises(InputError, match="parameterization: the run's is supar, which differs from sp"):
        rules_of(plan, "sp")


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "density: is missing; expected a density or a sparsity"),
    ({"density": 0.5, "sparsity": 0.5}, "density: sparsity is given too"),
    ({"density": 1}, "density: no weight would be pruned"),
    ({"density": 0.25, "scope": "all"}, "scope: all; expected one of tensor, global"),
    ({"density": 0.25, "scale": "all"}, "scale: all; expected none or energy"),
    ({"density": 0.25, "rewind": 5}, r"rewind: .* has no checkpoint of step 5, but those of 0 \(its start\), 4, 8, 12"),
    (
        {"density": "1/100000"},
        r"(?s)^(?!.*--scope)blocks\.0\.attn\.q: has no live weight\n.*blocks\.1\.mlp\.down: has no live weight",
    ),
    ({"density": "1/100000", "scope": "global"}, "density: is too low for these tensors.*or --scope tensor"),
    ({"density": "1/1000"}, r"blocks\.1\.mlp\.up: only \d+ of 256 rows and \d+ of 64 columns have a live weight"),
]


@pytest.mark.parametrize(("options", "what"), REFUSED, ids=str)
def test_what_is_refused(
    run: Path, prune: Callable[..., Plan], tmp_path: Path, options: dict[str, Any], what: str
) -> None:
    with pytest.raises(InputError, match=what):
        prune(run, **options)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_runs_are_refused_or_warned_of(text: Path, tmp_path: Path, prune: Callable[..., Plan]) -> None:
    fields = proxy_fields(str(text), train={**STEPS, "steps": 4}, run=KEEPING)
    with pytest.raises(InputError, match="nothing: no such folder"):
        prune(tmp_path / "nothing", density=0.5)
    sparse = {"density": 0.25, "pattern": "fixed_fan_in"}
    supar_cli.train(plan_from({**fields, "target": {"sparsity": sparse}}), tmp_path / "sparse")
    with pytest.raises(
        InputError, match=r"blocks\.0\.attn\.q: 256 of 1,024 weights live.*expected a density below 0\.25"
    ):
        prune(tmp_path / "sparse", density=0.5)
    with pytest.warns(TransferWarning, match="its masks are .*; those of the largest weights are not"):
        assert prune(tmp_path / "sparse", density=0.125).sparsity.pattern == "exact"
    moving = {"density": 0.25, "updates": "gmp"}
    supar_cli.train(plan_from({**fields, "target": {"sparsity": moving}}), tmp_path / "moving")
    with pytest.raises(InputError, match=r"moving: its masks moved while it trained \(gmp\)"):
        prune(tmp_path / "moving", density=0.125)


def test_an_unfinished_run_is_warned_of(run: Path, tmp_path: Path, prune: Callable[..., Plan]) -> None:
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "checkpoints").mkdir()
    (tmp_path / "cut" / "checkpoints" / "step-00000004").symlink_to(run / "checkpoints" / "step-00000004")
    with pytest.warns(TransferWarning, match="has not finished: its magnitudes are those after step 4 of 12"):
        prune(tmp_path / "cut", density=0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TransferWarning)
        prune(run, density=0.5)  # finished, and 32 weights for each neuron


def test_a_checkpoint_of_another_plan_is_not_rewound_to(
    plan: Plan, run: Path, tmp_path: Path, prune: Callable[..., Plan]
) -> None:
    other = plan.model_copy(update={"train": plan.train.model_copy(update={"seed": 5})})
    supar_cli.train(other, tmp_path / "other")
    (tmp_path / "mixed" / "checkpoints").mkdir(parents=True)
    for at, source in ((4, tmp_path / "other"), (12, run)):
        name = f"checkpoints/step-{at:08d}"
        (tmp_path / "mixed" / name).symlink_to(source / name)
    with pytest.raises(InputError, match=r"rewind: .*step-00000004 belongs to another plan than the newest checkpoint"):
        prune(tmp_path / "mixed", density=0.25, rewind=4)


def test_a_round_without_a_rewind_names_no_checkpoint_of_an_earlier_one(
    run: Path, tmp_path: Path, prune: Callable[..., Plan]
) -> None:
    first = prune(run, density=0.5, rewind=4)
    supar_cli.train(first, tmp_path / "first")
    assert "rewind" in first.parents and "rewind" not in prune(tmp_path / "first", density=0.25).parents
