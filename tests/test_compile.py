"""What torch.compile makes of a run: graphs, and that each part of the model runs in one, over 12 blocks, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.parallel import DistributedDataParallel

from supar_cli.models.transformer import FeedForward
from supar_cli.planning.plan import Plan
from supar_cli.training import distributed
from supar_cli.training.distributed import Ranks
from supar_cli.training.trainer import Trainer

MakePlan = Callable[..., Plan]
LAYERS, PARTS = 12, 14  # an embedding and a head besides
DEFAULTS = {
    "force_parameter_static_shapes": True,
    "recompile_limit": 8,
    "accumulated_recompile_limit": 256,
    "optimize_ddp": True,
}


class Counted:
    """A backend that runs graphs as they are, and counts them, their calls and the numbers that they return."""

    def __init__(self) -> None:
        self.graphs, self.calls, self.returned = 0, 0, 0

    def __call__(self, graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def call(*args: Any) -> Any:
            found = graph(*args)
            self.calls += 1
            self.returned = sum(one.numel() for one in found if isinstance(one, Tensor))
            return found

        return call

    def during(self, run: Callable[[], object]) -> tuple[int, int]:
        """The graphs that are made in a call, and how often graphs are called."""
        before = self.graphs, self.calls
        run()
        return self.graphs - before[0], self.calls - before[1]


class SmallBuckets(DistributedDataParallel):
    """Buckets of about a tensor each, so that a small model has several, as a large one has of 25 MiB."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, bucket_cap_mb=1 / 256, **options)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    found = Counted()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=found))
    with torch._dynamo.config.patch(**DEFAULTS):
        yield found


@pytest.fixture
def trainer_of(plan_of: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Trainer]]:
    """`trainer_of(kind, pattern)`: 12 blocks in one process."""
    monkeypatch.setattr(distributed, "DistributedDataParallel", SmallBuckets)
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 2**12)

    def make(kind: str, pattern: str = "exact", layers: int = LAYERS, **run: Any) -> Trainer:
        is_distributed = kind != "alone"
        if is_distributed and not dist.is_initialized():
            dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
        sparsity = {"density": 0.25, "pattern": pattern, **({"block": 16} if pattern == "block" else {})}
        run |= {"compile": "on", "engine": "block" if pattern == "block" else "dense"}
        run |= {"parallel": kind} if is_distributed else {}
        plan = plan_of(
            model={"layers": layers, "width": 16, "heads": 1}, run=run, target={"width": 32, "sparsity": sparsity}
        )
        return Trainer(plan, ranks=Ranks(is_distributed=is_distributed))

    yield make
    if dist.is_initialized():
        dist.destroy_process_group()


CASES = [
    ("alone", "exact", None),
    ("alone", "bernoulli", None),
    ("alone", "block", None),
    ("ddp", "bernoulli", None),
    ("fsdp", "bernoulli", 16),
]


def graphs_of(trainer: Trainer) -> int:
    """One for the first block, and one for each later one in which a tensor is the first to have another number of live weights."""
    counts = [
        {name.partition(f"blocks.{block}.")[2]: mask.count for name, mask in trainer.sparse_model.masks.items()}
        for block in range(LAYERS)
    ]
    fixed, graphs = {name: count for name, count in counts[0].items() if name}, 1
    for own in counts[1:]:
        moved = {name for name, count in fixed.items() if own[name] != count}
        graphs += bool(moved)
        fixed = {name: count for name, count in fixed.items() if name not in moved}
    return graphs


@pytest.mark.parametrize(("kind", "pattern", "chunk"), CASES)
def test_equal_blocks_share_a_graph_and_every_part_runs_in_one(
    kind: str, pattern: str, chunk: int | None, trainer_of: Any, counted: Counted
) -> None:
    trainer = trainer_of(kind, pattern, loss_chunk_tokens=chunk, precision="bfloat16" if kind == "fsdp" else "float32")
    blocks = graphs_of(trainer)
    assert blocks in ((2, 3, 4) if pattern == "bernoulli" else (1,))
    assert counted.during(trainer.step) == (2 + blocks, PARTS)  # an embedding and a head besides
    assert counted.returned == 1  # the loss is made inside: no logits leave a graph
    assert counted.during(trainer.evaluate) == (2 + 1, 2 * PARTS)  # what moves is known by now
    assert counted.during(partial(trainer.step, diagnose=True)) == (0, PARTS)
    assert counted.during(trainer.evaluate) == (0, 2 * PARTS)


class TestFaults:
    """What is planted shows in the counts that the test above requires."""

    def test_torchs_own_settings(self, trainer_of: Any, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(distributed, "_allow_for_blocks", lambda count: None)
        assert counted.during(trainer_of("alone", "bernoulli").step) == (2 + 8, 2 + 8)  # four blocks run eagerly

    def test_shapes_that_stay_fixed(self, trainer_of: Any, counted: Counted) -> None:
        trainer = trainer_of("alone", "bernoulli", layers=9)
        torch._dynamo.config.force_parameter_static_shapes = True
        assert counted.during(trainer.step) == (2 + 9, 2 + 9)  # the limit, at least, is high enough

    def test_a_graph_cut_for_buckets(self, trainer_of: Any, counted: Counted) -> None:
        trainer = trainer_of("ddp")
        torch._dynamo.config.optimize_ddp = True
        graphs, calls = counted.during(trainer.step)
        assert graphs > 3 and calls > PARTS

    def test_a_break_in_a_block(self, trainer_of: Any, counted: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = FeedForward.forward

        def broken(self: FeedForward, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return forward(self, x)

        monkeypatch.setattr(FeedForward, "forward", broken)
        graphs, calls = counted.during(trainer_of("alone", layers=3).step)
        assert graphs > 3 and calls > 2 + 3


def compile_whole(model: nn.Module, _blocks: list[nn.Module]) -> None:
    distributed._allow_for_blocks(0)
    model.compile()


@pytest.mark.parametrize("whole", [False, True])
def test_gradients_are_sent_while_others_are_computed(
    whole: bool, trainer_of: Any, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    """The first bucket goes before the last backward graph runs; not so where the model is one graph, the control."""
    events: list[str] = []

    def backward(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append("computed")
            return graph(*args)

        return make_boxed_func(call)  # type: ignore[no-any-return]

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=backward)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    if whole:
        monkeypatch.setattr(distributed, "compile_parts", compile_whole)
    trainer = trainer_of("ddp", layers=2)

    def send(_state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        events.append("sent")
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    # DDP reads a hook's annotations as they are, not as text
    send.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[Tensor]}
    trainer.model.register_comm_hook(None, send)
    trainer.step()
    events.clear()  # DDP makes its buckets anew after the first step
    trainer.step()
    assert events.count("computed") == (1 if whole else 4) and events.count("sent") > 4
    last = len(events) - 1 - events[::-1].index("computed")
    assert ("sent" in events[:last]) == (not whole)
