"""`supar tune-proxy`: a spec becomes a tuned proxy."""

from math import ceil
from pathlib import Path

import supar_cli
from supar_cli.cli import documents, terminal
from supar_cli.cli.option_table import flag_of
from supar_cli.cli.options import Flags, command, require_one, workers_of
from supar_cli.data import corpus
from supar_cli.errors import InputError
from supar_cli.files import template
from supar_cli.planning import document
from supar_cli.planning.layout import largest_over_head
from supar_cli.planning.layout_document import OwnShape
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Model, Proxy, Search, Spec, Target
from supar_cli.planning.transfer import target_model

OWN_TEMPLATE = "the template of your own models (`supar init own` writes it to supar.yaml)"
SHAPE = ("width", "layers", "heads", "context")


@command(
    "spec layout command timeout trials seeds sampler search study jobs executor executor_set",
    "width layers heads context batch_size steps tokens data tokenizer field format seed device precision",
    "dry_run set out force json quiet verbose",
    seeds={"help": "Number of seeds for each finalist.", "path": "search.seeds", "minimum": None},
    width={"help": "Model width; the spec's head width and FFN ratio are kept.", "path": ""},
    layers={"path": ""},
    heads={"path": ""},
    context={"path": ""},
    batch_size={"path": "train.batch_size"},
    steps={"help": "Training steps of a trial.", "path": "train.steps"},
    tokens={"help": "Training tokens of a trial, instead of --steps.", "path": "", "minimum": 1},
    seed={"help": "Seed of the trials' init and batches, and of the sampler.", "path": "train.seed"},
)
def tune_proxy(flags: Flags) -> None:
    """Search learning rate, init std and multipliers on a small dense proxy.

    Running the command again continues the study.

    Examples:
      supar tune-proxy supar.yaml --data corpus.jsonl --trials 64 --jobs 2
      supar tune-proxy --layout layout.yaml --command 'python train.py {plan}'
    """
    log, out = terminal.Log(flags.quiet), None if flags.out == "-" else flags.out
    require_one(flags, "tokens", "steps")
    spec = _read_spec(flags, log)
    study = flags.study or str(Path(out or "proxy").with_suffix(".journal"))
    with terminal.Progress("tune-proxy", flags.quiet or flags.dry_run) as progress:
        from supar_cli.experiments import search

        if flags.dry_run:
            return terminal.show_dry_run(search.parts(spec), flags)
        flags.force = flags.force or _is_own(flags.out, search.study_name(spec))
        if out is not None and flags.study is None:
            Path(out).parent.mkdir(parents=True, exist_ok=True)
        if flags.out != "-":
            terminal.check_writable(Path(out or "proxy.yaml"), flags.force)
        try:
            with documents.naming_flags(flags):
                proxy = supar_cli.tune(spec, study, reporter=progress, **workers_of(flags))
        except KeyboardInterrupt:
            best = search.best_so_far(spec, study)
            progress.warn("stopped; the same command continues the study" + (f"; {best}" if best else ""))
            raise
    _summarize(proxy, log)
    proxy = proxy.seen_from(Path(out or "proxy.yaml").parent)
    terminal.emit([proxy.model_dump()], flags, log, "proxy.yaml")
    if not terminal.prints(flags):
        log.next(" ".join(["supar transfer", *([out] if out else []), *_wider(spec), "--sparsity 0.992"]))


def _read_spec(flags: Flags, log: terminal.Log) -> Spec:
    """The spec that the command line asks for, its data identified. Raises InputError."""
    path, name = documents.find(flags.spec, "supar.yaml")
    is_template = flags.layout is not None and flags.spec is None and not _is_of_own(path)
    if is_template:
        path, name = str(template("own.yaml")), OWN_TEMPLATE
    read = documents.read_one(path, "expected a spec, which `supar init` writes", name)
    unnamed = "the quickstart template (`supar init` writes it to supar.yaml)"
    log.log(f"spec: {unnamed if name not in (path, OWN_TEMPLATE) else name}")
    usual = None
    if is_template:
        del read.data["run"]  # its command is an example
        usual = read.data["search"]["alpha_output"]
    documents.apply(read, flags)
    if flags.seed is not None:
        documents.set_path(read, ("search", "seed"), flags.seed, flags.places["seed"])
    spec = parse(Spec, read).beside(path)
    with documents.with_locations(read), documents.naming_flags(flags):
        spec = corpus.with_hash(_reshaped(spec, flags), log.log)
        return _with_usable_ranges(spec, usual, log) if is_template else spec


def _is_of_own(path: str) -> bool:
    """Whether a file is the spec of a user's model."""
    data = documents.read_one(path, "").data
    model = data.get("model") if isinstance(data, dict) else None
    return isinstance(model, dict) and model.get("family") == "own"


