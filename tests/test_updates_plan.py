"""Plans whose masks change: their section, their rows' numbers at the end and at step 0, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import product
from math import prod, sqrt
from pathlib import Path
from typing import Any

import pytest

import supar_cli
from supar_cli.errors import InputError
from supar_cli.planning import document
from supar_cli.planning.explain import explain
from supar_cli.planning.plan import Plan, PlanTensor, with_steps
from supar_cli.planning.problems import parse, validate
from supar_cli.planning.schedule import MaskSchedule
from supar_cli.planning.updates import Updates
from tests import oracle
from tests.conftest import Called

pytestmark = pytest.mark.filterwarnings("ignore::supar_cli.errors.TransferWarning")

MakePlan = Callable[..., Plan]
METHODS = ("set", "rigl", "gmp", "topk")

# what each method has by default, from the papers and SPEC §9; every other key is one that it doesn't have
PUBLISHED: dict[str, dict[str, Any]] = {
    "set": {"begin": 0.0, "end": 0.75, "drop": 0.3, "drop_schedule": "cosine", "grow": "random", "moments": "mean"},
    "rigl": {"begin": 0.0, "end": 0.75, "drop": 0.3, "drop_schedule": "cosine", "grow": "gradient", "moments": "mean"},
    "gmp": {"start": 1.0, "shape": "cubic", "begin": 0.2, "anneal": 0.75, "end": 0.75},
    "topk": {"start": 1.0, "shape": "linear", "begin": 0.0, "anneal": 0.5, "end": 1.0},
}
PUBLISHED["topk"] |= {"grow": "magnitude", "moments": "keep", "every_steps": 1}
FLOOR = {"set": 0, "rigl": 0, "gmp": 0, "topk": 4}
EXPONENT = {"set": 1.0, "rigl": 0.9, "gmp": 1.0, "topk": 1.0}


@pytest.fixture
def moving(plan_of: MakePlan) -> MakePlan:
    """`moving("gmp", end=0.9)`: the small proxy's plan whose masks change so; other sections by `sections`."""

    def make(method: str, name: str = "supar", density: Any = 0.25, sections: Any = None, **keys: Any) -> Plan:
        sparsity = {"density": density, "updates": {"method": method, **keys}}
        sections = {"train": {"steps": 40}, **(sections or {})}
        return plan_of(name, **sections, target={"width": 64, "sparsity": sparsity})

    return make


def section(plan: Plan) -> dict[str, Any]:
    updates = plan.sparsity.updates
    assert updates is not None
    return updates.model_dump()


