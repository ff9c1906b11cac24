"""`supar report`: what a page holds, that it needs nothing but itself, and what it refuses."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.reporting import figures
from supar_cli.reporting.result import Figure, Line, Panel, Result, Table, Verdict
from supar_cli.training import run_directory
from supar_cli.training.trainer import Trainer
from tests.conftest import Called

Supar = Callable[..., Called]
EVIL = "<script>throw Error('planted')</script>"
MARKS = [(True, False), (False, False), (False, True), (True, True), (None, False)]


def study(folder: Path, title: str = "A sweep", **changes: Any) -> Path:
    """A sweep's folder: two figures, one of them with gaps, every sort of verdict, six records and a cut one."""
    lines = [
        Line.through(f"density {d}", {2.0**k: 3 + (k + 7) ** 2 / 9 if k < -4 else None for k in range(-9, -2)})
        for d in (1, 2)
    ]
    panels = [Panel(title=name, vertical=2.0**-7, lines=lines) for name in ("SP", "μP", "SμPar")]
    axes: dict[str, Any] = {"x": "learning rate $", "y": "loss", "x_log2": True}
    found = Result(
        kind="supar.sweep-result/v1",
        title=title,
        verdicts=[Verdict(what=f"mark {i}", passed=p, control=c, text=title) for i, (p, c) in enumerate(MARKS)],
        tables=[Table(title="Optima", columns=["density", title], rows=[["1/4", 0.25], [title, None]])],
        figures=[
            Figure(name=name, title=f"{name} {title}", **axes, panels=panels[:n]) for name, n in (("a", 3), ("b", 1))
        ],
        parents={"sweep": "sha256:" + "ab" * 32},
        environment={"supar": "0", "cuda": None},
        command="supar sweep 'a b'",
    ).document()
    folder.mkdir(parents=True)
    states = ["done"] * 4 + ["diverged", "failed"]
    rows = [
        json.dumps({"run": f"r{i}", "state": s, "why": None if s == "done" else f"why {title}"})
        for i, s in enumerate(states)
    ]
    (folder / "records.jsonl").write_text("\n".join(rows) + '\n{"run": "r6", "sta')
    (folder / "question.json").write_text(json.dumps({"kind": "supar.sweep/v1", "name": "asked"}))
    (folder / "result.json").write_text(json.dumps({**found, **changes}))
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of twelve steps, its plan's notes hostile."""
    from tests.conftest import plan_from, proxy_fields, real_text

    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_bytes(real_text(24_000))
    fields = proxy_fields(str(folder / "text.txt"), run={"log_every": 2})
    plan: Plan = plan_from(fields).model_copy(update={"meta": {"note": EVIL}})
    run_directory.begin_run(folder / "run", plan, resume=False, force=False)
    Trainer(plan).run(folder / "run")
    return folder / "run"


@pytest.fixture
def cut(trained: Path, tmp_path: Path) -> Path:
    """The same run as it stood within its eighth step's line."""
    shutil.copytree(trained, tmp_path / "cut")
    (tmp_path / "cut" / "result.json").unlink()
    path = tmp_path / "cut" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:7]) + lines[7][:20])
    return tmp_path / "cut"


