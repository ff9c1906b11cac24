"""Plans of a user's model from its layout: the numbers of a built-in plan with its multipliers folded in, and sizes by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import supar_cli
from supar_cli.errors import InputError
from supar_cli.planning import document, layout
from supar_cli.planning.advice import warnings
from supar_cli.planning.explain import explain
from supar_cli.planning.folding import Numbers, TensorUse, describe_uses, fold, fold_each, fold_factors
from supar_cli.planning.layout_document import Layout
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Model, Proxy, Target
from supar_cli.planning.transfer import as_trial, transfer
from supar_cli.training.prepare import draw_masks
from tests.conftest import Called, proxy_fields

NUMBERS = ("init_std", "init_constant", "lr", "weight_decay", "eps")


def layout_of(model: Model, wider: int = 128) -> Layout:
    """The layout that a person would write of one of supar's own families, at the model's width and at a wider one."""
    at = [model, model.model_copy(update={"width": wider, "heads": 8, "ffn_width": 2 * wider, "kv_heads": 4})]
    uses = {use.name: use for use in describe_uses(layout.tensors(model), model.tied)}
    rows = []
    for tensor, wide in zip(*map(layout.tensors, at), strict=True):
        use = uses[tensor.name]
        head = tensor.role == "unembedding" or use.tied
        words = {"first_sum": use.in_first_sum, "head": head, "before_head": use.feeds_head and model.tied}
        site = tensor.site if tensor.block is None else f"blocks.*.{tensor.site}"
        scales = [axis for axis, (a, b) in enumerate(zip(tensor.shape, wide.shape, strict=True)) if a != b]
        start = {"norm": (1.0, 0.0), "bias": (0.0, 0.0)}.get(tensor.role, (0.0, 0.03))
        rows.append(
            {
                "name": tensor.name,
                "site": site,
                "role": tensor.role,
                "block": tensor.block,
                "base": list(tensor.shape),
                "wider": list(wide.shape),
                "fan_in_axes": list(tensor.fan_in_axes),
                "scales": scales,
                "writes_residual": use.writes_residual,
                "uses": [word for word, holds in words.items() if holds],
                "own": dict(zip(("mean", "std"), start, strict=True)),
            }
        )
    sizes = [{"width": one.width, "layers": one.layers} for one in at]
    data = {"kind": "supar.layout/v1", "base": sizes[0], "wider": sizes[1], "tensors": rows}
    return validate(Layout, data, "layout")


def own(proxy: Proxy, folder: Path, changed: Callable[[Layout], Layout] = lambda one: one, **hyper: Any) -> Proxy:
    """The proxy as a user's model, with its layout in a file."""
    path = folder / "layout.yaml"
    path.write_text(document.write([changed(layout_of(proxy.decoder)).model_dump()]), encoding="utf-8")
    data = proxy.model_dump() | {"model": {"family": "own", "layout": str(path)}, "data": None}
    data["hyperparameters"] = data["hyperparameters"] | hyper
    return validate(Proxy, data, "proxy")


def folded(plan: Plan) -> dict[str, dict[str, float]]:
    """The numbers of a built-in plan's rows by name, its multipliers folded in by the algebra of `fold`."""
    factors = fold_factors(describe_uses(layout.tensors(plan.decoder), plan.decoder.tied), plan.decoder.multipliers)
    found = {}
    for row in plan.tensors:
        numbers = fold(
            Numbers(**{name: getattr(row, name) for name in NUMBERS}), factors[row.name], plan.train.optimizer
        )
        found[row.name] = {name: value for name, value in vars(numbers).items() if value is not None}
    return found


FAMILIES: dict[str, dict[str, Any]] = {
    "tied": {"width": 64, "heads": 4, "kv_heads": 2, "ffn_width": 128, "layers": 2, "bias": True},
    "untied": {"family": "llama", "tied": False, "norm": "rmsnorm", "activation": "swiglu", "positions": "rope"},
}
FAMILIES["untied"] |= {name: FAMILIES["tied"][name] for name in ("width", "heads", "kv_heads", "ffn_width", "layers")}


@pytest.fixture
def proxy(request: pytest.FixtureRequest) -> Proxy:
    family, optimizer = getattr(request, "param", ("tied", "adamw"))
    fields = proxy_fields(
        "stdlib",
        model=FAMILIES[family],
        hyperparameters={"alpha_input": 3.0, "alpha_output": 5.0, "weight_decay": 0.1},
        train={"optimizer": optimizer},
        parameterization={"depth_rule": "completep" if optimizer == "adamw" else "none"},
    )
    return validate(Proxy, {**fields, "target": {}}, "proxy")


