"""The options of all commands, in one table, and commands made from it.

A command names the options that it takes, in the order of its help, and gets their values as one object:

    @command("proxy width steps", "set out force json quiet", steps={"help": "Training steps of a run."})
    def transfer(flags: Flags) -> None:
        read = documents.read_one(flags.proxy or "proxy.yaml", "`supar tune-proxy` writes it")
        apply(read, flags)

Keywords change columns of the table for this command alone. `flags.width` is the value of `--width`; an option that the
command does not take is None. `apply` puts `--set` and every flag that has a path into the document.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import Parameter, Signature
from types import SimpleNamespace
from typing import Any, get_args

import typer

from supar_cli.cli import documents
from supar_cli.errors import InputError, Problem
from supar_cli.planning import document
from supar_cli.planning.density import Share, share
from supar_cli.planning.document import Document
from supar_cli.planning.rules import ParameterizationName


def seconds(flag: str, text: str) -> float:
    """Seconds of `90s`, `30m`, `2h` or `1:30:00`. Raises InputError."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    parts = text.split(":")
    try:
        if 2 <= len(parts) <= 3 and all(part.isascii() and part.isdigit() for part in parts):
            found = sum(int(part) * 60.0**power for power, part in enumerate(reversed(parts)))
        else:
            found = float(text[:-1]) * units[text[-1:]]
        if not 0 < found < float("inf"):
            raise ValueError
    except (KeyError, ValueError):
        raise InputError(f"{flag} {text}: expected a time such as 90s, 30m, 2h or 1:30:00") from None
    return found


def names(_flag: str, text: str) -> list[str]:
    """Names with commas between them."""
    return [part.strip() for part in text.split(",")]


def numbers(flag: str, text: str) -> list[Share]:
    """Numbers or fractions with commas between them, exactly as they are written. Raises InputError."""
    for part in text.split(","):
        try:
            share(part)
        except ValueError:
            raise InputError(f"{flag} {text}: {part!r} is not a number") from None
    return [share(part) for part in text.split(",")]


def parameterization(flag: str, text: str) -> str:
    """The name of a parameterization. Raises InputError."""
    if text not in get_args(ParameterizationName):
        raise InputError(f"{flag} {text}: expected one of {', '.join(get_args(ParameterizationName))}")
    return text


