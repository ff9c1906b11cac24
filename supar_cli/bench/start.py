"""Time and memory of a start, from a plan to a model that can take its first step, over width at equal weights per neuron."""

from __future__ import annotations

import time
from itertools import pairwise

import torch

from supar_cli.bench.memory import bytes_of, free_memory, in_own_process, reset_peak
from supar_cli.bench.results import Benchmark, Document, Reading, machine_settings
from supar_cli.planning.plan import Plan
from supar_cli.reporting.result import Table
from supar_cli.sparse import autotune
from supar_cli.sparse.autotune import LayerCase
from supar_cli.sparse.linear import Engine
from supar_cli.sparse.masks import Mask
from supar_cli.training.prepare import prepare


def benchmark(plans: list[Plan], engine: str, per_neuron: int) -> Benchmark:
    """The benchmark of plans that differ in width alone; the first, the narrowest, warms each process up."""
    case = LayerCase(torch.device("cpu"), torch.float32, plans[0].decoder.context)
    settings = {"widths": [plan.decoder.width for plan in plans], "layers": plans[0].decoder.layers, "engine": engine}
    settings["weights_per_neuron"] = per_neuron
    settings |= machine_settings(case.device, "float32")
    return Benchmark("start", settings, case.device, lambda: measure_plans(plans, engine, case), tables, readings)


def measure_plans(plans: list[Plan], engine: str, case: LayerCase) -> Document:
    """`seconds`, `peak_bytes` and `kept_bytes` of each plan's start, each in a process of its own, and the growth of the time."""
    found: list[Document] = [
        {"width": plan.decoder.width, "live": plan.live, "positions": plan.parameters}
        | in_own_process("bench start", measure_here, plans[0], plan, engine, case)
        for plan in plans
    ]
    for before, one in pairwise(found):
        one["times_the_width_before"] = round(one["seconds"] / before["seconds"], 3)
    return {"starts": found}


def measure_here(warm: Plan, plan: Plan, engine: str, case: LayerCase) -> Document:
    """Start once in this process; bytes are above what it held before."""

    def make(_: str, mask: Mask) -> Engine:
        return autotune.make(engine, mask, case)

    prepare(warm, case.device, make)
    free_memory()
    before = bytes_of("VmRSS")
    is_reset = reset_peak(case.device)
    begin = time.perf_counter()
    model = prepare(plan, case.device, make)
    seconds = time.perf_counter() - begin
    peak = bytes_of("VmHWM") - before
    free_memory()
    kept = bytes_of("VmRSS") - before
    assert model.masks.keys() == {row.name for row in plan.tensors if row.kept < row.size}
    return {"seconds": round(seconds, 4), "peak_bytes": peak, "kept_bytes": kept, "peak_reset": is_reset}


def tables(document: Document) -> list[Table]:
    count, wpn = document["layers"], document["weights_per_neuron"]
    title = f"start of {count} layer{'s' * (count > 1)}, {wpn} live weights a neuron, engine {document['engine']}"
    rows = [
        [
            str(one["width"]),
            f"{one['live']:,}",
            f"{one['seconds']:.3g}",
            f"{one['times_the_width_before']:.2f}" if "times_the_width_before" in one else "–",
            f"{one['peak_bytes'] / 2**20:.1f}",
            f"{one['kept_bytes'] / 2**20:.1f}",
        ]
        for one in document["starts"]
    ]
    columns = ["width", "live weights", "s", "÷ the row above", "peak MiB", "kept MiB"]
    return [Table(title=title, columns=columns, rows=rows)]


def readings(document: Document) -> dict[str, Reading]:
    """One measurement has no spread."""
    found = {}
    for one in document["starts"]:
        for key in ("seconds", "peak_bytes", "kept_bytes"):
            value = float(one[key])
            found[f"{key.replace('_', ' ')} at width {one['width']}"] = Reading(value, value, value, is_gain=False)
    return found