class Page(HTMLParser):
    """What a page would run or fetch, its ids, headings and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.foreign: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag in ("script", "iframe", "object", "embed", "img", "base"):
            self.foreign.append(tag)
        for name, value in attributes:
            value = value or ""
            if name == "id":
                self.ids.append(value)
            self.targets += [value[1:]] if name in ("href", "xlink:href") and value.startswith("#") else []
            self.targets += re.findall(r"url\(#([^)]*)\)", value)
            if name.startswith("on") or (name in ("src", "href", "data") and not value.startswith(("#", "data:,"))):
                self.foreign.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data


def foreign(text: str) -> list[str]:
    """What a page would run, or fetch from elsewhere."""
    return Page(text).foreign + re.findall(r"https?://[^\s<\"]*|@import|url\((?!#)[^)]*\)", text)


def test_a_finished_run(supar_here: Supar, trained: Path, tmp_path: Path) -> None:
    called = supar_here("report", str(trained))
    assert (called.status, called.out) == (0, "")
    text = (tmp_path / "report.html").read_text()
    shown = Page(text)
    assert shown.tags.count("svg") == 4
    assert re.search("finished: step 12 of 12, last written 20", shown.text) and "✓ passed" in shown.text
    result = json.loads((trained / "result.json").read_text())
    assert f"{result['validation_loss']:.6g}" in shown.text and f"{result['train_loss']:.6g}" in shown.text
    plan = document.read_file(str(trained / "plan.yaml"))[0].data
    assert all(row["name"] in shown.text for row in plan["tensors"]) and result["plan"] in shown.text
    assert result["environment"]["torch"] in shown.text
    assert supar_here("report", str(trained)).status == 0, "equal input makes an equal page"


def test_a_running_run_is_shown_so_far(supar_here: Supar, cut: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    called = supar_here("report", "cut", "--json", "-o", "-")
    assert json.loads(called.out)["parts"][0]["state"].startswith("killed: step 7 of 12")
    with run_directory._lock(cut):
        called = supar_here("report", "cut", "--json", "-o", "-")
    (cut / "lock").unlink()
    assert called.status == 0
    part = json.loads(called.out)["parts"][0]
    assert re.match(r"running: step 7 of 12, last written 20\d\d-", part["state"])
    assert {one["what"]: one["passed"] for one in part["verdicts"]} == {"finished": None, "losses finite": True}
    training, validation = part["figures"][0]["panels"][0]["lines"]
    written = [json.loads(line)["loss"] for line in before[cut / "metrics.jsonl"].splitlines()[:7]]
    assert training["y"] == written and training["x"] == list(range(1, 8)) and validation["x"] == [6]
    assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "report.html").exists()


def test_losses_that_are_not_finite_are_gaps_and_said(supar_here: Supar, cut: Path) -> None:
    with (cut / "metrics.jsonl").open("w") as file:
        file.write(
            '{"step": 1, "loss": 5.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": null}\n{"step": 4, "loss": 4.0}\n'
        )
    part = json.loads(supar_here("report", "cut", "--json", "-o", "-").out)["parts"][0]
    assert part["figures"][0]["panels"][0]["lines"][0]["y"] == [5.0, None, None, 4.0]
    assert part["verdicts"][1]["passed"] is False and "2, 3" in part["verdicts"][1]["text"]
    assert "2 points without a finite value" in supar_here("report", "cut", "-o", "-").out
    (cut / "metrics.jsonl").write_text("")
    assert "No step is recorded yet" in supar_here("report", "cut", "-o", "-").out


def test_long_curves_are_downsampled_and_keep_their_gaps() -> None:
    from supar_cli.reporting.runs import downsample

    by_step: dict[float, float | None] = {float(step): float(step) for step in range(1, 401)}
    by_step[7.0] = None
    means, each = downsample(by_step)
    assert each == 2 and len(means) == 200
    assert (means[2.0], means[8.0], means[400.0]) == (1.5, None, 399.5)


def test_verdicts_say_in_words_what_they_are(supar_here: Supar, tmp_path: Path) -> None:
    study(tmp_path / "sweep")
    shown = Page(supar_here("report", "sweep", "-o", "-").out)
    words = ["✓ passed", "✗ FAILED", "✓ control fails", "! control passes, but it should fail", "? unknown"]
    places = [shown.text.index(word) for word in words]
    assert places == sorted(places) and places[-1] < shown.text.index("Figures")
    assert "supar sweep 'a b'" in shown.text and "why A sweep" in shown.text


def test_a_result_is_written_as_given_and_read_as_written(tmp_path: Path) -> None:
    line = Line.through("one", {2.0: float("nan"), 1: 3.0}, ring=1)
    figure = Figure(name="drawn", title="$", x="x", y="y", panels=[Panel(lines=[line])])
    verdict, table = Verdict(what="mark", passed=True), Table(title="t", columns=["a"], rows=[[1], [None]])
    result = Result(
        kind="k", title="t", verdicts=[verdict], tables=[table], figures=[figure], parents={}, environment={}, own=[1]
    )
    said: list[str] = []
    figures.write_result(result, tmp_path, said.append)
    found = json.loads((tmp_path / "result.json").read_text())
    assert list(found) == [*list(Result.model_fields), "own"] and found["command"].startswith("supar")
    assert found["verdicts"] == [{"what": "mark", "passed": True}] and found["tables"][0]["rows"] == [[1], [None]]
    assert found["figures"][0]["panels"] == [{"lines": [{"label": "one", "x": [1, 2.0], "y": [3.0, None], "ring": 0}]}]
    assert Result.parse(found, tmp_path).document() == found
    assert said == [f"wrote {tmp_path}/: result.json, drawn.png, records.jsonl"] and (tmp_path / "drawn.png").exists()


def test_a_table_has_a_cell_for_each_column() -> None:
    with pytest.raises(ValueError, match="t: a row has 1 cells; expected 2"):
        Table(title="t", columns=["a", "b"], rows=[[1, 2], [1]])


def test_a_running_sweep_counts_its_records(supar_here: Supar, tmp_path: Path) -> None:
    (study(tmp_path / "sweep") / "result.json").unlink()
    part = json.loads(supar_here("report", "sweep", "--json", "-o", "-").out)["parts"][0]
    assert part["state"].startswith("running: 6 runs recorded (4 done, 1 diverged, 1 failed), last written 20")
    assert part["title"] == "asked" and part["tables"][0]["rows"] == [["done", 4], ["diverged", 1], ["failed", 1]]


def test_a_running_sweep_shows_its_losses_so_far(supar_here: Supar, tmp_path: Path) -> None:
    (study(tmp_path / "sweep") / "result.json").unlink()
    found = [("sp", 1.0, 0.5, 3.0), ("sp", 1.0, 0.5, 4.0), ("sp", 1.0, 0.25, 2.0), ("supar", 0.25, 0.5, None)]
    keys = ("arm", "density", "lr", "loss")
    rows = [
        {"run": f"s{i}", "state": "done", "width": 64, **dict(zip(keys, one, strict=True))}
        for i, one in enumerate(found)
    ]
    (tmp_path / "sweep" / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    part = json.loads(supar_here("report", "sweep", "--json", "-o", "-").out)["parts"][0]
    (panel,) = part["figures"][0]["panels"]
    assert panel["title"].startswith("SP") and part["figures"][0]["x"] == "learning rate of the proxy"
    assert [(one["label"], one["x"], one["y"]) for one in panel["lines"]] == [("density 1.0", [0.25, 0.5], [2.0, 3.5])]


def test_a_demo_is_drawn_though_it_holds_records_too(supar_here: Supar, tmp_path: Path) -> None:
    (study(tmp_path / "demo") / "result.json").unlink()
    curve = {"parameterization": "sp", "density": 0.25, "losses": {"-1": 3.0, "0": 2.5, "1": None}}
    regrets = [{"parameterization": "sp", "density": 0.25, "regret": None}]
    found = {"kind": "supar.demo/v1", "proxy": "sha256:1", "curves": [curve], "regrets": regrets, "lr": 0.1}
    (tmp_path / "demo" / "results.json").write_text(json.dumps(found))
    part = json.loads(supar_here("report", "demo", "--json", "-o", "-").out)["parts"][0]
    line = part["figures"][0]["panels"][0]["lines"][0]
    assert (part["kind"], line["x"], line["y"]) == ("demo", [0.5, 1.0, 2.0], [3.0, 2.5, None])


def test_several_inputs_share_one_page(supar_here: Supar, trained: Path, cut: Path, tmp_path: Path) -> None:
    study(tmp_path / "one"), study(tmp_path / "two")
    called = supar_here("report", str(trained), "cut", "one", "two", str(trained / "plan.yaml"), "-o", "-")
    assert called.status == 0
    shown = Page(called.out)
    assert shown.tags.count("svg") == 4 + 4 + 2 + 2
    assert len(shown.ids) == len(set(shown.ids)) > 50
    assert set(shown.targets) <= set(shown.ids) and len(set(shown.targets)) > 50
    headings = [int(tag[1]) for tag in shown.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))
    assert called.out.count("<table>") == called.out.count("<caption>") > 5
    assert called.out.count('role="img" aria-label="') == 12


def test_a_folder_of_runs_and_measurements_is_reported_whole(supar_here: Supar, cut: Path, tmp_path: Path) -> None:
    study(tmp_path / "sweep")
    called = supar_here("report", ".", "--json")
    assert called.status == 0
    assert sorted(part["source"] for part in json.loads(called.out)["parts"]) == ["cut", "sweep"]


def test_two_equal_figures_have_ids_of_their_own() -> None:
    from supar_cli.reporting.html import draw_svg

    figure = Figure(name="a", title="a", x="x", y="y", panels=[Panel(lines=[Line.through("b", {1.0: 2.0, 2.0: 1.0})])])
    one, same, other = (set(Page(draw_svg(figure, salt)[1]).ids) for salt in ("p1f1", "p1f1", "p2f1"))
    assert one == same and len(one) > 3 and not one & other


def test_nothing_is_run_or_fetched_and_texts_stay_texts(supar_here: Supar, trained: Path, tmp_path: Path) -> None:
    study(tmp_path / EVIL.replace("/", "-"), title=EVIL)
    text = supar_here("report", EVIL.replace("/", "-"), str(trained), "-o", "-").out
    assert foreign(text) == []
    assert Page(text).text.count(EVIL) > 5 and EVIL.replace("/", "-") in Page(text).text
    for planted in (EVIL, '<img src="https://a.b/c">', '<link rel="x" href="a.css">', "<style>@import 'a'</style>"):
        assert foreign(text.replace("</main>", planted + "</main>")) != []


def test_a_page_that_differs_is_kept_without_force(supar_here: Supar, tmp_path: Path) -> None:
    study(tmp_path / "sweep")
    (tmp_path / "report.html").write_text("mine")
    called = supar_here("report", "sweep")
    assert called.status == 2 and "--force" in called.err and (tmp_path / "report.html").read_text() == "mine"
    assert supar_here("report", "sweep", "--force").status == 0


HUGE = '{"title": "t", "columns": ["a"], "rows": [[1e999]]}'
BAD: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "missing": (lambda at: shutil.rmtree(at), 2, "bad: no such file or folder"),
    "empty folder": (lambda at: [path.unlink() for path in at.iterdir()], 2, "bad: holds no results of supar"),
    "cut result": (lambda at: (at / "result.json").write_text('{"kind": "sup'), 3, "bad/result.json: is corrupt"),
    "list": (lambda at: (at / "result.json").write_text("[1]"), 2, "bad/result.json: kind: is None"),
    "binary": (lambda at: (at / "result.json").write_bytes(b"\xff\xfe\x00"), 3, "bad/result.json: is corrupt"),
    "deep": (lambda at: (at / "result.json").write_text("[" * 99_999), 3, "bad/result.json: is corrupt"),
    "huge": (
        lambda at: (at / "result.json").write_text(
            '{"kind": "supar.sweep-result/v1", "tables": [HUGE]}'.replace("HUGE", HUGE)
        ),
        3,
        "bad/result.json: tables[0].rows[0][0]",
    ),
    "demo": (
        lambda at: [(at / "result.json").unlink(), (at / "results.json").write_text('{"kind": "supar.demo/v1"}')],
        3,
        "bad/results.json: curves: Field required",
    ),
    "record": (lambda at: (at / "records.jsonl").write_text('{"run": 1}\nx\n'), 3, "bad/records.jsonl:2: not a record"),
    "plan": (
        lambda at: [(at / "question.json").unlink(), (at / "plan.yaml").write_text("kind: x\n")],
        2,
        "bad/plan.yaml:1",
    ),
}
CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "no panels": ({"figures": [{"name": "a", "title": "", "x": "", "y": "", "panels": []}]}, "figures[0].panels"),
    "verdict": ({"verdicts": [{"what": "x", "passed": "perhaps"}]}, "verdicts[0].passed"),
    "table": (
        {"tables": [{"title": "t", "columns": ["a"], "rows": [[1, 2]]}]},
        "tables[0]: t: a row has 2 cells; expected 1",
    ),
    "not a list": ({"tables": 3}, "tables: "),
    "environment": ({"environment": [1]}, "environment: Input should be a valid dictionary"),
    "ring": (
        {
            "figures": [
                {"name": "a", "title": "", "x": "", "y": "", "panels": [{"lines": [{"x": [1], "y": [1], "ring": 1}]}]}
            ]
        },
        "figures[0].panels[0].lines[0]: ring is not",
    ),
}


class TestErrors:
    @pytest.mark.parametrize("name", BAD)
    def test_name_the_file(self, name: str, supar_here: Supar, tmp_path: Path) -> None:
        spoil, status, message = BAD[name]
        spoil(study(tmp_path / "bad"))
        self._refused(supar_here("report", "bad"), status, message, tmp_path)

    @pytest.mark.parametrize("name", CHANGES)
    def test_name_the_place(self, name: str, supar_here: Supar, tmp_path: Path) -> None:
        changes, where = CHANGES[name]
        study(tmp_path / "bad", **changes)
        self._refused(supar_here("report", "bad"), 3, f"bad/result.json: {where}", tmp_path)

    @staticmethod
    def _refused(called: Called, status: int, message: str, tmp_path: Path) -> None:
        assert (called.status, called.out) == (status, "") and called.err.startswith(f"error: {message}"), called.err
        assert "Traceback" not in called.err and not (tmp_path / "report.html").exists()

    def test_another_document(self, supar: Supar, tmp_path: Path) -> None:
        (tmp_path / "supar.yaml").write_text("kind: supar.spec/v1\n")
        self._refused(supar("report", "supar.yaml"), 2, "supar.yaml:1: kind: is 'supar.spec/v1'", tmp_path)
