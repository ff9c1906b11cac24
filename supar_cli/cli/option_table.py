"""The table of all options: flag, type, help and the key of the document that it sets."""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

import typer

from supar_cli.cli import values

# by what reads the value; in other options they are the type's or the name's
METAVARS: dict[Any, str] = {
    values.shares: "SHARE[,…]",
    values.sizes: "NAME=N[,…]",
    values.seconds: "TIME",
    values.file: "FILE",
}


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
        """The option as a function parameter for Typer, to which a number is a text: `value` reads it."""
        kind = str if self.type in (int, float) else self.type
        metavar = (
            self.metavar
            or METAVARS.get(self.read)
            or {int: "N", float: "X", bool: None}.get(self.type, name.upper().replace("_", "-"))
        )
        shown: dict[str, Any] = {"help": self.help, "metavar": metavar}
        if self.type in (str, list[str]):
            shown["autocompletion"] = lambda incomplete: values.words_of(name, incomplete)
        if self.argument:
            made = typer.Argument(self.default, rich_help_panel="Arguments", **shown)
        else:
            flag = flag_of(name)
            negatable = self.type is bool and self.default is True
            flags = [f"{flag}/--no{flag[1:]}" if negatable else flag, *([self.short] if self.short else [])]
            made = typer.Option(self.default, *flags, rich_help_panel=group_of(name), **shown)
        return Parameter(
            name, Parameter.KEYWORD_ONLY, default=made, annotation=kind | None if self.default is None else kind
        )

    def value(self, flag: str, given: Any) -> Any:
        """The value of what was given. Raises InputError."""
        if isinstance(given, str) and self.type in (int, float):
            given = values.number(self.type, self.minimum)(flag, given)
        return given if self.read is None or given is None else self.read(flag, given)


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
    "directory": _argument(str, "A run directory. [default: the newest of runs/]", metavar="RUN"),
    "prompt": _argument(str, "The text to continue; - for stdin. [default: none, which begins a document]"),
    "paths": _argument(
        list[str],
        "Run directories, folders of sweeps, checks, comparisons or demos, plans or proxies; - for stdin. "
        "[default: the newest of runs/]",
        metavar="PATH…",
    ),
    "topic": _argument(str, "A topic, a key or a command. [default: list the topics]"),
    "kind": _argument(str, "Document type: spec, proxy, plan, sweep or layout.", default="spec"),
    "corpus": _argument(str, "`stdlib`, a file, or a folder.", default="stdlib", metavar="source"),
    # the user's own model
    "make": _argument(str, "The function that makes your model at a size, as MODULE:FUNCTION.", default=...),
    "base": Option(str, "The sizes of the model to tune.", read=values.sizes, default=...),
    "wider": Option(str, "Larger sizes, which show what scales.", read=values.sizes, default=...),
    "third": Option(str, "A third size; every tensor has to be in proportion there too.", read=values.sizes),
    "target": Option(str, "The size to train, where tensors are not in proportion to it.", read=values.sizes),
    "example": Option(str, "What the model is called with, or a function that returns it.", metavar="MODULE:NAME"),
    "run": Option(str, "A function of the model that makes a pass, instead of --example.", metavar="MODULE:FUNCTION"),
    "ignore": Option(list[str], "A parameter that the training never uses; repeatable.", metavar="NAME"),
    "layout": Option(str, "Layout of your own model, by `supar layout`.", "model.layout", read=values.file),
    "factory": Option(str, "The function that makes your model. [default: the layout's]", metavar="MODULE:FUNCTION"),
    "batches": Option(str, "A function of (seed, step) that returns a batch.", metavar="MODULE:FUNCTION"),
    "loss": Option(
        str, "A function of (model, batch) that returns the loss, unless the model does.", metavar="MODULE:FUNCTION"
    ),
    "command": Option(str, "Shell command that trains your own model; {plan} is a plan's file.", "run.command"),
    "timeout": Option(
        str, "End a run of --command that reports no loss for 90s, 30m or 2h.", "run.timeout_s", read=values.seconds
    ),
    # the target, and how sparse it is
    "sparsity": Option(
        str, "Share of hidden weights that are zero; several, as 0.5,0.75, make several plans.", read=values.shares
    ),
    "density": Option(
        str, "Share of weights that are not zero, instead of --sparsity: 0.008 or 1/4,1/16.", read=values.shares
    ),
    "width": Option(int, "Model width.", "target.width"),
    "layers": Option(int, "Number of blocks.", "target.layers"),
    "heads": Option(int, "Attention heads.", "target.heads"),
    "kv_heads": Option(int, "Key/value heads.", "target.kv_heads"),
    "ffn_width": Option(int, "FFN width. [default: the proxy's ratio]", "target.ffn_width"),
    "head_width": Option(int, "Width of a head. [default: the proxy's]", "target.head_width"),
    "context": Option(int, "Tokens per sequence.", "target.context"),
    "vocab": Option(int, "Vocabulary."),
    "batch_size": Option(int, "Sequences per step.", "target.batch_size"),
    "steps": Option(int, "Training steps.", "target.steps"),
    "tokens": Option(int, "Training tokens, instead of --steps.", "target.tokens"),
    "tokens_per_parameter": Option(
        float, "Tokens per live parameter, instead of --steps.", "target.tokens_per_parameter"
    ),
    "parameterization": Option(str, "Some of sp, sp-si, mup, supar, supar-init-only, supar-lr-only.", metavar="NAME"),
    "pattern": Option(
        str, "Mask pattern: exact, fixed_fan_in, bernoulli, block or N:M (2:4).", "target.sparsity.pattern"
    ),
    "block": Option(int, "Edge length of the blocks of --pattern block: 16, 32, 64 or 128.", "target.sparsity.block"),
    "updates": Option(
        str, "How masks change while training: set, rigl, gmp or topk. [default: not]", "target.sparsity.updates.method"
    ),
    "distribution": Option(str, "Density by tensor: uniform or erk (Erdős–Rényi).", "target.sparsity.distribution"),
    "data": Option(
        str,
        "Text, JSONL, tokens or images: a file or a folder; or `stdlib`, or `digits`.",
        "data.source",
        metavar="PATH",
    ),
    "seed": Option(int, "Seed of init, masks and batches.", "target.seed"),
    "rewind": Option(int, "Start from the values after this step of the run; 0: as it started.", default=0, minimum=0),
    "scope": Option(str, "The largest weights of each tensor, or global: of all.", default="tensor", read=values.scope),
    "scale": Option(str, "energy: what lives gets the energy of all; or none.", default="energy", read=values.scale),
    "from_paper": _switch("Start from the published proxy (arXiv 2405.15743, Table 3)."),
    "allow_low_wpn": _switch("Allow targets with less than one weight per neuron."),
    # measurements: options of searches, sweeps and checks
    "trials": Option(int, "Total number of trials of the study, including finished ones.", "search.trials"),
    "seeds": Option(int, "Seeds per point; all points use the same seeds.", "seeds", minimum=1),
    "max_seeds": Option(
        int, "Most seeds: they are doubled while a bound lies within a slope's 95 % interval.", default=16, minimum=1
    ),
    "sampler": Option(str, "Sampler of the trials: random, qmc, tpe or gp.", "search.sampler"),
    "search": Option(
        str, "Search only these of the spec's ranges: lr,init_std,…", metavar="NAME[,…]", read=values.names
    ),
    "study": Option(
        str,
        "Journal file or database (postgresql://HOST/NAME); several `supar tune-proxy` processes may share one. "
        "[default: proxy.journal]",
    ),
    "over": Option(
        list[str],
        "An axis; repeatable. One hyperparameter (lr, init_std, alpha_input, alpha_output, weight_decay, "
        "embedding_lr_ratio or head_lr_ratio), as a range or a list: log2:-12..-4/0.5 is 2^-12 to 2^-4 in half octaves, "
        "x:-3..3/1 is the proxy's value times 2^-3 to 2^3. And one of sparsity, density, width or layers, as a list such "
        "as 0,0.5,0.75.",
        metavar="NAME=VALUES",
    ),
    "iso": Option(
        str,
        "Widen sparser models to keep live parameters (parameters) or weights per neuron (wpn).",
        "iso",
        metavar="WHAT",
    ),
    "preset": Option(str, "Run a study that supar ships", metavar="NAME"),
    "masks": Option(
        str,
        "Take masks from a safetensors file, or the zeros of a run, a checkpoint, an export or a pruned model's weights.",
        metavar="PATH",
    ),
    "values": Option(
        str, "Start from the weights of a run, a checkpoint, an export or a Hugging Face folder.", metavar="PATH"
    ),
    "calibrate": _switch("Fit the exponent of the density in rates for --updates, verify it, and write the proxy."),
    "full": _switch("Run the preset at the paper's size."),
    "role": Option(str, "Show only this role: embedding, hidden, norm, bias or unembedding.", metavar="ROLE"),
    # training
    "index": Option(int, "Train only the plan at this index of the document stream, counted from 0."),
    "resume": _switch("Continue from the last checkpoint; --no-resume refuses a directory with a run.", default=True),
    "checkpoint_every": Option(int, "Steps between checkpoints.", "run.checkpoint_every", minimum=1),
    "keep": Option(int, "Number of newest checkpoints to keep.", "run.keep", minimum=1),
    "max_time": Option(str, "Write a checkpoint and stop after 90s, 30m, 2h or 1:30:00; exit 75.", read=values.seconds),
    "nproc": Option(int, "Processes to train with on this machine, each on its own GPU.", minimum=1),
    "parallel": Option(
        str,
        "How processes hold the model: ddp (a whole copy each), fsdp (in shards) or auto (shards if a copy doesn't fit a device).",
        "run.parallel",
    ),
    "max_restarts": Option(int, "With --nproc: restarts from the last checkpoint, when a process dies.", minimum=0),
    "tracker": Option(
        list[str], "Also log the run to tensorboard, wandb or mlflow, offline; repeatable.", "run.trackers"
    ),
    "device": Option(str, "auto, cpu, cuda or cuda:N.", "run.device"),
    "precision": Option(str, "auto, float32, tf32 or bfloat16.", "run.precision"),
    "compile": Option(str, "auto, on or off.", "run.compile"),
    "engine": Option(
        str, "Engine for masked weights: auto (the fastest on this machine), dense, sparse or block.", "run.engine"
    ),
    # text
    "temperature": Option(float, "Draw tokens, from logits divided by this; 0: take the likeliest. [default: 0]"),
    "top_k": Option(int, "Draw from this many of the likeliest tokens. [default: from all]"),
    # where runs are executed
    "jobs": Option(int, "Runs at the same time. [default: as many as the machine or cluster has room for]", minimum=1),
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
        read=values.executor_settings,
    ),
    # benchmarks
    "shape": Option(str, "Shape of the weight.", metavar="OUTxIN"),
    "rounds": Option(int, "Timed rounds, after one warm-up round.", minimum=3),
    "picture": Option(str, "Draw the ratios over density.", metavar="FILE.png"),
    "compare": Option(
        str,
        "Earlier result to compare with; exit 5 if one is worse by a tenth and out of the quartiles.",
        metavar="FILE",
    ),
    "format": Option(str, "text, jsonl, parquet, arrow, nanogpt, llmc, npy or auto, the default.", "data.format"),
    "tokenizer": Option(str, "bytes, a tokenizer.json or its folder. [default: bytes]", "data.tokenizer"),
    "field": Option(str, "The key or column of the text, such as text or a.b. [default: text]", "data.field"),
    "dtype": Option(str, "Integers of raw token files: auto, uint16 or uint32. [default: auto]", "data.dtype"),
    "encoding": Option(str, "Encoding of text files, such as latin-1. [default: utf-8]", "data.encoding"),
    "separator": Option(str, "The token between documents. [default: the tokenizer's]", "data.separator"),
    "size": Option(
        str, "Height and width to which images are resized.", "data.size", metavar="H,W", read=values.counts
    ),
    "image": Option(str, "The column of tables that holds images. [default: the only one]", "data.image"),
    "label": Option(str, "The column of tables that holds labels. [default: the only one]", "data.label"),
    "to": Option(
        str,
        "The class: gpt2, llama, granite, gpt-neox, mpt, vit, or auto: what holds the model; or the plan's names in safetensors, npz.",
        default="auto",
        metavar="FORMAT",
        read=values.one_of("auto", "gpt2", "llama", "granite", "gpt-neox", "mpt", "vit", "safetensors", "npz"),
    ),
    # what every command does with its result
    "list": _switch("Show the templates and write nothing."),
    "explain": _switch("Show the plan's table even if stderr is not a terminal."),
    "dry_run": _switch("Show what would be run, sizes, memory and time; write nothing."),
    "set": Option(list[str], "Set any key of the input document; repeatable.", metavar="A.B=VALUE", short="-s"),
    "name": Option(str, "Name of the run's folder under runs/."),
    "out": Option(str, "Where to write, and nothing to stdout; - for stdout alone.", metavar="PATH", short="-o"),
    "force": _switch("Overwrite an existing file whose content differs.", short="-f"),
    "json": _switch("Write JSON instead of YAML, to --out or to stdout."),
    "quiet": _switch("Say nothing but warnings and errors; a document is printed as without it.", short="-q"),
    "verbose": _switch("Print more details.", short="-v"),
}

GROUPS = {  # of a command's help, in their order; an argument is in none
    "Your own model": "base wider third target example run ignore layout command timeout factory batches loss",
    "Model": "width layers heads kv_heads head_width ffn_width context vocab parameterization role shape",
    "Training": "index batch_size steps tokens tokens_per_parameter seed resume checkpoint_every keep max_time tracker "
    "device precision compile engine",
    "Data": "data format tokenizer field dtype encoding separator size image label",
    "Sparsity": "sparsity density masks values scope rewind scale pattern block distribution updates from_paper allow_low_wpn",
    "Measurement": "trials seeds max_seeds sampler search study over iso preset full calibrate rounds compare",
    "Text": "temperature top_k",
    "Input and output": "to list explain dry_run set name out picture force json quiet verbose",
    "Processes and clusters": "nproc parallel max_restarts jobs executor executor_set",
}


def group_of(name: str) -> str:
    """The group of an option in help."""
    return next(group for group, members in GROUPS.items() if name in members.split())
