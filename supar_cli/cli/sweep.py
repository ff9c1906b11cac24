"""`supar sweep` and `compare`: does a hyperparameter that was tuned dense still hold where weights are sparse?"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

import supar_cli
from supar_cli.cli import documents, terminal
from supar_cli.cli.options import Flags, command, require_one, workers_of
from supar_cli.cli.sweep_text import describe, explain_comparison, explain_sweep
from supar_cli.cli.values import PRESETS, names, one_share
from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.files import template, write_file
from supar_cli.planning import document, templates
from supar_cli.planning.advice import density_exponent, warnings
from supar_cli.planning.axes import LEVELS, SHARES
from supar_cli.planning.document import Document
from supar_cli.planning.problems import parse, wrong_kind
from supar_cli.planning.spec import Proxy
from supar_cli.planning.sweep import TUNED, Sweep, plan_all
from supar_cli.user_code import words_of

KIND = "supar.sweep/v1"
PARAMETERIZATIONS = ["sp", "mup", "supar"]
# what a spec or a proxy lacks to be a study
SWEPT = {"over": {"lr": "x:-2..2/1", "density": [1.0, 0.25, 0.0625]}, "parameterizations": PARAMETERIZATIONS}
# a single value, the transferred one; SP's search continues from it in octaves
COMPARED = {
    "over": {"lr": "x:0..0/1", "sparsity": [0.0, 0.75, 0.9375]},
    "parameterizations": PARAMETERIZATIONS,
    "widen": 8,
}
NOT_IN_A_SWEEP = ("search", "evidence", "parents", "meta")
KEPT_OF_TARGET = ("pattern", "block", "distribution", "updates")

# densities two octaves apart, the fewest seeds that have power, and half octaves around each optimum
CALIBRATED = {
    "over": {"lr": "x:-1..1/1", "density": [1.0, 0.25, 0.0625]},
    "parameterizations": ["supar"],
    **{"seeds": 4, "widen": 7, "refine": 1, "robustness": True},
}

OPTIONS = (
    "command timeout updates seeds jobs executor executor_set width layers context batch_size steps data tokenizer field format "
    "seed device dry_run set out force json quiet verbose"
)
MEANINGS: dict[str, dict[str, Any]] = {
    "parameterization": {"metavar": "NAME[,…]", "read": names, "path": "parameterizations"},
    "width": {"help": "Width of the runs. [default: the proxy's]"},
    "steps": {"help": "Training steps of a run."},
    "seed": {"help": "The first seed."},
    "force": {"help": "Start a folder's measurements anew."},
}


@command(
    "source over density sparsity parameterization iso preset full calibrate",
    OPTIONS,
    source={"metavar": "[SPEC|PROXY|SWEEP|-]"},
    **{
        name: {"help": f"{name.capitalize()} of all runs.", "read": one_share, "path": f"target.sparsity.{name}"}
        for name in SHARES
    },
    preset={"help": "A study that supar ships, most of them figures of the paper, small: " + ", ".join(PRESETS) + "."},
    out={"help": "Folder; with --calibrate, file of the new proxy. [default: sweeps/NAME]"},
    **MEANINGS,
)
def sweep(flags: Flags) -> None:
    """Sweep a hyperparameter at several densities or widths and judge whether its optimum transfers.

    If an optimum lies at an end of the axis, the axis is extended in its own steps. Running the command again repeats no
    finished run. Exits with status 5 if SμPar misses a threshold: |γ| < 0.15 (γ: slope of log2(optimum) against log2(size)),
    largest shift < 0.5 octave, regret < 0.5 %, by 90 % intervals over seeds, or if an interval is wider than twice its mark.

    Examples:
      supar sweep proxy.yaml --over lr=x:-2..2/1 --over density=1,0.25,0.0625
      supar sweep proxy.yaml --calibrate --updates rigl -o proxy-rigl.yaml
    """
    preset = flags.preset
    if preset is not None and flags.source is not None:
        raise InputError(f"--preset {preset}: cannot be combined with a document; expected only one of them")
    if preset is not None and preset not in PRESETS:
        raise InputError(f"--preset {preset}: expected {', '.join(PRESETS)}")
    require_one(flags, "density", "sparsity")
    axes = {f"--over {text}": text for text in flags.over or []}
    if flags.calibrate:
        return _calibrate(axes, flags)
    read = read_study(flags.source, SWEPT, flags.full, preset)
    result = _measure(supar_cli.sweep, "sweeps", read, axes, flags)
    if not flags.quiet:
        explain_sweep(result, terminal.Log())
        terminal.show_verdicts(result["verdicts"])
    _finish(result, "sweeps", flags)


@command(
    "source sparsity density parameterization",
    OPTIONS,
    source={"metavar": "[PROXY|SPEC|-]"},
    sparsity={"help": "Sparsities to compare. [default: 0,0.75,0.9375]", "read": None},
    density={"help": "Densities to compare, instead of --sparsity.", "read": None},
    out={"help": "Folder. [default: compare/NAME]"},
    **MEANINGS,
)
def compare(flags: Flags) -> None:
    """Compare SP, μP and SμPar over sparsities at a fixed budget, without re-tuning.

    For reference, it also runs SP with its own learning rate, tuned on the dense model or at every size. A fairer control
    than SP alone is SP with sparse-aware init: --parameterization sp,sp-si,mup,supar adds it.

    Examples:
      supar compare proxy.yaml
      supar compare --sparsity 0,0.75,0.9375 --seeds 3 --jobs 2
    """
    require_one(flags, "density", "sparsity")
    read = read_study(flags.source, COMPARED)
    levels = {name: getattr(flags, name) for name in ("sparsity", "density")}
    axes = {flags.places[name]: f"{name}={level}" for name, level in levels.items() if level is not None}
    result = _measure(supar_cli.compare, "compare", read, axes, flags)
    if not flags.quiet:
        explain_comparison(result["levels"], terminal.Log())
        terminal.show_verdicts(result["verdicts"])
    _finish(result, "compare", flags)


def read_study(source: str | None, defaults: dict[str, Any], full: bool = False, preset: str | None = None) -> Document:
    """The document of a study, or a preset's. A spec or a proxy becomes one with the keys of `defaults`.

    Of a stream of two, the second is the one at full size. Raises InputError when there is no such document.
    """
    path, name = documents.find(source, "proxy.yaml", "supar.yaml")
    if preset is not None:
        name = f"--preset {preset}"
        found = document.read(templates.text(preset), name)
    else:
        found = documents.read_all(path, "expected a proxy, which `supar tune-proxy` writes")
    if full and len(found) != 2:
        raise InputError(f"--full: {name} holds {len(found)} document; expected a second one, at full size")
    if len(found) > 2:
        raise InputError(f"{name}: holds {len(found)} documents; expected one, or a small and a full one")
    one = found[1 if full else 0]
    one.name = name
    return as_study(one, path, defaults)


def as_study(one: Document, path: str, defaults: dict[str, Any]) -> Document:
    """The document of a study; a spec or a proxy of `path` becomes one with the keys of `defaults`. Raises InputError."""
    if not isinstance(one.data, dict) or one.data.get("kind") == KIND:
        return one
    kind = one.data.get("kind")
    if kind not in ("supar.spec/v1", "supar.proxy/v1"):
        raise wrong_kind(one, "supar.spec/v1", "supar.proxy/v1", KIND)
    target = one.data.get("target")
    own = target.get("sparsity") if isinstance(target, dict) else None
    one.data = {key: value for key, value in one.data.items() if key not in NOT_IN_A_SWEEP}
    one.data |= {"kind": KIND, "name": _folder_name(path), **copy.deepcopy(defaults)}
    # run the proxy's shape: the target's may not fit this machine
    kept = {key: own[key] for key in KEPT_OF_TARGET if key in own} if isinstance(own, dict) else {}
    one.data["target"] = {"sparsity": kept}
    return one


def _folder_name(path: str) -> str:
    """A file's name without its suffix and without characters that a folder's name should not have."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(path).stem).strip("-") or "sweep"


