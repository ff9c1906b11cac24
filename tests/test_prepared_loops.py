"""Training loops that people write, on a prepared model: dead weights stay 0, folds change nothing, rates stay the plan's."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import supar_cli as supar
from supar_cli.errors import InputError
from supar_cli.own.prepared import Prepared
from tests.own_models import Small, batch, loss_of, make, plan_of, rows_of, steps

Row = dict[str, Any]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def prepared(model: nn.Module | None = None, **plan: Any) -> Prepared:
    model = make() if model is None else model
    return supar.prepare(model, plan_of(model, **plan))


def dead_bits(model: nn.Module, made: Prepared) -> int:
    """How many dead weights have any bit set: −0 has one."""
    named = {name.replace("_orig_mod.", "").removeprefix("module."): p for name, p in model.named_parameters()}
    found = 0
    for name, mask in made.masks.items():
        values = named[name].detach()[~torch.from_numpy(mask.alive())].double()
        found += int(((values != 0) | values.signbit()).sum())
    return found


def moments(made: Prepared, optimizer: torch.optim.Optimizer) -> float:
    """The largest moment of a dead weight."""
    found = [0.0]
    for name, mask in made.masks.items():
        dead = ~torch.from_numpy(mask.alive())
        state = optimizer.state.get(made.tensors[name], {}).values()
        found += [float(one[dead].abs().max()) for one in state if isinstance(one, Tensor) and one.shape == dead.shape]
    return max(found)


class TestDeadWeightsStay:
    @pytest.mark.parametrize(
        "options", [{}, {"foreach": True}, {"fused": False, "amsgrad": True}, {"capturable": False}]
    )
    def test_in_a_plain_loop(self, options: dict[str, Any]) -> None:
        made = prepared()
        optimizer = made.optimizer(**options)
        losses = steps(made.model, optimizer, 5)
        assert losses[0] != losses[-1] and dead_bits(made.model, made) == 0 and made.check() == {}
        assert moments(made, optimizer) == 0

    def test_in_sgd_with_momentum_and_decay(self) -> None:
        made = prepared(train={"optimizer": "sgd", "momentum": 0.9})
        steps(made.model, made.optimizer(nesterov=True), 4)
        assert dead_bits(made.model, made) == 0

    def test_while_accumulating_under_autocast(self) -> None:
        made = prepared()
        optimizer = made.optimizer(clip=1.0)
        for step in range(3):
            for part in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    (loss_of(made.model, batch(2 * step + part)) / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert dead_bits(made.model, made) == 0

    def test_in_bfloat16(self) -> None:
        made = prepared(make().bfloat16())
        steps(made.model, made.optimizer(), 3)
        assert dead_bits(made.model, made) == 0

    def test_when_compiled(self) -> None:
        made, plain = prepared(), prepared()
        losses = steps(torch.compile(made.model, backend="aot_eager"), made.optimizer(), 3)
        assert dead_bits(made.model, made) == 0
        assert losses == pytest.approx(steps(plain.model, plain.optimizer(), 3), abs=1e-5)

    def test_when_prepared_after_compiling(self) -> None:
        model = make()
        compiled = torch.compile(model, backend="aot_eager")
        made = supar.prepare(compiled, plan_of(model))
        steps(compiled, made.optimizer(), 2)
        assert dead_bits(model, made) == 0

    def test_with_checkpointed_activations(self) -> None:
        made, plain = prepared(), prepared()

        class Recomputed(nn.Module):
            def __init__(self, inner: nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Any:
                return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)

        optimizer = made.optimizer()
        blocks = [Recomputed(block) for block in made.model.blocks]
        losses = []
        for step in range(3):
            tokens = batch(step)
            x = made.model.table(tokens[:, :-1])
            for block in blocks:
                x = block(x)
            logits = made.model.head(made.model.last_norm(x))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert dead_bits(made.model, made) == 0
        assert losses == pytest.approx(steps(plain.model, plain.optimizer(), 3), abs=1e-5)

    def test_in_averages(self) -> None:
        made = prepared()
        averaged, optimizer = AveragedModel(made.model, multi_avg_fn=get_ema_multi_avg_fn(0.9)), made.optimizer()
        for step in range(3):
            steps(made.model, optimizer, 1, step)
            averaged.update_parameters(made.model)
        assert dead_bits(averaged, made) == 0

    def test_in_muon_only_if_it_is_kept(self) -> None:
        made = prepared()
        weights = [made.tensors[name] for name in made.masks]
        with pytest.warns(UserWarning, match="Muon: its numbers are not the plan's: the masks hold"):
            kept = made.keep(torch.optim.Muon(weights, lr=1e-3))
        steps(made.model, kept, 3)
        assert dead_bits(made.model, made) == 0
        with pytest.warns(
            UserWarning, match=r"Muon: trains a prepared model, by numbers .* expected prepared\.optimizer"
        ):
            steps(made.model, torch.optim.Muon(weights, lr=1e-3), 1)
        assert sum(made.check().values()) > 1000  # the control

    def test_an_infinite_dead_gradient_skips_no_step_of_a_scaler(self) -> None:
        for is_dead in (True, False):
            made = prepared()
            optimizer, scaler = made.optimizer(clip=1.0), torch.amp.GradScaler("cpu", init_scale=2.0**8)
            name = "blocks.0.up.weight"
            alive = torch.from_numpy(made.masks[name].alive())
            where = (~alive if is_dead else alive).nonzero()[0]
            made.tensors[name].register_hook(lambda g, at=tuple(where): g.clone().index_put(at, torch.tensor(math.inf)))
            before = made.tensors[name].detach().clone()
            scaler.scale(loss_of(made.model, batch(0))).backward()
            scaler.step(optimizer)
            scaler.update()
            assert (scaler.get_scale() == 2.0**8) == is_dead
            assert torch.equal(before, made.tensors[name]) != is_dead and dead_bits(made.model, made) == 0

    def test_a_scaled_gradient_is_clipped_as_an_unscaled_one(self) -> None:
        found = []
        for scale in (1.0, 2.0**10):
            made = prepared(train={"optimizer": "sgd", "momentum": 0.0})
            optimizer, scaler = made.optimizer(clip=0.1), torch.amp.GradScaler("cpu", init_scale=scale)
            for step in range(3):
                optimizer.zero_grad()
                scaler.scale(loss_of(made.model, batch(step))).backward()
                scaler.step(optimizer)
                scaler.update()
            found.append(made.tensors["blocks.0.up.weight"].detach().clone())
        assert torch.allclose(*found, rtol=1e-5, atol=1e-7)

    def test_gradients_made_in_the_closure_are_masked_and_clipped(self) -> None:
        made, plain = prepared(), prepared()
        optimizer = made.optimizer(clip=0.05)

        def closure(step: int) -> Callable[[], Tensor]:
            def run() -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(made.model, batch(step))
                loss.backward()
                return loss

            return run

        losses = [optimizer.step(closure(step)).item() for step in range(3)]
        losses.append(optimizer.step(closure=closure(3)).item())
        assert losses == steps(plain.model, plain.optimizer(clip=0.05), 4)
        assert losses != steps((other := prepared()).model, other.optimizer(), 4)
        assert dead_bits(made.model, made) == 0

    def test_a_resumed_run_goes_on_bit_for_bit(self) -> None:
        made = prepared()
        optimizer = made.optimizer()
        steps(made.model, optimizer, 3)
        weights, state = copy.deepcopy(made.model.state_dict()), copy.deepcopy(optimizer.state_dict())
        assert weights.keys() == make().state_dict().keys()
        on = steps(made.model, optimizer, 3, first=3)
        again = make(seed=7)
        again.load_state_dict(weights)
        resumed = supar.prepare(again, made.plan, initialise=False)
        other = resumed.optimizer()
        other.load_state_dict(state)
        assert steps(again, other, 3, first=3) == on

    def test_masks_put_on_a_running_optimizer(self) -> None:
        """V3 of the reports: gradients masked, momentum not, brings pruned weights back."""
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        steps(model, optimizer, 5)
        masks = {row["name"]: model.get_parameter(row["name"]).detach() for row in rows_of(model) if row["density"] < 1}
        kept = {n: w.abs() > w.abs().flatten().kthvalue(w.numel() - w.numel() // 4).values for n, w in masks.items()}
        made = supar.prepare(model, plan_of(model), initialise=False, masks=kept)
        assert dead_bits(model, made) == 0 and moments(made, optimizer) > 0
        with pytest.warns(UserWarning, match="AdamW: its numbers are not the plan's"):
            made.keep(optimizer)
        assert moments(made, optimizer) == 0
        steps(model, optimizer, 2)
        assert dead_bits(model, made) == 0

    def test_a_copy_has_to_be_attached(self) -> None:
        made = prepared()
        twin = copy.deepcopy(made.model)
        steps(twin, torch.optim.AdamW(twin.parameters(), lr=0.01), 1)
        assert dead_bits(twin, made) > 1000  # the control
        twin = copy.deepcopy(made.model)
        steps(twin, made.optimizer(twin), 2)
        assert dead_bits(twin, made) == 0 and made.model is twin


POWERS = {"input": 4.0, "output": 0.125}
ANY = {"input": 3.3, "output": 0.17}


def folded(optimizer: str, factors: dict[str, float], tied: bool, **wrong: float) -> Callable[[Row], Row]:
    """Edits of rows that fold the factors; `wrong` multiplies a key of every folded row, for planted faults."""
    power = 2 if optimizer == "sgd" else 1
    before_head = factors["output"] / factors["input"]
    takes = {"table.weight": factors["input"], "head.weight": factors["output"]}
    if tied:
        takes |= {"last_norm.weight": before_head, "last_norm.bias": before_head}

    def change(row: Row) -> Row:
        row = {**row, **({"eps": 1e-3} if row["eps"] else {}), "weight_decay": 0.5 if row.get("init_std") else 0.0}
        if (a := takes.get(row["name"])) is None:
            return row
        row |= {"lr": row["lr"] * a**power, "weight_decay": row["weight_decay"] / a**power, "fold": a}
        row |= {"eps": row["eps"] / a} if power == 1 else {}
        row |= {key: row[key] * a for key in ("init_std", "init_constant") if key in row}
        return {**row, **{key: row[key] * by**power for key, by in wrong.items() if key in row}}

    return change


def unfolded(row: Row) -> Row:
    return {**row, **({"eps": 1e-3} if row["eps"] else {}), "weight_decay": 0.5 if row.get("init_std") else 0.0}


def run(
    model: Small, change: Callable[[Row], Row], optimizer: str, clip: str = "", limit: float = 0.3, count: int = 12
) -> list[float]:
    """Losses in double precision; `clip`: "prepared" or "torch"."""
    made = prepared(model.double(), change=change, train={"optimizer": optimizer, "momentum": 0.9})
    stepper, losses = made.optimizer(), []
    for step in range(count):
        loss = loss_of(made.model, batch(step))
        stepper.zero_grad()
        loss.backward()
        if clip == "prepared":
            made.clip_grad_norm_(limit)
        elif clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        stepper.step()
        losses.append(loss.item())
    return losses


def scaled(factors: dict[str, float], **shape: Any) -> Small:
    """The model with the multipliers in its forward pass."""
    model = make(**shape)
    model.table_scale, model.scale = factors["input"], factors["output"]
    return model


def gap(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


class TestFolding:
    @pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize(("factors", "allowed"), [(POWERS, 0.0), (ANY, 1e-9)])
    def test_changes_nothing(self, optimizer: str, tied: bool, factors: dict[str, float], allowed: float) -> None:
        true = run(scaled(factors, tied=tied), unfolded, optimizer)
        assert gap(true, run(make(tied=tied), folded(optimizer, factors, tied), optimizer)) <= allowed
        assert gap(true, run(make(tied=tied), unfolded, optimizer)) > 1e-2  # the multipliers matter

    @pytest.mark.parametrize(
        ("optimizer", "wrong"),
        [
            ("adamw", {"eps": 8.0}),
            ("adamw", {"weight_decay": 8.0}),
            ("adamw", {"lr": 8.0}),
            ("sgd", {"lr": 8.0**0.5}),  # a·η where a²·η is right
        ],
    )
    def test_a_planted_fault_is_seen(self, optimizer: str, wrong: dict[str, float]) -> None:
        true = run(scaled(POWERS), unfolded, optimizer)
        assert gap(true, run(make(), folded(optimizer, POWERS, False, **wrong), optimizer)) > 1e-3

    def test_a_folded_bias_of_the_head_is_seen(self) -> None:
        def change(row: Row) -> Row:
            row = folded("adamw", POWERS, False)(row)
            return {**row, "lr": row["lr"] * 0.125, "eps": row["eps"] * 8} if row["name"] == "head.bias" else row

        assert gap(run(scaled(POWERS), unfolded, "adamw"), run(make(), change, "adamw")) > 1e-3

    def test_a_folded_derived_gain_is_seen(self) -> None:
        class Derived(nn.LayerNorm):
            def forward(self, x: Tensor) -> Tensor:
                return nn.functional.layer_norm(x, self.normalized_shape, 1 + self.weight, self.bias, self.eps)

        def with_gain(model: Small) -> Small:
            model.last_norm = Derived(32)
            return model

        def zero(change: Callable[[Row], Row]) -> Callable[[Row], Row]:
            return lambda row: change({**row, "init_constant": 0.0} if row["name"] == "last_norm.weight" else row)

        true = run(with_gain(scaled(POWERS, tied=True)), zero(unfolded), "adamw")
        assert gap(true, run(with_gain(make(tied=True)), zero(folded("adamw", POWERS, True)), "adamw")) > 1e-3

    @pytest.mark.parametrize("tied", [False, True])
    def test_the_clip_is_that_of_the_model_with_multipliers(self, tied: bool) -> None:
        true = run(scaled(ANY, tied=tied), unfolded, "adamw", "torch")
        assert gap(true, run(make(tied=tied), folded("adamw", ANY, tied), "adamw", "prepared")) <= 1e-12
        with pytest.warns(UserWarning, match=r"write prepared\.clip_grad_norm_\(limit\)"):
            clipped = run(make(tied=tied), folded("adamw", ANY, tied), "adamw", "torch")
        assert gap(true, clipped) > 1e-3


class TestClipping:
    def test_returns_the_norm_and_limits_it(self) -> None:
        made = prepared()
        loss_of(made.model, batch(0)).backward()
        whole = torch.nn.utils.get_total_norm([p.grad for p in made.tensors.values()])
        assert float(made.clip_grad_norm_(whole.item() / 4)) == pytest.approx(float(whole), rel=1e-6)
        assert float(made.clip_grad_norm_(1e9)) == pytest.approx(float(whole) / 4, rel=1e-5)

    def test_leaves_dead_entries_out_and_shows_a_live_nan(self) -> None:
        made = prepared()
        loss_of(made.model, batch(0)).backward()
        weight = made.tensors["blocks.0.up.weight"]
        alive = torch.from_numpy(made.masks["blocks.0.up.weight"].alive())
        norm = made.clip_grad_norm_(1e9)
        weight.grad[~alive] = math.inf
        assert torch.equal(made.clip_grad_norm_(1e9), norm)
        weight.grad[tuple(alive.nonzero()[0])] = math.nan
        assert made.clip_grad_norm_(1e9).isnan() and made.tensors["table.weight"].grad.isnan().all()

    @pytest.mark.parametrize("limit", [0.0, -1.0, math.nan])
    def test_a_limit_that_limits_nothing_is_refused(self, limit: float) -> None:
        with pytest.raises(InputError, match=r"clip: .*expected a number above 0"):
            prepared().clip_grad_norm_(limit)
        with pytest.raises(InputError, match=r"clip: .*expected a number above 0"):
            made = prepared()
            steps(made.model, made.optimizer(clip=limit), 1)