def executor_settings(flag: str, texts: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` of each text, VALUE being YAML. Raises InputError."""
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise InputError(f"{flag} {text}: expected KEY=VALUE")
        found[key.strip().replace("-", "_")] = document.read(value, f"{flag} {key}")[0].data
    return found


@dataclass(frozen=True, slots=True)
class Option:
    """An option, or with `argument` a positional argument. `path` is the key of the document that it sets.

    `read(flag, given)` converts the given value. A default of `...` means that it is required.
    """

    type: Any
    help: str
    path: str = ""
    default: Any = None
    minimum: int | None = None
    metavar: str | None = None
    short: str = ""
    read: Callable[[str, Any], Any] | None = None
    argument: bool = False

    def parameter(self, name: str) -> Parameter:
        """The option as a function parameter for Typer."""
        kind = self.type | None if self.default is None else self.type
        shown: dict[str, Any] = {"help": self.help, "metavar": self.metavar}
        if self.argument:
            made = typer.Argument(self.default, **shown)
        else:
            flag = flag_of(name)
            negatable = self.type is bool and self.default is True
            flags = [f"{flag}/--no{flag[1:]}" if negatable else flag, *([self.short] if self.short else [])]
            made = typer.Option(self.default, *flags, min=self.minimum, **shown)
        return Parameter(name, Parameter.KEYWORD_ONLY, default=made, annotation=kind)


def flag_of(name: str) -> str:
    """The flag for a name: `--batch-size` for `batch_size`."""
    return f"--{name.replace('_', '-')}"


def _argument(type_: Any, help_: str, **columns: Any) -> Option:
    return Option(type_, help_, argument=True, **columns)


def _switch(help_: str, **columns: Any) -> Option:
    return Option(bool, help_, **{"default": False, **columns})


OPTIONS = {
    # what a command reads
    "proxy": _argument(str, "Proxy document; - for stdin. [default: proxy.yaml]"),
    "spec": _argument(str, "Spec document; - for stdin. [default: supar.yaml, else the quickstart template]"),
    "plan": _argument(str, "Plan document, run directory, or - for stdin. [default: plan.yaml]"),
    "source": _argument(
        str, "A document; - for stdin. [default: proxy.yaml, supar.yaml, else the quickstart template]"
    ),
    "tensor": _argument(str, "Tensors to explain: blocks.0.mlp.up, mlp.up (in all blocks) or mlp. [default: all]"),
    "template": _argument(str, "Name of a template; --list shows them.", default="quickstart"),
    "folder": _argument(str, "Folder that holds run directories, directly or one level below.", default="runs"),
    "run": _argument(str, "A run directory.", default=...),
    "paths": _argument(
        list[str],
        "Run directories, folders of sweeps, checks, comparisons or demos, plans or proxies; - for stdin.",
        default=...,
        metavar="PATH…",
    ),
    "kind": _argument(str, "Document type.", default="spec"),
    "corpus": _argument(str, "`stdlib`, a file, or a folder.", default="stdlib", metavar="source"),
    # the target, and how sparse it is
    "sparsity": Option(
        str, "Share of hidden weights that are zero; several, as 0.5,0.75, make several plans.", read=numbers
    ),
    "density": Option(
        str, "Share of weights that are not zero, instead of --sparsity: 0.008 or 1/4,1/16.", read=numbers
    ),
    "width": Option(int, "Model width.", "target.width"),
    "layers": Option(int, "Number of blocks.", "target.layers"),
    "heads": Option(int, "Attention heads.", "target.heads"),
    "kv_heads": Option(int, "Key/value heads.", "target.kv_heads"),
    "ffn_width": Option(int, "FFN width. [default: the proxy's ratio]", "target.ffn_width"),
    "context": Option(int, "Tokens per sequence.", "target.context"),
    "vocab": Option(int, "Vocabulary."),
    "batch_size": Option(int, "Sequences per step.", "target.batch_size"),
    "steps": Option(int, "Training steps.", "target.steps"),
    "tokens": Option(int, "Training tokens, instead of --steps.", "target.tokens"),
    "tokens_per_parameter": Option(
        float, "Tokens per live parameter, instead of --steps.", "target.tokens_per_parameter"
    ),
    "parameterization": Option(str, "One or more of sp, mup, supar, supar-init-only, supar-lr-only.", metavar="NAME"),
    "pattern": Option(
        str, "Mask pattern: exact, fixed_fan_in, bernoulli, block or N:M (2:4).", "target.sparsity.pattern"
    ),
    "block": Option(int, "Edge length of the blocks of --pattern block: 16, 32, 64 or 128.", "target.sparsity.block"),
    "distribution": Option(str, "Density by tensor: uniform or erk (Erdős–Rényi).", "target.sparsity.distribution"),
    "data": Option(str, "`stdlib`, a text/JSONL/token file or a folder of them.", "data.source"),
    "seed": Option(int, "Seed of init, masks and batches.", "target.seed"),
    "from_paper": _switch("Start from the published proxy (arXiv 2405.15743, Table 3)."),
    "allow_low_wpn": _switch("Allow targets with less than one weight per neuron."),
    # measurements: options of searches, sweeps and checks
    "trials": Option(int, "Total number of trials of the study, including finished ones.", "search.trials"),
    "seeds": Option(int, "Seeds per point; all points use the same seeds.", "seeds", minimum=1),
    "max_seeds": Option(
        int, "Most seeds: they are doubled while a bound lies within a slope's 95 % interval.", default=16, minimum=1
    ),
    "sampler": Option(str, "Sampler of the trials: random, qmc, tpe or gp.", "search.sampler"),
    "search": Option(str, "Search only these of the spec's ranges: lr,init_std,…", metavar="NAME[,…]", read=names),
    "study": Option(
        str,
        "Journal file or database (postgresql://HOST/NAME); several `supar tune-proxy` processes may share one. "
        "[default: proxy.journal]",
    ),
    "over": Option(
        list[str],
        "An axis; repeatable. One hyperparameter (lr, init_std, alpha_input, alpha_output or weight_decay), as a range or a list: "
        "log2:-12..-4/0.5 is 2^-12 to 2^-4 in half octaves, x:-3..3/1 is the proxy's value times 2^-3 to 2^3. "
        "And one of sparsity, density, width or layers, as a list such as 0,0.5,0.75.",
        metavar="NAME=VALUES",
    ),
    "iso": Option(
        str,
        "Widen sparser models to keep live parameters (parameters) or weights per neuron (wpn).",
        "iso",
        metavar="WHAT",
    ),
    "preset": Option(str, "Run a figure of the paper at a small size", metavar="NAME"),
    "full": _switch("Run the preset at the paper's size."),
    "role": Option(str, "Show only this role: embedding, hidden, norm, bias or unembedding.", metavar="ROLE"),
    # training
    "index": Option(int, "Train only the plan at this index of the document stream, counted from 0."),
    "resume": _switch("Continue from the last checkpoint; --no-resume refuses a directory with a run.", default=True),
    "checkpoint_every": Option(int, "Steps between checkpoints.", "run.checkpoint_every", minimum=1),
    "keep": Option(int, "Number of newest checkpoints to keep.", "run.keep", minimum=1),
    "max_time": Option(
        str, "Write a checkpoint and stop after 90s, 30m, 2h or 1:30:00; exit 75.", metavar="TIME", read=seconds
    ),
    "nproc": Option(int, "Processes to train with on this machine, each on its own GPU.", minimum=1),
    "parallel": Option(
        str,
        "How processes hold the model: ddp (a whole copy each), fsdp (in shards) or auto (shards if a copy doesn't fit a device).",
        "run.parallel",
    ),
    "max_restarts": Option(
        int, "With --nproc: number of restarts from the last checkpoint when a process dies.", default=0, minimum=0
    ),
    "tracker": Option(
        list[str], "Also log the run to tensorboard, wandb or mlflow, offline; repeatable.", "run.trackers"
    ),
    "device": Option(str, "auto, cpu, cuda or cuda:N.", "run.device"),
    "precision": Option(str, "auto, float32 or bfloat16.", "run.precision"),
    "compile": Option(str, "auto, on or off.", "run.compile"),
    "engine": Option(
        str, "Engine for masked weights: auto (the fastest on this machine), dense, sparse or block.", "run.engine"
    ),
    # where runs are executed
    "jobs": Option(
        int,
        "Runs at the same time. [default: one per GPU; on CPU, 1 for tune-proxy and one per core (at most 8) for other commands; "
        "on Ray, one per GPU or core of the cluster; on Slurm, 8]",
        minimum=1,
    ),
    "executor": Option(
        str,
        "Where runs are executed: local (processes of this machine), ray (a Ray cluster) or slurm.",
        default="local",
        metavar="NAME",
    ),
    "executor_set": Option(
        list[str],
        "A setting of the executor; repeatable. ray: address, cpus (per run). slurm: partition, account, time "
        "(minutes) and sbatch's other options.",
        metavar="KEY=VALUE",
        read=executor_settings,
    ),
    # benchmarks
    "shape": Option(str, "Shape of the weight.", metavar="OUTxIN"),
    "rounds": Option(int, "Timed rounds, after one warm-up round.", minimum=3),
    "picture": Option(str, "Draw the ratios over density.", metavar="FILE.png"),
    "compare": Option(str, "Earlier result to compare with; exit 5 if a value is worse by a tenth.", metavar="FILE"),
    # corpora
    "format": Option(str, "auto (by suffix and first bytes), text, jsonl, nanogpt or llmc.", default="auto"),
    "tokenizer": Option(str, "bytes, or a tokenizer.json (needs the package tokenizers).", default="bytes"),
    "field": Option(str, "The key that holds the text in a line of JSONL.", default="text"),
    # what every command does with its result
    "list": _switch("Show the templates and write nothing."),
    "explain": _switch("Show the plan's table even if stderr is not a terminal."),
    "dry_run": _switch("Show what would be run, sizes, memory and time; write nothing."),
    "set": Option(list[str], "Set any key of the input document; repeatable.", metavar="A.B=VALUE", short="-s"),
    "out": Option(str, "Where to write; - for stdout only.", short="-o"),
    "force": _switch("Overwrite an existing file whose content differs.", short="-f"),
    "json": _switch("Write JSON to stdout instead of YAML."),
    "quiet": _switch("Print only warnings and errors.", short="-q"),
    "verbose": _switch("Print more details.", short="-v"),
}


class Flags(SimpleNamespace):
    """The values of a command's options by name, None for those that it does not take."""

    document_paths: dict[str, str]

    def __getattr__(self, name: str) -> Any:
        if name not in OPTIONS:
            raise AttributeError(name)
        return None


def command(*taken: str, **changes: dict[str, Any]) -> Callable[[Callable[[Flags], None]], Callable[..., None]]:
    """Make a command with the named options (each text lists several names). `changes` overrides columns of single options."""
    options = {name: replace(OPTIONS[name], **changes.get(name, {})) for text in taken for name in text.split()}

    def decorate(function: Callable[[Flags], None]) -> Callable[..., None]:
        def call(**values: Any) -> None:
            for name, option in options.items():
                if option.read is not None and values[name] is not None:
                    values[name] = option.read(flag_of(name), values[name])
            function(
                Flags(**values, document_paths={name: option.path for name, option in options.items() if option.path})
            )

        call.__name__, call.__doc__ = function.__name__, function.__doc__
        call.__signature__ = Signature([option.parameter(name) for name, option in options.items()])  # type: ignore[attr-defined]
        return call

    return decorate


def require_one(flags: Flags, one: str, other: str) -> None:
    """Raise InputError where both of two options are given."""
    if getattr(flags, one) is not None and getattr(flags, other) is not None:
        raise InputError(f"{flag_of(one)}: cannot be combined with {flag_of(other)}; expected only one of them")


def apply(read: Document, flags: Flags, same_data: bool = False) -> None:
    """Put `--set` and then the flags into a document at the table's paths, and drop the keys that a changed value replaces.

    `same_data`: `--data` only gives the data's new location, so their hash is kept. Raises InputError.
    """
    for setting in flags.set or []:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise InputError(f"--set {setting}: expected A.B=VALUE")
        found = document.read(text or "null", f"--set {path}")
        documents.set_path(read, tuple(path.split(".")), found[0].data if found else None)
    sections: dict[tuple[str, ...], dict[str, Any]] = {}
    for name, path in flags.document_paths.items():
        if getattr(flags, name) is not None:
            *section, key = path.split(".")
            sections.setdefault(tuple(section), {})[key] = getattr(flags, name)
    if same_data and ("data",) in sections:
        documents.set_path(read, ("data", "source"), sections.pop(("data",))["source"])
    for at, changes in sections.items():
        documents.override(read, at, changes)


@contextmanager
def naming_flags(flags: Flags) -> Iterator[None]:
    """Name the flag in a problem raised inside as `a.b: what is wrong`, where `--b` was given."""
    try:
        yield
    except InputError as error:
        raise InputError(*(_at_flag(problem, flags) for problem in error.problems)) from None


def _at_flag(problem: Problem | str, flags: Flags) -> Problem | str:
    place, _, what = str(problem).partition(": ")
    key = place.rpartition(".")[2]
    return f"{flag_of(key)}: {what}" if getattr(flags, key, None) is not None else problem


def workers_of(flags: Flags) -> dict[str, Any]:
    """The keyword arguments that tell the package's functions where to execute runs."""
    return {name: getattr(flags, name) for name in ("jobs", "executor", "executor_set", "verbose")}
