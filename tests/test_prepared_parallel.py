"""Two processes train a prepared model, whole (DDP) and in shards (FSDP2); `torchrun` runs this file as their program."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import supar_cli as supar
from supar_cli.errors import InputError
from supar_cli.own.prepared import Prepared
from tests.conftest import CHECKOUT, environment
from tests.own_models import METHODS, STEPS, Small, batch, loss_of, make, moving_plan, plan_of

AGREE = 1e-5  # nats: over 5 steps in float32; measured: 5e-7
LIMIT = 0.5  # of the gradients' norm: below it in every step
MOVED = [*((method, how) for method in METHODS for how in ("ddp", "fsdp")), ("rigl", "views")]
Row = dict[str, Any]


def changed(row: Row) -> Row:
    """Folds, a start of the constructor's own, and an own density, so that all ways of preparing meet shards."""
    if row["name"] == "head.weight":
        return {**row, "fold": 4.0}
    if row["name"] == "blocks.0.up.weight":
        return {**row, "init": "own"}
    return row


def prepared(model: nn.Module, **plan: Any) -> Prepared:
    return supar.prepare(model, plan_of(make(), change=changed, **plan))


def sharded(model: Small) -> Small:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def losses(
    model: nn.Module, optimizer: torch.optim.Optimizer, count: int = 5, update: Callable[[], object] = lambda: None
) -> list[float]:
    """The losses of steps of 4 rows, each process taking its part of them."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    found = []
    for step in range(count):
        rows = batch(step)[rank * 4 // ranks : (rank + 1) * 4 // ranks]
        loss = loss_of(model, rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
        found.append(mean.item() / ranks)
    return found


def error_of(function: Callable[[], object]) -> str:
    try:
        function()
    except InputError as error:
        return str(error)
    return ""


def dead_moments(made: Prepared, optimizer: torch.optim.Optimizer) -> int:
    """How many moments of dead weights are not 0 in this process."""
    moments = [(dead, optimizer.state[made.tensors[name]]["exp_avg"]) for name, dead in made.dead.items()]
    return sum(int(dead.count_live(moment)) for dead, moment in moments)


def ddp(**options: Any) -> dict[str, Any]:
    made = prepared(make())
    model = DistributedDataParallel(made.model, **options)
    optimizer = made.optimizer(model, clip=LIMIT)
    found = losses(model, optimizer)
    return {"losses": found, "check": made.check(), "moments": dead_moments(made, optimizer)}


def fsdp(clip: float | None = LIMIT, **options: Any) -> dict[str, Any]:
    """Prepared, then sharded."""
    made = prepared(make(), **options)
    early = made.optimizer()
    model = sharded(made.model)
    told = error_of(lambda: losses(model, early, 1))
    optimizer = made.optimizer(model, clip=clip)
    found = {"losses": losses(model, optimizer), "check": made.check(), "told": told}
    found["sharded"] = all(isinstance(tensor, DTensor) for tensor in made.tensors.values())
    for row in optimizer.state.values():
        for name, moment in row.items():
            if moment.shape and not isinstance(moment, DTensor):
                found["sharded"] = name
    return found


def fsdp_first() -> dict[str, Any]:
    """Sharded, then prepared."""
    made = prepared(sharded(make()))
    optimizer = made.optimizer(clip=LIMIT)
    found = {"losses": losses(made.model, optimizer), "check": made.check(), "moments": dead_moments(made, optimizer)}
    up = made.tensors["blocks.0.up.weight"]
    with torch.no_grad():
        up.to_local().fill_(1.0)
    return {**found, "spoiled": made.check(), "told": error_of(lambda: made.require_dead(made.dead))}


def without_attach() -> int:
    """Live weights among the dead where a sharded model is trained without its masks: the control."""
    made = prepared(make())
    model = sharded(made.model)
    losses(model, torch.optim.AdamW(model.parameters(), lr=0.01), 1)
    made.attach(model)
    return sum(made.check().values())


def loaded() -> str:
    """What a load of other masks into shards says."""
    made, other = prepared(sharded(make())), prepared(sharded(make()), train={"seed": 1})
    return error_of(lambda: made.model.load_state_dict(other.model.state_dict()))


def accumulated() -> dict[str, int]:
    made = prepared(sharded(make()))
    optimizer = made.optimizer()
    for step in range(4):
        made.model.set_requires_gradient_sync(step % 2 == 1)
        made.model.set_reshard_after_backward(step % 2 == 1)
        loss_of(made.model, batch(step)).backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    return made.check()


def moved(method: str, how: str) -> dict[str, Any]:
    """A run whose masks move, and where each of them is at its end."""
    made = supar.prepare(make(), moving_plan(method))
    if how == "alone":
        model: nn.Module = made.model
    elif how == "fsdp":
        model = sharded(made.model)
    else:
        model = DistributedDataParallel(made.model, gradient_as_bucket_view=how == "views")
    optimizer = made.optimizer(model, clip=1.0)
    found = losses(model, optimizer, STEPS, made.update)
    masks = {name: mask.fingerprint for name, mask in made.masks.items()}
    moments = dead_moments(made, optimizer) if method != "topk" else 0
    return {"losses": found, "check": made.check(), "masks": masks, "moments": moments}


def moved_apart() -> list[str]:
    """What is said where processes hold other weights, and where they grow weights by their own gradients alone."""
    said, plain = [], dist.all_reduce
    for method in ("gmp", "rigl"):
        made = supar.prepare(make(), moving_plan(method))
        model = DistributedDataParallel(made.model)
        if method == "rigl":
            dist.all_reduce = lambda tensor, **_: None
        elif dist.get_rank():
            with torch.no_grad():
                made.tensors["blocks.1.up.weight"].mul_(torch.linspace(1, 2, 32))
        optimizer = made.optimizer(model)
        said.append(error_of(functools.partial(losses, model, optimizer, STEPS, made.update)))
    dist.all_reduce = plain
    return said


def refusals() -> dict[str, str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    split = parallelize_module(make(), mesh, {"blocks.0.up": ColwiseParallel()})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = FullyShardedDataParallel(make(), device_id=torch.device("cpu"))
    return {"tensor": error_of(lambda: prepared(split)), "fsdp1": error_of(lambda: prepared(flat))}


def main() -> None:
    dist.init_process_group("gloo")
    sgd = {"train": {"optimizer": "sgd", "momentum": 0.9}}
    cases: dict[str, Callable[[], Any]] = {
        "ddp": ddp,
        "views": lambda: ddp(gradient_as_bucket_view=True, static_graph=True),
        "fsdp": fsdp,
        "sgd": lambda: fsdp(**sgd),
        "first": fsdp_first,
        "without": without_attach,
        "loaded": loaded,
        "accumulated": accumulated,
        "refusals": refusals,
        "moved": lambda: {f"{method} {how}": moved(method, how) for method, how in MOVED},
        "apart": moved_apart,
    }
    warnings.simplefilter("ignore")
    found = {name: case() for name, case in cases.items()}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    if dist.get_rank() == 0:
        sys.stdout.write(json.dumps(everyone))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    """What two processes found, by rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = str(CHECKOUT / "tests/test_prepared_parallel.py")
    done = subprocess.run([*command, program], env=environment(OMP_NUM_THREADS="1"), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    return list(json.loads(done.stdout))


def alone(clip: float | None = LIMIT, **plan: Any) -> list[float]:
    made = prepared(make(), **plan)
    return losses(made.model, made.optimizer(clip=clip))


@pytest.mark.parametrize("how", ["ddp", "views", "fsdp", "first"])
def test_two_processes_train_as_one(found: list[dict[str, Any]], how: str) -> None:
    expected = alone()
    for one in found:
        assert one[how]["check"] == {} and one[how].get("moments", 0) == 0
        assert max(abs(a - b) for a, b in zip(one[how]["losses"], expected, strict=True)) <= AGREE


def test_sgd_in_shards(found: list[dict[str, Any]]) -> None:
    sgd = {"optimizer": "sgd", "momentum": 0.9}
    expected = alone(train=sgd)
    assert all(one["sgd"]["check"] == {} for one in found)
    assert max(abs(a - b) for a, b in zip(found[0]["sgd"]["losses"], expected, strict=True)) <= AGREE
    free = alone(clip=None, train=sgd)
    assert max(abs(a - b) for a, b in zip(free, expected, strict=True)) > 10 * AGREE  # the clip matters


def test_shards_need_their_masks(found: list[dict[str, Any]]) -> None:
    assert [one["accumulated"] for one in found] == [{}, {}]
    assert [one["fsdp"]["sharded"] for one in found] == [True, True]
    assert found[0]["without"] == found[1]["without"] > 1000  # the control
    assert all("other parameters than when its optimizer was made" in one["fsdp"]["told"] for one in found)


def test_live_weights_in_shards_are_counted(found: list[dict[str, Any]]) -> None:
    assert [one["first"]["spoiled"] for one in found] == [{"blocks.0.up.weight": 3072}] * 2  # of both ranks together
    counts = [int(one["first"]["told"].split()[1]) for one in found]
    assert sum(counts) == 3072 and 0 not in counts
    assert all("blocks.1.down.weight: " in one["loaded"] for one in found)


def test_what_flattens_or_splits_tensors_is_refused_by_name(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert "FSDP1 flattens parameters" in one["refusals"]["fsdp1"]
        assert one["refusals"]["tensor"].startswith("blocks.0.up.weight: is sharded ")
        assert "blocks.0.up.bias: is sharded" in one["refusals"]["tensor"]


@pytest.mark.parametrize("method", METHODS)
def test_masks_move_alike_in_two_processes(found: list[dict[str, Any]], method: str) -> None:
    alone = moved(method, "alone")
    for one in found:
        for here in (run for name, run in one["moved"].items() if name.startswith(method)):
            assert here["check"] == {} and here["moments"] == 0 and here["masks"] == alone["masks"]
            assert max(abs(a - b) for a, b in zip(here["losses"], alone["losses"], strict=True)) <= AGREE


def test_masks_that_differ_between_processes_are_told_in_all(found: list[dict[str, Any]]) -> None:
    for one in found:
        first, grown = one["apart"]
        assert first.startswith(
            "blocks.1.up.weight: the masks after step 4 differ between processes; expected one model"
        )
        assert "and 5 more: the masks after step 2 differ between processes" in grown


if __name__ == "__main__":
    main()
