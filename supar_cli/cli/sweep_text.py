"""What `supar sweep` and `compare` say of their runs, and of the columns of their tables."""

from typing import Any

from supar_cli.cli import terminal
from supar_cli.planning.sweep import AGGREGATES, Sweep


def describe(study: Sweep, log: terminal.Log) -> None:
    """Describe the runs in a few lines."""
    levels, train, target = study.levels, study.train, study.target
    size, proxy = study.size_at(levels[0]), study.size_at()
    more = f", {study.first_seeds} at the first size" if study.first_seeds else ""
    seeds = f"{study.seeds} seed{'s' if study.seeds > 1 else ''} per point{more}"
    if study.aggregate != "mean":
        seeds += f", their {AGGREGATES[study.aggregate]}"
    log.log(f"{study.title or study.name}: {'; '.join(study.arms) or ', '.join(study.parameterizations)}; {seeds}")
    if study.data is None:
        shape = ", ".join(f"{name} {value} (proxy {proxy[name]})" for name, value in size.items())
    else:
        shape = f"width {size['width']} (proxy {proxy['width']}), {size['layers']} layers"
        read = study.decoder.model_copy(update={"context": target.context or study.decoder.context})
        shape += f", {read.rows_text}"
    made_of = f"by: {study.run.command}" if study.data is None else f"data {study.data.source}"
    length = f"batch {target.batch_size or train.batch_size}, {target.steps or train.steps} steps"
    log.log(f"{shape}, {length}, {made_of}")
    if study.iso != "none":
        keeps, power = {"parameters": ("live hidden parameters", 2), "wpn": ("weights per neuron", 1)}[study.iso]
        log.log(
            f"widths with as many {keeps} as at density {levels[0].density:g}, "
            f"in multiples of {study.decoder.width_step}, for whole heads:"
        )
        for level in levels:
            width = study.size_at(level)["width"]
            share = width**power * level.density / (size["width"] ** power * levels[0].density)
            live = f"{width * level.density:g} weights per neuron"
            log.log(f"  density {level.density:g}: width {width}, {live}, {100 * share:.1f} % of the first")


def explain_sweep(result: dict[str, Any], log: terminal.Log) -> None:
    """Explain the columns of the tables and report what is undecided."""
    log.log(
        "octaves: log2 of the best value over the first row's\n"
        "re-used: loss at the value that measured best in the first row\n"
        "regret: its loss penalty against re-tuning\n"
        "γ: slope of log2(best value) against log2(size). A best value is the minimum\n"
        "  of a parabola through the losses within 2 steps and 1.5 octaves of the best\n"
        "  one measured"
    )
    levels = [level for arm in result["arms"] for level in arm["levels"]]
    for arm in result["arms"]:
        counts = {word: sum(level[word] for level in arm["levels"]) for word in ("diverged", "failed")}
        if any(counts.values()):
            runs = sum(len(loss["by_seed"]) for level in arm["levels"] for loss in level["losses"])
            said = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
            log.log(f"{arm['arm']}: of {runs} runs {said}; a diverged one counts as worse than any loss")
    seeds, widen = result["sweep"]["seeds"], result["sweep"]["widen"]
    if seeds == 1:
        log.log("one seed: no interval; differences may be chance")
    else:
        log.log(f"95 % intervals: {result['resamples']} resamples of the {seeds} seeds")
        log.log("90 % intervals of verdicts: Student's t times their standard error")
    if at_end := sum(not level["bracketed"] for level in levels):
        log.warn(
            f"{at_end} optima lie at an end of their axis, which was extended by at most {widen} steps; -s widen=N allows more"
        )


def explain_comparison(rows: list[dict[str, Any]], log: terminal.Log) -> None:
    """Say what the columns of the tables mean."""
    log.log(
        "tuned dense: SP at its best learning rate of the first row\n"
        "re-tuned: SP at its best learning rate of each row, searched in octaves; the\n"
        "  same runs are searched and scored, so this loss is slightly optimistic\n"
        "SP, μP and SμPar: at the proxy's learning rate; SμPar should need no re-tuning"
    )
    if rows[0]["cells"] and all(cell["standard_error"] is None for row in rows for cell in row["cells"].values()):
        log.log("one seed: no standard errors; differences may be chance")
