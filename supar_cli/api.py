"""The public Python API: documents in, documents out. torch is imported by `train` and `weights` only."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.planning.rules import Name
from supar_cli.planning.spec import Proxy, Sparsity, Spec, Target, parse
from supar_cli.planning.sweep import Sweep
from supar_cli.planning.transfer import transfer as _transfer

if TYPE_CHECKING:
    from torch import Tensor

KINDS: dict[str, type[Spec] | type[Proxy] | type[Plan] | type[Sweep]] = {
    "supar.spec/v1": Spec,
    "supar.proxy/v1": Proxy,
    "supar.plan/v1": Plan,
    "supar.sweep/v1": Sweep,
}


def load(path: str | Path) -> Spec | Proxy | Plan | Sweep:
    """The document in a file, as its kind says. Raises InputError with every problem in it."""
    found = document.read_file(str(path))
    if len(found) != 1:
        raise InputError(f"{path}: holds {len(found)} documents; expected one")
    kind = found[0].data.get("kind") if isinstance(found[0].data, dict) else None
    if kind not in KINDS:
        raise InputError(found[0].problem(("kind",), f"is {kind!r}", f"expected one of {', '.join(KINDS)}"))
    return parse(KINDS[kind], found[0])


def transfer(
    proxy: Proxy,
    *,
    sparsity: float | str | None = None,
    density: float | str | None = None,
    parameterization: Name = "supar",
    allow_low_wpn: bool = False,
    **target: Any,
) -> Plan:
    """The plan of a target; keywords as the flags of `supar transfer` (width, layers, steps, …). Raises InputError."""
    drawn = {name: target.pop(name) for name in ("pattern", "block", "distribution", "overrides") if name in target}
    wanted: dict[str, Any] = {**proxy.target.model_dump(), **target}
    if target.get("width") is not None:  # as the flags: a target's own heads and FFN width belong to its own width
        wanted |= {name: target.get(name) for name in ("heads", "kv_heads", "ffn_width")}
    if any(target.get(name) is not None for name in ("steps", "tokens", "tokens_per_parameter")):
        wanted |= {name: target.get(name) for name in ("steps", "tokens", "tokens_per_parameter")}
    if proxy.data.hash is None:
        proxy = proxy.model_copy(update={"data": corpus.identified(proxy.data)})
    own: dict[str, Any] = proxy.target.sparsity.model_dump()
    try:
        if sparsity is not None or density is not None:
            level: dict[str, Any] = {
                "sparsity": None if sparsity is None else float(sparsity),
                "density": None if density is None else float(density),
            }
            wanted["sparsity"] = Sparsity(**(own | level | drawn))
        elif drawn:
            wanted["sparsity"] = Sparsity(**(own | drawn))
        found = Target(**wanted)
    except ValueError as error:  # pydantic's ValidationError is one
        raise InputError(str(error)) from None
    return _transfer(proxy, found, parameterization, allow_low_wpn=allow_low_wpn)


def train(plan: Plan, directory: str | Path, *, resume: bool = True, force: bool = False) -> dict[str, Any]:
    """Train a plan in a run directory, from its last checkpoint, and return its result document. Raises SuparError.

    In a script that torchrun started, its processes train it together. Without `resume` a directory that holds a run is
    refused; with `force` it starts again.
    """
    from supar_cli.training import run_directory, trainer
    from supar_cli.training.distributed import Ranks, init_distributed

    def trained(ranks: Ranks) -> dict[str, Any]:
        goes_on = resume and not force
        with ExitStack() as stack:
            ready = trainer.Trainer(plan, ranks=ranks)
            opening = run_directory.open_run(Path(directory), plan, resume=goes_on, force=force)
            ranks.on_main(stack.enter_context, opening)
            ready.run(Path(directory), resume=goes_on)
            return dict(ranks.on_main(run_directory.read_result, Path(directory) / "result.json"))

    with init_distributed() as ranks:
        return trained(ranks)


def weights(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of a run's newest checkpoint by plan name, in the plan's shapes, float32, zero where dead.

    Raises InputError where there is none, SetupError where it is corrupt.
    """
    from supar_cli.training import checkpoint

    found = checkpoint.available(Path(directory) / "checkpoints")
    if not found:
        raise InputError(f"{directory}: no checkpoint there; expected the directory of a run")
    plan = load(found[-1] / "plan.yaml")
    if not isinstance(plan, Plan):
        raise InputError(f"{found[-1] / 'plan.yaml'}: is not a plan")
    return checkpoint.weights(found[-1], plan)