def set_axes(read: Document, axes: dict[str, str]) -> None:
    """Replace the document's axis of the same kind with `NAME=VALUES`, by its flag. Raises InputError for an unknown name."""
    replaced: set[tuple[str, ...]] = set()
    for flag, text in axes.items():
        name, equals, values = text.partition("=")
        name = name.strip().replace("-", "_")
        kind = next((kind for kind in (TUNED, LEVELS) if name in kind), None)
        if not equals or kind is None:
            raise InputError(f"{flag}: expected NAME=VALUES, NAME one of {', '.join((*TUNED, *LEVELS))}")
        over = read.data.get("over") if isinstance(read.data, dict) else None
        if isinstance(over, dict) and kind not in replaced:
            for other in kind:
                over.pop(other, None)
        replaced.add(kind)
        documents.set_path(read, ("over", name), values.strip(), flag)


def _measure(
    function: Callable[..., dict[str, Any]], folders: str, read: Document, axes: dict[str, str], flags: Flags
) -> dict[str, Any]:
    """Plan the study of a document, axes and flags, describe its runs, make them and show its tables. Raises InputError."""
    log = terminal.Log(flags.quiet)
    study = _study(read, axes, flags, log)
    if flags.dry_run:
        from supar_cli.experiments.sweep import sweep_parts

        terminal.show_dry_run(sweep_parts(study, function is supar_cli.compare), flags)
        raise typer.Exit
    folder = terminal.folder_of(flags, f"{folders}/{study.name}")
    if flags.preset is not None and study.data is None:
        study = _with_copies(study, flags.preset, log)
    progress = terminal.Progress(function.__name__, flags.quiet, folder / "records.jsonl")
    with progress, documents.with_locations(read):
        result = function(study, folder, force=flags.force, reporter=progress, **workers_of(flags))
    if not flags.quiet:
        terminal.show_tables(result["tables"])
    return result