CASES = [(family, optimizer) for family in FAMILIES for optimizer in ("adamw", "sgd")]
TARGET: dict[str, Any] = {"width": 256, "layers": 4, "sparsity": {"density": 0.25}}


@pytest.mark.parametrize("proxy", CASES, indirect=True, ids=map("-".join, CASES))
@pytest.mark.parametrize("name", ["supar", "mup", "sp", "sp-si"])
def test_rows_are_those_of_the_built_in_plan_with_its_multipliers_folded(
    proxy: Proxy, name: Any, tmp_path: Path
) -> None:
    target, ratio = validate(Target, TARGET, "target"), {"embedding_lr_ratio": 2.0}
    proxy = proxy.model_copy(update={"hyperparameters": proxy.hyperparameters.model_copy(update=ratio)})
    expected = folded(transfer(proxy, target, name))
    plan = transfer(own(proxy, tmp_path), target, name)
    assert {row.name for row in plan.tensors} == set(expected)
    for row in plan.tensors:
        for key, value in expected[row.name].items():
            if key != "eps" or proxy.train.optimizer == "adamw":
                assert getattr(row, key) == pytest.approx(value, rel=1e-12), (row.name, key)


def test_a_fold_that_is_left_out_differs(proxy: Proxy, tmp_path: Path) -> None:
    def without(use: str) -> Callable[[Layout], Layout]:
        def change(one: Layout) -> Layout:
            rows = [row.model_copy(update={"uses": [u for u in row.uses if u != use]}) for row in one.tensors]
            return one.model_copy(update={"tensors": rows})

        return change

    target = validate(Target, TARGET, "target")
    right = {row.name: row for row in transfer(own(proxy, tmp_path), target).tensors}
    with pytest.raises(InputError, match=r"alpha_input: no tensor can take the factor 3\.0"):
        transfer(own(proxy, tmp_path, without("first_sum")), target)
    with pytest.raises(
        InputError, match=r"embedding_lr_ratio: 2, but the layout has no embedding that is summed first"
    ):
        transfer(own(proxy, tmp_path, without("first_sum"), alpha_input=1.0, embedding_lr_ratio=2.0), target)
    hooked = transfer(own(proxy, tmp_path, without("before_head")), target)
    assert right["final_norm"].fold == pytest.approx(5 / 4 / 3) and hooked.model.hooks == {"": pytest.approx(5 / 4 / 3)}  # type: ignore[union-attr]
    assert any("multiply them by 0.41666" in message for message in warnings(hooked))


def test_own_deviations_are_scaled_from_the_base(proxy: Proxy, tmp_path: Path) -> None:
    plan = supar_cli.transfer(own(proxy, tmp_path, init_std=None, alpha_output=1.0), width=256, density="1/4")
    rows = {row.name: row for row in plan.tensors}
    assert rows["blocks.1.mlp.down"].init_std == pytest.approx(0.03)  # width × 4 and density ÷ 4 leave it
    assert rows["embedding"].init_std == pytest.approx(0.09) and rows["embedding"].because["own_std"] == 0.03
    assert rows["blocks.0.attn.q.bias"].init_constant == 0.0 and rows["blocks.0.attn_norm"].init_constant == 1.0
    explained = explain(plan)
    assert not any(number.is_edited for row in explained.rows for number in row.numbers)
    text = " ".join(explained.text("plan.yaml").split())
    assert "× 3: α_input folded, the forward pass is yours" in text and "init_std = own" in text


@pytest.mark.parametrize("proxy", CASES, indirect=True, ids=map("-".join, CASES))
def test_explain_works_out_every_number(proxy: Proxy, tmp_path: Path) -> None:
    plan = transfer(own(proxy, tmp_path), validate(Target, TARGET, "target"))
    explained = explain(plan)
    assert [(row.tensor.name, row.remarks) for row in explained.rows if row.remarks] == []
    assert [row.tensor.name for row in explained.rows if any(number.is_edited for number in row.numbers)] == []


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ({"heads": 8}, "target.heads: a model of your own has only the sizes of its layout; expected width, layers"),
        ({"size": {"hidden": 3}}, "target.hidden: is not a size of the layout.*-s target.size.width=N"),
        ({"tokens": 1000}, "target.tokens: a model of your own"),
    ],
)
def test_a_size_that_the_layout_does_not_have_is_refused(
    proxy: Proxy, tmp_path: Path, target: dict[str, Any], what: str
) -> None:
    with pytest.raises(InputError, match=what):
        transfer(own(proxy, tmp_path), validate(Target, TARGET | target, "target"))


