"""The trainer. Its loop, from top to bottom, is `Trainer.run`: stop, step, evaluate, record, checkpoint."""

from __future__ import annotations

import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from supar_cli.errors import InputError, Preempted, UnusableResult
from supar_cli.files import Record
from supar_cli.models.transformer import named_tensors
from supar_cli.planning.estimate import loss_chunk
from supar_cli.planning.plan import Plan
from supar_cli.sparse.masks import Mask
from supar_cli.training import checkpoint, checkpoint_reader, distributed, optimizer, prepare, tasks, trackers
from supar_cli.training.distributed import ALONE, Ranks, StopReason, collective_error
from supar_cli.training.mask_updates import MaskUpdates, remask_in_place
from supar_cli.training.monitor import Monitor, activation_sizes, first_not_finite
from supar_cli.training.reporter import NullReporter, Reporter
from supar_cli.training.run_directory import Metrics, RunHistory, is_finished, write_result
from supar_cli.training.runtime import Runtime, choose_parallelism, device_name, require_host_memory, versions
from supar_cli.training.state import GrownMoments, State


class StepResult(NamedTuple):
    """Of the whole batch: the loss before the update, the gradient's norm before clipping, and on request that by role."""

    loss: float
    grad_norm: float
    grad_norm_by_role: dict[str, float]


