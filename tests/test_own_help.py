"""The page on own models and the scripts beside it: every block runs as written, and what it shows is what supar writes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from supar_cli import files, load
from supar_cli.cli.help import PAGES
from supar_cli.planning import templates

from .test_readme import blocks, run

PAGE = PAGES / "own-models.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder after the page's commands."""
    path = tmp_path_factory.mktemp("own")
    (path / "bin").mkdir()
    for name, arguments in (("supar", "-m supar_cli "), ("python", "")):
        program = path / "bin" / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        program.chmod(0o755)
    for language, block in blocks(PAGE):
        if language == "sh":
            run(path, language, block)
    return path


@pytest.fixture
def reader(folder: Path, monkeypatch: pytest.MonkeyPatch, lightning: Any) -> dict[str, Any]:
    """What a reader's session in the folder holds."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "gpt", raising=False)
    return {"__name__": "reader"}


def test_commands_make_a_plan_and_a_proxy(folder: Path) -> None:
    proxy, plan = load(str(folder / "proxy.yaml")), load(str(folder / "plan.yaml"))
    assert plan.model.target == {"width": 128} and plan.hyperparameters.lr == proxy.hyperparameters.lr
    assert {row.density for row in plan.tensors if row.role == "hidden"} == {0.1}


def test_the_layout_is_shown_as_it_is_written(folder: Path) -> None:
    (shown,) = (yaml.safe_load(block) for language, block in blocks(PAGE) if language == "yaml")
    written = yaml.safe_load((folder / "layout.yaml").read_text())
    named = {row["name"]: row for row in written["tensors"]}
    assert len(shown["tensors"]) >= 8
    assert [row for row in shown["tensors"] if row != named[row["name"]]] == []


def test_python_blocks_run_in_one_session(folder: Path, reader: dict[str, Any]) -> None:
    found = [block for language, block in blocks(PAGE) if language == "python"]
    for block in found:
        exec(compile(block, "own-models.md", "exec"), reader)
    assert len(found) >= 9 and (folder / "saved" / "plan.yaml").exists()
    with pytest.raises(NameError):
        exec(found[-1].replace("prepared.", "unprepared."), reader)


def test_questions_and_remedies_name_flags_that_exist() -> None:
    text = PAGE.read_text("utf-8")
    assert re.search(r"--role '[^']+=unembedding'", text)


def test_llama_trains_and_reports(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `supar tune-proxy` runs it: a plan in a file, losses in another."""
    import supar_cli as supar
    from supar_cli.planning.problems import validate
    from supar_cli.planning.spec import Proxy

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SUPAR_RESULT", str(tmp_path / "losses.jsonl"))
    script: dict[str, Any] = {"__name__": "llama"}
    exec(compile(templates.text("llama.py"), "llama.py", "exec"), script)
    sizes = {name: {"width": width} for name, width in (("base", 32), ("wider", 64), ("third", 96))}
    layout = supar.layout(script["make"], example=script["example"], **sizes)
    Path("layout.yaml").write_text(supar_document(layout))
    proxy = load(str(folder / "proxy.yaml")).model_dump()
    proxy["model"] = {"family": "own", "layout": "layout.yaml"}
    plan = supar.transfer(validate(Proxy, proxy, "proxy"), width=64, density="1/4", steps=4)
    Path("plan.yaml").write_text(supar_document(plan))
    script["main"]("plan.yaml")
    reported = [json.loads(line) for line in Path("losses.jsonl").read_text().splitlines()]
    assert reported[-1]["step"] == 4 and 0 < reported[-1]["loss"] < 7
    assert load("trained/plan.yaml").hash() == plan.hash() and Path("trained/model.safetensors").exists()


def supar_document(one: Any) -> str:
    from supar_cli.planning import document

    return document.write([one.model_dump()])


def test_scripts_are_in_the_wheel() -> None:
    assert templates.scripts() == ["gpt.py", "llama.py"]
    assert all(files.template(f"own/{name}").exists() for name in templates.scripts())