def _study(read: Document, axes: dict[str, str], flags: Flags, log: terminal.Log) -> Sweep:
    """The study of a document, axes and flags; its warnings and its runs in words. Raises InputError."""
    set_axes(read, axes)
    documents.apply(read, flags)
    study = parse(Sweep, read).beside(read.name if flags.preset is None else str(template("own/preset")))
    for path in ("sparsity", "density"), ("sparsity", "sparsity"), (study.level_axis,):
        is_swept = study.level_axis in (SHARES if len(path) > 1 else path)
        if is_swept and (flag := read.flags.get(("target", *path))):
            raise InputError(f"{flag}: over.{study.level_axis} says it too; expected only one of them")
    with documents.with_locations(read):
        study = corpus.with_hash(study)
        plans = plan_all(study)
    for message in dict.fromkeys(message for plan in plans for message in warnings(plan)[:1]):
        log.warn(message)
    describe(study, log)
    return study


def _with_copies(study: Sweep, preset: str, log: terminal.Log) -> Sweep:
    """A preset's study of a model of its own, with copies of its script and layout in the working directory."""
    study = study.seen_from(template("own"))
    words = (study.model.layout, *words_of(study.run.command or ""))  # type: ignore[union-attr]
    shipped = {name: template(f"own/{name}") for name in words}
    contents = {name: path.read_bytes() for name, path in shipped.items() if path.is_file()}
    for name, content in contents.items():
        if Path(name).exists() and not (Path(name).is_file() and Path(name).read_bytes() == content):
            expected = f"expected another folder, or your own document: `supar init {preset}`"
            raise InputError(f"{name}: is not the one of --preset {preset}; {expected}")
    for name, content in contents.items():
        if not Path(name).exists():
            write_file(Path(name), content)
            log.log(f"wrote {name}")
    return study


def _calibrate(axes: dict[str, str], flags: Flags) -> None:
    """Calibrate the exponent of a proxy's densities, and write the proxy that has it. Raises CheckViolated if it isn't verified."""
    from supar_cli.experiments import calibration
    from supar_cli.experiments.sweep import sweep_parts

    if flags.preset is not None:
        raise InputError(f"--preset {flags.preset}: can't be calibrated; expected a proxy")
    log, source = terminal.Log(flags.quiet), flags.source or "proxy.yaml"
    read = documents.read_one(source, "expected a proxy, which `supar tune-proxy` writes")
    proxy = parse(Proxy, read).beside(read.name)
    if flags.out not in (None, "-") and Path(flags.out).resolve() == Path(source).resolve():
        raise InputError(f"--out {flags.out}: is the proxy itself; expected another file")
    read = as_study(read, source, CALIBRATED)
    study = _study(read, axes, flags, log)
    with documents.with_locations(read):
        plan = calibration.require_calibratable(study)
    before, updates = density_exponent(plan), plan.sparsity.updates
    if flags.dry_run:
        fresh = calibration.with_exponent(study, before, study.seeds_at(study.levels[0])[-1] + 1)
        return terminal.show_dry_run([*sweep_parts(study), *sweep_parts(fresh)], flags)
    folder = Path(f"sweeps/{study.name}-calibration-{updates.method if updates else 'static'}")
    with terminal.Progress("calibrate", flags.quiet, folder / "records.jsonl") as progress:
        found = supar_cli.calibrate(study, folder, force=flags.force, reporter=progress, **workers_of(flags))
    evidence = found["evidence"]
    if not flags.quiet:
        terminal.show_tables(found["tables"])
        terminal.show_verdicts(found["verdicts"])
    low, high = evidence["exponent_ci90"]
    kept = ": β₀, as the interval of γ holds 0" if evidence["kept"] else ""
    fitted = f"β₀ - γ = {before - evidence['drift']:.3f}, 90 % [{low:.3f}, {high:.3f}]"
    log.log(f"β₀ = {before:g}, γ = {evidence['drift']:+.3f}; {fitted}; β* = {evidence['exponent']:g}{kept}")
    options = proxy.parameterization.model_copy(update={"density_exponent": evidence["exponent"]})
    own, target = proxy.target.sparsity.updates, proxy.target
    if own is not None and own.method == evidence["method"]:  # its own exponent would go before the calibrated one
        free = own.model_copy(update={"exponent": None})
        target = target.model_copy(update={"sparsity": target.sparsity.model_copy(update={"updates": free})})
    known = {"parents": {**proxy.parents, "proxy": proxy.hash()}, "parameterization": options, "target": target}
    tuned = proxy.model_copy(update={**known, "evidence": {**proxy.evidence, "density_exponent": evidence}})
    tuned = tuned.seen_from(Path(flags.out or ".").parent)
    terminal.emit([tuned.model_dump()], flags, log, f"proxy-{evidence['method']}.yaml")
    terminal.require_passed(found["verdicts"], flags)


def _finish(result: dict[str, Any], folders: str, flags: Flags) -> None:
    """Print the result and say how to go on. Raises CheckViolated where it missed something."""
    terminal.print_documents([result], flags)
    folder = terminal.folder_of(flags, f"{folders}/{result['sweep']['name']}")
    terminal.Log(flags.quiet).next(f"supar report {folder}")
    terminal.require_passed(result["verdicts"], flags)