class TestSection:
    @pytest.mark.parametrize("method", METHODS)
    def test_every_key_of_the_method_is_in_the_plan_as_published(self, moving: MakePlan, method: str) -> None:
        wanted = {"method": method, **PUBLISHED[method], "min_per_neuron": FLOOR[method], "exponent": EXPONENT[method]}
        assert section(moving(method)) == {"every_steps": 1, "rates_follow": "now", **wanted}

    @pytest.mark.parametrize(("steps", "every"), [(1, 1), (79, 1), (80, 2), (400, 10), (4000, 100), (90000, 100)])
    def test_the_interval_follows_the_length_of_the_run(self, moving: MakePlan, steps: int, every: int) -> None:
        for method in ("set", "rigl", "gmp"):
            assert section(moving(method, sections={"train": {"steps": steps}}))["every_steps"] == every

    def test_zero_moments_have_an_exponent_of_their_own(self, moving: MakePlan) -> None:
        assert section(moving("rigl", moments="zero"))["exponent"] == 0.8
        assert section(moving("set", moments="zero"))["exponent"] == 1.0
        assert section(moving("rigl", moments="zero", exponent=1.0))["exponent"] == 1.0

    def test_a_calibrated_exponent_of_the_proxy_goes_before_the_methods(self, moving: MakePlan) -> None:
        tuned = {"parameterization": {"density_exponent": 0.7}}
        for method in METHODS:
            found = moving(method, sections=tuned)
            assert section(found)["exponent"] == 0.7 and found.parameterization.density_exponent is None
            assert section(moving(method, sections=tuned, exponent=0.4))["exponent"] == 0.4

    def test_a_floor_above_a_tensors_live_weights_is_lowered_where_it_is_the_default(self, moving: MakePlan) -> None:
        assert section(moving("topk", density="3/64"))["min_per_neuron"] == 3
        with pytest.raises(InputError, match=r"target\.sparsity\.updates\.min_per_neuron: 4 .* expected at most 3"):
            moving("topk", density="3/64", min_per_neuron=4)

    @pytest.mark.parametrize("method", METHODS)
    def test_written_and_read_it_is_the_same_plan(self, moving: MakePlan, method: str) -> None:
        plan = moving(method, every_steps=1, min_per_neuron=2, exponent=0.5, rates_follow="end")
        text = document.write([plan.model_dump()])
        again = parse(Plan, document.read(text, "plan.yaml")[0])
        assert again == plan and again.hash() == plan.hash() and document.write([again.model_dump()]) == text
        absent = set(Updates.keys()) - set(section(plan))
        assert not any(f" {key}:" in text.split("updates:")[1].split("\n")[0] for key in absent)

    def test_every_key_changes_the_hash(self, moving: MakePlan) -> None:
        other: dict[str, Any] = {"every_steps": 3, "begin": 0.125, "end": 0.875, "min_per_neuron": 1}
        other |= {"rates_follow": "end", "exponent": 0.625}
        falling = {"start": 0.875, "shape": "linear", "anneal": 0.625}
        replacing = {"drop": 0.25, "drop_schedule": "linear", "moments": "zero"}
        own = {"gmp": other | falling, "set": other | replacing, "rigl": other | replacing}
        topk = {key: value for key, value in (other | falling).items() if key not in ("every_steps", "end")}
        own["topk"] = topk | {"shape": "cubic", "end": 0.875}
        for method, keys in own.items():
            assert set(keys) | {"method", "grow"} | ({"every_steps", "moments"} if method == "topk" else set()) >= set(
                section(moving(method))
            )
            plans = [moving(method), *(moving(method, **{key: value}) for key, value in keys.items())]
            assert len({plan.hash() for plan in plans}) == len(plans)
        assert len({moving(method).hash() for method in METHODS}) == 4

    def test_a_plan_without_it_has_the_hash_it_had(self, plan_of: MakePlan) -> None:
        assert "updates" not in plan_of().identity()["sparsity"]


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gmp", {"drop": 0.3}, r"drop: 0\.3 with the method gmp; expected none: GMP has no such key"),
    ("gmp", {"moments": "zero"}, r"moments: zero with the method gmp; expected none"),
    ("set", {"start": 1.0}, r"start: 1\.0 with the method set; expected none: SET has no such key"),
    ("rigl", {"shape": "cubic"}, r"shape: cubic with the method rigl; expected none"),
    ("rigl", {"anneal": 0.5}, r"anneal: 0\.5 with the method rigl; expected none"),
    ("topk", {"drop_schedule": "linear"}, r"drop_schedule: linear with the method topk; expected none"),
    ("set", {"grow": "gradient"}, r"grow: gradient with the method set; expected random"),
    ("rigl", {"grow": "random"}, r"grow: random with the method rigl; expected gradient"),
    ("topk", {"moments": "mean"}, r"moments: mean with the method topk; expected keep"),
    ("topk", {"every_steps": 2}, r"every_steps: 2 with the method topk; expected 1"),
    ("set", {"every_steps": 0}, r"every_steps: "),
    ("set", {"begin": 0.5, "end": 0.5}, r"end: 0\.5 is not after begin, 0\.5"),
    ("set", {"begin": 0.8}, r"end: 0\.75 is not after begin, 0\.8"),
    ("gmp", {"begin": 0.6, "anneal": 0.5}, r"anneal: 0\.5 is not after begin, 0\.6"),
    ("gmp", {"anneal": 0.9}, r"end: 0\.75 is not after anneal, 0\.9"),
    ("topk", {"end": 0.4}, r"end: 0\.4 is not after anneal, 0\.5"),
    ("gmp", {"start": 0.0}, r"start: "),
    ("gmp", {"start": 1.5}, r"start: "),
    ("set", {"drop": 0.0}, r"drop: "),
    ("set", {"drop": 1.25}, r"drop: "),
    ("set", {"begin": 1.0}, r"begin: "),
    ("set", {"end": 0.0}, r"end: "),
    ("set", {"exponent": 2.5}, r"exponent: "),
    ("set", {"exponent": float("nan")}, r"exponent: "),
    ("set", {"min_per_neuron": -1}, r"min_per_neuron: "),
    ("set", {"rates_follow": "start"}, r"rates_follow: "),
    ("set", {"interval": 3}, r"unknown key 'interval'"),
    ("magnitude", {}, r"method: should be 'set', 'rigl', 'gmp' or 'topk', not 'magnitude'"),
]


