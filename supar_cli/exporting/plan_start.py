"""What a plan starts from where a model is given: masks that keep its zeros dead, and its values as the target needs them."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from supar_cli.errors import InputError
from supar_cli.exporting.stored_model import CONFIG, RECORD, StoredModel, open_model, scaled
from supar_cli.planning.folding import standard_factors
from supar_cli.planning.live_counts import GivenMasks
from supar_cli.planning.plan import Plan
from supar_cli.planning.plan_sections import MaskSource, Values
from supar_cli.planning.spec import Proxy, Sparsity, Target
from supar_cli.planning.transfer import target_model, transfer
from supar_cli.sparse.mask_files import find_masks, require_spread, write_masks, write_values
from supar_cli.sparse.masks import Mask
from supar_cli.training.prepare import make_masks, start_rows
from supar_cli.training.pruning import sum_of_squares

SIZES = ["width", "layers", "heads", "kv_heads", "head_width", "ffn_width"]  # that have flags in `supar transfer`
# keys that a target takes from its proxy, by what the model reads
OF_PROXY = {
    "tokens": ["vocab", "norm", "norm_eps", "activation", "positions", "bias", "tied"],
    "images": ["image", "channels", "patch", "classes", "pooling", "norm_eps", "activation", "bias"],
}
MOST_ZEROS = 0.01  # chosen: more zeros than a trained dense tensor has


def open_for_target(path: Path, proxy: Proxy, target: Target) -> StoredModel:
    """A model whose values the target can start from. Raises InputError that names every key in which they differ."""
    if proxy.model.family == "own":
        remedy = "`prepare(model, plan, initialise=False)`, which keeps the values that the model has"
        raise InputError(f"values: a plan of your own model holds none; expected {remedy}")
    stored = open_model(path)
    positions, kind = stored.decoder.positions, stored.decoder.data_kind
    sizes = SIZES + ["context"] * (positions == "learned" and kind == "tokens")
    of_proxy = OF_PROXY[kind] + ["rope_theta"] * (positions == "rope")
    _require_same_model("values", stored, proxy, target, sizes, of_proxy)
    return stored


def take_masks(path: Path, out: Path, proxy: Proxy, target: Target, start: StoredModel | None) -> GivenMasks:
    """The masks at a path for a target's hidden tensors, written to `out`; `start` is the model there if it is open.

    A run has its masks; of another model's weights the zeros are the dead ones. Raises InputError and SetupError.
    """
    _require_apart("masks", out, path)
    dense = transfer(proxy, target.model_copy(update={"sparsity": Sparsity(density=1.0)}))
    hidden = {row.name: (tuple(row.shape), tuple(row.fan_in_axes)) for row in dense.tensors if row.role == "hidden"}
    if proxy.model.family != "own" and (start or _is_model(path)):
        stored = start or open_model(path)
        is_gated = [one.activation == "swiglu" for one in (stored.decoder, proxy.decoder)]
        _require_same_model("masks", stored, proxy, target, SIZES, ["activation"] * (is_gated[0] != is_gated[1]))
        found = _masks_of(stored, hidden)
    else:
        found = find_masks(path, hidden)
    source = MaskSource(kind="file", path=str(out.resolve()), hash=write_masks(out, found))
    return GivenMasks(source, {name: mask.count for name, mask in found.items()})


def start_from(plan: Plan, stored: StoredModel, out: Path) -> tuple[Plan, list[str]]:
    """The plan with the values of a model, written to `out`, and what to warn of.

    Each tensor is multiplied once, by the model's factor over the target's, so that the target computes what the model does.
    Raises InputError, naming every tensor, for values that can't be trained, SetupError where a file can't be written.
    """
    _require_apart("values", out, stored.path)
    if str(out.resolve()) == plan.sparsity.source.path:
        raise InputError(f"values_out: {out} holds the plan's masks; expected another file")
    own, masks, values = standard_factors(plan.decoder), make_masks(plan), dict[str, Tensor]()
    sizes, zeros, cut, problems = dict[str, float](), dict[str, float](), dict[str, float](), list[str]()
    for row in start_rows(plan):
        if row.role == "bias" and not stored.decoder.bias:
            whole = torch.zeros(row.shape)
        else:
            whole = scaled(stored.read(row.name), stored.factors[row.name] / own[row.name])
        mask = masks.get(row.name)
        value = values[row.name] = whole if mask is None else live_values(whole, mask)
        sizes[row.name], live = sqrt(sum_of_squares(value) / value.numel()), int(value.count_nonzero())
        zeros[row.name] = 1 - live / value.numel()
        cut[row.name] = 1 - live / max(1, int(whole.count_nonzero()))
        if not np.isfinite(sizes[row.name]):
            problems.append(f"values: {row.name}: holds values that are not finite in float32")
        elif mask is not None and not live:
            problems.append(f"values: {row.name}: all live weights would start at 0; expected other masks or values")
    if problems:
        raise InputError(*problems)
    written = write_values(out, values)
    source = Values(source="file", path=str(out.resolve()), hash=written, model=str(stored.path))
    given = {"init": "file", "init_constant": None}
    rows = [row.model_copy(update={**given, "init_std": sizes[row.name]}) for row in plan.tensors]
    plan = Plan(**{**vars(plan), "values": source, "tensors": rows})
    return plan, _warnings(plan, stored, zeros, cut)


def live_values(whole: Tensor, mask: Mask) -> Tensor:
    """The values (live,) of a tensor under a mask, in row-major order."""
    return whole[torch.from_numpy(mask.alive())]


def _warnings(plan: Plan, stored: StoredModel, zeros: dict[str, float], cut: dict[str, float]) -> list[str]:
    """What to say of a start; by tensor the shares of its live weights that are 0, and of the model's that are dead."""
    found = [f"values: {note}" for note in stored.notes]
    hidden = [row.name for row in plan.tensors if row.role == "hidden"]
    rows = [row for row in plan.tensors if row.role != "bias" and zeros[row.name] == 1]
    if rows:
        found.append(f"values: {', '.join(row.name for row in rows)}: all values are 0")
    if plan.decoder.bias and not stored.decoder.bias:
        found.append(f"values: {stored.path} has no biases but 0, with which those of the target start")
    most = max(hidden, key=lambda name: zeros[name])
    if plan.sparsity.source.kind == "random" and zeros[most] >= MOST_ZEROS:
        what = f"zeros of {stored.path} start as live weights, {100 * zeros[most]:.3g} % of {most}"
        found.append(f"values: {what}; `--masks PATH` keeps them dead")
    most = max(hidden, key=lambda name: cut[name])
    if plan.sparsity.source.kind == "random" and cut[most]:
        what = f"the masks are drawn at random, so that {100 * cut[most]:.3g} % of what lives of {most} is dropped"
        found.append(f"values: {what}; `supar prune` keeps a run's largest weights, `--masks PATH` those of PATH")
    context = stored.decoder.context
    if context != plan.decoder.context:
        found.append(f"values: the context of {stored.path} is {context}, that of the target {plan.decoder.context}")
    return found


