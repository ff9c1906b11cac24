"""The training loop: obeys a plan, writes a run directory."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from supar_cli import __version__
from supar_cli.errors import Preempted, SetupError, UnusableResult
from supar_cli.planning import document, schedule
from supar_cli.planning.plan import Plan
from supar_cli.training import checkpoint, data, initial, masks, monitor, optim, rundir, trackers
from supar_cli.training.device import Setup, peak_flops
from supar_cli.training.engines import choose
from supar_cli.training.models.transformer import loss_of


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
    """Losses of a run: `losses[i]` is the training loss of step i before its update, `evaluations` are (step, loss)."""

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    resumed_at: int = 0


class Trainer:
    """One plan on one device. `step()` performs one optimizer step; `run()` the whole plan."""

    def __init__(self, plan: Plan, tokens: data.Tokens | None = None, reporter: Reporter | None = None) -> None:
        self.plan, self.reporter = plan, reporter or Silent()
        self.setup = Setup.of(plan)
        trackers.require(plan)
        self.tokens = tokens or data.load(plan.data, vocab=plan.model.vocab, context=plan.model.context)
        self._rows = {row.name: row for row in plan.tensors}
        self.engines = choose.Engines(plan, self.setup.device, self.setup.precision, self.setup.micro_batch)
        self.prepared = initial.prepare(plan, self.setup.device, self.engines.make)
        for line in self.engines.lines():
            self.reporter.log(line)
        self.model: nn.Module = self.prepared.model
        if self.setup.compiles:
            torch.compiler.reset()  # graphs of earlier plans count against the limit on recompiling
            self.model = torch.compile(self.prepared.model)  # type: ignore[assignment]
        self.optimizer = optim.build(plan, self.prepared.tensors)
        self.done = 0
        self._monitor = monitor.Monitor()
        self._prefetched: tuple[int, Future[tuple[Tensor, Tensor]]] | None = None
        self._drawing = ThreadPoolExecutor(1, "batches") if self.setup.device.type == "cuda" else None

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (batch, context) of a step; on CUDA the next ones are drawn meanwhile, in pinned memory."""
        if self._drawing is None:
            return self._draw(step)
        if self._prefetched is not None and self._prefetched[0] == step:
            pair = self._prefetched[1].result()
        else:
            pair = self._draw(step)
        self._prefetched = (step + 1, self._drawing.submit(self._draw, step + 1))
        return pair

    def _draw(self, step: int) -> tuple[Tensor, Tensor]:
        train = self.plan.train
        inputs, targets = self.tokens.train.batch(train.seed, step, train.batch_size, self.plan.model.context)
        return (inputs.pin_memory(), targets.pin_memory()) if self._drawing is not None else (inputs, targets)

    def step(self, watch: bool = False) -> tuple[float, float, dict[str, float]]:
        """One optimizer step: (loss before it, gradient norm before clipping, gradient norm per role if `watch`).

        Raises UnusableResult, before any weight changes, when the loss or a gradient is not finite.
        """
        train = self.plan.train
        inputs, targets = self.batch(self.done)
        total = torch.zeros((), device=self.setup.device)
        for start in range(0, len(inputs), self.setup.micro_batch):
            part = slice(start, start + self.setup.micro_batch)
            on_device = (tensor[part].to(self.setup.device, non_blocking=True) for tensor in (inputs, targets))
            with self.setup.autocast():
                loss = loss_of(self.model, *on_device) * (self.setup.micro_batch / len(inputs))
            torch.autograd.backward(loss)
            total += loss.detach()
        gradients = [tensor.grad for tensor in self.prepared.tensors.values() if tensor.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        norm = norms.norm()
        loss_value, norm_value = torch.stack((total, norm)).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise UnusableResult(self._not_finite(loss_value, norms, inputs))
        if train.grad_clip and norm_value > train.grad_clip:
            torch._foreach_mul_(gradients, train.grad_clip / (norm_value + 1e-6))
        optim.set_rates(self.optimizer, self.factor(self.done))
        self.optimizer.step()
        self.prepared.refresh()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        return loss_value, norm_value, self._watch(inputs, norms) if watch else {}

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

    def _watch(self, inputs: Tensor, norms: Tensor) -> dict[str, float]:
        by_tensor = dict(zip(self.prepared.tensors, norms.tolist(), strict=True))
        with self.setup.autocast():
            sizes = monitor.activation_sizes(self.prepared.model, inputs[:1].to(self.setup.device))
        for what, found in (("activation", sizes), ("gradient", by_tensor)):
            for message in self._monitor.warnings(self.done, what, found):
                self.reporter.warn(message)
        roles: dict[str, float] = {}
        for name, value in by_tensor.items():
            role = self._rows[name].role
            roles[role] = roles.get(role, 0.0) + value * value
        return {role: math.sqrt(value) for role, value in roles.items()}

    def _not_finite(self, loss: float, norms: Tensor, inputs: Tensor) -> str:
        if not math.isfinite(loss):
            where = "the loss"
            for part in torch.split(inputs, self.setup.micro_batch):
                with self.setup.autocast():
                    where = monitor.first_not_finite(self.prepared.model, part.to(self.setup.device))
                if where != "the loss":
                    break
            return f"step {self.done + 1}: the loss is {loss}; the first tensor that is not finite is {where}"
        names = [
            name for name, value in zip(self.prepared.tensors, norms.tolist(), strict=True) if not math.isfinite(value)
        ]
        return f"step {self.done + 1}: the gradient of {names[0] if names else 'the model'} is not finite"

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean validation loss over the plan's evaluation batches, nats per token."""
        train, losses = self.plan.train, []
        rows = self.setup.micro_batch
        count = train.eval_batches * train.batch_size // rows
        for index in range(count):
            pair = self.tokens.validation.evaluation(index, count, rows, self.plan.model.context)
            with self.setup.autocast():
                losses.append(loss_of(self.model, *(tensor.to(self.setup.device) for tensor in pair)))
        return float(torch.stack(losses).mean())

    def run(
        self,
        directory: Path | None = None,
        *,
        resume: bool = False,
        on_evaluation: Callable[[int, float], None] | None = None,
        stop: Callable[[], str | None] = lambda: None,
    ) -> Outcome:
        """Train to the plan's last step. With a directory: metrics, checkpoints and, last, result.json are written.

        `on_evaluation(step, loss)` may raise to end the run early. `stop()` is asked between steps; when it gives a reason,
        a checkpoint is written and Preempted raised. Raises UnusableResult on a loss that is not finite.
        """
        outcome = Outcome()
        if directory is not None and resume:
            self.done = outcome.resumed_at = self._restore(directory)
        started = time.perf_counter()
        with rundir.Metrics(directory, self.done) as metrics:
            outcome.losses = [record["loss"] for record in metrics.before]
            outcome.evaluations = [(r["step"], r["validation_loss"]) for r in metrics.before if "validation_loss" in r]
            if self.done == self.plan.train.steps and directory is not None and (directory / "result.json").is_file():
                return outcome
            writer = None
            if directory is not None:
                writer = checkpoint.Writer(directory / "checkpoints", self.plan, self.tokens.hash)
            try:
                with trackers.Trackers(self.plan, directory, self.done, self.reporter.warn) as tracked:
                    self._loop(outcome, metrics, tracked, writer, on_evaluation, stop)
            except Exception:
                if writer is not None:
                    with suppress(OSError):  # of the checkpoint before: there is something else to say
                        writer.wait()
                raise
        outcome.seconds = time.perf_counter() - started
        if directory is not None:
            text = json.dumps(self.result(outcome), indent=1) + "\n"
            with rundir.writing(directory):
                document.write_file(directory / "result.json", text)
        return outcome

    def _loop(
        self,
        outcome: Outcome,
        metrics: rundir.Metrics,
        tracked: trackers.Trackers,
        writer: checkpoint.Writer | None,
        on_evaluation: Callable[[int, float], None] | None,
        stop: Callable[[], str | None],
    ) -> None:
        train, run = self.plan.train, self.plan.run
        mark, marked = time.perf_counter(), self.done
        saved = self.done
        while self.done < train.steps:
            if reason := stop():
                self._checkpoint(writer, finish=True, save=self.done > saved)
                raise Preempted(f"stopped at step {self.done} of {train.steps} by {reason}")
            step = self.done
            watch = writer is not None and (step % run.log_every == 0 or step == train.steps - 1)
            loss, norm, roles = self.step(watch)
            outcome.losses.append(loss)
            self.reporter.progress(self.done, train.steps, loss)
            record: dict[str, Any] = {"step": self.done, "loss": loss}
            if watch:
                seconds = max(time.perf_counter() - mark, 1e-9)
                rate = (self.done - marked) * train.batch_size * self.plan.model.context / seconds
                record |= {"lr": self.plan.hyperparameters.lr * self.factor(step), "lr_factor": self.factor(step)}
                record |= {
                    "grad_norm": norm,
                    "grad_norm_by_role": roles,
                    "tokens_per_s": rate,
                    "peak_share": self.peak_share(rate),
                }
            if self.done % train.eval_every == 0 or self.done == train.steps:
                value = self.evaluate()
                outcome.evaluations.append((self.done, value))
                record["validation_loss"] = value
                if not math.isfinite(value):
                    raise UnusableResult(f"step {self.done}: the validation loss is {value}")
            metrics.write(record)
            tracked.log(record)
            if self.done % run.checkpoint_every == 0 and self.done < train.steps:
                self._checkpoint(writer)
                saved = self.done
            if "validation_loss" in record and on_evaluation is not None:
                on_evaluation(self.done, record["validation_loss"])
            if watch:
                mark, marked = time.perf_counter(), self.done
        self._checkpoint(writer, finish=True)

    def peak_share(self, tokens_per_s: float) -> float | None:
        """Model FLOP/s over the device's dense bf16 peak (masked weights counted as dense: that is what is computed)."""
        if self.setup.device.type != "cuda":
            return None
        peak = peak_flops(self.setup.device)
        return None if peak is None else tokens_per_s * self.plan.flops_per_token / peak

    def _restore(self, directory: Path) -> int:
        found = checkpoint.available(directory / "checkpoints")
        if not found:
            if (directory / "metrics.jsonl").is_file():
                self.reporter.log(f"{directory} holds no checkpoint yet: starting at step 0")
            return 0
        done = checkpoint.load(found[-1], self.plan, self.prepared, self.optimizer, self.tokens.hash)
        self.reporter.log(f"{directory}: continues after step {done}")
        return done

    def _checkpoint(self, writer: checkpoint.Writer | None, save: bool = True, finish: bool = False) -> None:
        """Have the state written while training goes on; with `finish`, return when it is on disk. Raises SetupError."""
        if writer is None:
            return
        try:
            if save:
                writer.save(self.prepared, self.optimizer, self.done)
            if finish:
                writer.wait()
        except OSError as error:
            raise SetupError(f"{writer.folder}: the checkpoint can't be written: {error.strerror or error}") from None

    def result(self, outcome: Outcome) -> dict[str, Any]:
        """The result document: losses, what ran where, and the hashes that identify it."""
        cuda = self.setup.device.type == "cuda"
        return {
            "kind": "supar.result/v1",
            "plan": self.plan.hash(),
            "data": self.tokens.hash,
            "masks": {name: masks.fingerprint(mask) for name, mask in self.prepared.masks.items()},
            "steps": self.done,
            "train_loss": outcome.losses[-1] if outcome.losses else None,
            "validation_loss": outcome.evaluations[-1][1] if outcome.evaluations else None,
            "parameters": self.plan.parameters,
            "live_parameters": sum(row.size for row in self.plan.tensors)
            - sum(int(mask.size - mask.sum()) for mask in self.prepared.masks.values()),
            "resumed_at": outcome.resumed_at,
            "seconds": outcome.seconds,
            "environment": {
                "supar": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
                "device": torch.cuda.get_device_name(self.setup.device)
                if cuda
                else f"cpu ({torch.get_num_threads()} threads)",
                "precision": str(self.setup.precision).removeprefix("torch."),
                "compiled": self.setup.compiles,
                "engines": {name: choice.name for name, choice in self.engines.choices.items()},
            },
        }