class TestRefused:
    @pytest.mark.parametrize(("method", "keys", "what"), REFUSED)
    def test_with_the_keys_place(self, moving: MakePlan, method: str, keys: dict[str, Any], what: str) -> None:
        with pytest.raises(InputError, match=rf"target\.sparsity\.updates\.?.*{what}"):
            moving(method, **keys)

    @pytest.mark.parametrize("pattern", ["fixed_fan_in", "bernoulli", "block", "2:4"])
    def test_another_pattern(self, plan_of: MakePlan, pattern: str) -> None:
        sparsity = {"density": 0.5, "pattern": pattern, "updates": "set"}
        sparsity |= {"block": 16} if pattern == "block" else {}
        with pytest.raises(InputError, match=rf"updates: can't be combined with the pattern {pattern}"):
            plan_of(target={"width": 64, "sparsity": sparsity})

    def test_where_no_mask_could_change(self, moving: MakePlan) -> None:
        for method in METHODS:
            with pytest.raises(InputError, match=r"target\.sparsity\.updates: no tensor is sparse"):
                moving(method, density=1.0)

    @pytest.mark.parametrize("method", METHODS)
    def test_a_plan_without_a_key_of_its_method(self, moving: MakePlan, method: str) -> None:
        data = moving(method).model_dump()
        for key in data["sparsity"]["updates"]:
            changed = {**data, "sparsity": {**data["sparsity"], "updates": dict(data["sparsity"]["updates"])}}
            del changed["sparsity"]["updates"][key]
            with pytest.raises(InputError, match=rf"sparsity\.updates.*{key}"):
                parse(Plan, document.Document(changed, "plan.yaml"))

    def test_a_plan_whose_floor_is_above_what_a_tensor_keeps(self, moving: MakePlan) -> None:
        data = moving("rigl", density="3/64").model_dump()
        data["sparsity"]["updates"]["min_per_neuron"] = 4
        with pytest.raises(InputError, match=r"sparsity\.updates\.min_per_neuron: 4 .* expected at most 3"):
            parse(Plan, document.Document(data, "plan.yaml"))


CASES = [
    *product(METHODS, ("supar",), ("independent", "coupled", "sqrt"), ("adamw",)),
    *product(METHODS, ("sp", "sp-si", "mup", "supar-init-only", "supar-lr-only"), ("independent",), ("adamw",)),
    *product(METHODS, ("supar",), ("independent",), ("sgd",)),
]


