"""Sweep documents: the grammar of axes, sizes that keep a budget, the plans of every run, and the paper's figures as templates."""

from __future__ import annotations

import io
from collections.abc import Callable
from math import log2
from pathlib import Path
from typing import Any

import pytest

import supar_cli
from supar_cli.cli.sweep import PRESETS, SWEPT, read_study, set_axes
from supar_cli.errors import InputError
from supar_cli.planning import document, templates
from supar_cli.planning.axes import Grid, axis_values
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.sweep import Sweep, plan_all

from .conftest import Called, proxy_fields

Supar = Callable[..., Called]


def sweep_fields(source: str = "text.txt", **changes: Any) -> dict[str, Any]:
    fields = proxy_fields(source, target={"width": None, "sparsity": {}})
    study = {"over": {"lr": "x:-1..1/1", "density": [1.0, 0.25]}, "parameterizations": ["sp", "supar"], "seeds": 2}
    return {**fields, "kind": "supar.sweep/v1", **study, **changes}


def sweep_of(**changes: Any) -> Sweep:
    return parse(Sweep, document.read(document.write([sweep_fields(**changes)]), "sweep.yaml")[0])


class TestGrammar:
    @pytest.mark.parametrize(
        ("name", "given", "values"),
        [
            ("lr", "log2:-12..-4/0.5", [2.0 ** (k / 2) for k in range(-24, -7)]),
            ("lr", "log2:-3..-1", [0.125, 0.25, 0.5]),
            ("init_std", "x:-1..1/1", [1.5, 3.0, 6.0]),
            ("lr", "x:0..0/1", [3.0]),
            ("lr", "log2:-2..-0.5/1", [0.25, 0.5]),  # a step never goes beyond the end
            ("lr", "0.1,0.025,0.05", [0.025, 0.05, 0.1]),
            ("sparsity", "0,0.5,0.75", [0.0, 0.5, 0.75]),
            ("density", [1, 0.5], [0.5, 1.0]),
            ("width", "64,128", [64.0, 128.0]),
            ("sparsity", 0.5, [0.5]),
        ],
    )
    def test_values(self, name: str, given: Any, values: list[float]) -> None:
        assert axis_values(name, given, 3.0) == tuple(values)

    @pytest.mark.parametrize(
        ("name", "given", "what"),
        [
            ("lr", "log2:-4..-12/0.5", "not a range"),
            ("lr", "log2:-4..-2/0", "not a range"),
            ("lr", "log2:-4..-2/0.001", "at most 200 values"),
            ("lr", "log2:-4", "'' is not a number"),
            ("lr", "log2:a..b", "'a' is not a number"),
            ("lr", "x:nan..1", "'nan' is not finite"),
            ("lr", "log10:-4..-2", "'log10' is not a scale"),
            ("lr", "0.1;0.2", "'0.1;0.2' is not a number"),
            ("lr", "", "'' is not a number"),
            ("lr", "0.1,,0.2", "'' is not a number"),
            ("lr", "0.1,0.1", "not 1 to 200 different values"),
            ("lr", "0", "0 is not a valid lr"),
            ("lr", "nan", "'nan' is not finite"),
            ("lr", True, "not an axis"),
            ("lr", {"a": 1}, "not an axis"),
            ("lr", [[1]], "'[1]' is not a number"),
            ("lr", [True, 0.5], "'True' is not a number"),
            ("lr", "1/0", "divides by zero"),
            (
                "sparsity",
                "log2:-3..-1",
                "a range in octaves; expected a list of numbers 0 <= sparsity < 1 such as 0,0.75,0.9375",
            ),
            ("sparsity", "0,1", "1 is not a valid sparsity"),
            ("density", "0,1", "0 is not a valid density"),
            ("width", "64.5", "64.5 is not a valid width"),
        ],
    )
    def test_refusals_name_the_axis(self, name: str, given: Any, what: str) -> None:
        with pytest.raises(ValueError, match=r".") as refused:
            axis_values(name, given)
        assert str(refused.value).startswith(f"over.{name}: ") and what in str(refused.value)

    def test_a_grid_goes_on_by_its_own_step_and_halves_it(self) -> None:
        grid = Grid((1.0, 2.0, 4.0))
        assert [grid.value(p) for p in (-2, -0.5, 0, 0.5, 1, 1.5, 2, 2.5, 4)] == pytest.approx(
            [0.25, 2**-0.5, 1, 2**0.5, 2, 2**1.5, 4, 2**2.5, 16]
        )
        assert Grid((1.0, 3.0, 30.0)).value(3) == pytest.approx(300) and Grid((5.0,)).value(-1) == pytest.approx(2.5)
        assert grid.octaves(3) == 3