# measured: small nets of 3×3 and 5×5 convolutions, with and without norms; the dense proxy tells which (`supar help vision`)
ALPHAS = (1.0, 4.0, 8.0, 16.0)


def _with_usable_ranges(spec: Spec, usual: list[float] | None, log: terminal.Log) -> Spec:
    """The template's spec without the ranges of what the model can't take, and with those that its layout's notes ask for.

    `usual` is the template's own range of alpha_output, which the user may have changed.
    """
    from supar_cli.experiments import search

    refused = search.refused_ranges(spec)
    for why in refused.values():
        log.log(f"not searched: {why}")
    ranges: dict[str, list[float] | None] = dict.fromkeys(refused)
    if isinstance(spec.model, OwnShape) and "alpha_output" not in refused and spec.search.alpha_output == usual:
        document = spec.model.read_layout()
        if found := largest_over_head(document.at(document.base)):
            ranges["alpha_output"] = list(ALPHAS)
            choices = ", ".join(f"{alpha:g}" for alpha in ALPHAS)
            what = f"the fan-in of {found[0].site} is {found[1]:.3g} times the head's"
            log.log(f"searched: alpha_output, one of {choices}, as {what}")
    return spec.model_copy(update={"search": spec.search.model_copy(update=ranges)})


def _wider(spec: Spec) -> list[str]:
    """The flag of a width to go on with, where a user's model has one; a plan of the proxy's own size has no use."""
    if not isinstance(spec.model, OwnShape):
        return []
    read = spec.model.read_layout()
    if "width" in read.base:
        return [f"--width {16 * read.base['width']}"]
    name = next(name for name, size in read.base.items() if read.wider[name] != size)
    return [f"-s target.size.{name}={read.base[name] + 15 * (read.wider[name] - read.base[name])}"]


def _reshaped(spec: Spec, flags: Flags) -> Spec:
    """The spec with the shape, the number of tokens and the searched names that flags ask for. Raises InputError."""
    shape = {name: getattr(flags, name) for name in SHAPE}
    refused, what = ["context", "tokens"], "is for text; a vision transformer trains for --steps"
    if isinstance(spec.model, OwnShape):
        refused = [*SHAPE, "tokens"]
        what = "a model of your own has the sizes of its layout, and trains for --steps"
    is_text = spec.data is not None and spec.data.kind == "tokens"
    if given := [name for name in refused if not is_text and getattr(flags, name)]:
        raise InputError(*(f"{flag_of(name)}: {what}" for name in given))
    model = (
        target_model(spec.decoder, Target(**shape))
        if any(value is not None for value in shape.values())
        else spec.model
    )
    train, search = spec.train, spec.search
    if flags.tokens is not None:
        context = model.context if isinstance(model, Model) else spec.decoder.context
        train = train.model_copy(update={"steps": ceil(flags.tokens / (train.batch_size * context))})
    if flags.search is not None:
        wanted = [name.replace("-", "_") for name in flags.search]
        for name in wanted:
            if name not in Search.SEARCHED:
                raise InputError(f"--search {name}: expected some of {', '.join(Search.SEARCHED)}")
            if name not in search.ranges():
                how = f"expected -s 'search.{name}=[LOW, HIGH]'"
                raise InputError(f"--search {name}: the spec has no range for it; {how}")
        search = search.model_copy(update={name: None for name in Search.SEARCHED if name not in wanted})
    return spec.model_copy(update={"model": model, "train": train, "search": search})


def _is_own(out: str | None, study: str) -> bool:
    """Whether the existing file is an earlier result of this study."""
    path = Path(out or "proxy.yaml")
    if out == "-" or not path.is_file():
        return False
    try:
        before = parse(Proxy, document.read_file(str(path))[0])
    except InputError:
        return False
    return bool(before.evidence.get("study", {}).get("name") == study)


def _summarize(proxy: Proxy, log: terminal.Log) -> None:
    evidence, values = proxy.evidence, proxy.hyperparameters.model_dump()
    chosen = next(finalist for finalist in evidence["finalists"] if finalist["chosen"])
    counts = ", ".join(f"{count} {state}" for state, count in evidence["trials"].items() if count)
    count = len(chosen["losses"])
    best = f"trial {chosen['trial']}, has loss {chosen['mean']:.4f} over {count} seed{'s' * (count > 1)}"
    log.log(f"trials: {counts}; the best, {best}")
    fit = evidence["lr_fit"]
    if fit and fit["usable"]:
        low, high = fit["lr_ci95"]
        log.log(f"lr fit over {fit['points']} runs: {fit['lr']:.4g}, 95 % interval {low:.4g} to {high:.4g}")
    known = {name: values[name] for name in Search.SEARCHED if name in values}
    texts = {name: "each tensor's own" if value is None else f"{value:.4g}" for name, value in known.items()}
    log.log(", ".join(f"{name} {text}" for name, text in texts.items()))
