"""The coordinate check of a user's model: made by the user's functions, trained a few steps by a plan, measured."""

from __future__ import annotations

import gc
import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from supar_cli.errors import InputError, UnusableResult
from supar_cli.experiments import coordinates
from supar_cli.experiments.coordinates import SHARE, Attentions, Sizes
from supar_cli.experiments.products import Products
from supar_cli.files import Record
from supar_cli.own.models import plain_operations
from supar_cli.own.prepared import prepare
from supar_cli.planning.layout_document import OwnShape
from supar_cli.planning.plan import Plan
from supar_cli.planning.plan_sections import OwnModel
from supar_cli.training.runtime import device_of
from supar_cli.user_code import calling_user_code, load_function

Function = str | Callable[..., Any]  # `module:function`, or the function itself


@dataclass(frozen=True, slots=True)
class OwnCode:
    """A user's functions: `factory(**size)` makes the model, `batches(seed, step)` a batch, `loss(model, batch)` its loss.

    Without `loss` the model itself returns it. `heads` are the tensors whose products leave the model.
    """

    factory: Function
    batches: Function
    loss: Function | None = None
    heads: tuple[str, ...] = ()

    def load(self) -> tuple[Callable[..., nn.Module], Callable[[int, int], Any], Callable[[nn.Module, Any], Tensor]]:
        """The three functions. Raises InputError for those that can't be imported."""
        loss = own_loss if self.loss is None else _load("--loss", self.loss)
        return _load("--factory", self.factory), _load("--batches", self.batches), loss

    @property
    def stays_here(self) -> bool:
        """Whether another process could not import one of the functions."""
        return any(callable(one) for one in (self.factory, self.batches, self.loss))

    @property
    def text(self) -> Record:
        """The names of the functions and the hashes of the files that they are in: with others it is another check."""
        named = {"factory": self.factory, "batches": self.batches, "loss": self.loss}
        found = {key: _load(f"--{key}", one) for key, one in named.items() if one is not None}
        return {key: f"{_name_of(named[key])} {_hash_of_file(one)}" for key, one in found.items()}


def own_code(
    own: OwnShape | None, factory: Function | None, batches: Function | None, loss: Function | None
) -> OwnCode | None:
    """The functions of a user's model, None for supar's own families. Raises InputError for those that are missing."""
    given = {"factory": factory, "batches": batches, "loss": loss}
    if own is None:
        if named := [name for name, one in given.items() if one is not None]:
            raise InputError(*(f"{name}: is for a model of your own, whose model.family is own" for name in named))
        return None
    document = own.read_layout()
    factory = factory or own.factory or document.factory
    missing = [name for name, one in (("factory", factory), ("batches", batches)) if one is None]
    if factory is None or batches is None:
        raise InputError(*(f"{name}: is missing; expected module:function, such as mymodel:{name}" for name in missing))
    code = OwnCode(factory, batches, loss, tuple(row.name for row in document.tensors if "head" in row.uses))
    code.load()
    return code


def _load(flag: str, name: Function) -> Callable[..., Any]:
    found: Any = name if callable(name) else load_function(name, flag)
    if not callable(found):
        raise InputError(f"{flag} {name}: is a {type(found).__name__}; expected a function")
    return found  # type: ignore[no-any-return]


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that a model returns for a batch: `.loss`, or the only number among what it returns. Raises InputError."""
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple) else model(batch)
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if found is None:
        parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else [output]
        numbers = [part for part in parts if isinstance(part, Tensor) and part.numel() == 1]
        found = numbers[0] if len(numbers) == 1 else None
    if found is None:
        what = f"the model returns a {type(output).__name__} without a loss"
        raise InputError(f"--loss: {what}; expected module:function of a function loss(model, batch)")
    return found  # type: ignore[no-any-return]


def measure(plan: Plan, code: OwnCode) -> Record:
    """As `coordinates.measure`, of a user's model. `not_measured` has what could not be, in sentences."""
    watch = OwnWatch(plan, code)
    model = plan.model
    assert isinstance(model, OwnModel)
    found = coordinates.measure_with(watch, plan, {"size": model.target})
    not_measured = watch.not_measured
    del watch  # model, hooks and optimizer refer to each other, and Python seldom looks for such circles by itself
    gc.collect()
    return {**found, "not_measured": not_measured}


def measured_step(code: OwnCode, plan: Plan) -> Callable[[], object]:
    """As `coordinates.measured_step`."""
    return OwnWatch(plan, code).step


