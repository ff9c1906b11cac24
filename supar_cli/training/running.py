"""A run: a trainer's steps to the plan's last one, with the metrics, checkpoints and result that are written on the way."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from supar_cli.errors import Preempted, SetupError, UnusableResult
from supar_cli.files import naming_write_errors, write_file
from supar_cli.training import checkpoint, run_directory, trackers
from supar_cli.training.distributed import shared
from supar_cli.training.runtime import peak_flops
from supar_cli.version import __version__

if TYPE_CHECKING:
    from supar_cli.training.trainer import Trainer


class Reporter(Protocol):
    """Where progress and warnings go; `cli` shows them, trials drop them."""

    def progress(self, step: int, steps: int, loss: float) -> None: ...
    def warn(self, message: str) -> None: ...
    def log(self, message: str) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def progress(self, step: int, steps: int, loss: float) -> None: ...
    def warn(self, message: str) -> None: ...
    def log(self, message: str) -> None: ...


@dataclass(slots=True)
class Outcome:
    """Losses of a run: `losses[i]` is the training loss of step i before its update, `evaluations` are (step, loss).

    Those of steps before `resumed_at` are known to a world's first process only, and nan where no record of them is left.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    resumed_at: int = 0


def run(
    trainer: Trainer, directory: Path | None, resume: bool, on_evaluation: Callable[[int, float], None] | None
) -> Outcome:
    """`Trainer.run`. In a world every process calls it, and the first one writes what is no shard of a checkpoint."""
    outcome, world = Outcome(), trainer.world
    if directory is not None and resume:
        trainer.done = outcome.resumed_at = _restore(trainer, directory)
    started = time.perf_counter()
    own = directory if world.is_first else None
    with run_directory.Metrics(own, trainer.done) as metrics:
        if metrics.damage:
            trainer.reporter.warn(metrics.damage)
        known = {record["step"]: record["loss"] for record in metrics.before}
        outcome.losses = [known.get(step, math.nan) for step in range(1, trainer.done + 1)]
        outcome.evaluations = [(r["step"], r["validation_loss"]) for r in metrics.before if "validation_loss" in r]
        there = directory is not None and trainer.done == trainer.plan.train.steps
        if there and world.on_first(lambda: own is not None and run_directory.result(own, trainer.plan) is not None):
            return outcome
        writer = None
        if directory is not None and (world.is_first or trainer.parallel.sharded):
            writer = checkpoint.Writer(directory / "checkpoints", trainer, metrics.sync)
        try:
            with trackers.Trackers(trainer.plan, own, trainer.done, trainer.reporter.warn) as tracked:
                _Loop(trainer, outcome, metrics, tracked, writer, directory is not None).run(on_evaluation)
        except BaseException as error:
            if writer is not None and not isinstance(error, Exception):  # at once
                writer.abandon()
            elif writer is not None:
                with suppress(SetupError, RuntimeError):  # of the checkpoint before: there is something else to say
                    writer.wait()
            raise
    outcome.seconds = time.perf_counter() - started
    if own is not None:
        text = json.dumps(result(trainer, outcome), indent=1) + "\n"
        with naming_write_errors(own):
            write_file(own / "result.json", text)
    return outcome