class TestDocument:
    @pytest.mark.parametrize(
        ("changes", "what"),
        [
            ({"over": {"lr": "0.1", "init_std": "0.1"}}, "over: 2 axes of a hyperparameter"),
            ({"over": {"density": "1"}}, "over: 0 axes of a hyperparameter"),
            (
                {"over": {"lr": "0.1", "width": "32", "density": "1"}},
                "over: 2 axes of a size; expected at most one of sparsity, ",
            ),
            ({"over": {"lr": "0.1", "depth": "1"}}, "over.depth: not an axis"),
            ({"over": {"lr": "log2:3..1"}}, "over.lr: 'log2:3..1': not a range"),
            ({"parameterizations": ["sp", "ntk"]}, "parameterizations[1]: "),
            ({"parameterizations": ["sp", "sp"]}, "parameterizations: one appears twice"),
            ({"own": {"ntk": {"lr": 0.1}}}, "own.ntk: not a parameterization"),
            ({"own": {"sp": {"lrs": 0.1}}}, "own.sp.lrs: "),
            (
                {"iso": "wpn", "over": {"lr": "0.1", "width": "32"}},
                "iso: wpn needs a density axis; expected over.sparsity",
            ),
            ({"name": "../x"}, "name: '../x' can't name a folder"),
            ({"seeds": 0}, "seeds: should be greater than 0"),
            ({"widne": 3}, "did you mean 'widen'?"),
        ],
    )
    def test_refusals_by_line(self, changes: dict[str, Any], what: str) -> None:
        with pytest.raises(InputError) as refused:
            sweep_of(**changes)
        assert what in str(refused.value) and str(refused.value).startswith("sweep.yaml:")

    def test_arms_differ_in_their_rules_only_and_share_their_seeds(self, text_file: Path) -> None:
        sweep = sweep_of(own={"sp": {"init_std": 0.02}})
        sp, supar = (
            sweep.plan(name, sweep.levels[1], 2.0, sweep.seeds_at(sweep.levels[1])[1]) for name in ("sp", "supar")
        )  # type: ignore[arg-type]
        assert (sp.train, sp.data, sp.sparsity) == (supar.train, supar.data, supar.sparsity)
        assert sp.train.seed == 1 and sp.sparsity.density == 0.25
        assert sp.hyperparameters.lr == supar.hyperparameters.lr == 0.02
        assert (sp.hyperparameters.init_std, supar.hyperparameters.init_std) == (0.02, 0.08)
        assert [row.kept for row in sp.tensors] == [row.kept for row in supar.tensors]
        up = next(row for row in supar.tensors if row.name == "blocks.0.mlp.up")
        assert up.lr == 0.02 / 0.25

    def test_the_first_size_is_the_densest_or_the_narrowest(self) -> None:
        assert [level.density for level in sweep_of(over={"lr": "0.1", "sparsity": "0.5,0,0.992"}).levels] == [
            1,
            0.5,
            0.008,
        ]
        assert [level.width for level in sweep_of(over={"lr": "0.1", "width": "64,32"}).levels] == [32, 64]
        assert [level.density for level in sweep_of(over={"lr": "0.1"}).levels] == [1]

    def test_a_width_without_whole_heads_is_refused_before_anything_runs(self) -> None:
        with pytest.raises(InputError, match="width 40 is not a multiple of 16, the least one with whole heads"):
            plan_all(sweep_of(over={"lr": "0.1", "width": "32,40"}))

    def test_identity_is_what_is_measured(self) -> None:
        one = sweep_of()
        assert one.hash() == sweep_of(run={"device": "cuda"}, meta={"a": 1}).hash() != sweep_of(seeds=3).hash()


def hidden_live(plan: Plan) -> int:
    return sum(row.kept for row in plan.tensors if row.role == "hidden")


class TestIso:
    WIDE = {"model": {"family": "gpt2", "width": 256, "layers": 2, "heads": 4, "context": 8, "vocab": 256}}  # noqa: RUF012

    def widths(self, iso: str, width: int, sparsity: str) -> list[int]:
        target = {"width": width, "sparsity": {}}
        return [
            level.width
            for level in sweep_of(**self.WIDE, iso=iso, target=target, over={"lr": "0.1", "sparsity": sparsity}).levels
        ]

    def test_equal_parameters_are_the_papers_widths(self) -> None:
        assert self.widths("parameters", 768, "0,0.5,0.75,0.875") == [768, 1088, 1536, 2176]

    def test_equal_weights_per_neuron_are_the_papers_256(self) -> None:
        widths = self.widths("wpn", 256, "0,0.5,0.75,0.875,0.9375")
        assert [width * 2.0**-k for k, width in enumerate(widths)] == [256] * 5

    def test_from_a_first_level_that_is_sparse_itself(self) -> None:
        assert self.widths("parameters", 256, "0.75,0.9375") == [256, 512]
        assert self.widths("wpn", 256, "0.75,0.9375") == [256, 1024]

    def test_plans_keep_the_live_parameters_within_the_rounding(self) -> None:
        sweep = sweep_of(**self.WIDE, iso="parameters", over={"lr": "0.1", "sparsity": "0,0.5,0.75,0.875"})
        live = [hidden_live(plan) for plan in plan_all(sweep)[:4]]
        # whole heads of 64: 362 becomes 384, 724 becomes 704
        assert [round(count / live[0], 3) for count in live] == [1, 1.125, 1, 0.945]
        without = sweep_of(**self.WIDE, over={"lr": "0.1", "sparsity": "0,0.5,0.75,0.875"})
        assert hidden_live(plan_all(without)[3]) == live[0] / 8  # the comparison sees a width that was left alone


