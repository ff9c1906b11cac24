"""Tables of benchmark documents, as plain data: title, columns, rows."""

from __future__ import annotations

from typing import Any

Table = dict[str, Any]


def tables(result: dict[str, Any]) -> list[Table]:
    """What a document says, within 80 columns."""
    return {"layer": _layer, "step": _step, "run": _run, "memory": _memory}[result["bench"]](result)


def _spread(found: dict[str, Any], word: str) -> list[str]:
    """A ratio and its quartiles."""
    low, high = found[f"{word}_quartiles"]
    return [f"{found[word]:.3f}", f"{low:.3f} to {high:.3f}"]


def _step(result: dict[str, Any]) -> list[Table]:
    rows = [
        ["masked (ours)", f"{result['masked_ms']:.1f}", "", "", ""],
        ["plain dense", f"{result['dense_ms']:.1f}", "ours ÷ it", *_spread(result, "ratio")],
        ["plain masked dense", f"{result['masked_dense_ms']:.1f}", "it ÷ ours", *_spread(result, "masked_dense_ratio")],
    ]
    engines = ", ".join(f"{name} {count}" for name, count in sorted(result["engines"].items())) or "none"
    title = (
        f"a training step at density {result['density']:g}, {result['precision']}, {result['steps']} rounds\n"
        f"masked tensors by engine: {engines}"
    )
    return [{"title": title, "columns": ["step", "ms", "ratio", "median", "quartiles"], "rows": rows}]


def _layer(result: dict[str, Any]) -> list[Table]:
    out, width = result["shape"]
    blocks = f", blocks of {result['block']}" if result["block"] else ""
    found = []
    for one in result["densities"]:
        rows = [
            [
                f"auto ({one['auto']})" if name == "auto" else name,
                f"{arm['ms']:.1f}" if arm["ms"] >= 10 else f"{arm['ms']:.3g}",
                *_spread(arm, "ratio"),
                *_spread(arm, "over_dense"),
            ]
            for name, arm in one["arms"].items()
        ]
        title = f"{out}×{width}, {result['tokens']} tokens, density {one['density']:g} ({one['live']:,} live{blocks})"
        columns = ["arm", "ms", "masked ÷", "quartiles", "best dense ÷", "quartiles"]
        found.append({"title": title, "columns": columns, "rows": rows})
    even = [[name, one["masked"]["text"], one["best_dense"]["text"]] for name, one in result["break_even"].items()]
    if even:
        columns = ["breaks even", "with masked dense", "with the best dense"]
        found.append({"title": "", "columns": columns, "rows": even})
    return found


def _run(result: dict[str, Any]) -> list[Table]:
    def share(one: dict[str, Any]) -> list[str]:
        return [f"{one['share']:.4g}", "{:.4g} to {:.4g}".format(*one["quartiles"])]

    rows = [
        ["a step", f"{result['step_ms']:.1f}", "1", ""],
        [
            f"a checkpoint of {result['checkpoint_bytes'] / 2**20:.1f} MiB",
            f"{result['checkpoint_stall_ms']:.1f}",
            *share(result["checkpoint"]),
        ],
        ["until its save returns", f"{result['checkpoint_returns_ms']:.1f}", "", ""],
        ["until it is on disk", f"{result['checkpoint_written_ms']:.1f}", "", ""],
        [f"metrics, and monitors every {result['log_every']} steps", "", *share(result["metrics"])],
    ]
    columns = ["", "ms", "of a step", "quartiles"]
    found = [{"title": f"what is added to a step, density {result['density']:g}", "columns": columns, "rows": rows}]
    parallel = result["parallel"]
    if parallel:
        title = f"a process's step at equal work, {parallel['threads_each']} threads each, {parallel['steps']} rounds"
        rows = [
            ["alone on the machine", f"{parallel['alone_ms']:.1f}", "", ""],
            ["beside another, nothing exchanged", f"{parallel['beside_ms']:.1f}", "", ""],
            ["gradients exchanged (DDP)", f"{parallel['exchanging_ms']:.1f}", *share(parallel["over_beside"])],
            ["the same, over alone", "", *share(parallel["over_alone"])],
        ]
        found.append({"title": title, "columns": ["", "ms", "ratio", "quartiles"], "rows": rows})
    return found


def _memory(result: dict[str, Any]) -> list[Table]:
    rows = [
        [
            name,
            f"{one['peak_bytes'] / 2**20:.1f}",
            f"{one['bytes_per_position']:.3g}",
            f"{one['bytes_per_live']:.4g}",
            f"{one['share_of_masked']:.3g}",
        ]
        for name, one in result["arms"].items()
    ]
    out, width = result["shape"]
    title = f"peak: {out}×{width}, {result['tokens']} tokens, AdamW, density {result['density']:g}"
    columns = ["arm", "MiB", "bytes a position", "bytes a live weight", "of masked"]
    return [{"title": title, "columns": columns, "rows": rows}]


def comparison(name: str, rows: list[dict[str, Any]]) -> Table:
    """What `bench_results.compared` found, against the document of a file."""
    drawn = [
        [
            row["what"],
            f"{row['then']:.4g}",
            *(["–", "–"] if row["now"] is None else [f"{row['now']:.4g}", f"{100 * row['change']:+.1f} %"]),
            "WORSE" if row["worse"] else "",
        ]
        for row in rows
    ]
    return {"title": f"against {name}", "columns": ["", "then", "now", "change", ""], "rows": drawn}