def test_another_layout_than_the_tuned_one_is_refused(proxy: Proxy, tmp_path: Path) -> None:
    tuned = own(proxy, tmp_path)
    data = tuned.model_dump() | {"model": {**tuned.model.model_dump(), "hash": "sha256:0"}}
    with pytest.raises(InputError, match="the layout that the hyperparameters were tuned with"):
        supar_cli.transfer(validate(Proxy, data, "proxy"), density="1/4")


def test_rules_by_depth_that_find_nothing_are_refused(proxy: Proxy, tmp_path: Path) -> None:
    def without_branches(one: Layout) -> Layout:
        return one.model_copy(
            update={"tensors": [row.model_copy(update={"writes_residual": False}) for row in one.tensors]}
        )

    def without_layers(one: Layout) -> Layout:
        return one.model_copy(update={key: {"width": vars(one)[key]["width"]} for key in ("base", "wider")})

    target = validate(Target, TARGET, "target")
    with pytest.raises(InputError, match="depth_rule: no tensor writes the residual stream"):
        transfer(own(proxy, tmp_path, without_branches), target)
    by_gpt2 = proxy.parameterization.model_copy(update={"residual_init": "gpt2", "depth_rule": "none"})
    proxy = proxy.model_copy(update={"parameterization": by_gpt2})
    assert transfer(own(proxy, tmp_path), target)
    with pytest.raises(InputError, match="residual_init: gpt2 divides by the number of blocks"):
        transfer(own(proxy, tmp_path, without_layers), target.model_copy(update={"layers": None}))