class TestRows:
    """A row's density, live weights, rate and decay are those of the end, its init is that of step 0."""

    @staticmethod
    def expected(plan: Plan, row: PlanTensor, start: float, beta: float) -> dict[str, float]:
        own, hyper, because = plan.parameterization, plan.hyperparameters, row.because
        options = own.model_dump(include=("name", "weight_decay_rule", "depth_rule", "residual_init"))
        known: dict[str, Any] = {"unembedding_init": own.unembedding_init, "optimizer": plan.train.optimizer, **options}
        known |= {"role": row.role, "m_d": because["m_d"], "m_out": 2.0, "m_fan_out": because.get("m_fan_out")}
        known |= {"m_L": 1.0, "layers": 2, "in_block": row.block is not None, "writes_residual": False}
        known |= {
            "first_sum": False,
            "ratio": 1.0,
            "head": False,
            "head_ratio": 1.0,
            "m_rho_start": None,
            "after_head": False,
            "edition": own.edition,
            "density_exponent": beta,
        }
        known |= {"sigma": hyper.init_std, "eta": hyper.lr, "lam": hyper.weight_decay, "eps": hyper.eps}
        at_start = max(start, row.density) if row.density < 1 else 1.0
        end, first = (oracle.numbers(**known, m_rho=m_rho) for m_rho in (row.density, at_start))
        return {**end, "init_std": first["init_std"]}

    @pytest.mark.parametrize(("method", "name", "rule", "optimizer"), CASES)
    def test_against_the_oracle(self, moving: MakePlan, method: str, name: str, rule: str, optimizer: str) -> None:
        train = {"steps": 40, "optimizer": optimizer}
        sections = {"parameterization": {"weight_decay_rule": rule}, "train": train}
        follows = name in ("supar", "supar-lr-only")
        for keys in ({}, {"exponent": 0.5}, {"start": 0.5} if method in ("gmp", "topk") else {"drop": 0.5}):
            plan = moving(method, name, sections=sections, **keys)
            beta = keys.get("exponent", EXPONENT[method]) if follows else 0.0
            assert section(plan)["exponent"] == beta
            start = keys.get("start", 1.0) if method in ("gmp", "topk") else 0.0
            for row in plan.tensors:
                for key, value in self.expected(plan, row, start, beta).items():
                    if key != "init_std" or row.init_constant is None:
                        assert getattr(row, key) == pytest.approx(value, rel=1e-12, abs=1e-300), (row.name, key)
                if row.role == "hidden":
                    assert (row.kept, row.density) == (row.size // 4, 0.25) and row.because["m_rho"] == 0.25
                    assert row.because.get("m_rho_start") == (start or None)

    def test_mixed_densities_start_where_they_are_above_the_start(self, plan_of: MakePlan) -> None:
        sparsity = {"density": 0.25, "overrides": {"attn": 0.75, "mlp.down": 1.0}}
        sparsity["updates"] = {"method": "gmp", "start": 0.5}
        plan = plan_of(train={"steps": 40}, target={"width": 64, "sparsity": sparsity})
        for row in (row for row in plan.tensors if row.role == "hidden"):
            at_start = {"mlp.up": 0.5, "mlp.down": 1.0}.get(row.site, 0.75)
            assert row.init_std == pytest.approx(0.08 / sqrt(row.because["m_d"] * at_start), rel=1e-12)
            assert ("m_rho_start" in row.because) == (row.site == "mlp.up")

    def test_the_wrong_end_would_be_seen(self, moving: MakePlan) -> None:
        """The control: a row with the rate of step 0, or with the init of the end."""
        plan = moving("gmp")
        for row in (row for row in plan.tensors if row.role == "hidden"):
            right = self.expected(plan, row, 1.0, 1.0)
            assert row.lr == pytest.approx(4 * self.expected(plan, row, 1.0, 0.0)["lr"]) == pytest.approx(right["lr"])
            assert self.expected(plan, row, 0.0, 1.0)["init_std"] == pytest.approx(2 * row.init_std)


class TestCommand:
    def test_the_flag_is_the_documents_key(
        self, proxy_file: Path, supar_here: Callable[..., Called], tmp_path: Path
    ) -> None:
        flags = ("--updates", "rigl", "-s", "target.sparsity.updates.every_steps=2", "-o", "flags.yaml", "-q")
        assert supar_here("transfer", "proxy.yaml", *flags).status == 0
        text = proxy_file.read_text() + "    updates: {method: rigl, every_steps: 2}\n"
        proxy_file.write_text(text)
        assert supar_here("transfer", "proxy.yaml", "-o", "keys.yaml", "-q").status == 0
        plans = [supar_cli.load(tmp_path / name) for name in ("flags.yaml", "keys.yaml")]
        assert plans[0].sparsity == plans[1].sparsity and plans[0].tensors == plans[1].tensors
        for plan in plans:
            assert isinstance(plan, Plan) and section(plan)["every_steps"] == 2

    def test_a_key_that_the_method_has_not(self, proxy_file: Path, supar_here: Callable[..., Called]) -> None:
        done = supar_here("transfer", "proxy.yaml", "--updates", "gmp", "-s", "target.sparsity.updates.drop=.3")
        assert done.status == 2 and "updates.drop=.3: 0.3 with the method gmp" in done.err and done.out == ""

    def test_a_file_of_masks_starts_set_and_rigl_only(
        self, proxy_file: Path, supar_here: Callable[..., Called], tmp_path: Path
    ) -> None:
        import numpy as np

        from supar_cli.sparse.mask_files import write_masks
        from supar_cli.sparse.masks import Mask

        alive = np.random.default_rng(0).random((64, 64)) < 0.3
        write_masks(tmp_path / "masks.safetensors", {"blocks.0.attn.q": Mask.of(alive)})
        (tmp_path / "proxy.yaml").write_text(proxy_file.read_text().replace("  sparsity:\n    sparsity: 0.5\n", ""))
        for method in METHODS:
            done = supar_here(
                "transfer", "--masks", "masks.safetensors", "--updates", method, "-o", "p.yaml", "--force"
            )
            if method in ("set", "rigl"):
                assert done.status == 0, done.err
                plan = supar_cli.load(tmp_path / "p.yaml")
                assert isinstance(plan, Plan) and section(plan)["method"] == method
                assert [row.kept for row in plan.tensors if row.kept < row.size] == [int(alive.sum())]
            else:
                assert done.status == 2 and "expected no masks from a file" in done.err


def moved(plan: Plan) -> Iterator[tuple[MaskSchedule, PlanTensor]]:
    schedule = MaskSchedule.of(plan)
    assert schedule is not None
    return ((schedule, row) for row in plan.tensors if row.kept < row.size)


@pytest.mark.parametrize("method", METHODS)
def test_another_length_keeps_the_shares(moving: MakePlan, method: str) -> None:
    for steps in (1, 2, 3, 7, 41):
        for schedule, row in moved(with_steps(moving(method), steps)):
            assert schedule.kept(row, steps) == row.kept
            first = row.size if method in ("gmp", "topk") else row.kept
            assert schedule.kept(row, 0) == first
            assert schedule.rate_factor(row, steps) == schedule.decay_factor(row, steps) == 1.0


def test_a_plan_whose_masks_stay_has_no_schedule(plan_of: MakePlan) -> None:
    assert MaskSchedule.of(plan_of()) is None


EDITS: list[tuple[dict[str, Any], str]] = [
    ({"start": 0.1}, r"start: 0\.1 is below the density of each tensor, of which the lowest is 0\.25"),
    ({"start": 0.5}, "init_std is that of m_rho_start 1; masks start at 0.5"),
]


@pytest.mark.parametrize(("keys", "what"), EDITS, ids=str)
def test_an_edited_start_is_refused_or_explained(moving: MakePlan, keys: dict[str, Any], what: str) -> None:
    plan = moving("gmp")
    fields = plan.model_dump()
    fields["sparsity"]["updates"] |= keys
    try:
        found = explain(validate(Plan, fields, "plan")).text("plan")
    except InputError as error:
        found = str(error)
    assert re.search(what, " ".join(found.split())) and "edited" not in explain(plan).text("plan")


def test_a_plan_without_a_sparse_tensor_has_no_updates(moving: MakePlan) -> None:
    fields = moving("gmp").model_dump()
    for row in fields["tensors"]:
        row |= {"kept": prod(row["shape"]), "density": 1.0}
    with pytest.raises(InputError, match="no tensor is sparse, so no mask changes"):
        validate(Plan, fields, "plan")
