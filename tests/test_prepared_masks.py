"""Masks and values that a user brings, the sparse engine, and supar's own transformer as somebody's module."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import supar_cli as supar
from supar_cli.errors import InputError
from supar_cli.models.transformer import Transformer
from supar_cli.planning import document
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Proxy
from supar_cli.planning.transfer import transfer
from supar_cli.training import optimizer as builtin_optimizer
from supar_cli.training import prepare as builtin
from tests.conftest import plan_from, proxy_fields
from tests.own_models import make, plan_of, prepared, steps
from tests.test_own_transfer import layout_of

Row = dict[str, Any]

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


class TestImports:
    def test_other_masks_in_kept_values_are_an_error(self) -> None:
        made = prepared()
        supar.prepare(copy.deepcopy(made.model), made.plan, initialise=False)
        plan = plan_of(make(), train={"seed": 1})
        with pytest.raises(
            InputError, match=r"blocks\.0\.up\.weight: \d+ weights live where the plan has dead ones"
        ) as raised:
            supar.prepare(made.model, plan, initialise=False)
        assert "pass masks= to prune dense values" in str(raised.value)
        assert made.check() == {}  # nothing was changed
        with pytest.raises(InputError, match="weights live where"):  # masks prune dense values, no others
            supar.prepare(made.model, plan, initialise=False, masks=supar.prepare(make(), plan).masks)
        with pytest.raises(InputError, match="weights live where"):
            supar.prepare(make(), plan, initialise=False)

    def test_masks_are_the_nonzeros_of_a_matrix(self) -> None:
        """V4 of the reports: a threshold without the absolute value froze every negative weight."""
        model = make()
        plan = plan_of(model)
        given: dict[str, Any] = {}
        for row in (row for row in plan.tensors if row.kept < row.size):
            values = torch.full(row.shape, -0.0).flatten()
            values[torch.randperm(row.size)[: row.kept]] = -0.3
            given[row.name] = values.view(row.shape)
        model.load_state_dict({**model.state_dict(), **given})
        made = supar.prepare(model, plan, initialise=False, masks=given)
        weight, alive = made.tensors["blocks.0.up.weight"], given["blocks.0.up.weight"] != 0
        assert torch.equal(torch.from_numpy(made.masks["blocks.0.up.weight"].alive()), alive)
        assert not weight[~alive].signbit().any()
        before = weight.detach().clone()
        steps(model, made.optimizer(), 2)
        assert (weight != before)[alive].float().mean() > 0.99 and made.check() == {}
        arrays = {name: mask.alive() for name, mask in made.masks.items()}
        assert (
            supar.prepare(make(), plan, masks=arrays).masks
            == made.masks
            == supar.prepare(make(), plan, masks=made.masks).masks
        )

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda m: m.pop("blocks.0.up.weight"), r"masks: blocks\.0\.up\.weight: is missing; the plan keeps 1024"),
            (
                lambda m: m.update({"blocks.0.up": m["blocks.0.up.weight"]}),
                r"blocks\.0\.up: unknown tensor; did you mean",
            ),
            (
                lambda m: m.update({"head.weight": torch.eye(48, 32)}),
                r"head\.weight: has a mask here; the plan has no such",
            ),
            (
                lambda m: m.update({"blocks.0.up.weight": torch.ones(128, 32)}),
                r"4096 weights live; the plan keeps 1024",
            ),
            (
                lambda m: m.update({"blocks.0.up.weight": torch.ones(32, 128)}),
                r"has the shape \[32, 128\]; the plan's is",
            ),
        ],
    )
    def test_masks_that_are_not_the_plans_are_named(self, spoil: Callable[[dict[str, Any]], Any], words: str) -> None:
        made = prepared()
        given: dict[str, Any] = dict(made.masks)
        spoil(given)
        with pytest.raises(InputError, match=words):
            supar.prepare(make(), made.plan, masks=given)

    def test_masks_of_a_random_number_of_weights_are_taken(self) -> None:
        made = prepared(sparsity={"pattern": "bernoulli"})
        assert any(mask.count != made.rows[name].kept for name, mask in made.masks.items())
        assert supar.prepare(make(), made.plan, masks=made.masks).masks == made.masks
        few = {**made.masks, "blocks.0.up.weight": torch.eye(128, 32)}
        with pytest.raises(InputError, match="32 weights live; the plan keeps 1024"):
            supar.prepare(make(), made.plan, masks=few)

    def test_a_tensor_that_is_all_zero_is_named(self) -> None:
        model = make()
        nn.init.zeros_(model.head.weight)
        with pytest.warns(UserWarning, match=r"^head\.weight: all their values are 0"):
            supar.prepare(model, plan_of(model, density=1.0), initialise=False)


class TestSparseEngine:
    pytestmark = pytest.mark.filterwarnings("ignore:Sparse")

    def test_trains_as_the_dense_layers(self) -> None:
        model, plain = make(), prepared()
        made = supar.prepare(model, plan_of(model), engine="sparse")
        losses = steps(model, made.optimizer(clip=1.0), 4)
        assert losses == pytest.approx(steps(plain.model, plain.optimizer(clip=1.0), 4), abs=1e-5)
        assert made.check() == {} and model.state_dict().keys() == make().state_dict().keys()
        supar.prepare(model, made.plan)
        assert "forward" not in vars(model.blocks[0].up)  # dense again

    def test_gradients_of_gradients_are_refused(self) -> None:
        """A penalty on them would be a constant, and train nothing; the control: the dense layers have them."""
        for engine in ("sparse", None):
            model = make()
            supar.prepare(model, plan_of(model), engine=engine)  # type: ignore[arg-type]
            x = torch.randn(3, 32, requires_grad=True)

            def slopes(layer: nn.Module = model.blocks[0].up, x: torch.Tensor = x) -> torch.Tensor:
                return torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)[0]

            if engine is None:
                assert slopes().requires_grad
            else:
                with pytest.raises(InputError, match="create_graph"):
                    slopes()

    def test_other_layers_and_precisions_are_refused_by_name(self) -> None:
        class Mine(nn.Linear):
            pass

        model = make()
        model.blocks[0].up = Mine(32, 128)
        model.blocks[1].down.bfloat16()
        with pytest.raises(InputError) as raised:
            supar.prepare(model, plan_of(make()), engine="sparse")
        said = str(raised.value)
        assert (
            "blocks.0.up.weight: is a tensor of Mine" in said
            and "blocks.1.down.weight: is torch.bfloat16 on cpu" in said
        )
        with pytest.raises(InputError, match="engine: 'block'"):
            supar.prepare(make(), plan_of(make()), engine="block")  # type: ignore[arg-type]


def as_own(proxy: Proxy, folder: Path) -> Proxy:
    """A proxy of a built-in family as that of somebody's module, whose weights have their attribute's name behind the module's."""
    data = layout_of(proxy.decoder).model_dump()
    for row in data["tensors"]:
        row["name"] += "" if row["name"].endswith(".bias") else ".weight"
    path = folder / "layout.yaml"
    path.write_text(document.write([data]), encoding="utf-8")
    model = {"family": "own", "layout": str(path)}
    return validate(Proxy, proxy.model_dump() | {"model": model, "data": None}, "proxy")


