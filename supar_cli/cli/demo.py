"""`supar demo`: in minutes, does a learning rate that was tuned dense still hold where weights are sparse?"""

from pathlib import Path
from typing import Any

import supar_cli
from supar_cli.cli import documents, terminal
from supar_cli.cli.options import Flags, command
from supar_cli.reporting.result import fraction

RULES = {"sp": "SP", "supar": "SμPar"}


@command(
    "data steps trials seeds jobs device dry_run out json quiet verbose",
    steps={"help": "Training steps of every run.", "default": 120, "minimum": 8},
    trials={"help": "Trials of the proxy's search.", "default": 6, "minimum": 1},
    seeds={"help": "Seeds averaged at every point of the sweep.", "default": 1},
    out={"help": "Folder for proxy.yaml, results.json and lr_transfer.png. [default: demo]"},
)
def demo(flags: Flags) -> None:
    """Show whether the dense model's learning rate stays best as weights go sparse, under SP and SμPar.

    Takes a few minutes on two CPU cores and downloads nothing.

    Examples:
      supar demo
      supar demo --data corpus.txt --jobs 2
    """
    if flags.dry_run:
        from supar_cli.experiments.sweep import demo_parts

        asked = (flags.steps, flags.trials, flags.seeds, flags.device)
        return terminal.show_dry_run(demo_parts(flags.data, *asked), flags)
    how = {name: getattr(flags, name) for name in ("steps", "trials", "seeds", "jobs", "device", "verbose")}
    folder = terminal.folder_of(flags, "demo")
    with terminal.Progress("demo", flags.quiet) as progress, documents.naming_flags(flags):
        result = supar_cli.demo(flags.data, **how, out=folder, reporter=progress)
    if not flags.quiet:
        terminal.show_tables([_regret_table(result["regrets"])])
        terminal.show_verdicts(result["verdicts"])
        terminal.Log().log(_explain_demo(result, folder))
    terminal.print_documents([result], flags)
    terminal.require_passed(result["verdicts"], flags)


def _regret_table(regrets: list[dict[str, Any]]) -> dict[str, Any]:
    rows = [
        [
            RULES[row["parameterization"]],
            fraction(row["density"]),
            f"2^{row['optimum_octaves']}",
            f"{row['loss_at_optimum']:.3f}",
            *("diverged" if row[key] is None else f"{row[key]:.3f}" for key in ("loss_at_dense_rate", "regret")),
        ]
        for row in regrets
    ]
    columns = ["rules", "density", "best rate ÷ dense", "loss at best", "loss at dense rate", "regret"]
    return {"title": "regret of re-using the dense model's learning rate", "columns": columns, "rows": rows}


def _explain_demo(result: dict[str, Any], folder: Path) -> str:
    worst = {}
    for name in RULES:
        regrets = [row["regret"] for row in result["regrets"] if row["parameterization"] == name]
        worst[name] = "diverges" if None in regrets else f"loses up to {max(regrets):.3f} nats per token"
    seeds = result["seeds"]
    return f"""\
best rate ÷ dense: a density's best learning rate over the dense model's best.
regret: nats per token lost by re-using the dense model's learning rate.
With the dense model's rate, sparse SP training
  {worst["sp"]}, sparse SμPar training
  {worst["supar"]}. SμPar is meant to make re-tuning unnecessary.
Not shown: that SμPar beats SP with a learning rate re-tuned at every density.
  Re-tuned SP can be as good: compare the column "loss at best". The models are
  tiny, trained for seconds, {seeds} seed{"s" if seeds > 1 else ""} per point.
Figure: {folder / "lr_transfer.png"}

Next, with a proxy that is tuned for longer:
  supar tune-proxy
  supar transfer --sparsity 0.992
  supar train"""
