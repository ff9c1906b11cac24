"""Tasks: what a run trains on. A task makes batches and computes their losses; next-token text is one task.

A batch is a tuple of tensors whose first axis is rows. The trainer splits it, copies it to its device and gives it back to
the task. Only the task knows what the tensors hold.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supar_cli.data import batches, images
from supar_cli.errors import InputError
from supar_cli.files import Record
from supar_cli.planning.plan import Data, Plan
from supar_cli.training.distributed import Parallel, Ranks
from supar_cli.training.runtime import Runtime, device_thread

Batch = tuple[Tensor, ...]


class Task(Protocol):
    """What the training loop needs of a task.

    `unit` names what is counted, such as tokens, `units_per_row` is their number in a row, and `flops_per_unit` is the cost
    of one, None if unknown. `hash` identifies the data and how they are read. `held_out_rows` is the number of rows in an
    evaluation. `scored_rows` is 0 where `evaluate` returns means over batches; else it returns a value for each row, of which
    the first `scored_rows` count, and the rest only fill up the last batches. `described` is what a result says of the data.
    A task may have `lines` and `warnings`, which say of its data what a user should know.
    """

    unit: str
    units_per_row: int
    flops_per_unit: float | None
    hash: str
    held_out_rows: int
    scored_rows: int
    described: Record

    def batch(self, step: int, rows: slice) -> Batch:
        """These rows of a step's batch, which depends only on the plan's seed and the step."""

    def held_out(self, index: int, count: int, rows: int) -> Batch:
        """Batch `index` of the `count` held-out ones, of `rows` rows each, the same in every evaluation."""

    def inputs(self, batch: Batch) -> Batch:
        """The model's arguments, to measure its activations."""

    def loss(self, model: nn.Module, batch: Batch, chunk: int | None) -> Tensor:
        """The mean loss (), to be minimised, computed `chunk` units at a time, if given, to save memory."""

    def evaluate(self, model: nn.Module, batch: Batch, chunk: int | None) -> dict[str, Tensor]:
        """Means () over a held-out batch by name, or values of its rows (B,). `validation_loss`, which decides, is one of them."""


def load(plan: Plan, log: Callable[[str], None] = lambda _: None) -> Task:
    """Load the task of a plan. `log` is told of a long reading.

    Raises InputError for the wrong data, SetupError for data that can't be used.
    """
    if plan.own_data.kind == "images":
        return Classification(plan, images.load(plan.own_data, log))
    return NextToken(plan, batches.load(plan.text, vocab=plan.decoder.vocab, context=plan.decoder.context))


class NextToken:
    """Prediction of the next token of a text. A batch is inputs (B, T) and targets (B, T), int64.

    Raises InputError if fewer windows are held out than the plan's evaluations need.
    """

    unit = "tokens"
    scored_rows = 0
    described: Record = {}  # noqa: RUF012  (nobody changes it)

    def __init__(self, plan: Plan, tokens: batches.Tokens) -> None:
        train, self._tokens = plan.train, tokens
        self.lines, self.warnings = tokens.lines, tokens.warnings
        self._seed, self._rows = train.seed, train.batch_size
        self.units_per_row, self.hash = plan.decoder.context, tokens.hash
        self.flops_per_unit: float | None = plan.flops_per_token
        self.held_out_rows = train.eval_batches * train.batch_size
        available = tokens.validation.windows(plan.decoder.context + 1)
        if self.held_out_rows > available:
            what = f"{train.eval_batches} batches need {self.held_out_rows} held-out sequences; expected at most {available}"
            raise InputError(f"train.eval_batches: {what}")

    def batch(self, step: int, rows: slice) -> Batch:
        return self._tokens.train.batch(self._seed, step, self._rows, self.units_per_row, rows)

    def held_out(self, index: int, count: int, rows: int) -> Batch:
        return self._tokens.validation.evaluation(index, count, rows, self.units_per_row)

    def inputs(self, batch: Batch) -> Batch:
        return batch[:1]

    def loss(self, model: nn.Module, batch: Batch, chunk: int | None) -> Tensor:
        """Mean cross-entropy in nats per token, which the model returns where it is given targets."""
        return model(*batch, chunk)  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module, batch: Batch, chunk: int | None) -> dict[str, Tensor]:
        return {"validation_loss": self.loss(model, batch, chunk)}


