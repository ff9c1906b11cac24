"""The README and the manual as a newcomer meets them: their blocks run as written, with a spec small enough for a test.

A `sh` or `python` block runs. A `console` block is only shown, and says in its first line why it does not run here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from supar_cli.cli.app import app
from supar_cli.cli.help import PAGES, topics
from supar_cli.cli.option_table import OPTIONS, flag_of

from .conftest import CHECKOUT, environment, real_text

README = CHECKOUT / "README.md"
TEXTS = [README, *(PAGES / f"{topic}.md" for topic in topics())]
NOT_RUN = "# not run by the tests: "
TINY = """\
kind: supar.spec/v1
model: {family: gpt2, width: 16, layers: 1, heads: 1, context: 16, vocab: 256}
hyperparameters: {lr: 0.01, init_std: 0.08, alpha_input: 2.0, alpha_output: 1.0, weight_decay: 0.1}
data: {source: text.txt}
train: {steps: 6, batch_size: 2, eval_every: 3, eval_batches: 1}
search: {trials: 2, finalists: 1, seeds: 1, lr_fit_octaves: [], lr: [0.002, 0.06]}
target: {width: 256, layers: 1, sparsity: {density: 0.0625}}
run: {device: cpu}
"""
# flags of other programs that the texts show
FOREIGN = {"nnodes", "nproc-per-node", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "signals-to-handle"}
FOREIGN |= {"cpu", "long", "stage"}  # of tests/gpu_first.py
FOREIGN |= {
    "signal",
    "requeue",
    "open-mode",
    "index-url",
    "help",
    "version",
    "no-resume",
    "max-restarts",
    "model",
    "tasks",
}

pytestmark = pytest.mark.skipif(not README.exists(), reason="the README is not beside an installed package")


def blocks(path: Path) -> list[tuple[str, str]]:
    """The language and text of every block of code."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", path.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def run(folder: Path, language: str, block: str) -> None:
    env = environment(PATH=f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    command = ["bash", "-euo", "pipefail", "-c"] if language == "sh" else [sys.executable, "-c"]
    done = subprocess.run([*command, block], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def run_all(folder: Path, path: Path) -> int:
    found = [(language, block) for language, block in blocks(path) if language in ("sh", "python")]
    for language, block in found:
        run(folder, language, block)
    return len(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder for all blocks, as for a reader who types them one after the other; the README's have been run."""
    path = tmp_path_factory.mktemp("readme")
    (path / "supar.yaml").write_text(TINY)
    (path / "text.txt").write_bytes(real_text(24_000))
    (path / "bin").mkdir()
    supar = path / "bin" / "supar"
    supar.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m supar_cli "$@"\n')
    supar.chmod(0o755)
    assert run_all(path, README) >= 2 and (path / "plan.yaml").exists() and any((path / "runs").iterdir())
    yield path


class TestBlocks:
    # the others are run by tests/test_own_trainer.py and tests/test_tutorial.py
    @pytest.mark.parametrize("topic", sorted({*topics()} - {"own-models", "interpretability", "export"}))
    def test_of_a_page_run_as_written(self, folder: Path, topic: str) -> None:
        run_all(folder, PAGES / f"{topic}.md")

    def test_one_that_fails_is_seen(self, folder: Path) -> None:
        with pytest.raises(AssertionError, match="no such file"):
            run(folder, "sh", "supar transfer none.yaml --sparsity 0.5 | cat")

    def test_that_do_not_run_say_why(self) -> None:
        shown = [(path, block) for path in TEXTS for language, block in blocks(path) if language == "console"]
        assert [block for path, block in shown if path != README and not block.startswith(NOT_RUN)] == []
        assert {language for path in TEXTS for language, _ in blocks(path)} <= {
            "sh",
            "python",
            "console",
            "text",
            "bibtex",
            "yaml",
        }


def names_of_commands(path: Path) -> set[str]:
    """What follows `supar` in code: within backticks, at the start of a line of a block, and after a pipe or `&&`."""
    shown = "".join(block for language, block in blocks(path) if language in ("sh", "console"))
    word = r"supar ([a-z][a-z-]+)"
    return {
        *re.findall(rf"`{word}", path.read_text("utf-8")),
        *re.findall(rf"(?:^|\| |&& ){word}", shown, re.MULTILINE),
    }


class TestTexts:
    def test_the_readme_is_short(self) -> None:
        text = README.read_text("utf-8")
        assert len(text.splitlines()) <= 150 and len(text.split()) <= 1500

    def test_every_command_is_named_and_no_other(self) -> None:
        commands = set(typer.main.get_command(app).list_commands(None))  # type: ignore[attr-defined,arg-type]
        named = {path: names_of_commands(path) for path in TEXTS}
        assert set().union(*named.values()) <= commands <= named[README]

    @pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
    def test_every_flag_exists(self, path: Path) -> None:
        known = {flag_of(name) for name in OPTIONS} | {f"--{name}" for name in FOREIGN}
        shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", path.read_text("utf-8")))
        assert shown - known == set()

    @pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
    def test_links_lead_somewhere_and_lines_fit_a_terminal(self, path: Path) -> None:
        text = path.read_text("utf-8")
        assert [link for link in re.findall(r"\]\(((?!http)[^)#]+)\)", text) if not (path.parent / link).exists()] == []
        long = [line for line in text.splitlines() if len(line) > 80 and not line.startswith(("|", "!"))]
        assert path == README or long == []

    def test_every_page_is_linked_and_names_its_subject(self) -> None:
        text = README.read_text("utf-8")
        assert [topic for topic in topics() if f"supar_cli/help/{topic}.md" not in text] == []
        assert all(re.match(r"# [^:\n]+: .+\n\n", (PAGES / f"{topic}.md").read_text("utf-8")) for topic in topics())