class Trainer:
    """Trains one plan, in one process or in each of several ranks: `step()` makes one optimizer step, `run()` all of them.

    `task` is by default the plan's. `build_model` makes a model whose parameters have the plan's names and shapes, with
    `sparse.linear.Linear` for masked ones; by default it is the plan's transformer.
    """

    # whether masks change by `remask` too; else a checkpoint's are those of the plan and its schedule
    moves_masks = False

    def __init__(
        self,
        plan: Plan,
        task: tasks.Task | None = None,
        reporter: Reporter | None = None,
        ranks: Ranks = ALONE,
        build_model: Callable[[Plan], nn.Module] = prepare.transformer,
    ) -> None:
        self.plan, self.reporter, self.ranks = plan, reporter or NullReporter(), ranks
        self._model_maker, self._roles = build_model, {row.name: row.role for row in plan.tensors}
        self.runtime, self.task = self.ranks.run_on_all(self._load_inputs, task)
        kind, why = choose_parallelism(plan, self.runtime, self.ranks)
        if why:
            self.reporter.log(why)
        units = self.runtime.micro_batch * self.task.units_per_row
        self.engines = prepare.EngineSelector(plan, self.runtime, self.ranks, units, sharded=kind == "fsdp")
        self._updates, self.done = MaskUpdates(plan, self.ranks), 0
        self._build_model(kind)
        self._stop, self._monitor = distributed.StopRequest(self.ranks), Monitor()
        self.batch = tasks.BatchLoader(self.task, self.runtime, self.ranks).get

    def run(
        self,
        directory: Path | None = None,
        *,
        resume: bool = False,
        on_evaluation: Callable[[int, float], None] | None = None,
        stop: StopReason = lambda: None,
    ) -> RunHistory:
        """Train to the plan's last step. In a directory, write metrics, checkpoints and at last result.json.

        Every rank calls it; rank 0 writes all files but the shards of checkpoints. `on_evaluation(step, loss)` may raise to
        end the run early. `stop()` is called between steps; when it returns a reason in any rank, the trainer writes a
        checkpoint and raises Preempted. Raises UnusableResult if a loss is not finite.
        """
        plan, steps = self.plan, self.plan.train.steps
        if directory is not None and resume:
            self._restore_newest(directory)
        self._stop, started_s = distributed.StopRequest(self.ranks, stop), time.perf_counter()
        own, folder = directory if self.ranks.is_main else None, directory and directory / "checkpoints"
        with Metrics(own, self.done) as metrics:
            history = metrics.history
            if metrics.damage:
                self.reporter.warn(metrics.damage)
            if directory is not None and self.done == steps and self.ranks.on_main(is_finished, directory, plan):
                return history
            with (
                trackers.Trackers(plan, own, self.done, self.reporter.warn) as tracked,
                checkpoint.Writer(folder, plan, self.task.hash, self.parallel, metrics.sync, self.done) as checkpoints,
            ):
                mark_s, marked = time.perf_counter(), self.done
                for step in range(self.done, steps):
                    if reason := self._stop.reason():
                        raise self._preempted(reason, checkpoints)
                    is_due = step % plan.run.log_every == 0 or step == steps - 1 or self._updates.is_reported(step + 1)
                    is_logged = directory is not None and is_due
                    found = self.step(diagnose=is_logged)
                    self.reporter.progress(self.done, steps, found.loss)
                    clipped = 0 < plan.train.grad_clip < found.grad_norm
                    record: Record = {"step": self.done, "loss": found.loss, "clipped": clipped}
                    if is_logged:
                        record |= self._measurements(step, found, self.done - marked, time.perf_counter() - mark_s)
                    if self.done % plan.train.eval_every == 0 or self.done == steps:
                        record |= self.evaluate()
                    metrics.write(record)
                    tracked.log(record)
                    if self.done % plan.run.checkpoint_every == 0 and self.done < steps:
                        checkpoints.save(self.done, self.capture)
                    if "validation_loss" in record and on_evaluation is not None:
                        on_evaluation(self.done, record["validation_loss"])
                    if is_logged:
                        mark_s, marked = time.perf_counter(), self.done
                if not self.ranks.on_main(lambda: steps in dict(history.evaluations)):  # its record is lost
                    history.add({"step": steps, **self.evaluate()})
                checkpoints.save(self.done, self.capture)
                checkpoints.wait()
        history.seconds = time.perf_counter() - started_s
        if own is not None:
            write_result(own, self.result_document(history))
        return history

    def step(self, diagnose: bool = False) -> StepResult:
        """Make one optimizer step, then change the masks if the plan says so.

        With `diagnose`, watch activations and gradients for a wrong scale too.

        Raises UnusableResult, before any weight changes, if the loss or a gradient is not finite.
        """
        plan, train, micro_batch = self.plan, self.plan.train, self.runtime.micro_batch
        batch, own_loss = self.batch(self.done), torch.zeros((), device=self.runtime.device)
        rows = len(batch[0])
        for start in range(0, rows, micro_batch):
            is_last = start + micro_batch >= rows
            part = self.runtime.to_device(batch, slice(start, start + micro_batch))
            with self.parallel.gradient_sync(is_last), self._updates.watch(self.sparse_model, self.done + 1, is_last):
                with self.runtime.autocast():
                    loss = self.task.loss(self.model, part, loss_chunk(plan, micro_batch)) * (micro_batch / rows)
                torch.autograd.backward(loss)
            own_loss += loss.detach()
        self._updates.mask_gradients(self.sparse_model, self.done + 1)
        gradients = [distributed.local_shard(t.grad) for t in self.sparse_model.tensors.values() if t.grad is not None]
        # with a multiplier a folded into it a parameter is a·w, and its gradient is that of w divided by a
        norms = self.parallel.norms(gradients) * self._folds
        own = torch.stack((own_loss / self.ranks.size, torch.full_like(own_loss, self._stop.vote())))
        mean_loss, votes = self.ranks.sum(own).unbind()
        loss_value, norm_value, vote_count = torch.stack((mean_loss, norms.norm(), votes)).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise collective_error(UnusableResult, self._not_finite(loss_value, float(own_loss), norms, batch))
        if train.grad_clip and norm_value > train.grad_clip:
            torch._foreach_mul_(gradients, train.grad_clip / (norm_value + 1e-6))
        factor = optimizer.rate_factor(plan, self.done)
        optimizer.set_rates(self.optimizer, factor, self._updates.schedule, self.done)
        self.optimizer.step()
        self.sparse_model.sync_engines()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self._stop.votes = vote_count
        if changed := self._updates.after_step(self.sparse_model, self.done):
            self.remask(changed, self._updates.grown)
        return StepResult(loss_value, norm_value, self.diagnostics(batch, norms) if diagnose else {})

    def evaluate(self) -> dict[str, float]:
        """The means over the task's held-out batches by name. Raises UnusableResult if the validation loss is not finite."""
        record = tasks.evaluate(self.task, self.parallel, self.runtime, loss_chunk(self.plan, self.runtime.micro_batch))
        if not math.isfinite(record["validation_loss"]):
            text = f"step {self.done}: the validation loss is {record['validation_loss']}"
            raise collective_error(UnusableResult, text)
        return record

    def _load_inputs(self, task: tasks.Task | None) -> tuple[Runtime, tasks.Task]:
        """Find the device, load the task and check what could fail, before ranks wait for each other."""
        runtime, plan = Runtime.of(self.plan, self.ranks), self.plan
        if self.ranks.is_main:
            trackers.require(plan)
        task = task or tasks.load(plan)
        if task.held_out_rows % plan.train.batch_size:  # all ranks must make equally many passes
            what = f"{task.held_out_rows} held-out rows are not a multiple of the batch size {plan.train.batch_size}"
            raise InputError(f"{type(task).__name__}: {what}")
        require_host_memory(plan, runtime, self.ranks)
        prepare.require_same_tensors(plan, self._model_maker)
        return runtime, task

    def _build_model(self, kind: distributed.Parallelism, state: State | None = None) -> None:
        """Make the model, its wrapper and its optimizer, with initial values or from a state of whole tensors."""
        plan, runtime, ranks = self.plan, self.runtime, self.ranks
        home = torch.device("cpu") if kind == "fsdp" else runtime.device  # FSDP2 moves the shards to the device
        masks = state.masks if state else ranks.run_on_all(prepare.make_masks, plan)
        machine = {"device": runtime.device.type, "precision": str(runtime.precision)}
        ranks.require_equal({**machine, "plan": plan.hash(), "data": self.task.hash, **_fingerprints(masks)})
        dense = self._updates.stores_dense(self.done)
        # collective: not inside `run_on_all`, where one rank may fail alone
        list(map(self.reporter.log, self.engines.choose({} if dense else masks)))
        values, make = state.values if state else None, self.engines.make
        self.sparse_model = ranks.run_on_all(prepare.prepare, plan, home, make, self._model_maker, masks, values, dense)
        if runtime.compiles:
            torch.compiler.reset()  # graphs of earlier models count towards the limit of recompilations
        self.parallel = distributed.Parallel(kind, self.sparse_model.model, runtime.device, runtime.compiles, ranks)
        self.model = self.parallel.model
        self.sparse_model.tensors = named_tensors(self.sparse_model.model)
        self.optimizer = optimizer.build(plan, self.sparse_model.tensors)
        self._folds = optimizer.folds(plan, self.sparse_model.tensors).to(runtime.device)
        if state is not None:
            state.load_moments(self.sparse_model, self.optimizer)
        self._updates.begin(self.sparse_model, self.done)

    def capture(self, gather: bool = False) -> State:
        """Copy the run's state. With `gather`, which every rank must call, tensors are whole and not in shards."""
        self._updates.sync_masks(self.sparse_model)
        return State.capture(self.done, self.sparse_model, self.optimizer, gather)

    def remask(self, masks: Mapping[str, Mask], grown: GrownMoments = "zero") -> None:
        """Change the masks of some tensors. Every rank calls it with the same masks.

        Where parameters get another length, all that is made of them is made anew, as in a resumed run.
        """
        own, tensors = self.sparse_model.masks, self.sparse_model.tensors
        lengths = {name: (own[name].count,) if name in own else () for name in masks}
        is_same = all(lengths[n] == (mask.count,) == tuple(tensors[n].shape) for n, mask in masks.items())
        if self.parallel.is_sharded or not is_same:
            self._rebuild(self.capture(gather=True).remasked(masks, grown))
            return
        self.ranks.require_equal(_fingerprints(masks))
        if not remask_in_place(self.sparse_model, self.optimizer, masks, grown, self.engines.make):
            torch.compiler.reset()  # graphs of the engines before count towards the limit of recompilations

    def _rebuild(self, state: State) -> None:
        kind = self.parallel.kind
        del self.model, self.parallel, self.sparse_model, self.optimizer
        gc.collect()  # compiling it and hooks of DDP and FSDP2 keep a model in cycles; free its memory for the next one
        self._build_model(kind, state)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint, which any number of ranks may have written.

        Raises InputError for another plan, other data or other masks, SetupError if the checkpoint is corrupt.
        """
        reader = self.ranks.run_on_all(checkpoint_reader.load, path, self.plan, self.task.hash, self.ranks)
        masks, own = self.ranks.run_on_all(reader.masks, self.plan), self.sparse_model.masks
        self.done = reader.step
        if self._updates.schedule is not None or self.moves_masks:
            self._updates.require_counts(masks, reader.step)
            self._rebuild(State.zeros(reader.step, self.plan, masks))
        elif changed := [name for name in {**masks, **own} if masks.get(name) != own.get(name)]:
            text = f"{path}: the mask of {changed[0]} is not the one this plan draws"
            raise collective_error(InputError, text)
        state = State.of_model(reader.step, self.sparse_model, optimizer.state_names(self.plan))
        self.ranks.run_on_all(reader.fill, state)
        self.sparse_model.sync_engines()
        state.load_moments(self.sparse_model, self.optimizer)

    def result_document(self, history: RunHistory) -> Record:
        """The result document of a run: losses, sizes, environment and the hashes that identify the run."""
        self._updates.sync_masks(self.sparse_model)
        plan, runtime, masks, losses = self.plan, self.runtime, self.sparse_model.masks, history.losses
        sizes = {name: tensor.numel() for name, tensor in self.sparse_model.tensors.items()}
        sizes |= {name: mask.count for name, mask in masks.items()}
        return {
            "kind": "supar.result/v1",
            "plan": plan.hash(),
            "data": self.task.hash,
            "masks": {name: mask.fingerprint for name, mask in masks.items()},
            "steps": len(losses),
            "train_loss": losses[-1] if losses and math.isfinite(losses[-1]) else None,
            "validation_loss": history.evaluations[-1][1] if history.evaluations else None,
            "clipped_share": history.clipped_share,
            "parameters": plan.parameters,
            "live_parameters": sum(sizes.values()),
            "resumed_at": history.resumed_at,
            "seconds": history.seconds,
            "environment": {
                **versions(),
                "device": device_name(runtime.device),
                "processes": self.ranks.size,
                "parallel": self.parallel.kind,
                "precision": str(runtime.precision).removeprefix("torch."),
                "compiled": runtime.compiles,
                "engines": {name: choice.name for name, choice in self.engines.choices.items()},
            },
        }

    def _restore_newest(self, directory: Path) -> None:
        """Continue from the newest checkpoint in a run's directory, if there is one."""
        found = self.ranks.on_main(checkpoint_reader.available, directory / "checkpoints")
        if found:
            self.restore(found[-1])
        if found and self.done < self.plan.train.steps:
            self.reporter.log(f"{directory}: continues after step {self.done}")
        elif not found and (directory / "metrics.jsonl").is_file():
            self.reporter.log(f"{directory} holds no checkpoint yet: starting at step 0")

    def _preempted(self, reason: str, checkpoints: checkpoint.Writer) -> Preempted:
        """Save a checkpoint and return the error to raise."""
        checkpoints.save(self.done, self.capture)
        checkpoints.wait()
        error = Preempted(f"stopped at step {self.done} of {self.plan.train.steps} by {reason}")
        error.is_collective, error.interrupted = True, reason == "SIGINT"
        return error

    def _measurements(self, step: int, found: StepResult, steps: int, seconds: float) -> Record:
        """The measurements in the record of a logged step; `steps` and `seconds` are those since the last one."""
        units = steps * self.plan.train.batch_size * self.task.units_per_row
        rate, factor = units / max(seconds, 1e-9), optimizer.rate_factor(self.plan, step)
        return {
            "lr": self.plan.hyperparameters.lr * factor,  # the tuned rate; each tensor has its own
            "lr_factor": factor,
            "grad_norm": found.grad_norm,
            "grad_norm_by_role": found.grad_norm_by_role,
            f"{self.task.unit}_per_s": rate,
            "peak_share": self.runtime.peak_share(self.task.flops_per_unit, rate / self.ranks.size),
            **self._updates.measurements(self.sparse_model, self.done),
        }

    def diagnostics(self, batch: tasks.Batch, norms: Tensor) -> dict[str, float]:
        """Watch the activations on a batch's first row and the tensors' gradient norms; return those norms by role."""
        by_tensor = dict(zip(self.sparse_model.tensors, norms.tolist(), strict=True))
        inputs = self.runtime.to_device(self.task.inputs(batch), slice(1))
        with self.runtime.autocast(), self.parallel.forward_only(with_hooks=True):
            sizes = activation_sizes(self.sparse_model.model, inputs)
        for what, found in (("activation", sizes), ("gradient", by_tensor)):
            for message in self._monitor.warnings(self.done, what, found):
                self.reporter.warn(message)
        squares: dict[str, float] = defaultdict(float)
        for name, value in by_tensor.items():
            squares[self._roles[name]] += value * value
        return {role: math.sqrt(value) for role, value in squares.items()}

    def _not_finite(self, loss: float, own_loss: float, norms: Tensor, batch: tasks.Batch) -> str:
        """A sentence that says which value is not finite. Every rank calls it."""
        if not math.isfinite(loss):
            model, is_own = self.sparse_model.model, not math.isfinite(own_loss)
            first = first_not_finite(model, self.task.inputs(batch), self.parallel, self.runtime, is_own)
            return f"step {self.done + 1}: the loss is {loss}; {first}"
        by_tensor = zip(self.sparse_model.tensors, norms.tolist(), strict=True)
        name = next((name for name, value in by_tensor if not math.isfinite(value)), "the model")
        return f"step {self.done + 1}: the gradient of {name} is not finite"


def _fingerprints(masks: Mapping[str, Mask]) -> dict[str, str]:
    """What ranks compare of their masks."""
    return {f"the mask of {name}": mask.fingerprint for name, mask in masks.items()}
