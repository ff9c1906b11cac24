"""What a command imports: light ones no heavy library, as a process that lists its modules when it ends."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT, environment, proxy_fields

PROBE = """
import json, sys
sys.argv = ["supar", *json.loads(sys.argv[1])]
if sys.argv[1:]:
    from supar_cli.cli.app import main
    try:
        main()
    except SystemExit as ended:
        assert not ended.code, ended.code
exec(sys.stdin.read())
sys.stderr.write("\\nMODULES " + json.dumps(sorted(sys.modules)))
"""
HEAVY = {"torch", "numpy", "optuna", "safetensors", "matplotlib", "jinja2", "rich"}
SLOW = {"pydantic.main", "tempfile", "pickle", "supar_cli.reporting", "supar_cli.planning.explain"}  # milliseconds each


def heavy_after(folder: Path, *arguments: str, then: str = "", among: set[str] = HEAVY) -> set[str]:
    """Which heavy libraries, or `among` others, a `supar` process has imported when it ends; its stderr is no terminal."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(arguments)],
        input=then.encode(),
        capture_output=True,
        cwd=folder,
        env=environment(),
        timeout=60,
    )
    assert done.returncode == 0, done.stderr.decode()
    return among & set(json.loads(done.stderr.decode().rpartition("MODULES ")[2]))


@pytest.mark.parametrize(
    "arguments",
    [
        *(
            ["--help"],
            ["--version"],
            ["help", "keys"],
            ["transfer", "--help"],
            ["generate", "--help"],
            ["export", "--help"],
        ),
        ["transfer", "--sparsity", "0.5", "-o", "-"],
    ],
)
def test_light_commands_import_nothing_heavy(arguments: list[str], tmp_path: Path, text_file: Path) -> None:
    # JSON is YAML, so the document needs no writer
    (tmp_path / "proxy.yaml").write_text(json.dumps(proxy_fields(str(text_file))))
    assert heavy_after(tmp_path, *arguments) == set()


def test_a_plan_is_made_without_what_only_other_commands_need(tmp_path: Path, text_file: Path) -> None:
    (tmp_path / "proxy.yaml").write_text(json.dumps(proxy_fields(str(text_file), data={"hash": "sha256:known"})))
    assert heavy_after(tmp_path, "transfer", "--sparsity", "0.5", among=SLOW) == set()
    assert heavy_after(tmp_path, "explain", "plan.yaml", among=SLOW) == {"supar_cli.planning.explain"}  # the control


@pytest.mark.parametrize("arguments", [["runs"], ["show", "runs/finished"]])
def test_runs_are_shown_without_what_trains_or_draws(arguments: list[str], tmp_path: Path) -> None:
    shutil.copytree(CHECKOUT / "tests/released/v0.1.0/runs", tmp_path / "runs")
    assert heavy_after(tmp_path, *arguments) == set()


def test_the_probe_sees_what_is_imported(tmp_path: Path) -> None:
    assert heavy_after(tmp_path, then="import numpy, rich") == {"numpy", "rich"}


def test_the_package_itself_imports_nothing_heavy(tmp_path: Path) -> None:
    assert heavy_after(tmp_path, then="import supar_cli; supar_cli.load, supar_cli.transfer") == set()


def test_listing_runs_draws_no_figure_and_renders_no_page(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    assert not heavy_after(tmp_path, "runs") & {"matplotlib", "jinja2", "torch"}
