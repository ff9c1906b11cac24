"""Training loops that people write, on a prepared model: dead weights stay 0, folds change nothing, rates stay the plan's."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import supar_cli as supar
from supar_cli.own.prepared import Prepared
from tests.own_models import batch, loss_of, make, plan_of, prepared, rows_of, steps

Row = dict[str, Any]

pytestmark = pytest.mark.filterwarnings("error::UserWarning")


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
