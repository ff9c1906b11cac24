"""A model of one's own prepared by its plan: every tensor claimed once, values and masks as the plan says, kept in files."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import supar_cli as supar
from supar_cli.errors import InputError
from supar_cli.planning.plan import Plan
from supar_cli.sparse.mask_files import write_masks
from tests.own_models import Small, make, moving_plan, plan_of, prepared, rows_of, steps

Row = dict[str, Any]

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


def edit(name: str, **keys: Any) -> Callable[[Row], Row]:
    """An edit of one row; a key that is None is taken out."""
    return lambda row: (
        {key: value for key, value in {**row, **keys}.items() if value is not None} if row["name"] == name else row
    )


class TestClaims:
    def test_all_differences_are_named_at_once(self) -> None:
        plan = plan_of(make(layers=1))
        model = make(layers=2, width=16)
        model.table = nn.Embedding(48, 32)
        with pytest.raises(InputError) as raised:
            supar.prepare(model, plan)
        said = str(raised.value)
        assert "blocks.0.qkv.weight: the plan has the shape [96, 32], the model [48, 16]" in said
        assert "blocks.1.qkv.weight: in the model only" in said and "table.weight" not in said
        smaller = plan_of(make(layers=2))
        with pytest.raises(InputError, match=r"blocks\.1\.down\.bias: in the plan only"):
            supar.prepare(make(layers=1), smaller)

    def test_tied_tensors_are_claimed_once(self) -> None:
        made = prepared(make(tied=True))
        assert "head.weight" not in made.tensors and len(made.tensors) == len(list(made.model.parameters()))
        head: Row = {**rows_of(make())[-2], "tied_to": "table.weight"}
        data = plan_of(make(tied=True)).model_dump()
        tied = Plan.model_validate({**data, "tensors": [*data["tensors"], head]})
        assert supar.prepare(make(tied=True), tied).tensors.keys() == made.tensors.keys()
        with pytest.raises(InputError, match=r"head\.weight: the plan ties it to table\.weight; the model has two"):
            supar.prepare(make(), tied)
        with pytest.raises(InputError, match=r"head\.weight: the model ties it to table\.weight; the plan has two"):
            supar.prepare(make(tied=True), plan_of(make()))
        with pytest.raises(InputError, match=r"head\.weight: in the model only"):
            supar.prepare(make(), plan_of(make(tied=True)))

    def test_what_nothing_reads_stays_as_it_is(self) -> None:
        model = make(layers=3)
        for block in model.blocks:
            block.unused = nn.Parameter(torch.full((2,), 3.0))
        with pytest.raises(InputError, match=r"blocks\.2\.unused: in the model only"):
            supar.prepare(model, plan_of(make(layers=3)))
        made = supar.prepare(model, plan_of(make(layers=3), model={"ignored": ["blocks.0.unused"]}))
        assert steps(model, made.optimizer(clip=1.0), 2) and model.blocks[2].unused.eq(3).all()
        model.blocks[1].norm.register_forward_hook(lambda module, _, out: out * model.blocks[1].unused.mean())
        with pytest.warns(
            UserWarning, match=r"^blocks\.1\.unused: model\.ignored leaves it out, but it has a gradient"
        ):
            steps(model, made.optimizer(), 2)
        assert not any("unused" in name for group in made.groups() for name in group["names"])

    def test_names_of_wrappers_are_no_names(self) -> None:
        class Wrapper(nn.Module):
            def __init__(self, module: nn.Module) -> None:
                super().__init__()
                self.module = module

        model = make()
        model.blocks[0] = torch.compile(model.blocks[0])
        made = supar.prepare(Wrapper(Wrapper(model)), plan_of(make()))
        assert made.check() == {} and set(made.tensors) == {row.name for row in made.plan.tensors}
        inner = Wrapper(make())  # whose own names begin so
        assert set(supar.prepare(Wrapper(inner), plan_of(inner)).tensors) == {n for n, _ in inner.named_parameters()}

    def test_only_plans_of_own_models_are_taken(self) -> None:
        with pytest.raises(InputError, match="plan: dict; expected the plan of a model of your own"):
            supar.prepare(make(), {})  # type: ignore[arg-type]
        with pytest.raises(InputError, match="initialise: None; expected True, False, or names"):
            supar.prepare(make(), plan_of(make()), initialise=None)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="masks: str; expected a mask, or a tensor whose non-zeros live, by name"):
            supar.prepare(make(), plan_of(make()), masks="masks.safetensors")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda m: m.to("meta"), r"table\.weight: is on the meta device and has no values; call model\.to_empty"),
            (
                lambda m: setattr(m, "head", nn.LazyLinear(48)),
                r"head\.weight: has no shape yet; expected a model that has",
            ),
            (lambda m: quantise(m, torch.int8), r"up\.weight: is Tensor of torch\.int8, quantised"),
            (lambda m: quantise(m, torch.float8_e4m3fn), r"up\.weight: is Tensor of torch\.float8_e4m3fn, quantised"),
            (
                lambda m: quantise(m, torch.complex64),
                r"up\.weight: is Tensor of torch\.complex64, quantised or complex",
            ),
            (lambda m: setattr(m.head.weight, "ds_id", 3), r"head\.weight: belongs to DeepSpeed ZeRO"),
        ],
    )
    def test_models_that_cannot_be_prepared_are_refused(self, spoil: Callable[[Any], Any], words: str) -> None:
        plan, model = plan_of(make()), make()
        spoil(model)
        with pytest.raises(InputError, match=words):
            supar.prepare(model, plan)


def quantise(model: Small, dtype: torch.dtype) -> None:
    model.blocks[0].up.weight = nn.Parameter(torch.zeros(128, 32).to(dtype), requires_grad=False)


class TestValues:
    def test_are_the_plans(self) -> None:
        made = prepared()
        for name, tensor in made.tensors.items():
            row = made.rows[name]
            if row.init_constant is not None:
                assert torch.equal(tensor, torch.full_like(tensor, row.init_constant))
                continue
            alive = torch.from_numpy(made.masks[name].alive()) if name in made.masks else torch.ones_like(tensor) > 0
            assert int(alive.sum()) == row.kept == int(tensor.count_nonzero())
            assert float(tensor[alive].detach().std()) == pytest.approx(0.08, rel=0.1)

    def test_are_a_function_of_the_plan_alone(self) -> None:
        one, other = prepared(make(seed=1)), prepared(make(seed=2))
        assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
        third = prepared(train={"seed": 1})
        assert not torch.equal(one.tensors["table.weight"], third.tensors["table.weight"])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_in_other_precisions_are_the_same_draw(self, dtype: torch.dtype) -> None:
        one, other = prepared(), prepared(make().to(dtype))
        assert all(torch.allclose(one.tensors[n], other.tensors[n].float(), rtol=1e-2, atol=1e-7) for n in one.tensors)

    def test_of_the_constructor_are_scaled(self) -> None:
        model = make()
        nn.init.orthogonal_(model.head.weight)
        before = model.head.weight.detach().clone()
        change = edit("head.weight", init="own", init_std=0.03)
        made = supar.prepare(model, plan_of(model, change=change))
        weight = made.tensors["head.weight"]
        assert float(weight.detach().square().mean().sqrt()) == pytest.approx(0.03, rel=1e-5)
        assert torch.allclose(weight / before, (weight / before)[0, 0])
        again = weight.detach().clone()
        supar.prepare(model, made.plan)
        assert torch.allclose(again, weight)  # preparing twice scales once

    def test_of_the_constructor_are_scaled_by_the_live_ones(self) -> None:
        made = prepared(change=edit("blocks.0.up.weight", init="own"))
        live = made.tensors["blocks.0.up.weight"][torch.from_numpy(made.masks["blocks.0.up.weight"].alive())]
        assert float(live.detach().square().mean().sqrt()) == pytest.approx(0.08, rel=1e-5)

    def test_that_are_all_zero_can_not_be_scaled(self) -> None:
        model = make()
        nn.init.zeros_(model.head.weight)
        with pytest.raises(InputError, match=r"head\.weight: init: own scales .* the size 0\.0"):
            supar.prepare(model, plan_of(model, change=edit("head.weight", init="own")))

    def test_leave_padding_at_zero(self) -> None:
        model = make()
        model.table = nn.Embedding(48, 32, padding_idx=5)
        made = prepared(model)
        assert not made.tensors["table.weight"][5].any() and made.tensors["table.weight"][[4, 6]].all()

    def test_of_named_modules_alone(self) -> None:
        model, before = make(), make().state_dict()
        plan = plan_of(model, density=1.0)
        supar.prepare(model, plan, initialise=["head", "blocks.1.up.weight"])
        same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
        assert model.state_dict().keys() - same == {"head.weight", "head.bias", "blocks.1.up.weight"}
        with pytest.raises(
            InputError, match=r"initialise: heads: no tensor of the plan has this name; did you mean 'head'"
        ):
            supar.prepare(model, plan, initialise=["heads"])

    def test_of_frozen_tensors_are_kept(self) -> None:
        model = make()
        model.table.weight.requires_grad_(False)
        before = model.table.weight.clone()
        assert torch.equal(prepared(model).tensors["table.weight"], before)


class TestMultipliers:
    def test_a_factor_is_on_the_input_once(self) -> None:
        model = make()
        plan = plan_of(model, model={"hooks": {"head": 2.0}})
        made = supar.prepare(model, plan)
        x = torch.ones(1, 32)
        expected = nn.functional.linear(2 * x, model.head.weight, model.head.bias)
        assert torch.equal(model.head(x), expected) and torch.equal(model.head(input=x), expected)
        again = copy.deepcopy(model)
        made.attach(again)
        supar.prepare(again, plan)
        assert torch.equal(again.head(x), expected)
        pickle.dumps(again)
        with pytest.raises(InputError, match=r"model\.hooks\.heads: the model has no such module"):
            supar.prepare(make(), plan_of(make(), model={"hooks": {"heads": 2.0}}))

    def test_another_plans_factor_is_taken_off(self) -> None:
        model = make()
        supar.prepare(model, plan_of(model, model={"hooks": {"head": 2.0}}))
        supar.prepare(model, plan_of(model))
        x = torch.ones(1, 32)
        assert torch.equal(model.head(x), nn.functional.linear(x, model.head.weight, model.head.bias))
        assert not model.head._forward_pre_hooks_with_kwargs

    def test_the_one_on_the_logits_is_said_once(self) -> None:
        plan = plan_of(make(), model={"hooks": {"": 0.25}})
        with pytest.warns(UserWarning, match=r"multiply the logits by 0\.25 in your forward pass") as said:
            steps(supar.prepare(make(), plan).model, torch.optim.SGD(make().parameters(), lr=0.1), 1)
        assert len(said) == 1


class TestFiles:
    def test_a_folder_holds_the_plan_and_given_masks(self, tmp_path: Path) -> None:
        made = prepared()
        made.save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"] and supar.load(
            tmp_path / "plan.yaml"
        ) == made.plan
        steps(made.model, made.optimizer(), 2)
        made.verify(tmp_path)
        given = supar.prepare(make(), made.plan, masks=prepared(train={"seed": 1}).masks)
        given.save(tmp_path / "given")
        given.verify(tmp_path / "given")
        saved = supar.load(tmp_path / "given" / "plan.yaml")
        assert isinstance(saved, Plan)
        again = supar.prepare(make(), saved.beside(str(tmp_path / "given" / "plan.yaml")))
        assert again.masks == given.masks != made.masks

    def test_what_does_not_agree_is_named(self, tmp_path: Path) -> None:
        made = prepared()
        made.save(tmp_path)
        with pytest.raises(InputError, match=r"plan\.yaml: train: differs from the plan in use"):
            prepared(train={"seed": 1}).verify(tmp_path)
        with pytest.raises(InputError, match=r"blocks\.0\.up\.weight: the saved mask is another one"):
            supar.prepare(make(), made.plan, masks=prepared(train={"seed": 1}).masks).verify(tmp_path)
        with pytest.raises(InputError, match=r"nothing/plan\.yaml: can't be read"):
            made.verify(tmp_path / "nothing")

    def test_weights_that_were_initialised_again_are_named(self, tmp_path: Path) -> None:
        """V5 of the reports: a loader that initialises after loading."""
        made = prepared()
        made.save(tmp_path)
        again = copy.deepcopy(made.model)
        for module in (again.blocks[0].up, again.blocks[1].down):
            module.weight.data.normal_()
        made.attach(again)
        with pytest.raises(InputError) as raised:
            made.verify(tmp_path)
        assert [str(problem).split(":")[0] for problem in raised.value.problems] == [
            "blocks.0.up.weight",
            "blocks.1.down.weight",
        ]

    def test_masks_of_the_plans_own_file(self, tmp_path: Path) -> None:
        masks = prepared(train={"seed": 1}).masks
        written = write_masks(tmp_path / "m.safetensors", masks)
        source = {"kind": "file", "path": str(tmp_path / "m.safetensors"), "hash": written}
        made = prepared(sparsity={"source": source})
        assert made.masks == masks
        made.save(tmp_path / "run")
        made.verify(tmp_path / "run")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_or_pickle_has_its_model_prepared(clone: Callable[[Any], Any]) -> None:
    """Its masks have moved; it goes on as the original does, and neither changes the other."""
    made = supar.prepare(make(), moving_plan("rigl"))
    optimizer = made.optimizer()

    def train(one: Any, by: torch.optim.Optimizer, first: int) -> list[float]:
        found = []
        for step in range(first, first + 3):
            found += steps(one.model, by, 1, step)
            one.update()
        return found

    train(made, optimizer, 0)
    twin = clone(made)
    state = copy.deepcopy(optimizer.state_dict())
    assert twin.model is not made.model and twin.check() == {} and twin.step == 3
    again = twin.optimizer()
    again.load_state_dict(state)
    assert train(twin, again, 3) == train(made, optimizer, 3) and twin.masks == made.masks
    with torch.no_grad():
        twin.tensors["blocks.0.up.weight"].fill_(1.0)
    assert twin.check() and made.check() == {}
