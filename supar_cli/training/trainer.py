"""A run of a plan, from top to bottom: batch, step, evaluate, record, checkpoint, stop. `Trainer.run` is the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from supar_cli.errors import InputError, Preempted, SetupError, UnusableResult
from supar_cli.files import Record
from supar_cli.models.transformer import named_tensors
from supar_cli.planning import schedule
from supar_cli.planning.plan import Plan
from supar_cli.training import checkpoint, monitor, optimizer, prepare, result, run_directory, tasks, trackers
from supar_cli.training.distributed import Parallel, Ranks, collective_error, local_shard
from supar_cli.training.engine_selector import EngineSelector
from supar_cli.training.launch.signals import StopRequest
from supar_cli.training.reporter import NullReporter, Reporter
from supar_cli.training.result import RunHistory
from supar_cli.training.runtime import Runtime, choose_parallelism, peak_share, require_host_memory
from supar_cli.training.tasks import Batch, Task


class StepResult(NamedTuple):
    """Of the whole batch: the loss before the update, the gradient's norm before clipping, and that by role if asked for."""

    loss: float
    grad_norm: float
    grad_norm_by_role: dict[str, float]


class Trainer:
    """One plan in one process, or in each of several ranks. `step()` performs one optimizer step; `run()` the whole plan.

    Without a `task` it is the plan's. `build_model` makes a model whose parameters have the plan's names and shapes, masked
    ones as `sparse.linear.Linear`; without it, the plan's transformer.
    """

    def __init__(
        self,
        plan: Plan,
        task: Task | None = None,
        reporter: Reporter | None = None,
        ranks: Ranks | None = None,
        build_model: Callable[[Plan], nn.Module] = prepare.transformer,
    ) -> None:
        self.plan, self.reporter, self.ranks = plan, reporter or NullReporter(), ranks or Ranks()
        self._build_model, self._rows = build_model, {row.name: row for row in plan.tensors}
        self.runtime, self.task = self.ranks.run_on_all(self._load_inputs, task)
        self._require_ranks_agree({"device": self.runtime.device.type, "precision": str(self.runtime.precision)})
        self.ranks.run_on_all(self._build)
        drawn = {f"the mask of {name}": mask.fingerprint for name, mask in self.sparse_model.masks.items()}
        self._require_ranks_agree({"plan": plan.hash(), "data": self.task.hash, **drawn})
        self.optimizer = optimizer.build(plan, self.sparse_model.tensors)
        self.done = 0
        self._stop = StopRequest(self.ranks)
        self._monitor = monitor.Monitor()
        self._batches = tasks.BatchLoader(self.task, self.runtime, self.ranks)

    @property
    def model(self) -> nn.Module:
        """The model as a training step calls it."""
        return self.parallel.model

    def run(
        self,
        directory: Path | None = None,
        *,
        resume: bool = False,
        on_evaluation: Callable[[int, float], None] | None = None,
        stop: Callable[[], str | None] = lambda: None,
    ) -> RunHistory:
        """Train to the plan's last step. With a directory: metrics, checkpoints and, last, result.json are written.

        Every rank calls it; the main one writes what is no shard of a checkpoint. `on_evaluation(step, loss)` may raise to
        end the run early. `stop()` is asked between steps; when it gives a reason, in any rank, a checkpoint is written and
        Preempted raised. Raises UnusableResult on a loss that is not finite.
        """
        plan, steps = self.plan, self.plan.train.steps
        if directory is not None and resume:
            self._restore_newest(directory)
        self._stop, started_s = StopRequest(self.ranks, stop), time.perf_counter()
        own = directory if self.ranks.is_main else None
        with run_directory.Metrics(own, self.done) as metrics:
            history = RunHistory.of(metrics.before, self.done)
            if metrics.damage:
                self.reporter.warn(metrics.damage)
            if (
                directory is not None
                and self.done == steps
                and self.ranks.on_main(run_directory.result, directory, plan)
            ):
                return history
            with (
                trackers.Trackers(plan, own, self.done, self.reporter.warn) as tracked,
                self._checkpoints(directory, metrics.sync) as checkpoints,
            ):
                mark_s, marked = time.perf_counter(), self.done
                for step in range(self.done, steps):
                    if reason := self._stop.reason():
                        checkpoints.save()
                        checkpoints.wait()
                        raise self._preempted(reason)
                    is_logged = directory is not None and (step % plan.run.log_every == 0 or step == steps - 1)
                    found = self.step(diagnose=is_logged)
                    self.reporter.progress(self.done, steps, found.loss)
                    record: Record = {"step": self.done, "loss": found.loss}
                    if is_logged:
                        record |= self._measurements(step, found, self.done - marked, time.perf_counter() - mark_s)
                    if self.done % plan.train.eval_every == 0 or self.done == steps:
                        record |= self.evaluate()
                    history.add(record)
                    metrics.write(record)
                    tracked.log(record)
                    if self.done % plan.run.checkpoint_every == 0 and self.done < steps:
                        checkpoints.save()
                    if "validation_loss" in record and on_evaluation is not None:
                        on_evaluation(self.done, record["validation_loss"])
                    if is_logged:
                        mark_s, marked = time.perf_counter(), self.done
                if not self.ranks.on_main(history.is_evaluated, steps):  # the record of it is lost
                    history.add({"step": steps, **self.evaluate()})
                checkpoints.save()
                checkpoints.wait()
        history.seconds = time.perf_counter() - started_s
        if own is not None:
            result.write(own, self.result_document(history))
        return history

    def step(self, diagnose: bool = False) -> StepResult:
        """One optimizer step; `diagnose`: look at activations and gradients for signs of a wrong scale too.

        Raises UnusableResult, before any weight changes, when the loss or a gradient is not finite.
        """
        train, micro_batch = self.plan.train, self.runtime.micro_batch
        batch = self.batch(self.done)
        rows = len(batch[0])
        own_loss = torch.zeros((), device=self.runtime.device)
        for start in range(0, rows, micro_batch):
            part = self._on_device(batch, slice(start, start + micro_batch))
            with self.parallel.gradient_sync(is_last=start + micro_batch >= rows):
                with self.runtime.autocast():
                    loss = self.task.loss(self.model, part) * (micro_batch / rows)
                torch.autograd.backward(loss)
            own_loss += loss.detach()
        gradients = [local_shard(t.grad) for t in self.sparse_model.tensors.values() if t.grad is not None]
        norms = self.parallel.norms(gradients)
        own = torch.stack((own_loss / self.ranks.size, torch.full_like(own_loss, self._stop.vote())))
        mean_loss, votes = self.ranks.sum(own).unbind()
        loss_value, norm_value, vote_count = torch.stack((mean_loss, norms.norm(), votes)).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise collective_error(UnusableResult, self._not_finite(loss_value, float(own_loss), norms, batch))
        if train.grad_clip and norm_value > train.grad_clip:
            torch._foreach_mul_(gradients, train.grad_clip / (norm_value + 1e-6))
        optimizer.set_rates(self.optimizer, self.factor(self.done))
        self.optimizer.step()
        self.sparse_model.sync_engines()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self._stop.count(vote_count)
        return StepResult(loss_value, norm_value, self.diagnostics(batch, norms) if diagnose else {})

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Means over the task's held-out batches by name; each rank takes its share of them.

        Where the task asks for it, NAME_se is the standard error of NAME's mean over batches. Raises UnusableResult when
        the validation loss is not finite.
        """
        rows = self.runtime.micro_batch
        count = self.task.held_out_rows // rows
        own: dict[str, list[Tensor]] = {}
        with self.parallel.forward_only():
            for index in range(self.ranks.rank, count, self.ranks.size):
                batch = self._on_device(self.task.held_out(index, count, rows))
                with self.runtime.autocast():
                    means = self.task.evaluate(self.parallel.inner, batch)
                for name, mean in means.items():
                    own.setdefault(name, []).append(mean)
        record: dict[str, float] = {}
        for name, means_N in ((name, torch.stack(means)) for name, means in own.items()):
            mean = self.ranks.sum(means_N.mean() / self.ranks.size)
            record[name] = float(mean)
            if self.task.standard_errors and count > 1:
                squares = self.ranks.sum((means_N - mean).square().sum())
                record[f"{name}_se"] = math.sqrt(float(squares) / (count - 1) / count)
        if not math.isfinite(record["validation_loss"]):
            text = f"step {self.done}: the validation loss is {record['validation_loss']}"
            raise collective_error(UnusableResult, text)
        return record

    def batch(self, step: int) -> Batch:
        """This rank's rows of a step's batch, on the host."""
        return self._batches.get(step)

    def _on_device(self, batch: Batch, rows: slice = slice(None)) -> Batch:
        return tuple(tensor[rows].to(self.runtime.device, non_blocking=True) for tensor in batch)

    def factor(self, step: int) -> float:
        """The schedule's factor on every peak learning rate at a step."""
        train = self.plan.train
        return schedule.factor(
            step,
            steps=train.steps,
            warmup_steps=train.warmup_steps,
            schedule=train.schedule,
            final_lr_fraction=train.final_lr_fraction,
        )

    def _load_inputs(self, task: Task | None) -> tuple[Runtime, Task]:
        """What has to be there before ranks wait for each other."""
        runtime, plan = Runtime.of(self.plan, self.ranks), self.plan
        if self.ranks.is_main:
            trackers.require(plan)
        task = task or tasks.load(plan)
        if task.held_out_rows % plan.train.batch_size:  # so that all ranks make as many passes
            what = f"{task.held_out_rows} held-out rows are not a multiple of the batch size {plan.train.batch_size}"
            raise InputError(f"{type(task).__name__}: {what}")
        require_host_memory(plan, runtime, self.ranks)
        return runtime, task

    def _build(self) -> None:
        plan, runtime = self.plan, self.runtime
        kind, why = self.ranks.on_main(choose_parallelism, plan, runtime, self.ranks)
        if why:
            self.reporter.log(why)
        units = runtime.micro_batch * self.task.units_per_row
        self.engines = EngineSelector(plan, runtime, self.ranks, units, sharded=kind == "fsdp")
        # what will be sharded goes to the device shard by shard
        home = torch.device("cpu") if kind == "fsdp" else runtime.device
        self.sparse_model = prepare.prepare(plan, home, self.engines.make, self._build_model)
        for line in self.engines.lines():
            self.reporter.log(line)
        if runtime.compiles:
            torch.compiler.reset()  # graphs of earlier plans count against the limit on recompiling
        self.parallel = Parallel(kind, self.sparse_model.model, runtime.device, runtime.compiles, self.ranks)
        self.sparse_model.tensors = named_tensors(self.sparse_model.model)

    def result_document(self, history: RunHistory) -> Record:
        """The result document of a run."""
        engines = {name: choice.name for name, choice in self.engines.choices.items()}
        environment = result.environment(self.runtime, self.parallel, engines)
        return result.document(self.plan, self.task.hash, self.sparse_model.masks, history, environment)

    def _require_ranks_agree(self, own: dict[str, str]) -> None:
        """Raise SetupError where another rank has other values of these: the run would be none of theirs."""
        found = self.ranks.gather(own)
        for rank, other in enumerate(found):
            for name, value in found[0].items():
                if other.get(name) != value:
                    text = f"rank {rank}: {name} is not that of rank 0; expected the same everywhere"
                    raise collective_error(SetupError, text)

    def _restore_newest(self, directory: Path) -> None:
        """Go on from the newest checkpoint of a run's directory, if there is one."""
        found = self.ranks.on_main(checkpoint.available, directory / "checkpoints")
        if found:
            self.done = self.ranks.run_on_all(checkpoint.load, found[-1], self)
            self.reporter.log(f"{directory}: continues after step {self.done}")
        elif (directory / "metrics.jsonl").is_file():
            self.reporter.log(f"{directory} holds no checkpoint yet: starting at step 0")

    def _checkpoints(self, directory: Path | None, before: Callable[[], None]) -> checkpoint.Writer:
        """Where this rank writes checkpoints: nowhere without a directory, nor where the main rank alone has all to write."""
        writes = directory is not None and (self.ranks.is_main or self.parallel.is_sharded)
        return checkpoint.Writer(
            directory / "checkpoints" if directory is not None and writes else None, self, before, self.done
        )

    def _preempted(self, reason: str) -> Preempted:
        error = Preempted(f"stopped at step {self.done} of {self.plan.train.steps} by {reason}")
        error.is_collective, error.interrupted = True, reason == "SIGINT"
        return error

    def _measurements(self, step: int, found: StepResult, steps: int, seconds: float) -> Record:
        """What is recorded of a step that is logged, `steps` and `seconds` being those since the last."""
        units = steps * self.plan.train.batch_size * self.task.units_per_row
        rate, factor = units / max(seconds, 1e-9), self.factor(step)
        return {
            "lr": self.plan.hyperparameters.lr * factor,
            "lr_factor": factor,
            "grad_norm": found.grad_norm,
            "grad_norm_by_role": found.grad_norm_by_role,
            f"{self.task.unit}_per_s": rate,
            "peak_share": peak_share(self.runtime.device, self.task.flops_per_unit, rate / self.ranks.size),
        }

    def diagnostics(self, batch: Batch, norms: Tensor) -> dict[str, float]:
        """Look at activations on a batch's first row and at the tensors' gradient norms; return those norms by role."""
        by_tensor = dict(zip(self.sparse_model.tensors, norms.tolist(), strict=True))
        inputs = self._on_device(self.task.inputs(batch), slice(1))
        with self.runtime.autocast(), self.parallel.forward_only(with_hooks=True):
            sizes = monitor.activation_sizes(self.sparse_model.model, inputs)
        for what, found in (("activation", sizes), ("gradient", by_tensor)):
            for message in self._monitor.warnings(self.done, what, found):
                self.reporter.warn(message)
        squares: dict[str, float] = {}
        for name, value in by_tensor.items():
            role = self._rows[name].role
            squares[role] = squares.get(role, 0.0) + value * value
        return {role: math.sqrt(value) for role, value in squares.items()}

    def _not_finite(self, loss: float, own_loss: float, norms: Tensor, batch: Batch) -> str:
        """Where values stop being finite. All ranks look, and pass the same batches: they may hold shards."""
        if not math.isfinite(loss):
            where, inputs, micro_batch = "", self.task.inputs(batch), self.runtime.micro_batch
            for start in range(0, len(inputs[0]), micro_batch):
                part = self._on_device(inputs, slice(start, start + micro_batch))
                with self.runtime.autocast(), self.parallel.forward_only(with_hooks=True):
                    found = monitor.first_not_finite(self.sparse_model.model, part)
                where = where or (found if found != "the loss" else "")
            places = self.ranks.gather(where or ("" if math.isfinite(own_loss) else "the loss"))
            rank = next((rank for rank, place in enumerate(places) if place), 0)
            of = f" of rank {rank}" if self.ranks.size > 1 else ""
            first = f"the first tensor{of} that is not finite is {places[rank] or 'the loss'}"
            return f"step {self.done + 1}: the loss is {loss}; {first}"
        by_tensor = zip(self.sparse_model.tensors, norms.tolist(), strict=True)
        names = [name for name, value in by_tensor if not math.isfinite(value)]
        return f"step {self.done + 1}: the gradient of {names[0] if names else 'the model'} is not finite"