class Classification:
    """The class of an image. A batch is images (B, C, H, W), float32, and labels (B,), int64.

    Evaluations score every held-out image once, or evenly spaced ones if the plan's evaluations have fewer rows. Raises
    InputError if the images are not those that the model reads.
    """

    unit, units_per_row = "images", 1

    def __init__(self, plan: Plan, found: images.Images) -> None:
        train, self._images = plan.train, found
        _require_same_shape(plan, found)
        self.lines, self.hash, self.described = found.lines, found.hash, {"images": found.described}
        self._seed, self._rows = train.seed, train.batch_size
        self.flops_per_unit: float | None = plan.flops_per_row
        self.scored_rows = min(len(found.held_out), train.eval_batches * train.batch_size)
        self.held_out_rows = -(-self.scored_rows // train.batch_size) * train.batch_size

    def batch(self, step: int, rows: slice) -> Batch:
        return self._images.batch(self._seed, step, self._rows, rows)

    def held_out(self, index: int, count: int, rows: int) -> Batch:
        return self._images.evaluation(index, rows, self.scored_rows)

    def inputs(self, batch: Batch) -> Batch:
        return batch[:1]

    def loss(self, model: nn.Module, batch: Batch, chunk: int | None) -> Tensor:
        """Mean cross-entropy in nats per image."""
        return model(*batch, chunk)  # type: ignore[no-any-return]

    def evaluate(self, model: nn.Module, batch: Batch, chunk: int | None) -> dict[str, Tensor]:
        pictures, labels = batch
        logits = model(pictures).float()
        losses = F.cross_entropy(logits, labels, reduction="none")
        return {"validation_loss": losses, "accuracy": (logits.argmax(1) == labels).float()}


def _require_same_shape(plan: Plan, found: images.Images) -> None:
    """Raise InputError unless the images have the size, channels and classes of the plan's model."""
    data, (channels, *size) = plan.own_data, found.shape
    problems = []
    for key, value in {"image": size, "channels": channels, "classes": len(found.classes)}.items():
        if (own := vars(plan.decoder)[key]) != value:
            more = f" (or data.size: {own})" if key == "image" else ""
            problems.append(f"model.{key}: {own}, yet {data.source} has {value}; expected {value}{more}")
    if data.shift >= min(size):
        problems.append(f"data.shift: {data.shift} moves images of {size} out of sight; expected less than {min(size)}")
    if problems:
        raise InputError(*problems)


@torch.no_grad()
def evaluate(task: Task, parallel: Parallel, runtime: Runtime, chunk: int | None = None) -> dict[str, float]:
    """The means over the held-out batches by name, the same in every rank; each rank evaluates its share of the batches.

    `chunk` is that of `Task.evaluate`. Where the task scores rows, NAME_se is the standard error of NAME's mean over them.
    """
    rows, ranks, scored = runtime.micro_batch, parallel.ranks, task.scored_rows
    own: dict[str, list[Tensor]] = {}
    with parallel.forward_only():
        count = task.held_out_rows // rows
        own_numbers = range(ranks.rank, count, ranks.size)
        ahead = made_ahead(lambda index: task.held_out(index, count, rows), own_numbers, runtime.device)
        for index, batch in zip(own_numbers, ahead, strict=True):
            with runtime.autocast():
                values = task.evaluate(parallel.inner, runtime.to_device(batch), chunk)
            for name, value in values.items():
                own.setdefault(name, []).append(value[: max(0, scored - index * rows)] if scored else value)
    record: dict[str, float] = {}
    for name, parts in own.items():
        if not scored:
            record[name] = float(ranks.sum(torch.stack(parts).mean() / ranks.size))
            continue
        values_N = torch.cat(parts)
        mean = ranks.sum(values_N.sum() / scored)
        squares = ranks.sum((values_N - mean).square().sum())
        record |= {name: float(mean), f"{name}_se": math.sqrt(float(squares)) / scored}
    return record


def made_ahead(make: Callable[[int], Batch], numbers: Iterable[int], device: torch.device) -> Iterator[Batch]:
    """The batches of these numbers, in host memory. For CUDA a thread makes the next one ahead, in pinned memory."""
    if device.type != "cuda":
        yield from map(make, numbers)
        return
    with device_thread(device, "batches") as thread:
        made = deque[Future[Batch]]()
        for number in numbers:
            made.append(thread.submit(lambda at: tuple(tensor.pin_memory() for tensor in make(at)), number))
            if len(made) == 2:
                yield made.popleft().result()
        yield from (batch.result() for batch in made)


class BatchLoader:
    """One rank's rows of a task's batches, made ahead where steps follow each other."""

    def __init__(self, task: Task, runtime: Runtime, ranks: Ranks) -> None:
        rows = slice(ranks.rank * runtime.rows, (ranks.rank + 1) * runtime.rows)
        self._make, self._device = lambda step: task.batch(step, rows), runtime.device
        self._batches: Iterator[Batch] | None = None
        self._step = 0

    def get(self, step: int) -> Batch:
        """This rank's rows of a step's batch, in host memory."""
        batches, self._batches = self._batches, None  # an error ends them
        if batches is None or step != self._step:
            batches = made_ahead(self._make, itertools.count(step), self._device)
        batch = next(batches)
        self._batches, self._step = batches, step + 1
        return batch


@lru_cache(maxsize=1)
def _load_tokens(data: str, vocab: int, context: int) -> batches.Tokens:
    return batches.load(Data(**json.loads(data)), vocab=vocab, context=context)


@lru_cache(maxsize=1)
def _load_images(data: str) -> images.Images:
    return images.load(Data(**json.loads(data)))


def load_task(plan: Plan) -> Task:
    """The task of a plan, as `load` makes it; the data are read once for all plans in a row that share them."""
    if plan.own_data.kind == "images":
        return Classification(plan, _load_images(json.dumps(plan.own_data.model_dump())))
    return NextToken(plan, _load_tokens(json.dumps(plan.text.model_dump()), plan.decoder.vocab, plan.decoder.context))