@dataclass(slots=True)
class _Loop:
    """The steps of a run. `watched`: it has a directory, so that it measures more than losses."""

    trainer: Trainer
    outcome: Outcome
    metrics: run_directory.Metrics
    tracked: trackers.Trackers
    writer: checkpoint.Writer | None
    watched: bool

    def run(self, on_evaluation: Callable[[int, float], None] | None) -> None:
        trainer, train, settings = self.trainer, self.trainer.plan.train, self.trainer.plan.run
        mark, marked = time.perf_counter(), trainer.done
        saved = trainer.done
        trainer.asked_to_stop = True  # before the first step nobody has been asked yet
        while trainer.done < train.steps:
            if reason := self._reason():
                self._checkpoint(finish=True, save=trainer.done > saved)
                error = Preempted(f"stopped at step {trainer.done} of {train.steps} by {reason}")
                error.shared, error.interrupted = True, reason == "SIGINT"
                raise error
            step = trainer.done
            watch = self.watched and (step % settings.log_every == 0 or step == train.steps - 1)
            loss, norm, roles = trainer.step(watch)
            self.outcome.losses.append(loss)
            trainer.reporter.progress(trainer.done, train.steps, loss)
            record: dict[str, Any] = {"step": trainer.done, "loss": loss}
            if watch:
                seconds = max(time.perf_counter() - mark, 1e-9)
                rate = (trainer.done - marked) * train.batch_size * trainer.plan.decoder.context / seconds
                factor = trainer.factor(step)
                record |= {"lr": trainer.plan.hyperparameters.lr * factor, "lr_factor": factor}
                record |= {
                    "grad_norm": norm,
                    "grad_norm_by_role": roles,
                    "tokens_per_s": rate,
                    "peak_share": peak_share(trainer, rate),
                }
            if trainer.done % train.eval_every == 0 or trainer.done == train.steps:
                record["validation_loss"] = self._evaluate()
            self.metrics.write(record)
            self.tracked.log(record)
            if trainer.done % settings.checkpoint_every == 0 and trainer.done < train.steps:
                self._checkpoint()
                saved = trainer.done
            if "validation_loss" in record and on_evaluation is not None:
                on_evaluation(trainer.done, record["validation_loss"])
            if watch:
                mark, marked = time.perf_counter(), trainer.done
        if trainer.world.on_first(lambda: trainer.done not in dict(self.outcome.evaluations)):
            self._evaluate()  # the record of it is lost
        self._checkpoint(finish=True, save=trainer.done > saved)

    def _reason(self) -> str | None:
        """Why to stop now: for all, though only one of them was asked to."""
        trainer = self.trainer
        if not trainer.world.grouped:
            return trainer.stop()
        if not trainer.asked_to_stop:
            return None
        trainer.asked_to_stop = False
        return next((reason for reason in trainer.world.gather(trainer.stop()) if reason), None)

    def _evaluate(self) -> float:
        value = self.trainer.evaluate()
        self.outcome.evaluations.append((self.trainer.done, value))
        if not math.isfinite(value):
            raise shared(UnusableResult, f"step {self.trainer.done}: the validation loss is {value}")
        return value

    def _checkpoint(self, save: bool = True, finish: bool = False) -> None:
        """Have the state written while training goes on; with `finish`, return when it is on disk. Raises SetupError."""
        if self.writer is None:
            return
        if save:
            self.writer.save()
        if finish:
            self.writer.wait()


def _restore(trainer: Trainer, directory: Path) -> int:
    """Load the newest checkpoint and give the steps it has done."""
    found = trainer.world.on_first(lambda: checkpoint.available(directory / "checkpoints"))
    if not found:
        if (directory / "metrics.jsonl").is_file():
            trainer.reporter.log(f"{directory} holds no checkpoint yet: starting at step 0")
        return 0
    done = trainer.world.together(lambda: checkpoint.load(found[-1], trainer))
    trainer.reporter.log(f"{directory}: continues after step {done}")
    return done


def peak_share(trainer: Trainer, tokens_per_s: float) -> float | None:
    """Model FLOP/s over the devices' dense bf16 peak (masked weights counted as dense: that is what is computed)."""
    if trainer.setup.device.type != "cuda":
        return None
    peak = peak_flops(trainer.setup.device)
    return None if peak is None else tokens_per_s * trainer.plan.flops_per_token / (peak * trainer.world.size)


def result(trainer: Trainer, outcome: Outcome) -> dict[str, Any]:
    """The result document: losses, what ran where, and the hashes that identify it."""
    plan, setup, drawn = trainer.plan, trainer.setup, trainer.prepared.masks
    cuda = setup.device.type == "cuda"
    return {
        "kind": "supar.result/v1",
        "plan": plan.hash(),
        "data": trainer.tokens.hash,
        "masks": {name: mask.fingerprint for name, mask in drawn.items()},
        "steps": trainer.done,
        "train_loss": outcome.losses[-1] if outcome.losses and math.isfinite(outcome.losses[-1]) else None,
        "validation_loss": outcome.evaluations[-1][1] if outcome.evaluations else None,
        "parameters": plan.parameters,
        "live_parameters": sum(row.size for row in plan.tensors)
        - sum(mask.size - mask.count for mask in drawn.values()),
        "resumed_at": outcome.resumed_at,
        "seconds": outcome.seconds,
        "environment": {
            "supar": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(setup.device) if cuda else f"cpu ({torch.get_num_threads()} threads)",
            "processes": trainer.world.size,
            "parallel": trainer.parallel.kind,
            "precision": str(setup.precision).removeprefix("torch."),
            "compiled": setup.compiles,
            "engines": {name: choice.name for name, choice in trainer.engines.choices.items()},
        },
    }
