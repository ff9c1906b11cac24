"""The README as a newcomer meets it: its commands run as written, in a folder with a spec small enough for a test."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import CHECKOUT, environment, real_text

README = CHECKOUT / "README.md"
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


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text("utf-8"), re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder for all blocks, as for a reader who types them one after the other."""
    path = tmp_path_factory.mktemp("readme")
    (path / "supar.yaml").write_text(TINY)
    (path / "text.txt").write_bytes(real_text(24_000))
    (path / "bin").mkdir()
    supar = path / "bin" / "supar"
    supar.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m supar_cli "$@"\n')
    supar.chmod(0o755)
    yield path


def run(folder: Path, *command: str) -> None:
    env = environment(PATH=f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.mark.skipif(not README.exists(), reason="the README is not beside an installed package")
class TestReadme:
    def test_every_block_runs_as_written(self, folder: Path) -> None:
        found = blocks("sh")
        assert len(found) >= 4 and "supar train" in "".join(found)
        for block in found:
            run(folder, "bash", "-euo", "pipefail", "-c", block)
        for block in blocks("python"):
            run(folder, sys.executable, "-c", block)
        assert (folder / "runs").is_dir() and blocks("python")

    def test_a_block_that_fails_is_seen(self, folder: Path) -> None:
        with pytest.raises(AssertionError, match="no such file"):
            run(folder, "bash", "-euo", "pipefail", "-c", "supar transfer none.yaml --sparsity 0.5 | cat")

    def test_names_every_command_and_no_other(self) -> None:
        from supar_cli.cli.app import NAMES

        text = README.read_text("utf-8")
        named = set(re.findall(r"(?:^|`|\| |&& )supar ([a-z][a-z-]+)", text, re.MULTILINE))
        assert named <= set(NAMES), named - set(NAMES)
        assert set(NAMES) <= named | {"bench"}, set(NAMES) - named
        assert all((CHECKOUT / path).exists() for path in re.findall(r"\]\(((?!http)[^)#]+)\)", text))
