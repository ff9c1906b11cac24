"""What people read of plans whose masks change: `explain` over the run, warnings, and what a dry run says it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from supar_cli.files import read_jsonl
from supar_cli.planning import density_over_run, estimate
from supar_cli.planning.advice import warnings
from supar_cli.planning.explain import explain
from supar_cli.planning.plan import Plan, PlanTensor
from supar_cli.planning.schedule import MaskSchedule
from supar_cli.planning.templates import text
from supar_cli.reporting import runs
from supar_cli.training import trackers

from .conftest import plan_from, proxy_fields
from .test_cli import Supar
from .test_train import trained

MakePlan = Callable[..., Plan]
METHODS = ("set", "rigl", "gmp", "topk")


def plan_with(
    updates: dict[str, Any] | str | None, density: Any = "1/16", steps: int = 200, name: str = "supar", **more: Any
) -> Plan:
    sparsity = {"density": density, **({"updates": updates} if updates else {}), **more.pop("sparsity", {})}
    train = {"steps": steps, **more.pop("train", {})}
    target = {"width": more.pop("width", 128), "sparsity": sparsity}
    return plan_from(proxy_fields("stdlib", target=target, train=train, **more), name)


def sparse_rows(plan: Plan) -> list[PlanTensor]:
    return [row for row in plan.tensors if row.kept < row.size]


@st.composite
def moving(draw: st.DrawFn) -> Plan:
    """A plan whose masks change: of any method, with keys, densities and lengths of its own."""
    updates: dict[str, Any] = {
        "method": draw(st.sampled_from(METHODS)),
        "exponent": draw(st.sampled_from([0.5, 0.9, 1])),
    }
    if updates["method"] in ("gmp", "topk"):
        updates |= {"begin": draw(st.sampled_from([0.0, 0.25])), "start": draw(st.sampled_from([0.75, 1]))}
        updates["shape"] = draw(st.sampled_from(["linear", "cubic"]))
    density = draw(st.sampled_from(["1/2", "1/4", "0.1", "1/16"]))
    rule = draw(st.sampled_from(["independent", "coupled", "sqrt"]))
    distribution = draw(st.sampled_from(["uniform", "erk"]))
    return plan_with(
        updates,
        density,
        draw(st.integers(3, 600)),
        sparsity={"distribution": distribution},
        parameterization={"weight_decay_rule": rule},
    )


class TestExplain:
    @settings(max_examples=25, deadline=None)
    @given(moving())
    def test_every_moment_obeys_the_rule_with_the_density_that_lives_then(self, plan: Plan) -> None:
        """Against SPEC §9's formula from the proxy's own numbers, not from the factors."""
        hyper, updates, steps = plan.hyperparameters, plan.sparsity.updates, plan.train.steps
        assert updates is not None
        powers = {"independent": 1.0, "coupled": 0.0, "sqrt": 0.5}
        for row in sparse_rows(plan):
            found = density_over_run.moments(plan, row)
            assert (found[0].step, found[-1].step) == (0, steps) and len(found) == min(11, steps + 1)
            assert found[-1].kept == row.kept and found[-1].peak_lr == row.lr
            for one in found:
                divisor = 4 * one.density**updates.exponent
                assert one.peak_lr == pytest.approx(hyper.lr / divisor, rel=1e-3)
                decay = hyper.weight_decay * divisor ** powers[plan.parameterization.weight_decay_rule]
                assert one.weight_decay == pytest.approx(decay, rel=1e-3)
        if updates.rates_follow == "now" and updates.start:  # the control: the end's rates from step 0
            control = plan_with({"method": updates.method, "rates_follow": "end"})
            first = density_over_run.moments(control, sparse_rows(control)[0])[0]
            assert first.peak_lr != pytest.approx(hyper.lr / (4 * first.density), rel=0.5)

    def test_gmps_densities_are_those_of_its_paper(self) -> None:
        """Zhu and Gupta: s_t = s_f + (s_i - s_f)(1 - progress)^3, at the last change before each tenth."""
        plan = plan_with({"method": "gmp", "begin": 0.2, "anneal": 0.7, "end": 0.7, "every_steps": 10})
        for row in sparse_rows(plan):
            for one in density_over_run.moments(plan, row):
                progress = min(Fraction(1), max(Fraction(0), Fraction(one.step - 40, 100)))
                wanted = Fraction(1, 16) + Fraction(15, 16) * (1 - progress) ** 3
                assert one.density == pytest.approx(float(wanted), abs=2 / row.size)
        linear = plan_with(
            {"method": "gmp", "begin": 0.2, "anneal": 0.7, "end": 0.7, "every_steps": 10, "shape": "linear"}
        )
        assert density_over_run.moments(linear, row)[5].density > 1.5 * density_over_run.moments(plan, row)[5].density

    @settings(max_examples=25, deadline=None)
    @given(moving())
    def test_the_text_fits_says_the_end_and_has_every_sparse_tensor_once(self, plan: Plan) -> None:
        shown = explain(plan).text("plan.yaml")
        assert max(map(len, shown.splitlines())) <= 80
        said = " ".join(shown.split())
        _, over_run = said.split(" over the run ")
        assert ("at the end of the run" in said) == any("m_rho_start" in row.because for row in plan.tensors)
        for row in plan.tensors:
            assert (row.site in over_run) == (row.kept < row.size), row.name
        assert "[D, measured]" in over_run and "how sure" in over_run and "width 128" in over_run

    def test_one_table_serves_all_tensors_whose_factors_agree(self) -> None:
        uniform, erk = plan_with("topk"), plan_with("topk", sparsity={"distribution": "erk"})
        tables = [list(density_over_run.tables(plan, sparse_rows(plan))) for plan in (uniform, erk)]
        assert [len(found) for found in tables] == [1, 2]
        ((members, table),) = tables[0]
        assert len(members) == 12 and table[0][4:] == ["kept of 16,384", "kept of 65,536", "peak lr"]
        assert table[1][:4] == ["0", "1", "× 0.0625", "× 16"] and table[-1][4:] == ["1,024", "4,096", "0.04"]

    def test_set_and_rigl_say_what_share_is_replaced(self) -> None:
        plan = plan_with({"method": "rigl", "every_steps": 20, "drop": 0.3})
        (row, *_) = sparse_rows(plan)
        shares = [one.replaced for one in density_over_run.moments(plan, row)]
        assert shares[0] is None and shares[-1] is None, "before the first change, and after the last"
        assert shares[1] == pytest.approx(0.3 * 0.957, rel=0.01) and shares[5] == pytest.approx(0.075, rel=0.01)
        gmp = plan_with("gmp")
        assert all(one.replaced is None for one in density_over_run.moments(gmp, sparse_rows(gmp)[0]))

    def test_json_has_the_moments_and_static_plans_have_none(self, supar_here: Supar, tmp_path: Path) -> None:
        moves, stays = plan_with("gmp"), plan_with(None)
        (tmp_path / "plan.yaml").write_text(json.dumps(moves.model_dump()))
        (tmp_path / "static.yaml").write_text(json.dumps(stays.model_dump()))
        (told,) = json.loads(supar_here("explain", "plan.yaml", "--json").out)
        by_name = {row["name"]: row for row in told["tensors"]}
        assert [one["kept"] for one in by_name["blocks.0.mlp.up"]["over_run"]][::10] == [65536, 4096]
        assert "over_run" not in by_name["embedding"]
        (told,) = json.loads(supar_here("explain", "static.yaml", "--json").out)
        assert not any("over_run" in row for row in told["tensors"])
        assert "over the run" not in supar_here("explain", "static.yaml").out

    @pytest.mark.parametrize(
        ("updates", "name", "says"),
        [
            ("rigl", "supar", "medium: β may fall"),
            ("topk", "supar", "yes; γ −.05"),
            ({"method": "rigl", "exponent": 0.7}, "supar", "not measured with β 0.7 (0.9 was); else medium"),
            ({"method": "gmp", "rates_follow": "end"}, "supar", "it fails, a control: γ +.53"),
            ("gmp", "sp", "these rules do not correct rates for the density"),
        ],
    )
    def test_how_sure_it_is(self, updates: Any, name: str, says: str) -> None:
        assert density_over_run.how_sure(plan_with(updates, name=name)).startswith(says)


# each with what makes it harmless
WARNED = [
    ("coupled", {"method": "gmp"}, {"parameterization": {"weight_decay_rule": "coupled"}}, {}),
    ("zero with β₂ 0.999", {"method": "set", "moments": "zero"}, {"train": {"betas": [0.9, 0.999]}}, None),
    ("β 0.9 (0.8 was)", {"method": "rigl", "moments": "zero", "exponent": 0.9}, {}, None),
    ("β 0.8 (0.9 was)", {"method": "rigl", "exponent": 0.8}, {}, None),
    ("β 0.5 (1 was)", {"method": "topk", "exponent": 0.5}, {}, None),
    ("moments: keep (mean was)", {"method": "set", "moments": "keep"}, {}, None),
    ("SGD (AdamW was)", {"method": "gmp"}, {"train": {"optimizer": "sgd"}}, {}),
    ("changes the masks only once;", {"method": "gmp", "every_steps": 200}, {}, None),
    ("changes the masks only 3 times", {"method": "set", "every_steps": 50}, {}, None),
    ("4 for each neuron is 100 %", {"method": "topk"}, {"density": "1/32"}, {}),
    ("rates_follow: end is a control", {"method": "gmp", "rates_follow": "end"}, {}, None),
    ("1,200 steps (at most 1,000 were)", {"method": "gmp"}, {"steps": 1200}, {}),
    ("width 512 (at most 256 was)", {"method": "set"}, {"width": 512}, {"width": 256}),
    ("density 0.03125 (at least 1/16 was)", {"method": "rigl"}, {"density": "1/32"}, {}),
    ("density 0.01562 (at least 1/32 was)", {"method": "gmp"}, {"density": "1/64"}, {"density": "1/32"}),
]


class TestWarnings:
    @pytest.mark.parametrize(("says", "updates", "how", "harmless"), WARNED, ids=[one[0] for one in WARNED])
    def test_what_is_known_to_fail_is_warned_of_and_its_twin_is_not(
        self, says: str, updates: dict[str, Any], how: dict[str, Any], harmless: dict[str, Any] | None
    ) -> None:
        assert sum(says in one for one in warnings(plan_with(updates, **how))) == 1
        twin = plan_with(updates["method"]) if harmless is None else plan_with(updates, **harmless)
        assert [one for one in warnings(twin) if "updates" in one or "coupled" in one] == []

    def test_sp_has_no_exponent_to_warn_of(self) -> None:
        for name in ("sp", "mup"):
            assert not any("not measured" in one for one in warnings(plan_with("rigl", name=name)))

    def test_a_floor_leaves_no_row_empty(self) -> None:
        words = "rows have no weight at all"
        assert any(words in one for one in warnings(plan_with("gmp", "1/64")))
        assert not any(words in one for one in warnings(plan_with({"method": "gmp", "min_per_neuron": 1}, "1/64")))


class TestDryRun:
    @settings(max_examples=25, deadline=None)
    @given(moving())
    def test_memory_is_that_of_the_start_and_time_that_of_the_run(self, plan: Plan) -> None:
        schedule, rows = MaskSchedule.of(plan), sparse_rows(plan)
        assert schedule is not None
        steps = plan.train.steps
        for row in rows:
            true = sum(schedule.kept(row, step) for step in range(steps)) / steps
            assert estimate._mean_kept(plan, row) == pytest.approx(true, rel=0.03 + 2 / steps)
        first = sum(schedule.kept(row, 0) for row in rows)
        assert estimate.start_live(rows, plan) == first >= sum(row.kept for row in rows)

    def test_each_method_takes_what_it_needs(self) -> None:
        static, dense = plan_with(None), plan_with(None, 1)
        held = {name: estimate.state_bytes(plan_with(name), "sparse", 4) for name in METHODS}
        bare, most = estimate.state_bytes(static, "sparse", 4), max(row.size for row in sparse_rows(static))
        assert held["set"] == bare and held["rigl"] == bare + 4 * most
        summed = plan_with("rigl", run={"micro_batch_size": 1})
        assert estimate.state_bytes(summed, "sparse", 4) == bare + 4 * sum(row.size for row in sparse_rows(summed))
        assert any("of all tensors" in line for line in estimate.lines(summed))
        assert held["gmp"] > estimate.state_bytes(dense, "dense", 4) > 4 * bare
        assert held["topk"] == estimate.state_bytes(plan_with("topk"), "dense", 4) > 4 * bare
        times = {name: estimate.run_seconds(plan_with(name, steps=2000), sparse=True) for name in METHODS}
        ends = [
            estimate.run_seconds(plan_with(None, density, steps=2000), sparse=True)
            for density in ("1/16", "65535/65536")
        ]
        assert times["set"] == times["rigl"] == ends[0] < times["gmp"] < ends[1]
        sooner = plan_with({"method": "topk", "end": 0.5}, steps=2000)
        assert ends[0] < estimate.run_seconds(sooner, sparse=True) != times["topk"]

    @pytest.mark.parametrize(
        ("method", "says"),
        [
            ("gmp", "GMP starts with 393,216 live weights"),
            ("topk", "densely until step 200"),
            ("rigl", "dense gradients of one tensor at a time"),
            ("set", None),
        ],
    )
    def test_it_is_said_in_words(self, method: str, says: str | None) -> None:
        found, static = estimate.lines(plan_with(method)), estimate.lines(plan_with(None))
        assert len(found) == len(static) + (says is not None)
        assert says is None or any(says in line for line in found)
        (flops,) = [line for line in found if "FLOPs" in line]
        (memory,) = [line for line in found if line.startswith("memory")]
        assert "without those of dead weights" in flops and ("sparse (CPU)" in memory) == (method != "topk")
        assert any("sparse engine" in line for line in estimate.times([plan_with(method)])) == (method != "topk")

    def test_transfer_and_train_say_that_the_numbers_are_those_of_the_end(
        self, supar_here: Supar, proxy_file: Path, tmp_path: Path
    ) -> None:
        said = supar_here("transfer", "--sparsity", "0.75", "--updates", "gmp", "--dry-run").err
        assert "density 0.25 at the end" in said and "density 1 → 0.25 by GMP" in said
        assert "the numbers of a row are those of the end" in said
        assert "at the end" not in supar_here("transfer", "--sparsity", "0.75", "--updates", "set", "--dry-run").err
        assert supar_here("transfer", "--sparsity", "0.75", "--updates", "gmp", "-q").status == 0
        assert "by timing a few steps: at most" in supar_here("train", "--dry-run").err

    def test_another_method_leaves_the_keys_of_the_documents_own(
        self, supar_here: Supar, proxy_file: Path, tmp_path: Path
    ) -> None:
        tuned = yaml.safe_load(proxy_file.read_text())
        own = {"method": "topk", "begin": 0.01, "anneal": 0.5, "shape": "linear"}
        tuned["target"]["sparsity"] = {"density": "1/4", "updates": own}
        proxy_file.write_text(yaml.safe_dump(tuned))

        def planned(*flags: str) -> dict[str, Any]:
            ended = supar_here("transfer", "-q", "-o", "-", *flags)
            assert ended.status == 0, ended.err
            found: dict[str, Any] = yaml.safe_load(ended.out)["sparsity"]["updates"]
            return found

        gmp = planned("--updates", "gmp", "-s", "target.sparsity.updates.end=0.8")
        assert (gmp["begin"], gmp["anneal"], gmp["end"], gmp["shape"]) == (0.2, 0.75, 0.8, "cubic")
        assert planned("--updates", "rigl")["begin"] == 0.0
        assert planned("--updates", "topk")["begin"] == planned()["begin"] == 0.01


@pytest.mark.parametrize("method", ["gmp", "rigl"])
def test_what_a_run_measures_is_the_plans_and_is_shown(
    method: str, plan_of: MakePlan, supar_here: Supar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparsity = {"density": 0.1, "updates": {"method": method, "every_steps": 2}}
    run = {"log_every": 1, "trackers": ["mlflow"]}
    plan = plan_of(target={"width": 64, "sparsity": sparsity}, train={"steps": 12}, run=run)
    tracked: dict[tuple[str, int], float] = {}
    log = trackers.Tracker(lambda name, value, step: tracked.update({(name, step): value}), lambda _: None, None)
    monkeypatch.setitem(trackers.KINDS, "mlflow", lambda *_: log)
    monkeypatch.setattr(trackers, "require", lambda _: None)
    trainer, _ = trained(plan, tmp_path / "run")

    records = read_jsonl(tmp_path / "run/metrics.jsonl", "step")
    schedule, rows = MaskSchedule.of(plan), sparse_rows(plan)
    assert schedule is not None and [one["step"] for one in records] == list(range(1, 13))
    size = sum(row.size for row in rows)
    for one in records:
        assert one["density"] == sum(schedule.kept(row, one["step"]) for row in rows) / size
        assert tracked["density", one["step"]] == one["density"]
    changed = [one.get("mask_changed") for one in records]
    dropped = sum(schedule.dropped(row, 2) for row in rows) / sum(row.kept for row in rows)
    assert changed[1] == (pytest.approx(dropped) if method == "rigl" else None)
    masks = trainer.sparse_model.masks.values()
    assert records[-1]["dead_rows"] == sum(int((~mask.alive().any(1)).sum()) for mask in masks)

    shown = supar_here("show", "run").err
    assert f"masks at step 12: density {plan.sparsity.density:g}" in " ".join(shown.split())
    assert ("density of the tensors whose masks change" in shown) == (method == "gmp"), "a curve where it moves"
    names = [figure.name for figure in runs.run_part(tmp_path / "run").figures]
    assert names[:2] == ["loss", "density"] and "dead_rows" in names


def test_a_run_whose_masks_stay_shows_none(plan_of: MakePlan, supar_here: Supar, tmp_path: Path) -> None:
    trained(plan_of(), tmp_path / "run")
    assert not any("density" in one for one in read_jsonl(tmp_path / "run/metrics.jsonl", "step"))
    assert "masks at step" not in supar_here("show", "run").err
    assert not {"density", "mask_changed"} & {figure.name for figure in runs.run_part(tmp_path / "run").figures}


def test_the_interpretability_template_trains_by_annealed_top_k(
    plan_of: MakePlan, supar_here: Supar, tmp_path: Path
) -> None:
    """At a tiny size, with all that the template says of masks, rates and shape but the sizes."""
    fields = yaml.safe_load(text("interpretability"))
    updates = fields["target"]["sparsity"]["updates"]
    model = {**fields["model"], "width": 32, "layers": 1, "heads": 2, "context": 16}
    train = {**fields["train"], "steps": 20, "batch_size": 4}
    plan = plan_of(
        model=model,
        train=train,
        target={"width": 64, "sparsity": {"density": "1/8", "updates": updates}},
        run={"log_every": 1},
    )
    trainer, history = trained(plan, tmp_path / "run")
    densities = [one["density"] for one in read_jsonl(tmp_path / "run/metrics.jsonl", "step")]
    assert densities[9:] == [0.125] * 11 and sorted(densities, reverse=True) == densities and densities[0] > 0.85
    for row in sparse_rows(plan):  # floor of 4 inputs, where 8 live on average; without it some neuron has fewer
        alive = trainer.sparse_model.masks[row.name].alive()
        assert alive.sum() == row.kept and alive.sum(1).min() >= 4
    assert history.losses[-1] < history.losses[0]
    bare = plan_of(
        model=model,
        train=train,
        target={"width": 64, "sparsity": {"density": "1/8", "updates": {**updates, "min_per_neuron": 0}}},
    )
    without, _ = trained(bare, tmp_path / "bare")
    assert min(without.sparse_model.masks[row.name].alive().sum(1).min() for row in sparse_rows(bare)) < 4
