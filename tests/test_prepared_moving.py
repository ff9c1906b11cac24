"""Masks that change while a prepared model trains: as supar's own trainer changes them; planted faults give other runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import supar_cli as supar
from supar_cli.models.transformer import Transformer
from supar_cli.own import dead_weights, moving
from supar_cli.own.guard import Kept
from supar_cli.own.prepared import Prepared
from supar_cli.planning.problems import validate
from supar_cli.planning.schedule import MaskSchedule
from supar_cli.planning.spec import Proxy
from supar_cli.planning.transfer import transfer
from supar_cli.sparse.updates import random_scores
from supar_cli.training import optimizer as builtin_optimizer
from supar_cli.training.trainer import Trainer
from tests.conftest import plan_from, proxy_fields
from tests.own_models import METHODS, STEPS, updates
from tests.test_prepared_masks import as_own

pytestmark = pytest.mark.filterwarnings("error::UserWarning")

AGREE = 1e-6  # nats, of losses near 5


# --- supar's own trainer ---


def two_runs(method: str, source: Path, folder: Path, **keys: Any) -> tuple[Trainer, Prepared]:
    """One plan for supar's own transformer in its trainer, and as somebody's module; all multipliers are powers of two."""
    shape = {"family": "llama", "width": 64, "layers": 1, "heads": 4, "kv_heads": 2, "ffn_width": 128, "tied": False}
    target = {"width": 128, "sparsity": {"density": 0.125, "updates": updates(method, **keys)}}
    hyper = {"alpha_input": 2.0, "alpha_output": 4.0, "weight_decay": 0.125}
    train = {"steps": STEPS, "batch_size": 4, "grad_clip": 0.5, "warmup_fraction": 0.25}
    fields = proxy_fields(str(source), model=shape, hyperparameters=hyper, target=target, train=train)
    proxy, plan = validate(Proxy, fields, "proxy"), plan_from(fields)
    theirs_plan = transfer(as_own(proxy, folder), proxy.target, "supar", allow_low_wpn=True)
    none = plan.decoder.multipliers.model_copy(update={"input": 1.0, "output": 1.0})
    theirs = supar.prepare(Transformer(plan.decoder.model_copy(update={"multipliers": none})), theirs_plan)
    return Trainer(plan), theirs


def compare(ours: Trainer, theirs: Prepared) -> tuple[int, float]:
    """Train both side by side; how many masks differed after a step, and the largest difference of losses."""
    optimizer, differ, apart = theirs.optimizer(clip=ours.plan.train.grad_clip), 0, 0.0
    for step in range(STEPS):
        inputs, targets = ours.batch(step)
        theirs.set_rate(theirs.plan.hyperparameters.lr * builtin_optimizer.rate_factor(ours.plan, step))
        loss = theirs.model(inputs, targets)
        loss.backward()
        optimizer.step()
        theirs.update()
        optimizer.zero_grad()
        apart = max(apart, abs(ours.step().loss - loss.item()))
        ours.capture()  # tells the masks
        for name, mask in theirs.masks.items():
            builtin = ours.sparse_model.masks.get(name.removesuffix(".weight"))
            differ += mask.count < mask.size if builtin is None else mask != builtin
        assert theirs.check() == {}
    return differ, apart


@pytest.mark.parametrize(("method", "keys"), [*((method, {}) for method in METHODS), ("rigl", {"moments": "keep"})])
def test_masks_move_as_in_supars_own_trainer(
    method: str, keys: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    ours, theirs = two_runs(method, text_file, tmp_path, **keys)
    first = dict(theirs.masks)
    differ, apart = compare(ours, theirs)
    assert theirs.step == STEPS and all(mask != first[name] for name, mask in theirs.masks.items())
    assert differ == 0 and apart < AGREE


def at_random(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda scores, *how: plain(random_scores(scores.shape, 0, "other", 1), *how)


class Early:
    """A schedule whose factors hold a step too early."""

    def __init__(self, schedule: MaskSchedule) -> None:
        self.rate_factor = lambda row, step: schedule.rate_factor(row, step + 1)
        self.decay_factor = lambda row, step: schedule.decay_factor(row, step + 1)


def early(plain: Callable[..., None]) -> Callable[..., None]:
    return lambda kept, optimizer, schedule: plain(kept, optimizer, Early(schedule))


def elsewhere(plain: Callable[..., None]) -> Callable[..., None]:
    return lambda moment, grown, others: plain(moment, grown.flip(0), others)


def without_factors(plain: Callable[..., None]) -> Callable[..., None]:
    return lambda kept, optimizer, schedule: None


def zeroed(plain: Callable[..., None]) -> Callable[..., None]:
    return lambda kept, parameter: kept.dead.zero_(parameter.grad)


@pytest.mark.parametrize(
    ("method", "place", "name", "fault"),
    [
        ("set", moving, "_fill_squares", lambda _: lambda *_: None),
        ("set", moving, "_fill_squares", elsewhere),
        ("rigl", moving, "grow_largest", at_random),
        ("gmp", Kept, "_scale", early),
        ("gmp", Kept, "_scale", without_factors),
        ("topk", dead_weights._ZeroGradient, "__call__", zeroed),
    ],
)
def test_a_planted_fault_is_another_run(
    method: str,
    place: Any,
    name: str,
    fault: Callable[[Any], Any],
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(place, name, fault(getattr(place, name)))
    _, apart = compare(*two_runs(method, text_file, tmp_path))
    assert apart > 10 * AGREE
