"""A user's model under a plan: initialised and masked in place, its optimizer grouped, its dead weights kept at 0."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from supar_cli.errors import InputError
from supar_cli.files import naming_write_errors, write_file
from supar_cli.own import dead_weights, initial, modules
from supar_cli.own.dead_weights import DeadWeights
from supar_cli.own.guard import STEP, Kept, kept, kept_of
from supar_cli.own.masked_model import MaskedModel
from supar_cli.own.moving import MASKS, masks_of_state, move, read_state
from supar_cli.own.oversights import InitialValues
from supar_cli.own.parameters import local_shard, match
from supar_cli.planning import document
from supar_cli.planning.plan import OwnModel, Plan, read_plan
from supar_cli.sparse.mask_files import write_masks
from supar_cli.sparse.masks import Mask
from supar_cli.training.prepare import make_masks


def prepare(
    model: nn.Module,
    plan: Plan,
    *,
    initialise: bool | Collection[str] = True,
    masks: Mapping[str, Any] | None = None,
    engine: Literal["sparse"] | None = None,
    state: Mapping[str, Any] | None = None,
) -> Prepared:
    """Initialise and mask a model of your own by its plan, in place; its `Prepared` makes the optimizer.

    `initialise`: False keeps all values, as after loading; names of modules or tensors initialise those alone. `masks`: by
    name a mask, or a tensor whose non-zeros live; by default the plan's. `engine="sparse"` multiplies masked nn.Linear
    layers on CPU at live weights only. `state`: what `Prepared.state_dict` returned, where masks of a run have moved.
    Raises InputError with every difference between the plan and the model.
    """
    if not isinstance(plan, Plan) or not isinstance(plan.model, OwnModel):
        found = plan.model.family if isinstance(plan, Plan) else type(plan).__name__
        raise InputError(f"plan: {found}; expected the plan of a model of your own, as supar.load reads it")
    chosen = initial.names_to_initialise(plan, initialise)
    tensors = match(model, plan)
    if state is not None and (initialise is True or masks is not None):
        raise InputError("state: is of a run that has begun; expected it with initialise=False and without masks=")
    step, found_masks = (0, initial.masks_of(plan, masks)) if state is None else masks_of_state(plan, state)
    modules.require_engine(engine, model, plan, found_masks)
    chosen = {name for name, tensor in tensors.items() if name in chosen and tensor.requires_grad}
    dead = {name: DeadWeights(mask, tensors[name]) for name, mask in found_masks.items() if name in tensors}
    initial.require_kept(plan, tensors, dead, tensors.keys() - chosen, is_given=masks is not None)
    initial.fill(plan, tensors, found_masks, chosen)
    initial.keep_padding(model, tensors, chosen)
    with torch.no_grad():
        for name, weights in dead.items():
            weights.zero_(tensors[name])
    if (factor := plan.model.hooks.get("")) is not None:
        text = f"no tensor of the model can take the output multiplier; multiply the logits by {factor!r} in your forward pass"
        warnings.warn(f"model.hooks: {text}", stacklevel=2)
    is_drawn = masks is None and state is None and plan.sparsity.source.kind == "random"
    made = _prepared_at(step, model, plan, found_masks, engine, is_drawn)
    made.initial_values = InitialValues({name: tensors[name] for name in sorted(chosen)})
    return made


class Prepared(MaskedModel):
    """What holds between a model and its plan. `masks` are by the plan's names of tensors.

    After what gives the model other parameters (fully_shard, deepcopy), call `attach`, or `optimizer`, which does it.
    Raises InputError at a step of a kept optimizer whose groups, or the model's weights, are not the plan's any more.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, masks: Mapping[str, Mask], engine: str | None, is_drawn: bool
    ) -> None:
        super().__init__(model, plan, masks, engine)
        self._is_drawn = is_drawn

    def __reduce__(self) -> Any:
        """A copy or pickle has the model with it, prepared as here, and no optimizer."""
        return _prepared_at, (self.step, self.model, self.plan, self.masks, self._engine, self._is_drawn)

    def groups(self, model: nn.Module | None = None) -> list[dict[str, Any]]:
        """Parameter groups for AdamW, Adam without decay or SGD, as the plan's `train.optimizer` says.

        Each has `names` and `ratio`, its rate divided by the tuned one. Frozen parameters are in none. The first group has
        the tuned rate where any has.
        """
        self.attach(self.model if model is None else model)
        grouped: dict[tuple[float, ...], dict[str, Any]] = {}
        eta = self.plan.hyperparameters.lr
        for name, tensor in self.tensors.items():
            if not tensor.requires_grad:
                continue
            row = self.rows[name]
            numbers = {"lr": row.lr, "weight_decay": row.weight_decay}
            if self.plan.train.optimizer == "adamw":
                numbers["eps"] = row.eps
            new = {**numbers, "params": [], "names": [], "ratio": row.lr / eta}
            group = grouped.setdefault((*numbers.values(), *self.density_key(row)), new)
            group["params"].append(tensor)
            group["names"].append(name)
        found = sorted(grouped.values(), key=lambda group: group["lr"] != eta)
        if not found:
            raise InputError("groups: every parameter is frozen; expected one that requires_grad")
        if found[0]["lr"] != eta:
            what = f"no group has the tuned rate {eta:g}; a scheduler or log line that reads the first group sees"
            warnings.warn(f"{what} {found[0]['lr']:g}", stacklevel=2)
        return found

    def optimizer(
        self, model: nn.Module | None = None, *, clip: float | None = None, **options: Any
    ) -> torch.optim.Optimizer:
        """The plan's AdamW or SGD, kept; `clip` limits the gradients' norm before each step (0: no limit), as `clip_grad_norm_` does.

        `options` go to torch's class, such as betas, momentum or foreach. `defaults["lr"]` is the tuned rate.
        """
        if fixed := options.keys() & {"lr", "eps", "weight_decay", "params"}:
            raise InputError(*(f"{name}: is the plan's, tensor by tensor; expected it in the plan" for name in fixed))
        if clip is not None and not clip >= 0:
            raise InputError(f"clip: {clip}; expected a number above 0, or 0 for none")
        groups, train, eta = self.groups(model), self.plan.train, self.plan.hyperparameters.lr
        tensors = [tensor for group in groups for tensor in group["params"]]
        if not options.keys() & {"fused", "foreach", "capturable", "differentiable"}:
            is_whole = all(local_shard(tensor) is tensor for tensor in tensors)  # fused SGD can't update shards
            is_fast = all(tensor.device.type in ("cpu", "cuda") for tensor in tensors)
            options["fused"] = is_fast and (is_whole or train.optimizer == "adamw")
        made: torch.optim.Optimizer
        if train.optimizer == "adamw":
            made = torch.optim.AdamW(groups, **{"lr": eta, "betas": tuple(train.betas), **options})
        else:
            made = torch.optim.SGD(groups, **{"lr": eta, "momentum": train.momentum, **options})
        self._keep(made, clip=clip or None, is_whole=True)
        return made

    def keep(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Hold the masks in any optimizer of this model: dead weights are set to 0 after each step, their moments now.

        Where its groups are those of `groups()`, their numbers are held too. Raises InputError for numbers of the plan in an
        optimizer for which they are wrong; warns where the plan gives masks and no numbers.
        """
        inner = getattr(optimizer, "optimizer", optimizer)  # inside of a wrapper
        before = kept[inner][0] if inner in kept else None
        clip, is_whole = (None, False) if before is None else (before.clip, before.is_whole)
        self._keep(inner, clip=clip, is_whole=is_whole)
        return optimizer

    def set_rate(self, lr: float) -> None:
        """Set the tuned rate: every group of the kept optimizers gets lr times its ratio."""
        for optimizer, _ in kept_of(self):
            for group in optimizer.param_groups:
                if "ratio" in group and isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr * group["ratio"])
                elif "ratio" in group:
                    group["lr"] = lr * group["ratio"]

    def update(self) -> bool:
        """Change the masks as the plan says: call it after each optimizer.step(), in every process. True where they changed.

        It counts the steps that kept optimizers have made, and does nothing where none was made (accumulated gradients, a
        step that a GradScaler skipped) or where the plan's masks stay. Raises InputError where processes chose other masks.
        """
        optimizers = kept_of(self)
        if self.schedule is None or not any(one.unfinished for _, one in optimizers):
            return False
        self.step += 1
        if changes := self.schedule.is_update(self.step):
            states = [item for optimizer, _ in optimizers for item in optimizer.state.items()]
            move(self, {self.by_id[id(tensor)].name: state for tensor, state in states if id(tensor) in self.by_id})
        for optimizer, one in optimizers:
            one.unfinished = 0
            for group in optimizer.param_groups:
                group[STEP] = self.step
        self.get_ready()
        return changes

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside model and optimizer where masks move: the plan's hash, the step, packed masks."""
        masks = {name: torch.from_numpy(mask.bits.copy()) for name, mask in self.masks.items()}
        return {"plan": self.plan.hash(), "step": self.step, "masks": masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the step and the masks of a state, before or after model and optimizer are loaded; no weight is changed.

        Raises InputError for the state of another plan.
        """
        self.step, self.masks = masks_of_state(self.plan, state)
        for _, one in kept_of(self):
            one.unfinished = 0
        self.attach(self.model)

    def save(self, folder: str | Path) -> None:
        """Write plan.yaml into a folder, and masks.safetensors unless they are those that the plan draws.

        Raises SetupError where they can't be written.
        """
        folder, plan = Path(folder), self.plan
        with naming_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if self.schedule is not None:
                write_masks(folder / MASKS, self.masks)
                plan = plan.model_copy(update={"meta": {**plan.meta, STEP: self.step}})
            elif not self._is_drawn:
                written = write_masks(folder / MASKS, self.masks)
                plan = _with_source(plan, kind="file", path=MASKS, hash=written)
            write_file(folder / "plan.yaml", document.write([plan.model_dump()]))

    def load(self, folder: str | Path) -> None:
        """Take the step and the masks that `save` wrote into a folder, if the plan's masks move. Raises InputError or SetupError."""
        if self.schedule is not None:
            self.load_state_dict(read_state(Path(folder)))

    def verify(self, folder: str | Path) -> None:
        """Raise InputError, naming each tensor, unless a folder's plan and masks and the model's weights agree.

        Raises SetupError where the folder can't be read. Every rank calls it where tensors are sharded.
        """
        path = Path(folder) / "plan.yaml"
        saved = read_plan(path)
        ours, theirs = (
            _with_source(plan, kind="random", path=None, hash=None).experiment() for plan in (self.plan, saved)
        )
        problems = [f"{path}: {key}: differs from the plan in use" for key in ours if ours[key] != theirs.get(key)]
        if not problems:
            is_moving = self.schedule is not None
            masks = masks_of_state(self.plan, read_state(path.parent))[1] if is_moving else make_masks(saved)
            differ = [name for name, mask in self.masks.items() if masks.get(name) != mask]
            problems = [f"{path.parent}: {name}: the saved mask is another one than that in use" for name in differ]
        problems += [initial.live_text(name, count) for name, count in self.check().items()]
        if problems:
            raise InputError(*problems)

    def _keep(self, optimizer: torch.optim.Optimizer, *, clip: float | None, is_whole: bool) -> None:
        if not any(id(tensor) in self.by_id for group in optimizer.param_groups for tensor in group["params"]):
            what = "none of the optimizer's parameters is the prepared model's"
            raise InputError(f"keep: {what}; call attach(model) after what made new ones, then make the optimizer")
        Kept(self, optimizer, clip, is_whole, _has_numbers(self.plan, optimizer))


def _prepared_at(step: int, model: nn.Module, plan: Plan, masks: Mapping[str, Mask], *how: Any) -> Prepared:
    """A model whose values and masks are those after a step."""
    made = Prepared(model, plan, masks, *how)
    made.step = step
    made.get_ready()
    return made


def _has_numbers(plan: Plan, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer trains by the plan's numbers. Warns where it does not, or where that is not known to be right.

    Raises InputError where they are wrong: multipliers fold exactly into AdamW, Adam without decay and SGD alone.
    """
    kind, groups, wanted = type(optimizer).__name__, optimizer.param_groups, plan.train.optimizer
    has_numbers = any("ratio" in group for group in groups)
    if isinstance(optimizer, torch.optim.Adam):
        is_decoupled = isinstance(optimizer, torch.optim.AdamW)
        coupled = [g for g in groups if g["weight_decay"] and not g.get("decoupled_weight_decay", is_decoupled)]
        is_exact = wanted == "adamw" and not coupled
    else:
        is_exact = wanted == "sgd" and isinstance(optimizer, torch.optim.SGD)
    if has_numbers and is_exact:
        return True
    known = "AdamW, Adam without weight decay" if wanted == "adamw" else "SGD"
    if has_numbers and type(optimizer).__module__.startswith("torch.optim"):
        what = f"{kind}: the plan's rates, decay and epsilon are those of {known}, and wrong here"
        raise InputError(f"{what}; expected prepared.optimizer(), or groups with numbers of your own, kept by keep()")
    what = f"{kind}: its numbers are not the plan's: the masks hold, its rates and decay are yours"
    if has_numbers:
        what = f"{kind}: the plan's numbers hold for {known}; whether {kind} is one is not known"
    warnings.warn(what, stacklevel=4)
    return has_numbers


def _with_source(plan: Plan, **source: str | None) -> Plan:
    """The plan with masks from elsewhere."""
    sparsity = plan.sparsity.model_copy(update={"source": plan.sparsity.source.model_copy(update=source)})
    return plan.model_copy(update={"sparsity": sparsity})


_noticed: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def _notice(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Warn, at its first step, of an optimizer of a prepared model that is not kept: nothing holds the plan's numbers there."""
    if optimizer in _noticed or optimizer in kept:
        return
    _noticed.add(optimizer)
    has_numbers = any("ratio" in group for group in optimizer.param_groups)
    if dead_weights.is_prepared(tensor for group in optimizer.param_groups for tensor in group["params"]):
        what = "and nothing watches its numbers" if has_numbers else "by numbers that are not the plan's"
        remedy = "expected prepared.optimizer(), or prepared.keep(optimizer)"
        warnings.warn(f"{type(optimizer).__name__}: trains a prepared model, {what}; {remedy}", stacklevel=3)
    elif has_numbers and all("names" in group for group in optimizer.param_groups):  # copied or pickled with its model
        what = "has a plan's groups and parameters that are not a prepared model's, so no mask holds there"
        remedy = "if the model was copied: expected prepared.optimizer(copy)"
        warnings.warn(f"{type(optimizer).__name__}: {what}; {remedy}", stacklevel=3)


register_optimizer_step_pre_hook(_notice)  # of every optimizer, so that one made without supar is noticed
