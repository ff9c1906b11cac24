"""`supar demo`: tune a tiny dense proxy, go sparse under SP and SμPar, and see whose learning rate still holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import supar_cli
from supar_cli.cli import terminal
from supar_cli.cli.app import command_app
from supar_cli.cli.options import Flags, command
from supar_cli.reporting.result import fraction

RULES = {"sp": "SP", "supar": "SμPar"}


@command(
    "data steps trials seeds jobs device out json quiet verbose",
    steps={"help": "Training steps of every run.", "default": 120, "minimum": 8},
    trials={"help": "Trials of the proxy's search.", "default": 6, "minimum": 1},
    seeds={"help": "Seeds averaged at every point of the sweep.", "default": 1},
    jobs={"help": "Processes. [default: one a CPU core, at most 8]"},
    out={"help": "Folder for proxy.yaml, results.json and lr_transfer.png.", "default": "demo"},
)
def demo(flags: Flags) -> None:
    """See what SμPar keeps and SP loses as weights go sparse: a few minutes on two CPU cores, no download."""
    how = {name: getattr(flags, name) for name in ("steps", "trials", "seeds", "jobs", "device", "out", "verbose")}
    with terminal.Progress("demo", flags.quiet) as progress:
        result = supar_cli.demo(flags.data, **how, reporter=progress)
    if not flags.quiet:
        terminal.show_tables([_table(result["regrets"])])
        terminal.Log().log(_explanation(result, Path(flags.out)))
    terminal.print_documents([result], flags)


def _table(regrets: list[dict[str, Any]]) -> dict[str, Any]:
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
    return {"title": "regret of re-using the dense model's rate", "columns": columns, "rows": rows}


def _explanation(result: dict[str, Any], folder: Path) -> str:
    worst = {}
    for name in RULES:
        regrets = [row["regret"] for row in result["regrets"] if row["parameterization"] == name]
        worst[name] = "diverges" if None in regrets else f"loses up to {max(regrets):.3f} nats a token"
    seeds = result["seeds"]
    return f"""\
best rate ÷ dense: a density's best learning rate over the dense model's best.
regret: nats a token lost by re-using the dense model's.
Shown: with the dense model's rate, sparse SP training {worst["sp"]},
  sparse SμPar training {worst["supar"]}. Nothing to re-tune is what SμPar is for.
Not shown: that SμPar beats an SP whose rate is re-tuned at every density. That can be as
  good; compare the losses at their own best. The models are tiny, trained for seconds,
  {seeds} seed{"s" if seeds > 1 else ""} a point.
Figure: {folder / "lr_transfer.png"}

Next, with a proxy that is tuned for longer:
  supar tune-proxy
  supar transfer --sparsity 0.992
  supar train"""


app = command_app(demo)
