"""The public Python API: documents in, documents out, with the command line's words for what is wrong.

torch is imported by what runs something only.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.planning import document
from supar_cli.planning.density import Share
from supar_cli.planning.explain import Explained
from supar_cli.planning.kinds import AnyDocument, parse_any
from supar_cli.planning.plan import Plan
from supar_cli.planning.rules import ParameterizationName
from supar_cli.planning.schema import Section
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.planning.sweep import Sweep
from supar_cli.planning.transfer import transfer as _transfer
from supar_cli.training.reporter import NullReporter

if TYPE_CHECKING:
    from torch import Tensor

    from supar_cli.jobs.workers import Workers


def load(path: str | Path) -> AnyDocument:
    """The document in a file, as its kind says. Raises InputError with every problem in it."""
    found = document.read_file(str(path))
    if len(found) != 1:
        raise InputError(f"{path}: holds {len(found)} documents; expected one")
    parsed = parse_any(found[0])
    return parsed.beside(str(path)) if isinstance(parsed, Plan) else parsed


def transfer(
    proxy: Proxy, *, parameterization: ParameterizationName = "supar", allow_low_wpn: bool = False, **target: Any
) -> Plan:
    """The plan of a target; keywords as the flags of `supar transfer`: sparsity or density (0.008 or "1/128"), width,
    layers, steps, pattern, … Raises InputError.
    """
    _require(proxy, Proxy)
    wanted = proxy.target.override(**target)
    if proxy.data.hash is None:
        proxy = proxy.model_copy(update={"data": corpus.identified(proxy.data)})
    return _transfer(proxy, wanted, parameterization, allow_low_wpn=allow_low_wpn)


def explain(plan: Plan, tensor: str | None = None, role: str | None = None) -> Explained:
    """The formula, the numbers and the source behind a plan's values, of all tensors or of those named.

    `.text(title)` is what `supar explain` prints, `.as_json()` its data. Raises InputError where no tensor is named so.
    """
    return Explained.of(_require(plan, Plan), tensor, role)


def tune(
    spec: Spec,
    study: str | Path = "proxy.journal",
    *,
    jobs: int | None = None,
    executor: str = "local",
    executor_set: dict[str, Any] | None = None,
    reporter: Any = None,
) -> Proxy:
    """Tune a spec up to its number of trials, in a study that the same call continues; the proxy with its evidence.

    `study` is a journal file or a database's URL. Raises SuparError.
    """
    from supar_cli.experiments import search

    spec = _require(spec, Spec).model_copy(update={"data": corpus.identified(spec.data)})
    folder = Path("proxy" if "://" in str(study) else study).with_suffix(".slurm")
    workers = _workers(executor, jobs, executor_set, spec.run.device, folder, on_cpu=1)
    with workers:
        return search.search(spec, str(study), workers=workers, reporter=reporter or NullReporter())


def check(
    subject: Spec | Proxy | Plan,
    *,
    parameterization: ParameterizationName = "supar",
    width: Sequence[int] = (),
    density: Sequence[Share] = (),
    seeds: int = 4,
    max_seeds: int = 16,
    steps: int = 10,
    batch_size: int | None = None,
    jobs: int | None = None,
    executor: str = "local",
    executor_set: dict[str, Any] | None = None,
    out: str | Path = "check",
    force: bool = False,
    reporter: Any = None,
) -> dict[str, Any]:
    """The coordinate check of a proxy's or spec's shape, or of a plan as it stands: its result document.

    Each of its `verdicts` has `passed` and `control`: controls are to miss. Raises SuparError.
    """
    from supar_cli.experiments import check_run

    subject = _identified(_require(subject, Spec, Proxy, Plan))
    sweeps = check_run.sweeps_of(
        subject, parameterization, widths=width, densities=density, seeds=seeds, steps=steps, batch_size=batch_size
    )
    workers = _workers(executor, jobs, executor_set, subject.run.device, Path(out) / "slurm")
    found = check_run.run_check(
        sweeps, Path(out), workers, reporter or NullReporter(), max_seeds=max_seeds, force=force
    )
    return found.result


def sweep(study: Sweep, out: str | Path | None = None, **how: Any) -> dict[str, Any]:
    """Sweep a hyperparameter: see `supar_cli.experiments.sweep.sweep`. Raises SuparError."""
    from supar_cli.experiments import sweep

    return sweep.sweep(study, out, **how)


def compare(study: Sweep, out: str | Path | None = None, **how: Any) -> dict[str, Any]:
    """Compare parameterizations: see `supar_cli.experiments.sweep.compare`. Raises SuparError."""
    from supar_cli.experiments import sweep

    return sweep.compare(study, out, **how)


def report(paths: Sequence[str | Path], out: str | Path | None = None) -> str:
    """One self-contained HTML page of runs, sweeps, checks, comparisons, plans and proxies; written to `out` if given.

    Raises InputError for a path that is none of these.
    """
    from supar_cli.reporting import read as reading

    return reading.report(paths, out)


def train(plan: Plan, directory: str | Path, *, resume: bool = True, force: bool = False) -> dict[str, Any]:
    """Train a plan in a run directory, from its last checkpoint, and return its result document. Raises SuparError.

    In a script that torchrun started, its processes train it together. Without `resume` a directory that holds a run is
    refused; with `force` it starts again.
    """
    _require(plan, Plan)
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
    return checkpoint.weights(found[-1])


def _require(document: Any, *types: type[Section]) -> Any:
    """The document itself. Raises InputError where it is of none of these types."""
    if not isinstance(document, types):
        raise InputError(f"{type(document).__name__}: expected a {' or '.join(one.__name__ for one in types)}")
    return document


def _identified(subject: Any) -> Any:
    """A document with the hash of its data filled in. Raises InputError where it has another."""
    if subject.data.hash is not None:
        return subject
    return subject.model_copy(update={"data": corpus.identified(subject.data)})


def _workers(
    executor: str,
    jobs: int | None,
    settings: dict[str, Any] | None,
    device: str,
    folder: Path,
    on_cpu: int | None = None,
) -> Workers:
    from supar_cli.jobs import workers as execute

    return execute.make_workers(
        executor, jobs=jobs, settings=settings, device=device, on_cpu=on_cpu or execute.CPU_JOBS, folder=folder
    )