@pytest.mark.parametrize(("family", "optimizer"), [("llama", "adamw"), ("gpt2", "adamw"), ("llama", "sgd")])
def test_supars_own_transformer_trains_bit_for_bit_as_under_the_built_in_plan(
    family: str, optimizer: str, text_file: Path, tmp_path: Path
) -> None:
    """As somebody's module without multipliers, which the plan folds; all of them are powers of two."""
    warnings.filterwarnings("ignore", "no group has the tuned rate")  # SGD multiplies all of them by a ratio
    shape = {"family": family, "width": 64, "layers": 6, "heads": 4, "kv_heads": 2, "ffn_width": 128}
    shape |= {"tied": False} if family == "llama" else {}
    hyper = {"alpha_input": 2.0, "alpha_output": 4.0}
    fields = proxy_fields(
        str(text_file), model=shape, hyperparameters=hyper, train={"optimizer": optimizer}, target={"width": 128}
    )
    proxy, plan = validate(Proxy, fields, "proxy"), plan_from(fields)
    theirs_plan = transfer(as_own(proxy, tmp_path), proxy.target, "supar", allow_low_wpn=True)
    none = plan.decoder.multipliers.model_copy(update={"input": 1.0, "output": 1.0})
    theirs = supar.prepare(Transformer(plan.decoder.model_copy(update={"multipliers": none})), theirs_plan)
    ours = builtin.prepare(plan, torch.device("cpu"))
    optimizers = [builtin_optimizer.build(plan, ours.tensors), theirs.optimizer()]
    assert len(theirs.tensors) == len(plan.tensors) == (57 if family == "llama" else 51)
    assert {name.removesuffix(".weight"): mask for name, mask in theirs.masks.items()} == ours.masks != {}
    for step in range(3):
        losses = []
        for made, stepper in zip((ours.model, theirs.model), optimizers, strict=True):
            tokens = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(step))
            stepper.zero_grad()
            loss = made(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            stepper.step()
            losses.append(loss.item())
        ours.sync_engines()
        assert losses[0] == losses[1]
        for name, tensor in theirs.tensors.items():
            true = ours.weight(name.removesuffix(".weight")) * (theirs.rows[name].fold or 1.0)
            assert torch.equal(tensor, true), (step, name)
