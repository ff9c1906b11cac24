"""The public Python API: documents in, documents out, with the command line's words for what is wrong.

torch is imported by what runs something only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.files import template, write_file
from supar_cli.planning import document
from supar_cli.planning.density import Share
from supar_cli.planning.explain import Explained
from supar_cli.planning.kinds import AnyDocument, parse_any
from supar_cli.planning.plan import Plan
from supar_cli.planning.rules import ParameterizationName
from supar_cli.planning.schema import Section
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.planning.sweep import Sweep
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
    verbose: bool = False,
) -> Proxy:
    """Tune a spec up to its number of trials, in a study that the same call continues; the proxy with its evidence.

    `study` is a journal file or a database's URL. Raises SuparError.
    """
    from supar_cli.experiments import search

    spec = _require(spec, Spec).model_copy(update={"data": corpus.identified(spec.data)})
    folder = Path("proxy" if "://" in str(study) else study).with_suffix(".slurm")
    workers = _workers(executor, jobs, executor_set, spec.run.device, folder, on_cpu=1, verbose=verbose)
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
    verbose: bool = False,
) -> dict[str, Any]:
    """The coordinate check of a proxy's or spec's shape, or of a plan as it stands: its result document.

    Each of its `verdicts` has `passed` and `control`: controls are to miss. Raises SuparError.
    """
    from supar_cli.experiments import check_run

    subject = corpus.with_hash(_require(subject, Spec, Proxy, Plan))
    sweeps = check_run.sweeps_of(
        subject, parameterization, widths=width, densities=density, seeds=seeds, steps=steps, batch_size=batch_size
    )
    workers = _workers(executor, jobs, executor_set, subject.run.device, Path(out) / "slurm", verbose=verbose)
    found = check_run.run_check(
        sweeps, Path(out), workers, reporter or NullReporter(), max_seeds=max_seeds, force=force
    )
    return found.result


def sweep(
    study: Sweep,
    out: str | Path | None = None,
    *,
    jobs: int | None = None,
    executor: str = "local",
    executor_set: dict[str, Any] | None = None,
    force: bool = False,
    reporter: Any = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Sweep a hyperparameter at the study's sizes and judge whether its optimum transfers: the result document.

    `out` is the folder of its records, by default `sweeps/NAME`; no finished run is made again. Raises SuparError.
    """
    from supar_cli.experiments import sweep as sweep_run
    from supar_cli.planning.sweep import checked

    study, folder = corpus.with_hash(_require(study, Sweep)), Path(out or f"sweeps/{study.name}")
    checked(study)
    workers = _workers(executor, jobs, executor_set, study.run.device, folder / "slurm", verbose=verbose)
    return sweep_run.run_sweep(study, folder, workers, reporter or NullReporter(), force=force)[0]


def compare(
    study: Sweep,
    out: str | Path | None = None,
    *,
    jobs: int | None = None,
    executor: str = "local",
    executor_set: dict[str, Any] | None = None,
    force: bool = False,
    reporter: Any = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Compare parameterizations at one value of a hyperparameter, and SP re-tuned at every size: the result document.

    `out` is the folder of its records, by default `compare/NAME`. Raises SuparError.
    """
    from supar_cli.experiments import sweep as sweep_run
    from supar_cli.planning.sweep import checked

    sweep_run.require_comparison(_require(study, Sweep), study.name)
    study, folder = corpus.with_hash(study), Path(out or f"compare/{study.name}")
    checked(study)
    workers = _workers(executor, jobs, executor_set, study.run.device, folder / "slurm", verbose=verbose)
    return sweep_run.run_comparison(study, folder, workers, reporter or NullReporter(), force=force)


def report(paths: Sequence[str | Path], out: str | Path | None = None) -> str:
    """One self-contained HTML page of runs, sweeps, checks, comparisons, plans and proxies; written to `out` if given.

    Raises InputError for a path that is none of these.
    """
    from supar_cli.reporting import html as page
    from supar_cli.reporting import read as reading

    text = page.render(
        [part for path in paths for part in reading.read(str(path))], template("report.html.j2").read_text("utf-8")
    )
    if out is not None:
        write_file(Path(out), text)
    return text


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


def _workers(
    executor: str,
    jobs: int | None,
    settings: dict[str, Any] | None,
    device: str,
    folder: Path,
    on_cpu: int | None = None,
    verbose: bool = False,
) -> Workers:
    from supar_cli.jobs import workers as execute

    return execute.workers(
        executor,
        jobs=jobs,
        settings=settings,
        device=device,
        on_cpu=on_cpu or execute.CPU_JOBS,
        folder=folder,
        verbose=verbose,
    )
