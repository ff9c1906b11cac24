"""`supar check` on a user's model: products found whatever they are written with, sizes, verdicts, and planted faults seen."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import supar_cli as supar
from supar_cli.experiments import check_plans, coordinates, own_coordinates
from supar_cli.experiments.coordinate_bounds import CheckResult, judge
from supar_cli.experiments.products import Products
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Proxy
from supar_cli.training.tasks import load_task
from supar_cli.training.trainer import Trainer
from tests.conftest import CHECKOUT, Called

Supar = Callable[..., Called]
BASE, VOCAB, CONTEXT, ROWS = 64, 32, 16, 4
TUNED = {"lr": 2**-7, "init_std": 0.1, "alpha_input": 1.0, "alpha_output": 2.0, "weight_decay": 0.0}


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(width)
        self.qkv, self.o = nn.Parameter(torch.randn(width, 3, width)), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        found = torch.einsum("btd,dce->cbte", self.norm(x), self.qkv)
        q, k, v = found.unflatten(-1, (self.heads, -1)).transpose(2, 3)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.o(mixed)
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Gpt(nn.Module):
    """Raw parameters, einsum, a norm used twice; returns (logits, loss)."""

    def __init__(self, width: int, tied: bool = False, heads: int = 0) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, width), nn.Parameter(0.1 * torch.randn(CONTEXT, width))
        self.block, self.norm = Block(width, heads or width // 8), nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.head(self.norm(self.block(self.tokens(tokens) + self.positions)))
        loss = None if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return logits, loss


tied, moving_heads = partial(Gpt, tied=True), partial(Gpt, heads=2)


def batches(seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Tokens that follow from the one before, so that there is something to learn."""
    random = torch.Generator().manual_seed(1000 * seed + step)
    start, pace = (torch.randint(VOCAB, (ROWS, 1), generator=random) for _ in range(2))
    tokens = (start + (1 + pace % 3) * torch.arange(CONTEXT + 1)) % VOCAB
    return tokens[:, :-1], tokens[:, 1:]


def other_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    logits, _ = model(batch[0])
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


def write_proxy(folder: Path, make: Callable[..., nn.Module], **tuned: float) -> Path:
    sizes = {"base": {"width": BASE}, "wider": {"width": 2 * BASE}, "third": {"width": 3 * BASE}}
    layout = supar.layout(make, **sizes, example=lambda _: batches(0, 0)[:1])
    (folder / "layout.yaml").write_text(document.write([layout.model_dump()]))
    model = {"family": "own", "layout": "layout.yaml"}
    train = {"steps": 10, "batch_size": ROWS}
    fields = {"kind": "supar.proxy/v1", "model": model, "hyperparameters": {**TUNED, **tuned}, "train": train}
    path = folder / "proxy.yaml"
    path.write_text(document.write([fields]))
    return path


def read_proxy(path: Path) -> Proxy:
    found = validate(Proxy, document.read_file(str(path))[0].data, "proxy")
    return found.beside(str(path))


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": F.linear,
    "matmul": lambda x, w: x @ w.T,
    "conv1d of transformers": lambda x, w: torch.addmm(torch.zeros(6), x.flatten(0, 1), w.T).view(4, 5, 6),
    "einsum": lambda x, w: torch.einsum("btd,ed->bte", x, w),
    "einsum in heads": lambda x, w: torch.einsum("btd,hed->bthe", x, w.view(2, -1, w.shape[1])).flatten(2),
    "a part at a time": lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(3)], dim=-1),
    "convolution": lambda x, w: F.conv1d(x.transpose(1, 2), w[..., None]).transpose(1, 2),
    "masked": lambda x, w: F.linear(x, w * torch.ones_like(w)),
    "in another precision": lambda x, w: F.linear(x.double(), w.double()).float(),
    "normalised and scaled back": lambda x, w: F.linear(x, F.normalize(w, dim=1) * w.norm(dim=1, keepdim=True)),
    "picked by index": lambda x, w: F.linear(x, w[torch.arange(len(w))]),
    "recomputed": lambda x, w: checkpoint(F.linear, x, w, use_reentrant=False),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_the_same_however_it_is_written(form: str) -> None:
    random = torch.Generator().manual_seed(0)
    batch = torch.randn(4, 5, 8, generator=random)
    first, weight = (nn.Parameter(torch.randn(shape, generator=random)) for shape in ((8, 8), (6, 8)))
    changed = weight.detach() + 0.1 * torch.randn(6, 8, generator=random)
    with Products({"weight": weight}, [], {}, {"first": first}, batch) as products:
        x = torch.tanh(batch @ first)
        y = FORMS[form](x, weight)
        loss = (torch.sin(y) * y.exp().detach()).sum() + x.square().sum()  # X is read elsewhere too
        products.is_backward = True
        loss.backward()
    with torch.no_grad():
        by_y = torch.cos(y) * y.exp()
        product = products.found["weight"]
        found = (product.activation, product.gain, product.change({"weight": weight}, {"weight": changed}))
        expected = (
            y.abs().mean(),
            (by_y @ weight).abs().mean() / by_y.abs().mean(),
            (x @ (changed - weight).T).abs().mean(),
        )
    if form == "a part at a time":  # the gradients of X are apart too
        found, expected = found[::2], expected[::2]
    assert [float(one) for one in found] == pytest.approx([float(one) for one in expected], rel=1e-4)


