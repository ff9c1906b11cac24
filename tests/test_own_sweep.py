"""Sweeps of models of the user's own, made by a command; losses below 0; how the runs of several seeds become one number."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supar_cli import files
from supar_cli.cli.sweep import read_study
from supar_cli.experiments.comparison_views import _cell
from supar_cli.experiments.curves import Curve, find_optimum, find_regrets
from supar_cli.experiments.statistics import interquartile_mean, resample
from supar_cli.jobs import runs
from supar_cli.planning import document, templates
from supar_cli.planning.axes import Grid
from supar_cli.planning.layout_document import Layout
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.sweep import Level, Sweep, plan_all
from supar_cli.reporting import figures
from tests.conftest import Called

Supar = Callable[..., Called]

# a script that needs no torch and trains nothing: a parabola of the rate of `up` times its density, lowest at 2^-6.8
SCRIPT = """\
import json, os, re, sys
from math import log2
text = open(sys.argv[1]).read()
row, seed = next(line for line in text.splitlines() if "name: up," in line), int(re.search(r"  seed: (\\d+)", text)[1])
read = lambda key: float(re.search(rf" {key}: ([^,}}]+)", row)[1])
x, density = log2(read("lr")) + 6.8, read("density")
loss = 0.1 * (x + log2(density)) ** 2 + 0.01 * seed
FAULT
open(os.environ["SUPAR_RESULT"], "a").write(json.dumps({"loss": OFFSET + loss}))
"""
STUDY = {
    "kind": "supar.sweep/v1",
    "name": "study",
    "model": {"family": "own", "layout": "layout.yaml"},
    "run": {"command": "{python} -S -E train.py {plan}"},
    "hyperparameters": {"lr": 2.0**-7, "init_std": None, "alpha_input": 1.0, "alpha_output": 1.0, "weight_decay": 0.1},
    "train": {"steps": 30, "batch_size": 4},
    "over": {"lr": "x:-1..1/1", "density": [1.0, 0.25]},
    "parameterizations": ["supar", "sp"],
}
RUN = ("--jobs", "1", "--json")


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "save", lambda *_: None)  # which takes longest; other tests draw them


def write_study(here: Path, offset: float = 2.0, fault: str = "", **changes: Any) -> None:
    """study.yaml and train.py in a folder; `fault` are lines of the script."""
    (here / "train.py").write_text(SCRIPT.replace("OFFSET", str(offset)).replace("FAULT", fault))
    (here / "study.yaml").write_text(document.write([{**STUDY, **changes}]))


def runs_made(here: Path) -> int:
    return len(list((here / "sweeps" / "study" / "runs").iterdir()))


class TestOwnModels:
    @pytest.mark.parametrize("offset", [2.0, -3.0])  # as a loss, and as a return with a minus sign
    def test_the_optimum_is_found_at_each_density_and_no_run_is_made_twice(
        self, here: Path, supar_here: Supar, offset: float
    ) -> None:
        write_study(here, offset)
        called = supar_here("sweep", "study.yaml", *RUN)
        assert called.status == 0, called.err
        result = json.loads(called.out)
        supar, sp = result["arms"]
        for arm, slope in (supar, 0), (sp, -1):
            assert arm["drift"] == pytest.approx(slope, abs=1e-6)
            for level in arm["levels"]:
                assert log2(level["optimum"]) == pytest.approx(-6.8 + slope * log2(level["density"]), abs=1e-6)
                assert level["width"] == 64 and "layers" not in level
        # SP's best dense rate on the grid is 2^-7, and its optimum at 1/4 is 2^-4.8, 2^-5 on the grid
        best = offset + 0.1 * 0.2**2 + 0.005
        assert sp["levels"][-1]["regret"] == pytest.approx(0.1 * (2.2**2 - 0.2**2) / abs(best))
        passed = {one["what"]: (one["passed"], one["control"]) for one in result["verdicts"]}
        assert passed["SμPar: regret"] == (True, False) and passed["SP: regret"] == (False, True)

        assert "nats" not in result["figures"][0]["y"] and result["figures"][0]["y_limits"] is None
        assert result["environment"]["script"] == {"train.py": files.file_hash(here / "train.py")}
        assert str(here) not in json.dumps({**result, "command": ""})
        records = (here / "sweeps" / "study" / "records.jsonl").read_text().splitlines()
        made = runs_made(here)
        assert (
            len(records) == made == 2 * sum(len(level["losses"]) for arm in result["arms"] for level in arm["levels"])
        )
        assert "sweeps/study/runs/" in called.err

        (here / "train.py").write_text((here / "train.py").read_text() + "# changed")
        again = supar_here("sweep", "study.yaml", *RUN)
        assert again.status == 0 and runs_made(here) == made and json.loads(again.out)["arms"] == result["arms"]
        assert "train.py: changed since the study began" in again.err and "--force or another --out" in again.err
        other = supar_here("sweep", "study.yaml", *RUN, "--command", "{python} train.py {plan}")
        assert other.status == 2 and "holds the records of another measurement" in other.err
        shown = supar_here("report", "sweeps/study", "-o", "page.html")
        assert shown.status == 0 and "train.py" in (here / "page.html").read_text("utf-8")

    def test_a_script_that_ignores_densities_fails(self, here: Path, supar_here: Supar) -> None:
        write_study(here, fault="loss = 0.1 * x**2 + 0.01 * seed", parameterizations=["supar"])
        called = supar_here("sweep", "study.yaml", *RUN)
        verdicts = json.loads(called.out)["verdicts"]
        assert called.status == 5 and not any(one["passed"] for one in verdicts)

    @pytest.mark.parametrize(
        ("fault", "what", "made"),
        [
            ("raise KeyError(7)", "the first 3 runs failed; the last: the script failed", 3),
            ("loss = 1", "all 12 runs have the loss 3.0, whatever their values", 12),
        ],
    )
    def test_a_script_that_trains_no_plan_ends_the_sweep(
        self, here: Path, supar_here: Supar, fault: str, what: str, made: int
    ) -> None:
        write_study(here, fault=fault, parameterizations=["supar"])
        called = supar_here("sweep", "study.yaml", *RUN, "-s", "widen=0")
        assert called.status == 4 and what in called.err and "Traceback" not in called.err.replace("  Traceback", "")
        assert runs_made(here) == made

    def test_a_sweep_whose_runs_all_diverge_shows_that_and_blames_no_script(
        self, here: Path, supar_here: Supar
    ) -> None:
        write_study(here, fault="loss = float('nan')", parameterizations=["supar"])
        called = supar_here("sweep", "study.yaml", *RUN, "-s", "widen=0")
        result = json.loads(called.out)
        assert [level["diverged"] for level in result["arms"][0]["levels"]] == [6, 6]
        assert not any(one["passed"] for one in result["verdicts"])
        assert "whatever their values" not in called.err and "changes no loss" not in called.err

    def test_a_seed_that_changes_nothing_is_warned_of(self, here: Path, supar_here: Supar) -> None:
        write_study(here, fault="loss -= 0.01 * seed", over={"lr": "x:-1..1/1"}, parameterizations=["supar"])
        called = supar_here("sweep", "study.yaml", *RUN)
        assert called.status == 0 and "another seed changes no loss" in called.err and "or seeds: 1" in called.err

    def test_a_proxy_becomes_a_sweep_over_width_and_a_comparison(self, here: Path, supar_here: Supar) -> None:
        write_study(here, fault="loss += 0.1 * log2(float(re.search(r'fan_in: (\\d+)', row)[1]))")
        proxy = {key: value for key, value in STUDY.items() if key not in ("name", "over", "parameterizations")}
        (here / "sub").mkdir()
        (here / "sub" / "proxy.yaml").write_text(document.write([{**proxy, "kind": "supar.proxy/v1"}]))
        (here / "layout.yaml").rename(here / "sub" / "layout.yaml")  # sought beside the proxy
        flags = ("--over", "width=64,256", "--parameterization", "supar", "--seeds", "1")
        swept = supar_here("sweep", "sub/proxy.yaml", *RUN, *flags)
        levels = json.loads(swept.out)["arms"][0]["levels"]
        assert [(level["width"], log2(level["optimum"])) for level in levels] == [
            (64, pytest.approx(-6.8)),
            (256, pytest.approx(-4.8)),  # the script's rate is the tensor's own, a quarter of the proxy's there
        ]
        assert json.loads(swept.out)["sweep"]["model"]["layout"] == "../../sub/layout.yaml"
        compared = supar_here("compare", "sub/proxy.yaml", *RUN, "--sparsity", "0,0.75", "--seeds", "1")
        row = json.loads(compared.out)["levels"][1]
        assert compared.status == 0 and row["width"] == 64 and row["cells"]["SP, re-tuned"]["octaves"] == 2
        assert json.loads(compared.out)["tables"][0]["title"].startswith("loss as the script reports it: mean")

    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"over": {"lr": "x:-1..1/1", "layers": [2, 4]}}, "over.layers: the layout has no such size, only width"),
            ({"iso": "wpn"}, "iso: wpn is for supar's own families"),
            ({"parameterizations": [], "arms": {"a": {"prune": "energy"}}}, "arms.a.prune: energy is for supar's own"),
            (
                {"over": {"init_std": "x:-1..1/1"}},
                "over.init_std: 'x:-1..1/1': the proxy's value, which x: multiplies, is null",
            ),
            (
                {"over": {"lr": [0.1], "width": [64, 128]}, "target": {"size": {"width": 64}}},
                "target.size.width: over.width says it too",
            ),
            ({"run": {}}, "run.command: is missing"),
            ({"data": {"source": "stdlib"}}, "data: is for supar's own families"),
            ({"model": {"family": "own", "layout": "none.yaml"}}, "none.yaml"),
            ({"aggregate": "median"}, "study.yaml:"),
        ],
    )
    def test_what_can_not_be_asked_is_refused_by_name(
        self, here: Path, supar_here: Supar, unchanged: Any, changes: dict[str, Any], what: str
    ) -> None:
        write_study(here, **changes)
        unchanged()
        called = supar_here("sweep", "study.yaml", *RUN)
        assert (called.status, called.out) == (2, "") and what in called.err


class TestPresets:
    def test_runs_in_an_empty_folder_as_its_document_does(
        self, here: Path, supar_here: Supar, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        trained: list[Plan] = []

        def planted(plan: Plan, folder: Path) -> float:
            trained.append(plan)
            own = 0 if plan.parameterization.name == "supar" else log2(plan.sparsity.density)
            return 1 + 0.1 * (log2(plan.hyperparameters.lr) + 8.1 - own / 2) ** 2 + 0.01 * plan.train.seed

        monkeypatch.setattr(runs, "validation_loss", planted)
        (here / "layout.yaml").unlink()
        told = supar_here("sweep", "--preset", "mlp-lr", "--dry-run")
        assert told.status == 0 and "each by: {python} mlp.py {plan}" in told.err and not list(here.iterdir())
        called = supar_here("sweep", "--preset", "mlp-lr", *RUN)
        assert called.status == 0, called.err
        assert (here / "mlp.py").read_text("utf-8") == templates.text("mlp.py")
        assert json.loads(called.out)["sweep"]["model"]["layout"] == "../../mlp-layout.yaml"
        made = len(trained)
        assert "next: supar init mlp.py\n" in supar_here("init", "mlp-lr").err
        again = supar_here("sweep", "mlp-lr.yaml", *RUN)
        assert json.loads(again.out)["parents"] == json.loads(called.out)["parents"] and len(trained) == made
        (here / "mlp.py").write_text("# mine")
        (here / "mlp-layout.yaml").unlink()
        other = supar_here("sweep", "--preset", "mlp-lr", *RUN)
        assert other.status == 2 and "mlp.py: is not the one of --preset mlp-lr" in other.err
        assert not (here / "mlp-layout.yaml").exists()  # nothing is written then
        unclosed = supar_here("sweep", "--preset", "mlp-lr", *RUN, "--command", "python 'mlp.py {plan}")
        assert unclosed.status == 2 and "another measurement" in unclosed.err
        assert (here / "mlp.py").read_text() == "# mine"

    @pytest.mark.parametrize("name", ["ppo", "mlp-lr", "mlp-lr-sgd"])
    def test_every_run_can_be_planned_and_sp_is_mup(self, name: str) -> None:
        read = read_study(None, {}, preset=name)
        study = parse(Sweep, read).beside(str(files.template("own/study.yaml")))
        assert len(plan_all(study)) == 2 * len(study.arms) and study.name == name
        sp, sparse = "SP, which is μP here", study.levels[-1]
        arms = {**study.arms, "mup": study.arms[sp].model_copy(update={"parameterization": "mup"})}
        both = [study.model_copy(update={"arms": arms}).plan(arm, sparse, 0, 0).tensors for arm in (sp, "mup", "SμPar")]
        assert both[0] == both[1] != both[2]  # the control: SμPar's numbers are others

    def test_the_shipped_layout_is_that_of_the_script(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import supar_cli

        pytest.importorskip("sklearn")
        monkeypatch.syspath_prepend(files.template("own/mlp.py").parent)
        import mlp  # type: ignore[import-not-found]

        shipped = parse(Layout, document.read_file(str(files.template("own/mlp-layout.yaml")))[0])
        sizes = {name: getattr(shipped, name) for name in ("base", "wider", "third")}
        found = supar_cli.layout(mlp.make, **sizes, example=mlp.example)
        shapes = [
            [(row.name, row.role, row.base, row.uses, row.own is not None) for row in one.tensors]
            for one in (shipped, found)
        ]
        assert shapes[0] == shapes[1]
        for row, fresh in zip(shipped.tensors, found.tensors, strict=True):
            assert (
                row.own is not None and fresh.own is not None and row.own.std == pytest.approx(fresh.own.std, rel=0.05)
            )


OCTAVES = range(-9, -4)


def curve_of(by_seed: list[Callable[[float], float]], aggregate: Any) -> Curve:
    """A curve over 2^-9 to 2^-5 from a function of the octave for each seed."""
    losses = {float(i): {seed: of(x) for seed, of in enumerate(by_seed)} for i, x in enumerate(OCTAVES)}
    grid = Grid(tuple(2.0**x for x in OCTAVES))
    return Curve("supar", Level("density", 1.0, 1.0, 64, None), grid, losses, aggregate)


def parabola(best: float, offset: float = 1.0, by: float = 0.1) -> Callable[[float], float]:
    return lambda x: offset + by * (x - best) ** 2


class TestAggregates:
    @pytest.mark.parametrize("count", range(1, 14))
    def test_is_the_mean_of_the_middle_half_of_each_value_repeated_four_times(self, count: int) -> None:
        """Four copies of each value are a number divisible by 4 with the same distribution: nothing counts in part there."""
        values = np.random.default_rng(count).standard_cauchy((3, count, 2))
        copies = np.sort(np.repeat(values, 4, axis=1), axis=1)
        assert np.allclose(interquartile_mean(values, axis=1), copies[:, count : 3 * count].mean(1), rtol=1e-12)

    def test_an_outlier_moves_the_means_optimum_alone(self) -> None:
        """Seven seeds with their optimum at 2^-7; the eighth is far worse everywhere, and least so at 2^-5."""
        seeds = [parabola(-7, 1 + 0.01 * seed) for seed in range(7)]
        outlier = parabola(-5, 50.0, 2.0)
        found = {
            (kind, len(own)): find_optimum(curve_of(own, kind), resample(len(own))).octaves
            for kind in ("mean", "iqm")
            for own in (seeds, [*seeds, outlier])
        }
        assert found["mean", 7] == pytest.approx(found["iqm", 7]) == pytest.approx(-7)
        assert found["iqm", 8] == pytest.approx(-7) and found["mean", 8] > -6

    def test_every_interval_is_of_resampled_interquartile_means(self) -> None:
        rng, draws = np.random.default_rng(0), resample(8)
        shifts = rng.standard_normal(8) / 4
        curve = curve_of([parabola(-7 + shift, 1 + shift / 10) for shift in shifts], "iqm")
        optimum = find_optimum(curve, draws)
        x = np.array(OCTAVES) - curve.grid.octaves(curve.best)
        window = np.abs(x) <= 1.5
        losses_XS = np.array([list(by_seed.values()) for by_seed in curve.losses.values()])[window]
        for row, drawn in enumerate(draws[:20]):  # by hand: a parabola through the means of the middle 4 of 8
            middle = np.sort(losses_XS[:, drawn], axis=1)[:, 2:6].mean(1)
            a, b, _ = np.polyfit(x[window], middle, 2)
            assert optimum.resampled[row] - curve.grid.octaves(curve.best) == pytest.approx(-b / (2 * a))
        regret, regrets_B = find_regrets(curve, optimum, optimum, draws)
        assert regret == pytest.approx(0, abs=1e-9) and len(regrets_B) == len(draws)
        middle = np.sort(list(curve.losses[2.0].values()))[2:6].mean()
        plain = curve_of([parabola(-7 + shift, 1 + shift / 10) for shift in shifts], "mean")
        assert _cell(curve, 2.0)["loss"] == pytest.approx(middle) != pytest.approx(_cell(plain, 2.0)["loss"])
        assert _cell(curve, 2.0)["standard_error"] != _cell(plain, 2.0)["standard_error"]

    def test_a_run_that_diverged_is_not_trimmed_away(self) -> None:
        seeds = [parabola(-7)] * 7
        curve = curve_of([*seeds, lambda x: float("inf") if x == -7 else 1.5], "iqm")
        assert curve.mean(2.0) == float("inf") and curve.best != 2.0 and np.isfinite(curve.mean(1.0))

    def test_the_word_changes_no_hash_and_no_record(self, here: Path, supar_here: Supar) -> None:
        write_study(here, parameterizations=["supar"], seeds=4)
        asked = {
            word: parse(Sweep, document.read(document.write([{**STUDY, "aggregate": word}]), "s")[0])
            for word in ("mean", "iqm")
        }
        plain = parse(Sweep, document.read(document.write([STUDY]), "s")[0])
        assert asked["mean"].hash() == plain.hash() != asked["iqm"].hash()
        assert supar_here("sweep", "study.yaml", *RUN).status == 0
        made = runs_made(here)
        again = supar_here("sweep", "study.yaml", *RUN, "-s", "aggregate=iqm")  # judges the same runs anew
        assert again.status == 0 and runs_made(here) == made


def test_losses_near_zero_have_no_share() -> None:
    curve = curve_of([lambda x: (x + 7) ** 2], "mean")
    assert np.isnan(curve.regret(0.0)) and curve.mean(curve.best) == 0


def test_templates_of_an_installation_are_inside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "supar_cli/templates").mkdir(parents=True)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "supar_cli/files.py"))
    assert (
        files.template("own/preset") == tmp_path / "supar_cli/templates/own/preset"
    )  # a place beside a layout, no file