PAPER_WIDTHS = {
    "fig9": [768, 1088, 1536, 2176],
    "fig10": [768, 1088, 1536, 2176],
    "fig11": [256, 512, 1024, 2048, 4096],
}


SMALL_ALONE = ("fig12-400", "nm", "imp", "vit-lr", "vit-width")
OWN_MODELS = ("ppo", "mlp-lr", "mlp-lr-sgd")  # of users: `test_own_sweep`
# of the grids of those with arms: 3 or 5 rates, 6 seeds of each dense model that arms share and 4 of each of their other sizes
RUNS = {
    "fig12": 3 * (6 + 10 * 2 * 4),
    "fig12-400": 5 * (2 * 6 + 5 * 2 * 4),
    "vit-lr": 4 * 2 * 3 * 3,
    "vit-width": 2 * 3 * 3 * 3,
    "nm": 3 * (6 + 5 * 4),
    "imp": 3 * (6 + 2 * 4),  # before pruning, which makes two plans of one
}

# of each figure's small and full document, from the time when it had a file of its own
PRESET_HASHES = {
    "fig1": ["363512b6fa7e", "ab94bad9ccfd"],
    "fig6": ["afba0a73e81e", "e074fecc2891"],
    "fig7": ["f0851f2bd33f", "72f5d8dfb7c6"],
    "fig9": ["db99eae842ff", "c4d9db2de16e"],
    "fig10": ["cd98f1ed3d94", "bfcaea2d3f6f"],
    "fig11": ["7abef3d04767", "cb077a0e6238"],
    "fig13": ["fb15e26d9279", "48466fb96544"],
    "fig14": ["a4551d2d9463", "df1e726461b1"],
}


class TestPresets:
    @pytest.mark.parametrize("name", [name for name in PRESETS if name not in OWN_MODELS])
    def test_both_sizes_are_sound_and_every_run_can_be_planned(self, name: str, text_file: Path) -> None:
        small, *full = document.read(templates.text(name), name)
        assert bool(full) == (name not in SMALL_ALONE)
        for read in (small, *full):
            sweep = parse(Sweep, read)
            assert sweep.data is not None
            sweep = sweep.model_copy(update={"data": sweep.data.model_copy(update={"hash": "sha256:" + "0" * 64})})
            plan_all(sweep)
            assert len(sweep.levels) >= 2 + (name != "vit-lr") and sweep.seeds >= 2
            if read is small:
                seen = set()
                for arm in sweep.all_arms:
                    for level in sweep.levels_of(arm):
                        for place in range(len(sweep.grid(arm).values)):
                            seen |= {sweep.plan(arm, level, place, seed).hash() for seed in sweep.seeds_at(level)}
                runs = len(sweep.parameterizations) * len(sweep.levels) * len(sweep.grid("supar").values) * sweep.seeds
                assert len(seen) == RUNS.get(name, runs)
                assert sweep.name == name and max(level.width for level in sweep.levels) <= 384
            else:
                assert [level.width for level in sweep.levels] == PAPER_WIDTHS.get(name, [4096] * 8)

    def test_fig1_at_full_size_is_the_papers(self) -> None:
        sweep = parse(Sweep, document.read(templates.text("fig1"), "fig1")[1])
        plan = sweep.plan("supar", sweep.levels[-1], 4.0, 0)
        assert (plan.train.tokens, plan.train.warmup_steps, plan.train.steps) == (306_446_336, 116, 1169)
        assert plan.hyperparameters.lr == 0.0162 and len(plan.tensors) < 30
        up = next(row for row in plan.tensors if row.name == "blocks.0.mlp.up")
        assert up.because == {"m_d": 16.0, "m_rho": 2.0**-7} and log2(up.lr / 0.0162) == 3
        sp = sweep.plan("sp", sweep.levels[0], 4.0, 0)
        assert next(row for row in sp.tensors if row.role == "hidden").init_std == pytest.approx(0.08665602 / 4)

    @pytest.mark.parametrize("name", PRESET_HASHES)
    def test_ask_what_they_asked_when_each_had_a_file(self, name: str) -> None:
        sweeps = [parse(Sweep, read) for read in document.read(templates.text(name), name)]
        assert [document.content_hash(sweep.identity())[7:19] for sweep in sweeps] == PRESET_HASHES[name]

    def test_are_all_the_figures_there_are(self) -> None:
        found = {name for name in templates.names() if "kind: supar.sweep/v1" in templates.text(name)}
        assert found == set(PRESETS) >= set(PRESET_HASHES)

    def test_init_writes_one_and_says_what_it_is_for(self, supar_here: Supar, tmp_path: Path) -> None:
        called = supar_here("init", "fig7")
        assert called.status == 0 and "next: supar sweep fig7.yaml" in called.err
        text = (tmp_path / "fig7.yaml").read_text("utf-8")
        assert text == templates.text("fig7") and text.startswith("# The paper's Figure 7, small: ")
        # its own comments, and those of the figure that it shares its other lines with
        assert "# measured: at the small size" in text and "#   supar sweep --preset fig7 --full" in text
        assert text.count("# ours") == 11 and "Figure 6" not in text and "fig6" not in text and "NAME" not in text
        assert "like:" not in text and text.count("eval_every: 100\n") == 2


