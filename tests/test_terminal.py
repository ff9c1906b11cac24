"""What people see: tables and messages that break no word, colours, help in groups with examples that work, and completion."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from supar_cli.cli import text as words
from supar_cli.cli.app import COMMANDS, NAMES, app
from supar_cli.cli.option_table import GROUPS
from supar_cli.planning.estimate import duration

from .conftest import CHECKOUT, Called, environment
from .test_flags import call, commands

Supar = Callable[..., Called]
WORD = st.text("abcdefghijklmnop*._-,0123456789×", min_size=1, max_size=25)
CELL = st.lists(WORD, max_size=5).map(" ".join)
TABLES = st.integers(1, 7).flatmap(
    lambda n: st.tuples(
        st.lists(CELL, min_size=n, max_size=n), st.lists(st.lists(CELL, min_size=n, max_size=n), max_size=4)
    )
)


def shown_words(text: str) -> list[str]:
    return sorted(text.split())


def by_rich(columns: list[str], rows: list[list[str]], width: int) -> str:
    """The table as it was made before: words that don't fit are folded."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for heading in columns:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(width=width, file=open(os.devnull, "w"), record=True)  # noqa: SIM115
    console.print(table)
    return console.export_text()


class TestTables:
    @settings(max_examples=50)
    @given(TABLES, st.integers(words.NARROWEST, 120))
    def test_no_word_is_broken_and_no_line_is_too_long(self, table: Any, width: int) -> None:
        columns, rows = table
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", str(width))
            text = words.table(columns, rows, right=range(1, len(columns)))
        all_words = " ".join(cell for row in rows for cell in row).split()
        assert set(all_words) <= set(text.split())  # a stacked table may have headings several times or not at all
        longest = max(map(len, [*" ".join(columns).split(), *all_words]), default=0)
        assert all(len(line) <= max(width, longest + 4) for line in text.splitlines())

    def test_control_the_former_tables_broke_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names = ["*.attn_norm.bias", "*.attn.q.bias"]
        columns, rows = ["tensor", *"abcdefgh"], [[name, *["0.007812"] * 8] for name in names]
        monkeypatch.setenv("COLUMNS", "80")
        assert not set(names) <= set(by_rich(columns, rows, 80).split())
        assert set(names) <= set(words.table(columns, rows).split())

    def test_headings_of_numbers_give_way_before_names_do(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "31")
        text = words.table(["run", "validation loss"], [["supar-w128-l2-s0.75", "2.4"]], right=[1])
        assert (
            text == "run                  validation\n                           loss\nsupar-w128-l2-s0.75         2.4"
        )

    def test_the_widest_template_fits_80_columns(self, supar_here: Supar, tmp_path: Path) -> None:
        fields = yaml.safe_load((CHECKOUT / "templates/interpretability.yaml").read_text("utf-8"))
        proxy = {key: fields[key] for key in ("model", "hyperparameters", "train", "target")}
        (tmp_path / "proxy.yaml").write_text(json.dumps({"kind": "supar.proxy/v1", **proxy}))
        ended = supar_here("transfer", "--dry-run")
        table = ended.err.partition("decay: steps")[0].splitlines()[1:]
        assert max(map(len, table)) <= 80 and len(table) < 16 and any(line.startswith("*.bias ") for line in table)


class TestMessages:
    @given(st.lists(WORD, min_size=1, max_size=30), st.integers(words.NARROWEST, 100))
    def test_are_wrapped_at_words_on_a_terminal_only(self, message: list[str], width: int) -> None:
        line = "warning: " + " ".join(message)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COLUMNS", str(width))
            patch.setenv("NO_COLOR", "1")
            assert words.fit(line) == line  # stderr is no terminal here
            patch.setattr(words, "is_terminal", lambda: True)
            fitted = words.fit(line)
        assert fitted.split() == line.split()
        assert all(len(part) <= max(width, 2 + max(map(len, message))) for part in fitted.splitlines())

    @pytest.mark.parametrize(
        ("line", "code"),
        [("error: x", 31), ("warning: x", 33), ("x FAIL y", 31), ("pass  SμPar", 32), ("it passes", None)],
    )
    def test_a_word_has_a_colour(self, monkeypatch: pytest.MonkeyPatch, line: str, code: int | None) -> None:
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setattr(words, "is_terminal", lambda: True)
        assert (f"\x1b[{code}m" in words.fit(line)) == (code is not None) and ("\x1b" in words.fit(line)) == (
            code is not None
        )
        monkeypatch.setenv("NO_COLOR", "1")
        assert words.fit(line) == line

    def test_long_times_are_in_days_and_years(self) -> None:
        assert [duration(86400.0 * days) for days in (1739.9, 5835.6, 400, 2.4)] == [
            "4.8 years",
            "16 years",
            "400 days",
            "2 days",
        ]
        assert [duration(seconds) for seconds in (4, 600, 12000)] == ["4s", "10m", "3h20m"]


