"""Perceptrons and convolutions: roles of generated nets, what is said of starved heads, choices in a search, shipped scripts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import nn

import supar_cli as supar
from supar_cli.errors import InputError
from supar_cli.experiments import search as tuning
from supar_cli.jobs import runs
from supar_cli.jobs.runs import RunHistory
from supar_cli.jobs.storage import open_study
from supar_cli.planning import advice, document, templates
from supar_cli.planning import layout as plan_layout
from supar_cli.planning.layout_document import Layout
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.training.reporter import NullReporter
from tests.conftest import Called

WIDTH, COLOURS = 16, 3
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch norm": nn.BatchNorm2d,
    "group norm": partial(nn.GroupNorm, 4),
    "none": lambda width: nn.Identity(),
}
# how many inputs of a width one output of a convolution sees
SEEN: dict[str, Callable[[int], int]] = {
    "all": lambda width: width,
    "a quarter": lambda width: width // 4,
    "eight": lambda width: 8,
    "one": lambda width: 1,
}
SIZES = {"base": {"width": WIDTH}, "wider": {"width": 2 * WIDTH}, "third": {"width": 3 * WIDTH}}


class Net(nn.Module):
    """A stem, a convolution whose outputs see some of its inputs, one of single points, a head."""

    def __init__(self, width: int, kernel: int, seen: str, norm: str) -> None:
        super().__init__()
        conv = partial(nn.Conv2d, kernel_size=kernel, padding=kernel // 2)
        self.a, self.b = conv(COLOURS, width), conv(width, width, groups=width // SEEN[seen](width))
        self.c, self.d = nn.Conv2d(width, width, 1), nn.Linear(width, 10)
        self.norm = NORMS[norm](width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        x = x + self.c(self.norm(self.b(x)).relu())
        return self.d(x.mean((2, 3)))


def layout_of(make: Callable[..., nn.Module], inputs: int = COLOURS, side: int = 6) -> Layout:
    return supar.layout(make, example=lambda _: (torch.randn(2, inputs, side, side),), **SIZES)


@pytest.mark.parametrize(("kernel", "seen"), list(product((1, 3, 5), SEEN)))
def test_roles_of_convolutions_follow_from_what_their_sums_see(kernel: int, seen: str) -> None:
    norm = list(NORMS)[(kernel + list(SEEN).index(seen)) % 3]
    layout = layout_of(partial(Net, kernel=kernel, seen=seen, norm=norm))
    found = {row.name: row for row in layout.tensors if row.name.endswith("weight") and row.module != "Linear"}
    sees = [SEEN[seen](width) for width in (WIDTH, 2 * WIDTH)]
    grows = sees[0] != sees[1]  # a fan-in that scales, with outputs that do
    expected = {"a.weight": "embedding", "b.weight": "hidden" if grows else "embedding", "c.weight": "hidden"}
    kernels = {name: row.role for name, row in found.items() if name in expected}
    assert kernels == expected
    fans = {name: row.tensor(0).fan_in for name, row in found.items() if name in expected}
    assert fans == {"a.weight": COLOURS * kernel**2, "b.weight": sees[0] * kernel**2, "c.weight": WIDTH}
    assert {row.role for name, row in found.items() if name not in expected} <= {"norm"}
    assert {row.name: row.uses for row in layout.tensors}["d.weight"] == ["head"]
    # the control: roles by the number of extents take every kernel for one kind
    assert kernels != {name: "hidden" if len(row.base) == 4 else "norm" for name, row in found.items()}
    is_wide = grows and sees[0] * kernel**2 > 4 * WIDTH
    assert [f"is {sees[0] * kernel**2 / WIDTH:g} times the head's" in note for note in layout.notes] == [True] * is_wide


def mlp(width: int) -> nn.Module:
    layers = (nn.Linear(WIDTH, width), nn.ReLU(), nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
    return nn.Sequential(nn.Flatten(), *layers, nn.ReLU(), nn.Linear(width, 10))


def spec_of(folder: Path, layout: Layout, **search: Any) -> Spec:
    """A spec of a model, searched in a range of rates."""
    (folder / "layout.yaml").write_text(document.write([layout.model_dump()]))
    data = {
        "kind": "supar.spec/v1",
        "model": {"family": "own", "layout": str(folder / "layout.yaml")},
        "run": {"command": "python train.py {plan}"},
        "hyperparameters": {
            **{"lr": 2**-7, "init_std": None, "weight_decay": 0.0},
            **{"alpha_input": 1.0, "alpha_output": 1.0},
        },
        "train": {"steps": 100, "batch_size": 16},
        "search": {"lr": [2**-10, 2**-4], **search},
    }
    return validate(Spec, data, "supar.yaml")


def conv(width: int) -> nn.Module:
    layers = (nn.Conv2d(COLOURS, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.BatchNorm2d(width), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


@pytest.mark.filterwarnings("ignore::supar_cli.errors.TransferWarning")
def test_a_plan_warns_of_a_starved_head_and_of_few_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 144 weights of a neuron, nine times as many as the head's, 72 live at 1/2, above 50, and 18 at 1/8."""

    def warned(make: Any, density: str, alpha: float, name: Any = "supar", evidence: Any = None) -> tuple[bool, bool]:
        plan = supar.transfer(
            tuning.proxy_of(specs[make], {"alpha_output": alpha}), density=density, parameterization=name
        )
        found = advice.warnings(plan, evidence=evidence)
        return any("alpha_output: 1, but" in one for one in found), any("fewer than 50" in one for one in found)

    specs = {}
    for make, inputs in ((conv, COLOURS), (mlp, 1)):
        (tmp_path / make.__name__).mkdir()
        specs[make] = spec_of(tmp_path / make.__name__, layout_of(make, inputs, side=6 if make is conv else 4))
    assert warned(conv, "1", 1.0) == (False, False)
    for name in ("mup", "supar", "supar-lr-only"):
        assert warned(conv, "1/2", 1.0, name) == (True, False) and warned(conv, "1/8", 1.0, name) == (True, True)
        assert warned(conv, "1/2", 4.0, name) == (False, False) and warned(conv, "1/8", 4.0, name) == (False, True)
    for name in ("sp", "sp-si"):  # they have no such multiplier, and were not measured there
        assert warned(conv, "1/8", 1.0, name) == (False, False)
    ranges = {"lr": [0.001, 0.1], "alpha_output": [1.0, 4.0, 8.0]}
    assert warned(conv, "1/2", 1.0, evidence={"ranges": ranges}) == (False, False)
    assert warned(conv, "1/2", 1.0, evidence={"ranges": {"lr": [0.001, 0.1]}}) == (True, False)
    # controls: a perceptron, whose widest product has four times the head's inputs, and a rule that knows no ratio
    assert warned(mlp, "1/8", 1.0) == (False, False)
    monkeypatch.setattr(plan_layout, "LARGEST_FAN_IN_RATIO", 9)
    assert warned(conv, "1/8", 1.0) == (False, False)


