"""`supar tune-proxy`: a spec becomes a tuned proxy."""

from __future__ import annotations

import sys
from math import ceil
from pathlib import Path
from typing import Annotated, Any

import typer

from supar_cli.cli import console
from supar_cli.cli.app import single
from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.planning import document
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy, Search, Spec, Target
from supar_cli.planning.transfer import target_model


def tune_proxy(
    spec: Annotated[
        str | None,
        typer.Argument(
            help="Spec document; - for stdin. [default: supar.yaml, else the quickstart template]", show_default=False
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="Trials of the study in total, those done before included.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds each finalist is run with.")] = None,
    sampler: Annotated[str | None, typer.Option(help="random, qmc, tpe or gp.")] = None,
    search: Annotated[
        str | None, typer.Option(metavar="NAME[,…]", help="Search only these of the spec's ranges: lr,init_std,…")
    ] = None,
    study: Annotated[
        str | None,
        typer.Option(
            help="Journal file or database (postgresql://HOST/NAME); any number of these commands may share one. "
            "[default: proxy.journal]",
            show_default=False,
        ),
    ] = None,
    jobs: console.JobsOption = None,
    executor: console.ExecutorOption = "local",
    executor_set: console.ExecutorSet = None,
    width: Annotated[int | None, typer.Option(help="Model width; head width and FFN ratio stay the spec's.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of blocks.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps of a trial.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens of a trial, instead of --steps.")] = None,
    data: console.DataOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the trials' init and batches, and of the sampler.")] = None,
    device: console.DeviceOption = None,
    precision: console.PrecisionOption = None,
    settings: console.Set = None,
    out: console.Out = None,
    force: console.Force = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    verbose: console.Verbose = False,
) -> None:
    """Search learning rate, init std and multipliers on a small dense proxy; the same command again continues."""
    flags = locals()
    talk = console.Talk(quiet, verbose)
    read, source = _read(spec)
    talk.log(f"spec: {source}")
    console.apply_settings(read, settings)
    _put_flags(read, flags)
    wanted = _reshaped(parse(Spec, read), flags)
    wanted = wanted.model_copy(update={"data": corpus.identified(wanted.data)})
    if out not in (None, "-") and study is None:
        Path(str(out)).parent.mkdir(parents=True, exist_ok=True)
    storage = study or ("proxy.journal" if out in (None, "-") else str(Path(str(out)).with_suffix(".journal")))

    from supar_cli.experiments import search as tuning
    from supar_cli.jobs import workers as execute

    may_replace = force or _is_own(out, tuning.study_name(wanted))
    console.check_writable(out, "proxy.yaml", may_replace)
    workers = execute.make_workers(
        executor,
        jobs=jobs,
        settings=console.executor_settings(executor_set),
        device=wanted.run.device,
        folder=Path("proxy.slurm" if out in (None, "-") else str(out)).with_suffix(".slurm"),
        verbose=verbose,
    )
    with console.Progress("tune-proxy", quiet, verbose) as progress, workers:
        try:
            proxy = tuning.search(wanted, storage, workers=workers, reporter=progress)
        except KeyboardInterrupt:
            best = tuning.best_so_far(wanted, storage)
            progress.warn("stopped; the same command continues the study" + (f"; {best}" if best else ""))
            raise
    _summarize(proxy, talk)
    console.emit([proxy.model_dump()], out, "proxy.yaml", force=may_replace, as_json=as_json, talk=talk)
    if out != "-" and sys.stdout.isatty():
        talk.log(f"next: supar transfer {out or ''} --sparsity 0.992".replace("  ", " "))


def _read(spec: str | None) -> tuple[document.Document, str]:
    """The spec asked for, and what to call it: ./supar.yaml or the quickstart template where none is."""
    if spec is not None:
        return console.read_one(spec, "`supar init` writes one"), spec
    if Path("supar.yaml").exists():
        return console.read_one("supar.yaml", ""), "supar.yaml"
    read = console.read_one(str(console.template("quickstart")), "the installation lacks its templates")
    read.name = "quickstart template"
    return read, "the quickstart template (`supar init` writes it to supar.yaml)"


def _put_flags(read: document.Document, flags: dict[str, Any]) -> None:
    places = {
        "trials": ("search", "trials"),
        "seeds": ("search", "seeds"),
        "sampler": ("search", "sampler"),
        "batch_size": ("train", "batch_size"),
        "steps": ("train", "steps"),
        "device": ("run", "device"),
        "precision": ("run", "precision"),
    }
    for name, path in places.items():
        if flags[name] is not None:
            console.put(read, path, flags[name])
    if flags["seed"] is not None:
        console.put(read, ("train", "seed"), flags["seed"])
        console.put(read, ("search", "seed"), flags["seed"])
    console.override(read, ("data",), {"source": flags["data"]})
    if flags["steps"] is not None and flags["tokens"] is not None:
        raise InputError("--tokens: given beside --steps; expected only one of them")


def _reshaped(spec: Spec, flags: dict[str, Any]) -> Spec:
    """The spec with the shape, the number of tokens and the searched names that flags ask for."""
    shape = {name: flags[name] for name in ("width", "layers", "heads", "context")}
    for name, value in shape.items():
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected a number above 0")
    model = target_model(spec.model, Target(**shape)) if any(shape.values()) else spec.model
    train, search = spec.train, spec.search
    if flags["tokens"] is not None:
        if flags["tokens"] < 1:
            raise InputError(f"--tokens {flags['tokens']}: expected a number above 0")
        train = train.model_copy(update={"steps": ceil(flags["tokens"] / (train.batch_size * model.context))})
    if flags["search"] is not None:
        names = [name.replace("-", "_").strip() for name in flags["search"].split(",")]
        for name in names:
            if name not in Search.SEARCHED:
                raise InputError(f"--search {name}: expected some of {', '.join(Search.SEARCHED)}")
            if name not in search.ranges():
                raise InputError(
                    f"--search {name}: the spec has no range for it; expected -s 'search.{name}=[LOW, HIGH]'"
                )
        search = search.model_copy(update={name: None for name in Search.SEARCHED if name not in names})
    return spec.model_copy(update={"model": model, "train": train, "search": search})


def _is_own(out: str | None, study: str) -> bool:
    """Whether the file in the way is this very study's earlier result."""
    path = Path(out or "proxy.yaml")
    if out == "-" or not path.is_file():
        return False
    try:
        before = parse(Proxy, document.read_file(str(path))[0])
    except InputError:
        return False
    return bool(before.evidence.get("study", {}).get("name") == study)


def _summarize(proxy: Proxy, talk: console.Talk) -> None:
    evidence, values = proxy.evidence, proxy.hyperparameters
    chosen = next(finalist for finalist in evidence["finalists"] if finalist["chosen"])
    counts = ", ".join(f"{count} {state}" for state, count in evidence["trials"].items() if count)
    talk.log(
        f"trials: {counts}; the best, trial {chosen['trial']}, has loss {chosen['mean']:.4f} over {len(chosen['losses'])} seeds"
    )
    fit = evidence["lr_fit"]
    if fit and fit["usable"]:
        low, high = fit["lr_ci95"]
        talk.log(f"lr fit over {fit['points']} runs: {fit['lr']:.4g}, 95 % interval {low:.4g} to {high:.4g}")
    talk.log(
        f"lr {values.lr:.4g}, init_std {values.init_std:.4g}, alpha_input {values.alpha_input:.4g}, "
        f"alpha_output {values.alpha_output:.4g}, weight_decay {values.weight_decay:.4g}"
    )


app = single(tune_proxy)