class TestHelp:
    def test_lists_every_command_once_in_its_group(self) -> None:
        shown = call("--help").out
        headings = [f"\n{group}:\n" for group in COMMANDS]
        assert sorted(map(shown.index, headings)) == list(map(shown.index, headings))
        assert all(shown.count(f"\n  {name} ") == 1 for name in NAMES)

    def test_of_every_command_has_groups_and_two_examples_that_parse(self) -> None:
        group: Any = typer.main.get_command(app)
        for name_words, command in commands():
            shown = call(*name_words, "--help").out
            assert "range>" not in shown and "INTEGER" not in shown and "TEXT" not in shown
            at = [shown.index(f"\n{heading}:\n") for heading in GROUPS if f"\n{heading}:\n" in shown]
            assert at == sorted(at) and at
            examples = shown.partition("\nExamples:\n")[2].splitlines()
            assert len(examples) == 2, name_words
            for example in examples:
                program, *arguments = shlex.split(example)
                assert program == "supar" and arguments[: len(name_words)] == name_words
                command.make_context("x", arguments[len(name_words) :])
        assert group.get_command(None, "train") is not None

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["trian"], "trian: no such command; did you mean 'train'?"),
            (["tune"], "tune: no such command; did you mean 'tune-proxy'?"),
            (["data", "inspct"], "inspct: no such command; did you mean 'inspect'?"),
            (["transfer", "--sparsty", "0.5"], "--sparsty: no such option; did you mean --sparsity?"),
            (["transfer", "--sparsity"], "--sparsity: expected a value"),
            (["transfer", "--force=3"], "--force: takes no value"),
            (["train", "--steps", "x", "--keep", "0"], "--steps x: expected a whole number of at least 1"),
        ],
    )
    def test_a_command_line_that_is_wrong_has_supars_own_words(self, arguments: list[str], said: str) -> None:
        ended = call(*arguments)
        assert (ended.status, ended.out) == (2, "") and ended.err.splitlines()[0] == f"error: {said}"
        assert "Usage" not in ended.err and "Try " not in ended.err

    def test_no_command_shows_the_help(self) -> None:
        for arguments in ([], ["data"], ["bench"]):
            assert call(*arguments).status == 2 and "Usage: " in call(*arguments).err


PROBE = "import sys; from supar_cli.cli.app import main\ntry: main()\nfinally: sys.stderr.write(' '.join(sys.modules))"


def completed(shell: str, line: str) -> set[str]:
    """What a shell gets when the line is completed; nothing heavy is imported for it."""
    env = {
        "_SUPAR_COMPLETE": f"complete_{shell}",
        "_TYPER_COMPLETE_ARGS": line,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    env |= {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    code = f"import sys; sys.argv[0] = 'supar'\n{PROBE}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(**env), timeout=60
    )
    assert not {"torch", "numpy", "optuna", "matplotlib"} & set(done.stderr.split()), line
    return set(done.stdout.replace('"', " ").replace("\t", " ").replace(":", " ").split())


class TestCompletion:
    @pytest.mark.parametrize(
        ("shell", "line", "expected"),
        [
            ("bash", "supar tr", {"transfer", "train"}),
            ("zsh", "supar transfer --spars", {"--sparsity"}),
            ("fish", "supar init inter", {"interpretability"}),
            ("bash", "supar sweep --preset fig1", {"fig1", "fig10", "fig11"}),
            ("bash", "supar train -s train.sche", {"train.schedule="}),
        ],
    )
    def test_knows_commands_flags_templates_and_keys(self, shell: str, line: str, expected: set[str]) -> None:
        assert expected <= completed(shell, line)

    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_the_script_is_shown_and_a_shell_reads_it(self, shell: str, tmp_path: Path) -> None:
        env = environment(_SUPAR_COMPLETE=f"source_{shell}", SHELL=f"/bin/{shell}")
        code = "import sys; sys.argv[0] = 'supar'\nfrom supar_cli.cli.app import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
        assert done.returncode == 0 and "_SUPAR_COMPLETE=complete_" in done.stdout
        (tmp_path / "script").write_text(done.stdout)
        if found := shutil.which(shell):
            assert subprocess.run([found, "-n", str(tmp_path / "script")], capture_output=True).returncode == 0


class TestPictures:
    def test_have_a_legend_for_rings_and_the_band(self) -> None:
        from matplotlib import pyplot as plt

        from supar_cli.reporting.figures import draw
        from supar_cli.reporting.result import Line, Panel, loss_figure

        lines = [Line.through(f"density {d}", {0.5: 3.0, 1.0: 2.0}, ring=1.0) for d in ("1", "1/4")]
        drawn = draw(
            loss_figure("title", "rate", [Panel(title="SP", vertical=1.0, lines=lines), Panel(lines=lines[:1])])
        )
        first, second = ([text.get_text() for text in axis.get_legend().get_texts()] for axis in drawn.axes)
        plt.close(drawn)
        assert first == ["best at density 1", "density 1", "density 1/4", "best of each line"]
        assert second == ["density 1", "best of each line"]

    def test_one_seed_has_no_interval(self) -> None:
        from supar_cli.experiments.check_plans import SlopeSweep
        from supar_cli.experiments.coordinate_bounds import CheckResult, Finding

        findings = [Finding("update", "median", 0.15, 0.05), Finding("update", "each", 0.5, 0.9, math.inf, 1, "mlp.up")]
        texts = [CheckResult(SlopeSweep("supar", "width", {}, plans=[[]] * n), findings).text for n in (1, 3)]
        assert "one seed gives no interval" in texts[0] and "inf" not in texts[0] and "of 3 seeds" in texts[1]