class OwnWatch:
    """Trains a user's model by a plan, at a constant rate and without clipping, and finds the products of its tensors."""

    def __init__(self, plan: Plan, code: OwnCode) -> None:
        assert isinstance(plan.model, OwnModel)
        make, self.batches, self.loss = code.load()
        self.loss_text = f"--loss {code.loss}" if isinstance(code.loss, str) else "loss"
        torch.manual_seed(plan.train.seed)
        self.device, self.seed, self.done = device_of(plan.run.device), plan.train.seed, 0
        with calling_user_code("factory"):
            self.model = make(**plan.model.target).to(self.device).train()
        self.optimizer = prepare(self.model, plan).optimizer()
        roles = {row.name: row.role for row in plan.tensors if row.tied_to is None}
        self.hidden = [name for name, role in roles.items() if role == "hidden"]
        self.heads = [name for name, role in roles.items() if role == "unembedding" or name in code.heads]
        self.norms = [name for name, role in roles.items() if role in ("norm", "bias")]
        self.tables = [name for name, role in roles.items() if role == "embedding"]
        self._running: list[str] = []  # names of the modules that are running, the innermost last
        for name, module in self.model.named_modules():
            module.register_forward_pre_hook(partial(self._enter, name))
            module.register_forward_hook(self._leave, always_call=True)
        self.not_measured: list[str] = []

    def _enter(self, name: str, *_: Any) -> None:
        self._running.append(name)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def step(self) -> tuple[float, Sizes]:
        """Make one optimizer step; return the loss before it and the sizes."""
        with calling_user_code("batches"):
            batch = _to(self.device, self.batches(self.seed, self.done))
        before = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        random = self._random_states()
        with plain_operations(), self._products(batch) as one:
            with Attentions(self._place) as attentions, calling_user_code("loss"):
                loss = self.loss(self.model, batch)
            if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
                what = (
                    f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
                )
                raise InputError(f"{self.loss_text}: returned {what}; expected one number that depends on the weights")
            one.is_backward = True
            torch.autograd.backward(loss)
        value = float(loss.detach())
        if not torch.isfinite(loss):
            raise UnusableResult(f"step {self.done + 1}: the loss is {value}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1
        with torch.no_grad(), torch.random.fork_rng(self._gpus):
            self._set_random_states(random)
            with plain_operations(), Attentions(self._place) as attentions_after, self._products(batch) as after:
                self.loss(self.model, batch)
            sizes = self._sizes(one, after, before) | _attention_sizes(attentions, attentions_after)
        self._say_what_is_missing(one, sizes)
        return value, coordinates.finite(sizes)

    @property
    def _gpus(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    def _random_states(self) -> list[Tensor]:
        """The states that dropout and the like draw from, on the CPU and on the device."""
        return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._gpus)]

    def _set_random_states(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for gpu, state in zip(self._gpus, states[1:], strict=True):
            torch.cuda.set_rng_state(state, gpu)

    def _place(self) -> str:
        """The name of the module that is running."""
        return self._running[-1] if self._running else ""

    def _products(self, batch: Any) -> Products:
        named = dict(self.model.named_parameters())
        weights, norms, tables = (
            {name: named[name] for name in names} for names in ([*self.hidden, *self.heads], self.norms, self.tables)
        )
        return Products(weights, self.heads, norms, tables, batch)

    def _sizes(self, one: Products, after: Products, before: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """All that is measured of products, from those before the step and those of the same batch after it."""
        now = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        hidden = {name: one.found[name] for name in self.hidden if name in one.found}
        heads = {name: one.found[name] for name in self.heads if name in one.found and one.found[name].outputs}
        share = {name: head.change(before, {name: now[name]}) for name, head in heads.items()}
        for name, head in heads.items():
            gains = sorted(head.norms, key=self.norms.index)
            if gains:  # the gain names gain and shift
                key = gains[0] if len(heads) == 1 else f"{gains[0]} before {name}"
                share[key] = head.change(before, {gain: now[gain] for gain in gains})
        return {
            "activation": {name: product.activation for name, product in hidden.items()},
            "gain": {name: product.gain for name, product in hidden.items() if product.input_gradients},
            "update": {name: product.change(before, {name: now[name]}) for name, product in hidden.items()},
            "logits": {name: head.logits for name, head in heads.items()},
            "Δlogits": {name: _mean_change(head.outputs, after.found[name].outputs) for name, head in heads.items()},
            SHARE: share,
        }

    def _say_what_is_missing(self, one: Products, sizes: dict[str, dict[str, Tensor]]) -> None:
        missing = [name for name in [*self.hidden, *self.heads] if not one.found[name].outputs]
        said = [f"{name}: no product of it was found, so nothing of it is measured" for name in missing]
        if not sizes["attention"]:
            said.append("q·k: the model does not call scaled_dot_product_attention, so it is not measured")
        if not self.heads:
            said.append("logits: no tensor's product leaves the model, so they are not measured")
        self.not_measured += [text for text in said if text not in self.not_measured]


def _attention_sizes(before: Attentions, after: Attentions) -> dict[str, dict[str, Tensor]]:
    """Mean |q·k| and its mean |change| by the module that calls."""
    calls: dict[str, list[int]] = {}
    for at, place in enumerate(before.places):
        calls.setdefault(place or "attention", []).append(at)
    sizes = {
        place: torch.cat([before.scores[at].flatten() for at in found]).abs().mean() for place, found in calls.items()
    }
    if before.places != after.places:
        return {"attention": sizes, "Δattention": {}}
    changes = {
        place: _mean_change([before.scores[at] for at in found], [after.scores[at] for at in found])
        for place, found in calls.items()
    }
    return {"attention": sizes, "Δattention": changes}


def _mean_change(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Mean |change| of outputs; NaN where their shapes are not the same."""
    if [one.shape for one in before] != [one.shape for one in after]:
        return torch.tensor(torch.nan)
    changes = [(new - old).abs() for old, new in zip(before, after, strict=True)]
    return torch.cat([change.flatten() for change in changes]).mean()


def _to(device: torch.device, batch: Any) -> Any:
    """A batch with its tensors on the device; mappings become dictionaries."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _to(device, part) for name, part in batch.items()}
    return type(batch)(_to(device, part) for part in batch) if isinstance(batch, list | tuple) else batch


def _name_of(function: Function | None) -> str:
    return function if isinstance(function, str) else getattr(function, "__qualname__", type(function).__name__)


def _hash_of_file(function: Callable[..., Any]) -> str:
    """The hash of the file that a function, a partial one or a callable object's class is in; empty where there is none."""
    inner = inspect.unwrap(function.func if isinstance(function, partial) else function)
    try:
        path = inspect.getsourcefile(inner if hasattr(inner, "__qualname__") else type(inner))
    except TypeError:  # built in
        path = None
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if path and Path(path).is_file() else ""
