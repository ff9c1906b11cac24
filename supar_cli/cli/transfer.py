"""`supar transfer`: a proxy and a target become a plan.

Annotations are no strings here: Typer would have each compiled, a fortieth of the command's time.
"""

import sys
from typing import Annotated, Any, get_args

import typer

from supar_cli.cli import console
from supar_cli.cli.app import single
from supar_cli.errors import InputError
from supar_cli.planning.density import Share, share
from supar_cli.planning.problems import parse
from supar_cli.planning.rules import ParameterizationName
from supar_cli.planning.spec import Proxy

TARGET_FLAGS = (
    "width",
    "layers",
    "heads",
    "kv_heads",
    "ffn_width",
    "context",
    "batch_size",
    "steps",
    "tokens",
    "tokens_per_parameter",
    "seed",
)


def transfer(
    proxy: Annotated[
        str | None, typer.Argument(help="Proxy document; - for stdin. [default: proxy.yaml]", show_default=False)
    ] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Share of hidden weights that are zero; several: 0.5,0.75,0.992.")
    ] = None,
    density: Annotated[
        str | None, typer.Option(help="Share that lives, instead of --sparsity: 0.008, 1/4,1/16.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Model width.")] = None,
    layers: Annotated[int | None, typer.Option(help="Number of blocks.")] = None,
    heads: Annotated[
        int | None, typer.Option(help="Attention heads. [default: the proxy's head width]", show_default=False)
    ] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Key/value heads.")] = None,
    ffn_width: Annotated[
        int | None, typer.Option(help="FFN width. [default: the proxy's ratio]", show_default=False)
    ] = None,
    context: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens, instead of --steps.")] = None,
    tokens_per_parameter: Annotated[
        float | None, typer.Option(help="Training tokens per live parameter, instead.")
    ] = None,
    parameterization: Annotated[
        str, typer.Option(metavar="NAME", help="supar, mup, sp, or half of supar: supar-init-only, supar-lr-only.")
    ] = "supar",
    pattern: Annotated[
        str | None, typer.Option(help="exact, fixed_fan_in, bernoulli, block, or N:M such as 2:4.")
    ] = None,
    block: Annotated[int | None, typer.Option(help="Edge of a block: 16, 32, 64 or 128.")] = None,
    distribution: Annotated[str | None, typer.Option(help="uniform or erk.")] = None,
    data: console.DataOption = None,
    seed: Annotated[int | None, typer.Option(help="Seed of init, masks and batches.")] = None,
    from_paper: Annotated[
        bool, typer.Option("--from-paper", help="Start from the published proxy (arXiv 2405.15743, Table 3).")
    ] = False,
    allow_low_wpn: Annotated[
        bool, typer.Option("--allow-low-wpn", help="Plan targets below one weight per neuron.")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the table per role also where stderr is no terminal.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show sizes, FLOPs, memory and time; write nothing.")
    ] = False,
    settings: console.Set = None,
    out: console.Out = None,
    force: console.Force = False,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
    verbose: console.Verbose = False,
) -> None:
    """Turn a tuned proxy into the plan of a wide, sparse target, every number derived and stored."""
    flags = locals()
    from supar_cli.data import corpus
    from supar_cli.planning.advice import warnings
    from supar_cli.planning.transfer import transfer as make_plan

    talk = console.Talk(quiet, verbose)
    if parameterization not in get_args(ParameterizationName):
        raise InputError(f"--parameterization {parameterization}: expected {', '.join(get_args(ParameterizationName))}")
    if sparsity is not None and density is not None:
        raise InputError("--density: given beside --sparsity; expected only one of them")
    if from_paper and proxy is not None:
        raise InputError("--from-paper: given beside a proxy document; expected only one of them")
    source = str(console.template("paper-proxy")) if from_paper else proxy or "proxy.yaml"
    read = console.read_one(source, "`supar tune-proxy` writes it, or use --from-paper")
    if from_paper:
        read.name = "--from-paper"
    console.apply_settings(read, settings)
    _put_flags(read, flags)
    plans = []
    for word, value in _levels(sparsity, density):
        if word:
            console.override(read, ("target", "sparsity"), {word: value})
        document = parse(Proxy, read)
        with console.located(read):
            if document.data.hash is None:
                document = document.model_copy(update={"data": corpus.identified(document.data)})
            plans.append(make_plan(document, document.target, parameterization, allow_low_wpn=allow_low_wpn))  # type: ignore[arg-type]
    for plan in plans:
        talk.log(
            f"{plan.parameterization.name}: sparsity {plan.sparsity.sparsity:g}, density {plan.sparsity.density:g}; "
            f"width {plan.decoder.width}, {plan.decoder.layers} layers; {plan.live:,} of {plan.parameters:,} parameters live"
        )
        if dry_run or explain or (talk.terminal and not quiet):
            from supar_cli.cli import tables

            tables.show_plan(plan)
            if dry_run:
                tables.show_estimate(plan)
        for message in warnings(plan):
            talk.warn(message)
    if dry_run:
        return
    console.emit([plan.model_dump() for plan in plans], out, "plan.yaml", force=force, as_json=as_json, talk=talk)
    if out != "-" and sys.stdout.isatty():
        talk.log("next: supar train" + (f" {out}" if out else ""))


def _put_flags(read: Any, flags: dict[str, Any]) -> None:
    """Flags stand for keys of the proxy document: its target, data and seed."""
    console.override(read, ("target",), {name: flags[name] for name in TARGET_FLAGS})
    console.override(read, ("target", "sparsity"), {name: flags[name] for name in ("pattern", "block", "distribution")})
    console.override(read, ("data",), {"source": flags["data"]})


def _levels(sparsity: str | None, density: str | None) -> list[tuple[str, Share]]:
    """The levels asked for, as (word, number); one empty level when the document is to say it."""
    word, text = ("sparsity", sparsity) if sparsity is not None else ("density", density)
    if text is None:
        return [("", 0.0)]
    levels: list[tuple[str, Share]] = []
    for part in text.split(","):
        try:
            levels.append((word, share(part)))
        except ValueError:
            raise InputError(f"--{word} {text}: {part!r} is not a number") from None
    return levels


app = single(transfer)
