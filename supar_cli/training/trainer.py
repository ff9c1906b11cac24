"""The trainer. Its loop, from top to bottom, is `Trainer.run`: stop, step, evaluate, record, checkpoint."""

from __future__ import annotations

import gc
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from supar_cli.errors import InputError, Preempted, UnusableResult
from supar_cli.files import Record
from supar_cli.models.transformer import named_tensors
from supar_cli.planning.estimate import loss_chunk
from supar_cli.planning.plan import Plan
from supar_cli.sparse.masks import Mask
from supar_cli.training import checkpoint, checkpoint_reader, distributed, optimizer, prepare, tasks, trackers
from supar_cli.training.distributed import ALONE, Parallel, Ranks, StopReason, collective_error
from supar_cli.training.mask_updates import MaskUpdates, remask_in_place
from supar_cli.training.monitor import Monitor, activation_sizes, why_not_finite
from supar_cli.training.reporter import NullReporter, Reporter
from supar_cli.training.run_directory import Metrics, RunHistory, is_finished, result_document, write_result
from supar_cli.training.runtime import Runtime, choose_parallelism, require_host_memory
from supar_cli.training.state import GrownMoments, State
from supar_cli.training.step import ClippedUpdate, LaunchedStep, StepResult, read_later
from supar_cli.training.step_graph import StepGraph


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
        units = self.runtime.micro_batch * getattr(plan.model, "context", self.task.units_per_row)
        self.engines = prepare.EngineSelector(plan, self.runtime, self.ranks, units, sharded=kind == "fsdp")
        self._updates, self.done = MaskUpdates(plan, self.ranks), 0
        self._build_model(kind)
        self._stop, self._monitor = distributed.StopRequest(self.ranks), Monitor()
        self._late: LaunchedStep | None = None  # of which `run` has not read what it gave
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
        self._stop, self._late, started_s = distributed.StopRequest(self.ranks, stop), None, time.perf_counter()
        own, folder = directory if self.ranks.is_main else None, directory and directory / "checkpoints"
        with Metrics(own, self.done) as metrics:
            if metrics.damage:
                self.reporter.warn(metrics.damage)
            if directory is not None and self.done == steps and self.ranks.on_main(is_finished, directory, plan):
                return metrics.history
            with (
                trackers.Trackers(plan, own, self.done, self.reporter.warn) as tracked,
                checkpoint.Writer(folder, plan, self.task.hash, self.parallel, metrics.sync, self.done) as checkpoints,
            ):
                mark_s, marked = time.perf_counter(), self.done
                for step in range(self.done, steps):
                    reason, is_last = self._stop.reason(), step == steps - 1
                    is_due = step % plan.run.log_every == 0 or is_last or self._updates.is_reported(step + 1)
                    is_logged = directory is not None and is_due
                    is_evaluated = (step + 1) % plan.train.eval_every == 0 or is_last
                    is_saved = (step + 1) % plan.run.checkpoint_every == 0 and not is_last
                    if self._launch_ahead(metrics, bool(reason) or is_logged or is_evaluated or is_saved):
                        continue
                    if reason:
                        raise self._preempted(reason, checkpoints)
                    record = self._record(step + 1, found := self.step(diagnose=is_logged))
                    if is_logged:
                        record |= self._measurements(step, found, self.done - marked, time.perf_counter() - mark_s)
                    if is_evaluated:
                        record |= self.evaluate()
                    metrics.write(record)
                    tracked.log(record)
                    if is_saved:
                        checkpoints.save(self.done, self.capture)
                    if "validation_loss" in record and on_evaluation is not None:
                        on_evaluation(self.done, record["validation_loss"])
                    if is_logged:
                        mark_s, marked = time.perf_counter(), self.done
                if not self.ranks.on_main(lambda: steps in dict(metrics.history.evaluations)):  # its record is lost
                    metrics.history.add({"step": steps, **self.evaluate()})
                checkpoints.save(self.done, self.capture)
                checkpoints.wait()
        metrics.history.seconds = time.perf_counter() - started_s
        if own is not None:
            write_result(own, self._result(metrics.history))
        return metrics.history

    def step(self, diagnose: bool = False) -> StepResult:
        """Make one optimizer step, then change the masks if the plan says so.

        With `diagnose`, watch activations and gradients for a wrong scale too.

        Raises UnusableResult, before any weight changes, if the loss or a gradient is not finite.
        """
        return self._read(self._launch(), diagnose)

    def _launch_ahead(self, metrics: Metrics, is_needed: bool) -> bool:
        """Launch a step, unless what it gives is needed at once, and record the one before while a CUDA device makes it."""
        before, self._late = self._late, None
        if self.update.runs_ahead and not (is_needed or self._updates.changes_masks(self.done + 1)):
            self._late = self._launch()
        if before is not None:
            metrics.write(self._record(before.done + 1, self._read(before)))
        return self._late is not None

    def _launch(self) -> LaunchedStep:
        """Make one optimizer step without waiting for the device, but where masks change after it."""
        batch, factor = self.batch(self.done), optimizer.rate_factor(self.plan, self.done)
        optimizer.set_rates(self.optimizer, factor, self._updates.schedule, self.done)
        own_loss, norms, figures = self._graph.step(self._update_weights, batch)
        launched = LaunchedStep(self.done, batch, own_loss, norms, read_later(figures))
        self.done += 1
        if self._updates.changes_masks(self.done):
            self._read(launched)  # no mask changes after a step that is not finite
        if changed := self._updates.after_step(self.sparse_model, self.done):
            self.remask(changed, self._updates.grown)
        return launched

    def _update_weights(self, batch: tasks.Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Own loss (), norms (tensors,) and figures (loss, votes, norm) of a step. A CUDA graph of it must know no other value."""
        plan, micro_batch, rows = self.plan, self.runtime.micro_batch, len(batch[0])
        own_loss = torch.zeros((), device=self.runtime.device)
        for start in range(0, rows, micro_batch):
            is_last = start + micro_batch >= rows
            part = self.runtime.to_device(batch, slice(start, start + micro_batch))
            with self.parallel.gradient_sync(is_last), self._updates.watch(self.sparse_model, self.done + 1, is_last):
                with self.runtime.autocast():
                    loss = self.task.loss(self.model, part, loss_chunk(plan, micro_batch)) * (micro_batch / rows)
                self.runtime.backward(loss)
            own_loss += loss.detach()
        self._updates.mask_gradients(self.sparse_model, self.done + 1)
        gradients = [distributed.local_shard(t.grad) for t in self.sparse_model.tensors.values() if t.grad is not None]
        # with a multiplier a folded into it a parameter is a·w, and its gradient is that of w divided by a
        norms = self.parallel.norms(gradients) * self._folds
        own = torch.stack((own_loss / self.ranks.size, torch.full_like(own_loss, self._stop.vote())))
        figures = torch.cat((self.ranks.sum(own), norms.norm().view(1)))
        self.update.apply(gradients, figures)
        self.sparse_model.sync_engines()
        self.optimizer.zero_grad(set_to_none=True)
        return own_loss, norms, figures

    def _read(self, launched: LaunchedStep, diagnose: bool = False) -> StepResult:
        """What a step gave, once the device has computed it. Raises UnusableResult where it is not finite."""
        loss, self._stop.votes, norm = launched.read()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.done = launched.done
            self.update.allow_again(is_first=not self.done)
            inputs = self.task.inputs(launched.batch)
            why = why_not_finite(loss, launched, self.sparse_model, inputs, self.parallel, self.runtime)
            raise collective_error(UnusableResult, f"step {self.done + 1}: {why}")
        return StepResult(loss, norm, self.diagnostics(launched.batch, launched.norms) if diagnose else {})

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
        task = task or tasks.load(plan, self.reporter.log)
        if task.held_out_rows % plan.train.batch_size:  # all ranks must make equally many passes
            what = f"{task.held_out_rows} held-out rows are not a multiple of the batch size {plan.train.batch_size}"
            raise InputError(f"{type(task).__name__}: {what}")
        require_host_memory(plan, runtime, self.ranks)
        prepare.require_same_tensors(plan, self._model_maker)
        return runtime, task

    def _build_model(self, kind: distributed.Parallelism, state: State | None = None) -> None:
        """Make the model, its wrapper and its optimizer, with initial values or from a state of whole tensors."""
        plan, runtime, ranks, precision = self.plan, self.runtime, self.ranks, self.runtime.precision
        home = torch.device("cpu") if kind == "fsdp" else runtime.device  # FSDP2 moves the shards to the device
        masks = state.masks if state else ranks.run_on_all(prepare.make_masks, plan)
        machine = {"device": runtime.device.type, "precision": runtime.precision_name}
        ranks.require_equal({**machine, "plan": plan.hash(), "data": self.task.hash, **_fingerprints(masks)})
        dense = self._updates.stores_dense(self.done)
        # collective: not inside `run_on_all`, where one rank may fail alone
        list(map(self.reporter.log, self.engines.choose({} if dense else masks)))
        values, make = state.values if state else None, self.engines.make
        self.sparse_model = ranks.run_on_all(prepare.prepare, plan, home, make, self._model_maker, masks, values, dense)
        if runtime.compiles:
            torch.compiler.reset()  # graphs of earlier models count towards the limit of recompilations
        self.parallel = Parallel(kind, self.sparse_model.model, runtime.device, runtime.compiles, ranks, precision)
        self.model = self.parallel.model
        self.sparse_model.tensors = named_tensors(self.sparse_model.model)
        self.optimizer = optimizer.build(plan, self.sparse_model.tensors)
        self.update = ClippedUpdate(self.optimizer, plan.train.grad_clip)
        self._folds = optimizer.folds(plan, self.sparse_model.tensors).to(runtime.device)
        self._graph = StepGraph(runtime)
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
        self._graph = StepGraph(self.runtime)
        if not remask_in_place(self.sparse_model, self.optimizer, masks, grown, self.engines.make):
            torch.compiler.reset()  # graphs of the engines before count towards the limit of recompilations

    def _rebuild(self, state: State) -> None:
        kind = self.parallel.kind
        del self.model, self.parallel, self.sparse_model, self.optimizer, self.update
        if kind != "alone" or self.runtime.compiles:
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
        self._graph = StepGraph(self.runtime)

    def _result(self, history: RunHistory) -> Record:
        """The result document of a run."""
        self._updates.sync_masks(self.sparse_model)
        masks = self.sparse_model.masks
        sizes = {name: tensor.numel() for name, tensor in self.sparse_model.tensors.items()}
        sizes |= {name: mask.count for name, mask in masks.items()}
        fingerprints = {name: mask.fingerprint for name, mask in masks.items()}
        own = {"engines": {name: one.name for name, one in self.engines.choices.items()}}
        environment = self.runtime.environment(self.ranks.size, self.parallel.kind) | own | self.task.described
        return result_document(self.plan, history, self.task.hash, fingerprints, sum(sizes.values()), environment)

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

    def _record(self, step: int, found: StepResult) -> Record:
        """Report a step's progress and return what is recorded of every step; `step` counts it."""
        self.reporter.progress(step, self.plan.train.steps, found.loss)
        return {"step": step, "loss": found.loss, "clipped": 0 < self.plan.train.grad_clip < found.grad_norm}

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


def _fingerprints(masks: Mapping[str, Mask]) -> dict[str, str]:
    """What ranks compare of their masks."""
    return {f"the mask of {name}": mask.fingerprint for name, mask in masks.items()}