def _require_same_model(
    where: str, stored: StoredModel, proxy: Proxy, target: Target, sizes: list[str], of_proxy: list[str]
) -> None:
    """Raise InputError unless the target has the model's sizes and the proxy its other keys; it says what would fit."""
    problems, kind = list[str](), proxy.decoder.data_kind
    if stored.decoder.data_kind != kind:
        raise InputError(f"{where}: {stored.path} reads {stored.decoder.data_kind}; expected a model of {kind}")
    try:
        model = target_model(proxy.decoder, target)
    except InputError as error:
        raise InputError(*error.problems, f"{where}: {stored.path} fits with {_flags(stored, sizes)}") from None
    own, other = vars(model), vars(stored.decoder)
    for keys, flags in ((sizes, _flags(stored, sizes)), (of_proxy, "")):
        differ = {key: _text(other[key]) for key in keys if own[key] != other[key]}
        if own["bias"] and not other["bias"]:
            differ.pop("bias", None)  # biases of 0 change nothing
        found = ", ".join(f"{key} {value}, not {_text(own[key])}" for key, value in differ.items())
        expected = flags or "a proxy with " + ", ".join(f"model.{key}: {value}" for key, value in differ.items())
        if differ:
            problems.append(f"{where}: {stored.path} has {found}; expected {expected}")
    if problems:
        raise InputError(*problems)


def _flags(stored: StoredModel, keys: list[str]) -> str:
    return " ".join(f"--{key.replace('_', '-')} {vars(stored.decoder)[key]}" for key in keys)


def _text(value: object) -> str:
    """A value as documents have it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _masks_of(stored: StoredModel, hidden: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[str, Mask]:
    """The masks of a model's hidden tensors, given as name: (shape, fan-in axes), where any weight is dead."""
    masks, problems = dict[str, Mask](), list[str]()
    for name, (shape, fan_in_axes) in hidden.items():
        own = stored.masks.get(name) if stored.masks is not None else Mask.of((stored.read(name) != 0).numpy())
        if own is None:
            continue
        masks[name] = own
        try:
            require_spread(masks[name], shape, fan_in_axes)
        except ValueError as error:
            problems.append(f"{stored.path}: {name}: {error}")
    if problems:
        raise InputError(*problems)
    return {name: mask for name, mask in masks.items() if mask.count < mask.size}


def _is_model(path: Path) -> bool:
    """Whether a run, a checkpoint, a stock model or an export is at a path, and not files of masks or weights by name."""
    return any((path / name).exists() for name in ("manifest.json", "checkpoints", CONFIG, RECORD))


def _require_apart(what: str, out: Path, path: Path) -> None:
    if out.exists() and out.resolve() in (path.resolve(), path.resolve() / out.name):
        raise InputError(f"{what}_out: {out} would replace what {what} are read from; expected another file")