@pytest.mark.parametrize("sampler", ["random", "qmc", "tpe", "gp"])
def test_a_search_chooses_among_three_or_more_values(
    sampler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if sampler in ("qmc", "gp"):
        pytest.importorskip("scipy")

    def train(plan: Plan, *_: Any) -> RunHistory:  # a parabola in both, lowest at a rate of 2^-7 and a factor of 8
        at = np.log2([plan.hyperparameters.lr, plan.hyperparameters.alpha_output]) - (-7, 3)
        return RunHistory(evaluations=[(100, 1.0 + float(at @ at))], clipped=[])

    monkeypatch.setattr(runs, "train_plan", train)
    monkeypatch.setattr(runs, "validation_loss", lambda plan, *_: train(plan).evaluations[-1][1])
    choices = [1.0, 4.0, 8.0, 16.0]
    few = {"trials": 12, "sampler": sampler, "seeds": 1, "lr_fit_octaves": []}
    spec = spec_of(tmp_path, layout_of(mlp, inputs=1, side=4), alpha_output=[1, 4, 8, 16], **few)
    storage = str(tmp_path / "study.journal")
    proxy = tuning.search(spec, storage, reporter=NullReporter())
    trials: list[optuna.trial.FrozenTrial] = open_study(storage, tuning.study_name(spec)).get_trials()
    tried = [trial.params["alpha_output"] for trial in trials]
    assert set(tried) <= set(choices) and len(set(tried)) >= 3 and tried[0] == 1.0
    assert proxy.evidence["ranges"]["alpha_output"] == choices
    best = min(trials, key=lambda trial: trial.value or 0.0)
    assert proxy.hyperparameters.alpha_output == best.params["alpha_output"]
    if sampler == "random":  # the control: of two values, all between them are tried
        spec = spec_of(tmp_path, layout_of(mlp, inputs=1, side=4), alpha_output=[1, 16], **few)
        tuning.search(spec, storage, reporter=NullReporter())
        trials = open_study(storage, tuning.study_name(spec)).get_trials()
        assert len({trial.params["alpha_output"] for trial in trials}) == len(trials)


@pytest.mark.parametrize("values", [[4.0], [4.0, 1.0], [1.0, 8.0, 4.0], [1.0, 4.0, 4.0], [0.0, 1.0, 4.0]])
def test_choices_that_are_none_are_refused(values: list[float], tmp_path: Path) -> None:
    layout = layout_of(mlp, inputs=1, side=4)
    with pytest.raises(InputError, match=r"alpha_output: .*expected \[low, high\].*, or three or more values"):
        spec_of(tmp_path, layout, alpha_output=values)
    spec_of(tmp_path, layout, alpha_output=sorted({1.0, 2.0, *filter(None, values)}))


def images(file: Path, colours: int, has_test: bool) -> None:
    """Images of three classes that differ in their brightness."""
    draw = np.random.default_rng(0)
    y = draw.integers(3, size=200)
    x = (draw.random((200, *[colours] * bool(colours), 10, 10)) * 60).astype(np.uint8)
    x += (80 * y).astype(np.uint8).reshape(-1, *[1] * (x.ndim - 1))
    np.savez(file, x=x, y=y, **({"x_test": x[:50], "y_test": y[:50]} if has_test else {}))


@pytest.mark.filterwarnings("ignore::supar_cli.errors.TransferWarning")
@pytest.mark.parametrize(
    ("script", "make", "optimizer", "colours"),
    [("mlp", "make", "adamw", 0), ("resnet", "make", "sgd", 3), ("resnet", "make_group_norm", "adamw", 0)],
)
def test_shipped_scripts_learn_and_report(
    script: str, make: str, optimizer: str, colours: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images(tmp_path / "images.npz", colours, has_test=bool(colours))
    monkeypatch.setenv("IMAGES", str(tmp_path / "images.npz"))
    monkeypatch.setenv("SUPAR_RESULT", str(tmp_path / "losses.jsonl"))
    found: dict[str, Any] = {"__name__": script}
    exec(compile(templates.text(f"{script}.py"), f"{script}.py", "exec"), found)
    layout = supar.layout(found[make], example=found["example"], **SIZES)
    spec = spec_of(tmp_path, layout.model_copy(update={"factory": f"{script}:{make}"}))
    train = {"optimizer": optimizer, "schedule": "cosine", "steps": 60, "eval_every": 20}
    spec = spec.model_copy(update={"train": spec.train.model_copy(update=train)})
    proxy: Proxy = tuning.proxy_of(spec, {"lr": 2**-6 if optimizer == "adamw" else 2**-4})
    plan = supar.transfer(proxy, width=2 * WIDTH, density="1/2")
    (tmp_path / "plan.yaml").write_text(document.write([plan.model_dump()]))
    found["main"](str(tmp_path / "plan.yaml"))
    reported = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert [one["step"] for one in reported] == [20, 40, 60]
    assert reported[-1]["loss"] < 0.5 * np.log(3) < reported[0]["loss"] + 1
    norms = {row.module for row in layout.tensors if row.role == "norm"}
    assert norms == {("resnet", "make"): {"BatchNorm2d"}, ("resnet", "make_group_norm"): {"GroupNorm"}}.get(
        (script, make), set()
    )


@pytest.mark.parametrize(
    ("make", "settings", "is_searched"),
    [(conv, [], True), (mlp, [], False), (conv, ["search.alpha_output=[1, 2]"], False)],
    ids=["convolutions", "perceptron", "own range"],
)
def test_the_template_searches_the_choices_where_the_head_is_starved(
    make: Any, settings: list[str], is_searched: bool, tmp_path: Path, supar_here: Callable[..., Called]
) -> None:
    layout = layout_of(make, COLOURS if make is conv else 1, side=6 if make is conv else 4)
    (tmp_path / "layout.yaml").write_text(document.write([layout.model_dump()]))
    flags = [part for setting in settings for part in ("-s", setting)]
    run = supar_here("tune-proxy", "--layout", "layout.yaml", "--command", "python x.py {plan}", "--dry-run", *flags)
    assert run.status == 0, run.err
    assert ("searched: alpha_output, one of 1, 4, 8, 16, as the fan-in of" in run.err) == is_searched, run.err