def test_data_that_nothing_would_read_are_refused(proxy: Proxy, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data: is for supar's own families"):
        validate(Proxy, own(proxy, tmp_path).model_dump() | {"data": {"source": "stdlib"}}, "proxy")


def test_the_command_plans_a_model_of_the_user(proxy: Proxy, tmp_path: Path, supar_here: Callable[..., Called]) -> None:
    tuned = own(proxy, tmp_path)
    data = tuned.model_dump() | {"model": {"family": "own", "layout": "layout.yaml", "factory": "mymodel:make"}}
    (tmp_path / "proxy.yaml").write_text(document.write([data]), encoding="utf-8")
    done = supar_here("transfer", "--width", "256", "--sparsity", "0.75", "-o", "plan.yaml", "--explain")
    assert done.status == 0 and "width 256, layers 2" in done.err and "supar train" not in done.err
    plan = supar_cli.load(tmp_path / "plan.yaml")
    assert isinstance(plan, Plan) and plan.model.target == {"width": 256, "layers": 2}  # type: ignore[union-attr]


def with_rows(change: Callable[[Any], dict[str, Any]]) -> Callable[[Layout], Layout]:
    """A change of a layout's rows."""

    def changed(one: Layout) -> Layout:
        return one.model_copy(update={"tensors": [row.model_copy(update=change(row)) for row in one.tensors]})

    return changed


@pytest.mark.parametrize(("rule", "layers", "refused"), [("completep", 4, 1), ("completep", 2, 0), ("none", 4, 0)])
def test_a_branch_that_layers_share_has_no_rule_by_depth(
    proxy: Proxy, rule: str, layers: int, refused: int, tmp_path: Path
) -> None:
    def shares(layout: Layout) -> Layout:
        """One down projection for all layers, beside what each of them has of its own."""
        rows = [row for row in layout.tensors if row.name != "blocks.1.mlp.down"]
        shared = {"name": "down", "site": "down", "block": None}
        rows = [row.model_copy(update=shared) if row.name == "blocks.0.mlp.down" else row for row in rows]
        return layout.model_copy(update={"tensors": rows})

    scheme = proxy.parameterization.model_copy(update={"depth_rule": rule})
    changed = own(proxy.model_copy(update={"parameterization": scheme}), tmp_path, shares)
    target = validate(Target, {**TARGET, "layers": layers}, "target")
    if refused:
        with pytest.raises(InputError, match=r"^down: writes the residual stream and is not each layer's own"):
            transfer(changed, target, "supar")
    else:
        assert "down" in {row.name for row in transfer(changed, target, "supar").tensors}


def test_layers_that_start_differently_keep_their_own_deviations(proxy: Proxy, tmp_path: Path) -> None:
    def by_depth(row: Any) -> dict[str, Any]:
        own = row.own.model_copy(update={"std": row.own.std / (1 + (row.block or 0))})
        return {"own": own}

    tuned = own(proxy, tmp_path, with_rows(by_depth), init_std=None)
    plan = supar_cli.transfer(tuned, density="1/4", width=128)
    rows = {row.name: row for row in plan.tensors}
    assert rows["blocks.1.attn.q"].init_std == pytest.approx(0.5 * rows["blocks.0.attn.q"].init_std)
    with pytest.raises(InputError, match=r"blocks\.2\.\S+: its layers start with different deviations"):
        supar_cli.transfer(tuned, density="1/4", layers=3)


def test_a_listed_target_is_no_size_of_the_trial(proxy: Proxy, tmp_path: Path) -> None:
    def listed(one: Layout) -> Layout:
        tensors = {tensor.name: list(tensor.shape) for tensor in one.at({"width": 256, "layers": 2})}
        changed = with_rows(lambda row: {"target": tensors[row.name]})(one)
        return changed.model_copy(update={"target": {"width": 256, "layers": 2}})

    tuned = own(proxy, tmp_path, listed)
    trial = as_trial(tuned)
    assert trial.model.target == trial.model.base == {"width": 64, "layers": 2}  # type: ignore[union-attr]
    assert supar_cli.transfer(tuned, density=1, layers=2).model.target["width"] == 64  # type: ignore[union-attr]
    assert supar_cli.transfer(tuned, density=1, width=256).model.target["width"] == 256  # type: ignore[union-attr]


def as_conv1d(axes: list[int]) -> Callable[[Layout], Layout]:
    """Hidden weights stored the other way round, as GPT-2's Conv1D has them, their fan-in said to lie along `axes`."""

    def change(row: Any) -> dict[str, Any]:
        if row.role != "hidden":
            return {}
        return {"base": row.base[::-1], "wider": row.wider[::-1], "fan_in_axes": axes}

    return with_rows(change)


@pytest.mark.parametrize("pattern", ["2:4", "1:16", "3:8"])
def test_groups_lie_along_the_fan_in_of_a_users_model(proxy: Proxy, pattern: str, tmp_path: Path) -> None:
    live, length = map(int, pattern.split(":"))
    target = validate(Target, {"width": 128, "sparsity": {"pattern": pattern}}, "target")
    seen = {}
    for axes in ([0], [1]):  # the second is planted: the layout calls the fan-out the fan-in
        plan = transfer(own(proxy, tmp_path, as_conv1d(axes)), target)
        masks = draw_masks(plan)
        assert len(masks) == 12 and all(row.kept * length == row.size * live for row in plan.tensors if row.density < 1)
        seen[axes[0]] = {
            name: set(mask.alive().T.reshape(-1, length).sum(axis=1).tolist()) for name, mask in masks.items()
        }
    assert all(found == {live} for found in seen[0].values()) and all(found != {live} for found in seen[1].values())
    ragged = validate(Target, {"width": 128, "sparsity": {"pattern": f"{live}:48"}}, "target")
    with pytest.raises(InputError, match=r"attn\.q: the fan-in 128 is not a multiple of 48; expected whole groups"):
        transfer(own(proxy, tmp_path, as_conv1d([0])), ragged)


class TestSeveralTiedHeads:
    """Two tables that are heads too, and one norm before a head: whose it is can't be known from its use."""

    one = TensorUse("one", "embedding", in_first_sum=True, tied=True, m_d=4.0)
    two = TensorUse("two", "embedding", in_first_sum=True, tied=True, m_d=4.0)
    norm = TensorUse("norm", "norm", feeds_head=True)

    def test_each_has_its_multiplier_where_its_module_is_known(self) -> None:
        there = replace(self.two, multiply_at="readout")
        assert fold_each([self.one, there, self.norm], 2.0, 4.0, 1.0) == (
            {"one": 2.0, "two": 2.0, "norm": 0.5},
            {"readout": 0.5},
        )

    def test_one_norm_for_two_heads_is_refused(self) -> None:
        with pytest.raises(InputError, match="one, two: 2 tied heads, but 1 norm before a head"):
            fold_each([self.one, self.two, self.norm], 2.0, 4.0, 1.0)

    def test_two_factors_in_one_forward_pass_are_refused(self) -> None:
        with pytest.raises(InputError, match="2 tied heads, but 0 norms"):
            fold_each([self.one, replace(self.two, m_d=8.0)], 2.0, 4.0, 1.0)
        assert fold_each([self.one, self.two], 2.0, 4.0, 1.0)[1] == {"": 0.5}