def test_the_api_loads_a_sweep(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(document.write([sweep_fields()]))
    assert isinstance(supar_cli.load(tmp_path / "sweep.yaml"), Sweep)


@pytest.mark.parametrize(
    ("file", "name"), [("proxy.yaml", "proxy"), ("-", "sweep"), (None, "quickstart"), ("my proxy+1.yaml", "my-proxy-1")]
)
def test_a_spec_or_proxy_becomes_a_study_of_its_own_shape(
    file: str | None, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = document.write([proxy_fields("text.txt", target={"sparsity": {"density": 0.1, "pattern": "fixed_fan_in"}})])
    if file == "-":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    elif file:
        (tmp_path / file).write_text(text)
    sweep = parse(Sweep, read_study(file, SWEPT))
    assert sweep.name == name and sweep.levels[0].width == sweep.model.width  # its target's width is for something else
    assert (sweep.target.sparsity.pattern == "fixed_fan_in") == (file is not None)
    assert [level.density for level in sweep.levels] == [1.0, 0.25, 0.0625]


def test_an_axis_on_the_command_line_takes_the_place_of_its_kind() -> None:
    read = document.read(document.write([sweep_fields()]), "sweep.yaml")[0]
    set_axes(read, {"--over init-std=x:-1..1/1": "init-std=x:-1..1/1"})
    assert read.data["over"] == {"density": [1.0, 0.25], "init_std": "x:-1..1/1"}
    set_axes(read, {"--over width=32,64": "width=32,64", "--over lr=0.1": "lr=0.1"})
    assert read.data["over"] == {"width": "32,64", "lr": "0.1"}


class TestRefusedFlags:
    @pytest.mark.parametrize(
        ("arguments", "what"),
        [
            (["--over", "lr"], "--over lr: expected NAME=VALUES"),
            (["--over", "eta=0.1"], "--over eta=0.1: expected NAME=VALUES"),
            (["--over", "lr=log2:1"], "--over lr=log2:1: 'log2:1': '' is not a number"),
            (["--over", "sparsity=0,1"], "--over sparsity=0,1: '0,1': 1 is not a valid sparsity"),
            (["--over", "lr=0.1", "--over", "init_std=0.1"], "over: 2 axes of a hyperparameter"),
            (["--parameterization", "sp,ntk"], "parameterizations[1]"),
            (["--iso", "flops"], "--iso flops: "),
            (["--preset", "nm", "--full"], "--preset nm holds 1 document; expected a second one"),
            (["--preset", "fig2"], "--preset fig2: expected fig1"),
            (["--preset", "fig1", "proxy.yaml"], "--preset fig1: cannot be combined with a document"),
            (["--full"], "expected a second one, at full size"),
            (["--width", "40"], "width 40 is not a multiple"),
            (["--data", "none.txt"], "--data none.txt: none.txt: no such file"),
            (["--out", "text.txt"], "text.txt: is a file"),
            (["none.yaml"], "none.yaml: no such file"),
            (["text.txt"], "text.txt:"),
        ],
    )
    def test_end_with_2_and_leave_nothing(
        self, supar_here: Supar, proxy_file: Path, unchanged: Any, arguments: list[str], what: str
    ) -> None:
        unchanged()
        called = supar_here("sweep", "--device", "cpu", *arguments)
        assert (called.status, called.out) == (2, "") and what in called.err
