"""A plan on its devices, a step at a time: batches, gradients, updates, evaluations. `run` makes a whole run of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch
from torch import Tensor, nn

from supar_cli.data import batches
from supar_cli.errors import InputError, SetupError, UnusableResult
from supar_cli.models.transformer import loss_of, named_tensors
from supar_cli.planning import schedule
from supar_cli.planning.plan import Plan
from supar_cli.training import monitor, optimizer, prepare, running, trackers
from supar_cli.training.distributed import World, shared
from supar_cli.training.engine_selector import EngineSelector
from supar_cli.training.parallel import Parallel, kind_of, local, require_host_memory
from supar_cli.training.running import Outcome, Reporter, Silent
from supar_cli.training.runtime import Setup, on_device


class Trainer:
    """One plan in one process, or in each of a world's. `step()` performs one optimizer step; `run()` the whole plan."""

    def __init__(
        self,
        plan: Plan,
        tokens: batches.Tokens | None = None,
        reporter: Reporter | None = None,
        world: World | None = None,
    ) -> None:
        self.plan, self.reporter, self.world = plan, reporter or Silent(), world or World()
        self._rows = {row.name: row for row in plan.tensors}
        self.setup, self.tokens = self.world.together(lambda: self._found(tokens))
        self._require_equal({"device": self.setup.device.type, "precision": str(self.setup.precision)})
        self.world.together(self._build)
        drawn = {f"the mask of {name}": mask.fingerprint for name, mask in self.prepared.masks.items()}
        self._require_equal({"plan": plan.hash(), "data": self.tokens.hash, **drawn})
        self.optimizer = optimizer.build(plan, self.prepared.tensors)
        self.done = 0
        self.asked_to_stop = False
        self.stop: Callable[[], str | None] = lambda: None
        self._monitor = monitor.Monitor()
        self._prefetched: tuple[int, Future[tuple[Tensor, Tensor]]] | None = None
        self._drawing = on_device(self.setup.device, "batches") if self.setup.device.type == "cuda" else None

    @property
    def model(self) -> nn.Module:
        """Tokens (B, T) → logits (B, T, V), as a training step calls it."""
        return self.parallel.model

    def _found(self, tokens: batches.Tokens | None) -> tuple[Setup, batches.Tokens]:
        """What has to be there, before processes wait for each other."""
        setup, plan = Setup.of(self.plan, self.world), self.plan
        if self.world.is_first:
            trackers.require(plan)
        tokens = tokens or batches.load(plan.data, vocab=plan.decoder.vocab, context=plan.decoder.context)
        wanted, there = (
            plan.train.eval_batches * plan.train.batch_size,
            tokens.validation.windows(plan.decoder.context + 1),
        )
        if wanted > there:
            raise InputError(f"train.eval_batches: {wanted} sequences in all are more than the {there} held out")
        require_host_memory(plan, setup, self.world)
        return setup, tokens

    def _build(self) -> None:
        setup, plan = self.setup, self.plan
        kind, why = self.world.on_first(lambda: kind_of(plan, setup, self.world))
        if why:
            self.reporter.log(why)
        self.engines = EngineSelector(plan, setup, self.world, sharded=kind == "fsdp")
        # what will be sharded goes to the device shard by shard
        home = torch.device("cpu") if kind == "fsdp" else setup.device
        self.prepared = prepare.prepare(plan, home, self.engines.make)
        for line in self.engines.lines():
            self.reporter.log(line)
        if setup.compiles:
            torch.compiler.reset()  # graphs of earlier plans count against the limit on recompiling
        self.parallel = Parallel(kind, self.prepared.model, setup, self.world)
        self.prepared.tensors = named_tensors(self.prepared.model)

    def _require_equal(self, own: dict[str, str]) -> None:
        """Raise SetupError where another process has other values of these: the run would be none of theirs."""
        found = self.world.gather(own)
        for rank, other in enumerate(found):
            for name, value in found[0].items():
                if other.get(name) != value:
                    raise shared(SetupError, f"rank {rank}: {name} is not that of rank 0; expected the same everywhere")

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (rows, context) of a step, this process's share of the batch.

        On CUDA the next ones are drawn meanwhile, in pinned memory.
        """
        if self._drawing is None:
            return self._draw(step)
        if self._prefetched is not None and self._prefetched[0] == step:
            pair = self._prefetched[1].result()
        else:
            pair = self._draw(step)
        self._prefetched = (step + 1, self._drawing.submit(self._draw, step + 1))
        return pair

    def _draw(self, step: int) -> tuple[Tensor, Tensor]:
        train, rows = self.plan.train, self.setup.rows
        share = slice(self.world.rank * rows, (self.world.rank + 1) * rows)
        pair = self.tokens.train.batch(train.seed, step, train.batch_size, self.plan.decoder.context, share)
        return (pair[0].pin_memory(), pair[1].pin_memory()) if self._drawing is not None else pair

    def step(self, watch: bool = False) -> tuple[float, float, dict[str, float]]:
        """One optimizer step: (loss before it, gradient norm before clipping, gradient norm per role if `watch`).

        All of the whole batch. Raises UnusableResult, before any weight changes, when the loss or a gradient is not finite.
        """
        train, micro_batch = self.plan.train, self.setup.micro_batch
        inputs, targets = self.batch(self.done)
        own = torch.zeros((), device=self.setup.device)
        for start in range(0, len(inputs), micro_batch):
            part = slice(start, start + micro_batch)
            on_device = (tensor[part].to(self.setup.device, non_blocking=True) for tensor in (inputs, targets))
            with self.parallel.exchanging(last=start + micro_batch >= len(inputs)):
                with self.setup.autocast():
                    loss = loss_of(self.model, *on_device) * (micro_batch / len(inputs))
                torch.autograd.backward(loss)
            own += loss.detach()
        gradients = [local(t.grad) for t in self.prepared.tensors.values() if t.grad is not None]
        norms = self.parallel.norms(gradients)
        asked = torch.full_like(own, float(self.world.grouped and self.stop() is not None))
        total, anyone = self.world.sum(torch.stack((own / self.world.size, asked))).unbind()
        loss_value, norm_value, stops = torch.stack((total, norms.norm(), anyone)).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise shared(UnusableResult, self._not_finite(loss_value, float(own), norms, inputs))
        if train.grad_clip and norm_value > train.grad_clip:
            torch._foreach_mul_(gradients, train.grad_clip / (norm_value + 1e-6))
        optimizer.set_rates(self.optimizer, self.factor(self.done))
        self.optimizer.step()
        self.prepared.refresh()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        self.asked_to_stop = stops > 0
        return loss_value, norm_value, self.watch(inputs, norms) if watch else {}

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

    def watch(self, inputs: Tensor, norms: Tensor) -> dict[str, float]:
        """Look at activations on the first of the inputs, and at the tensors' gradient norms; those norms by role."""
        by_tensor = dict(zip(self.prepared.tensors, norms.tolist(), strict=True))
        with self.setup.autocast(), self.parallel.looking(hooks=True):
            sizes = monitor.activation_sizes(self.prepared.model, inputs[:1].to(self.setup.device))
        for what, found in (("activation", sizes), ("gradient", by_tensor)):
            for message in self._monitor.warnings(self.done, what, found):
                self.reporter.warn(message)
        roles: dict[str, float] = {}
        for name, value in by_tensor.items():
            role = self._rows[name].role
            roles[role] = roles.get(role, 0.0) + value * value
        return {role: math.sqrt(value) for role, value in roles.items()}

    def _not_finite(self, loss: float, own: float, norms: Tensor, inputs: Tensor) -> str:
        """Where values stop being finite. All processes look, and pass the same batches: they may hold shards."""
        if not math.isfinite(loss):
            where = ""
            for part in torch.split(inputs, self.setup.micro_batch):
                with self.setup.autocast(), self.parallel.looking(hooks=True):
                    found = monitor.first_not_finite(self.prepared.model, part.to(self.setup.device))
                where = where or (found if found != "the loss" else "")
            places = self.world.gather(where or ("" if math.isfinite(own) else "the loss"))
            rank = next((rank for rank, place in enumerate(places) if place), 0)
            of = f" of rank {rank}" if self.world.size > 1 else ""
            first = f"the first tensor{of} that is not finite is {places[rank] or 'the loss'}"
            return f"step {self.done + 1}: the loss is {loss}; {first}"
        names = [
            name for name, value in zip(self.prepared.tensors, norms.tolist(), strict=True) if not math.isfinite(value)
        ]
        return f"step {self.done + 1}: the gradient of {names[0] if names else 'the model'} is not finite"

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean validation loss over the plan's evaluation batches, nats per token; each process takes its share of them."""
        train, losses, rows = self.plan.train, [], self.setup.micro_batch
        count = train.eval_batches * train.batch_size // rows
        with self.parallel.looking():
            for index in range(self.world.rank, count, self.world.size):
                pair = self.tokens.validation.evaluation(index, count, rows, self.plan.decoder.context)
                with self.setup.autocast():
                    losses.append(loss_of(self.parallel.inner, *(tensor.to(self.setup.device) for tensor in pair)))
        return float(self.world.sum(torch.stack(losses).mean() / self.world.size))

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
        in one process or in any of them, a checkpoint is written and Preempted raised. Raises UnusableResult on a loss that
        is not finite.
        """
        self.stop = stop
        return running.run(self, directory, resume, on_evaluation)
