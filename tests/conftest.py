"""What the tests share: a small corpus of real text, a small proxy and its plans, and ways to call `supar`."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; workers' threads would only wait

import supar_cli
from supar_cli.errors import SuparError
from supar_cli.planning.plan import Plan
from tests.fuzzing import tried as tried
from tests.plans import plan_from as plan_from
from tests.plans import proxy_fields as proxy_fields
from tests.plans import real_text as real_text

# mup asks for torchvision. PyPI's does not import beside a CPU build of torch, and then transformers does not either.
sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]

CHECKOUT = Path(supar_cli.__file__).resolve().parent.parent
TEXT_BYTES = 24_000  # enough for a validation tail, small enough to hash in no time

PROXY = """\
kind: supar.proxy/v1
model:
  family: gpt2
  width: 32
  layers: 2
  heads: 2
  context: 16
  vocab: 256
hyperparameters: {lr: 0.01, init_std: 0.08, alpha_input: 1.5, alpha_output: 2.0, weight_decay: 0.1}
data:
  source: text.txt
train:
  steps: 12
  batch_size: 4
target:
  width: 64
  sparsity:
    sparsity: 0.5
"""


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(real_text(TEXT_BYTES))
    return path


@pytest.fixture
def proxy_file(tmp_path: Path, text_file: Path) -> Path:
    path = tmp_path / "proxy.yaml"
    path.write_text(PROXY)
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the layout of a user's model in it."""
    from tests.own_scripts import LAYOUT

    monkeypatch.chdir(tmp_path)
    (tmp_path / "layout.yaml").write_text(LAYOUT)
    return tmp_path


@pytest.fixture
def unchanged(tmp_path: Path) -> Iterator[Callable[[], None]]:
    """Call it before a command; at the end of the test the folder must hold the same files."""
    before: dict[Path, bytes] = {}

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def remember() -> None:
        before.update(files())

    yield remember
    assert before and files() == before


@pytest.fixture
def plan_of(text_file: Path) -> Callable[..., Plan]:
    """`plan_of(train={...}, model={...})`: the small proxy's plan with changes; `name` is the parameterization."""

    def make(name: Any = "supar", **changes: dict[str, Any]) -> Plan:
        return plan_from(proxy_fields(str(text_file), **changes), name)

    return make


@dataclass
class Called:
    """How a command ended."""

    status: int
    out: str
    err: str


def environment(**changes: str) -> dict[str, str]:
    """The environment of a subprocess: this checkout importable, nothing that colours or widens output."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHONWARNINGS")}
    path = os.pathsep.join(part for part in (str(CHECKOUT), kept.get("PYTHONPATH", "")) if part)
    return {**kept, "PYTHONPATH": path, **changes}


def run_on_simulated_cuda(module: str, *args: str) -> list[dict[str, Any]]:
    """The JSON lines that a module of the tests prints in a process of its own, as CUDA is simulated before torch is imported."""
    import torch

    if torch.version.cuda is not None or shutil.which("g++") is None:
        pytest.skip("a simulated CUDA device needs torch's CPU build and g++")
    command = [sys.executable, "-m", f"tests.{module}", *args]
    done = subprocess.run(command, capture_output=True, cwd=CHECKOUT, env=environment(OMP_NUM_THREADS="1"), timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def supar(tmp_path: Path) -> Callable[..., Called]:
    """Run `supar` as a process in `tmp_path`."""

    def call(*args: str, stdin: str = "", **env: str) -> Called:
        done = subprocess.run(
            [sys.executable, "-m", "supar_cli", *args],
            input=stdin.encode(),
            capture_output=True,
            cwd=tmp_path,
            env=environment(**env),
            timeout=120,
        )
        return Called(done.returncode, done.stdout.decode(), done.stderr.decode())

    return call


@pytest.fixture
def supar_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> Callable[..., Called]:
    """Run `supar` inside the test's process, where torch is imported already; errors end it as in a process."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str) -> Called:
        from supar_cli.cli.app import app

        capfd.readouterr()
        status: Any = 0
        try:
            app(list(args))
        except SystemExit as ended:
            status = ended.code or 0
        except SuparError as error:  # a command may not let one through
            raise AssertionError("an error escaped the application") from error
        return Called(int(status), *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def lightning() -> Any:
    """Lightning's package; it asks which version of torchvision is installed, see above. Skips where it is missing."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.metadata, "version", version)
        return pytest.importorskip("lightning.pytorch")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many inputs each fuzz test tried, and how they ended."""
    for report in terminalreporter.stats.get("", []):
        for name, text in getattr(report, "user_properties", []):
            if name == "tried" and report.when == "teardown":
                terminalreporter.write_line(f"{report.nodeid.rpartition('/')[2]}: {text}")