def test_what_is_no_product_is_not_taken_for_one() -> None:
    """A gate, and a table that is looked up and added."""
    weight, table, batch = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(9, 8)), torch.randn(4, 8)
    with Products({"weight": weight, "table": table}, ["table"], {}, {"table": table}, batch) as products:
        _ = (batch * weight + table[torch.arange(4)]).sum()
    assert not products.found["weight"].outputs and not products.found["table"].outputs


def test_supars_own_transformer_has_the_sizes_that_its_modules_show(plan_of: Callable[..., Plan]) -> None:
    """Products below autograd against hooks on modules: an oracle that shares no code."""
    plan = plan_of(target={"sparsity": {"density": 1.0}})  # where masked, a weight holds its live values only
    _, shown = coordinates.measured_step(plan)()  # type: ignore[misc]
    trainer = Trainer(plan, load_task(plan))
    model, named = trainer.sparse_model.model, dict(trainer.sparse_model.model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    by_role = {role: [f"{row.name}.weight" for row in plan.tensors if row.role == role] for role in ("hidden", "norm")}
    tables, head = (
        {name: named[name] for name in named if name not in by_role["hidden"] + by_role["norm"]},
        "embedding.weight",
    )
    weights = {name: named[name] for name in [*by_role["hidden"], head]}
    norms = {name: named[name] for name in by_role["norm"]}
    batch = trainer.batch(0)
    with Products(weights, [head], norms, tables, batch) as products:
        loss = trainer.task.loss(model, batch, None)
        products.is_backward = True
        torch.autograd.backward(loss)
    trainer.optimizer.step()
    now = {name: parameter.detach() for name, parameter in named.items()}
    assert products.found[head].norms == {"final_norm.weight"}
    with torch.no_grad():
        for name, size in shown["activation"].items():
            product = products.found[f"{name}.weight"]
            update = product.change(before, {f"{name}.weight": now[f"{name}.weight"]})
            assert float(product.activation) == pytest.approx(size, rel=1e-4)
            assert float(product.gain) == pytest.approx(shown["gain"][name], rel=1e-4)
            assert float(update) == pytest.approx(shown["update"][name], rel=1e-3)
        for name, size in shown[coordinates.SHARE].items():
            changed = {f"{name}.weight": now[f"{name}.weight"]}
            assert float(products.found[head].change(before, changed)) == pytest.approx(size, rel=1e-2)


_judged: dict[Any, CheckResult] = {}


class TestVerdicts:
    """Of Gpt over width 64 to 256, dense, 4 steps of 64 tokens; a fault is planted in every plan.

    n = 4 seeds. measured: a bound that a right plan exceeds, it exceeds by less than the 95 % interval; the slopes that a fault
    moves, it moves by .44 to 1.2, and a head width that moves by .41 (SE .02 to .08).
    """

    def judge(self, folder: Path, make: Callable[..., nn.Module], role: str = "", key: str = "") -> CheckResult:
        """Once for each model and fault."""
        if (make, role, key) not in _judged:
            torch.set_num_threads(1)
            proxy, own = check_plans.with_layout(read_proxy(write_proxy(folder, make)), None)
            code = own_coordinates.own_code(own, make, batches, None)
            assert code is not None
            sizes: dict[str, Any] = {"widths": [64, 128, 256], "densities": [1.0], "seeds": 4, "steps": 4}
            sweep = check_plans.sweeps_of(proxy, **sizes, own=own)[0]
            sweep.plans = [[with_fault(plan, role, key) for plan in plans] for plans in sweep.plans]
            by_run = {plan.hash(): own_coordinates.measure(plan, code) for plans in sweep.plans for plan in plans}
            assert all(record["not_measured"] == [] for record in by_run.values())
            _judged[make, role, key] = judge(sweep, by_run)
        return _judged[make, role, key]

    @pytest.mark.parametrize("make", [Gpt, tied])
    def test_a_right_plan_passes(self, make: Callable[..., nn.Module], tmp_path: Path) -> None:
        found = self.judge(tmp_path, make)
        assert found.passed or found.inconclusive, found.text
        quantities = {*coordinates.LINEAR, "attention", "Δattention", "logits", "Δlogits", coordinates.SHARE}
        assert {one.quantity for one in found.findings} == quantities

    @pytest.mark.parametrize(
        ("make", "role", "key", "quantity", "tensor"),
        [
            (Gpt, "unembedding", "init_std", "logits", "head.weight"),
            (Gpt, "unembedding", "lr", coordinates.SHARE, "head.weight"),
            (tied, "norm", "init_constant", "logits", "tokens.weight"),
            (tied, "norm", "lr", coordinates.SHARE, "norm.weight"),
        ],
    )
    def test_a_fold_of_the_head_that_is_forgotten_is_seen(
        self, make: Callable[..., nn.Module], role: str, key: str, quantity: str, tensor: str, tmp_path: Path
    ) -> None:
        right, faulty = self.judge(tmp_path, make), self.judge(tmp_path, make, role, key)
        assert slope(faulty, quantity, tensor) - slope(right, quantity, tensor) > 0.35
        if tensor != "norm.weight":  # at widths so narrow its share starts at -.19
            assert not (faulty.passed or faulty.inconclusive)
            assert (faulty.violations[0].quantity, faulty.violations[0].tensor) == (quantity, tensor)

    def test_a_head_width_that_moves_is_seen_by_the_change_of_q_k(self, tmp_path: Path) -> None:
        right, moving = self.judge(tmp_path, Gpt), self.judge(tmp_path, moving_heads)
        assert (moving.violations[0].quantity, moving.violations[0].tensor) == ("Δattention", "block")
        assert slope(moving, "Δattention", "block") - slope(right, "Δattention", "block") > 0.25
        assert abs(slope(moving, "attention", "block")) < 0.15, "q·k of random weights does not show it"


def slope(result: CheckResult, quantity: str, tensor: str) -> float:
    return next(one.value for one in result.findings if (one.quantity, one.tensor) == (quantity, tensor))


def with_fault(plan: Plan, role: str, key: str) -> Plan:
    """A plan whose rows of a role are without their fold in one of their numbers."""
    rows = []
    for row in plan.tensors:
        is_meant = row.role == role and row.fold is not None and getattr(row, key) is not None
        rows.append(row.model_copy(update={key: getattr(row, key) / row.fold}) if is_meant else row)  # type: ignore[operator]
    return plan.model_copy(update={"tensors": rows})


MODULE = """
import tests.test_own_check as own

make, batches, tied, other_loss = own.Gpt, own.batches, own.tied, own.other_loss
number = 3

def logits_only(model, batch):
    return model(batch[0])[0]
"""
NAMED = ("--factory", "mymodel:make", "--batches", "mymodel:batches")
SMALL = ("--width", "64,128", "--density", "1,0.25", "--seeds", "1", "--max-seeds", "1", "--steps", "2")


class TestCommand:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "mymodel.py").write_text(MODULE)
        monkeypatch.delitem(sys.modules, "mymodel", raising=False)
        monkeypatch.syspath_prepend(str(CHECKOUT))
        write_proxy(tmp_path, Gpt)
        return tmp_path

    def test_a_proxy_is_checked_over_density_and_width(self, supar_here: Supar, folder: Path) -> None:
        ended = supar_here("check", "proxy.yaml", *NAMED, *SMALL, "--jobs", "1")
        result = json.loads((folder / "check/result.json").read_text())
        assert ended.status in (0, 5), ended.err  # so small a model bends; what matters here is what is said and kept
        what = [
            "supar over density",
            "supar over width",
            "sp over density",
            "mup over density",
            "sp over width",
            "power",
        ]
        assert [verdict["what"] for verdict in result["verdicts"]] == what
        assert all(verdict["passed"] is False for verdict in result["verdicts"] if verdict["control"])
        tensors = {row[5] for table in result["tables"] for row in table["rows"]}
        assert {"head.weight", "norm.weight", "block"} <= tensors and result["notes"] == []
        lines = (folder / "check/records.jsonl").read_text()
        again = supar_here("check", "proxy.yaml", *NAMED, *SMALL, "--jobs", "1")
        assert (folder / "check/records.jsonl").read_text() == lines and again.status == ended.status
        (folder / "mymodel.py").write_text(MODULE + "# another model, for all that is known")
        changed = supar_here("check", "proxy.yaml", *NAMED[:2], "--batches", "mymodel:tied", *SMALL)
        assert changed.status == 2 and "holds the records of another measurement" in changed.err

    def test_a_plan_is_compared_with_its_proxy(self, supar_here: Supar, folder: Path) -> None:
        assert (
            supar_here("transfer", "proxy.yaml", "--width", "128", "--density", "0.25", "-o", "plan.yaml").status == 0
        )
        ended = supar_here("check", "plan.yaml", *NAMED, "--loss", "mymodel:other_loss", *SMALL[4:], "--jobs", "1")
        assert ended.status in (0, 4, 5), ended.err
        result = json.loads((folder / "check/result.json").read_text())
        what = {"the plan over density", "sp over density", "the plan over scale", "power"}
        assert {verdict["what"] for verdict in result["verdicts"]} == what
        (folder / "layout.yaml").rename(folder / "elsewhere.yaml")
        missing = supar_here("check", "plan.yaml", *NAMED)
        assert missing.status == 2 and "layout.yaml" in missing.err

    def test_a_dry_run_times_a_step_and_writes_nothing(self, supar_here: Supar, folder: Path) -> None:
        ended = supar_here("check", "proxy.yaml", *NAMED, *SMALL, "--jobs", "1", "--dry-run")
        assert ended.status == 0 and "here, by timing a few steps: at least" in ended.err
        assert not (folder / "check").exists()

    def test_a_rate_that_is_too_hot_is_lowered_and_said(self, supar_here: Supar, folder: Path) -> None:
        arguments = (*SMALL[:2], "--density", "1", "--seeds", "1", "--max-seeds", "1", "--steps", "4", "--jobs", "1")
        ended = supar_here("check", "proxy.yaml", *NAMED, *arguments, "-s", "hyperparameters.lr=0.5", "--json")
        result = json.loads((folder / "check/result.json").read_text())
        assert ended.status in (0, 5), ended.err
        assert "lr 0.5 is too high for slopes to be judged" in result["notes"][0] and result["lr_factor"] < 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (NAMED[2:], "factory: is missing; expected module:function, such as mymodel:factory"),
            (NAMED[:2], "batches: is missing; expected module:function, such as mymodel:batches"),
            ((*NAMED[:3], "mymodel:nothing"), "--batches mymodel:nothing: mymodel has no nothing"),
            ((*NAMED[:3], "mymodel:number"), "--batches mymodel:number: is a int; expected a function"),
            ((*NAMED[:3], "mymodel"), "--batches mymodel: expected MODULE:FUNCTION, such as mymodel:make"),
            ((*NAMED[:3], "no_such:f"), "--batches no_such:f: no module no_such here"),
            ((*NAMED, "--batch-size", "4"), "--batch-size 4: 4; of a model of your own, --batches says how large"),
            ((*NAMED, "--loss", "mymodel:logits_only"), "--loss mymodel:logits_only: returned a tensor of shape"),
        ],
    )
    def test_what_can_not_be_used_is_named(
        self, supar_here: Supar, folder: Path, arguments: tuple[str, ...], message: str
    ) -> None:
        ended = supar_here("check", "proxy.yaml", *arguments, *SMALL, "--jobs", "1")
        assert ended.status == 2 and message in ended.err

    def test_functions_are_for_own_models_only(self, supar_here: Supar, folder: Path, proxy_file: Path) -> None:
        plan = supar_here("transfer", str(proxy_file), "--width", "64", "--density", "1", "-o", "decoder.yaml")
        assert plan.status == 0 and supar_here("check", "decoder.yaml", "--dry-run", "--jobs", "1").status == 0
        ended = supar_here("check", str(proxy_file), *NAMED, *SMALL)
        assert ended.status == 2 and "factory: is for a model of your own" in ended.err.replace(
            "--factory mymodel:make", "factory"
        )
