"""What the tests of shared studies share: a small search, processes that work on it, and a PostgreSQL server of their own."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial

from supar_cli.data import corpus
from supar_cli.experiments import search as tuning
from supar_cli.jobs import queue
from supar_cli.jobs.queue import SharedStudy, is_counted
from supar_cli.planning import document
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy, Spec

from .conftest import environment, real_text

SPEC = """\
kind: supar.spec/v1
model: {family: gpt2, width: 16, layers: 1, heads: 1, context: 16, vocab: 256}
hyperparameters: {lr: 0.01, init_std: 0.08, alpha_input: 4.0, alpha_output: 1.0, weight_decay: 0.1}
train: {steps: STEPS, batch_size: 2, eval_every: 20, eval_batches: 1}
data: {source: text.txt}
search: {trials: TRIALS, pruner: none, finalists: 2, seeds: 2, lr: [0.001, 0.05], init_std: [0.02, 0.3], lr_fit_octaves: [-1.0, 1.0]}
run: {device: cpu}
"""
FURTHER = 2 + 4  # runs beside the trials: two finalists with a second seed, two rates for the fit with two seeds
FAST, SLOW = 20, 240  # steps: next to nothing, and long enough to be killed in


def write_spec(folder: Path, trials: int, steps: int, further: bool = True) -> Spec:
    """supar.yaml and its corpus in a folder; the spec as the command makes it of them."""
    (folder / "text.txt").write_bytes(real_text(24_000))
    text = SPEC.replace("TRIALS", str(trials)).replace("STEPS", str(steps))
    if not further:
        text = text.replace("finalists: 2, seeds: 2", "finalists: 1, seeds: 1").replace("[-1.0, 1.0]", "[]")
    (folder / "supar.yaml").write_text(text)
    spec = parse(Spec, document.read(text, "supar.yaml")[0])
    data = corpus.identify(spec.data.model_copy(update={"source": str(folder / "text.txt")}))
    return spec.model_copy(update={"data": data.model_copy(update={"source": "text.txt"})})


def start(folder: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """`supar` as a process, Ctrl-C not ignored and one thread to a process."""
    return subprocess.Popen(
        [sys.executable, "-m", "supar_cli", *arguments],
        cwd=folder,
        env=environment(OMP_NUM_THREADS="1", **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def ended(processes: list[subprocess.Popen[str]]) -> list[Proxy]:
    """The proxies of processes that are to end well, and without a traceback."""
    proxies = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == 0, err
        assert "Traceback" not in err, err
        proxies.append(parse(Proxy, document.read(out, "stdout")[0]))
    return proxies


@functools.cache  # a connection each, which a look every few ms would use up
def _study(storage: str, name: str) -> SharedStudy:
    return SharedStudy(storage, name)


def trials_of(spec: Spec, storage: str, suffix: str = "") -> list[FrozenTrial]:
    return _study(storage, tuning.study_name(spec) + suffix).trials()


def wait_for(found: Callable[[], Any], seconds: float = 60) -> Any:
    """What `found` returns as soon as it is something."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if it := found():
            return it
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def midway(spec: Spec, storage: str, but: tuple[int, ...] = ()) -> FrozenTrial | None:
    """A trial that runs in another process and has been evaluated already."""
    running = [t for t in trials_of(spec, storage) if t.state.name == "RUNNING" and t.last_step]
    return next((t for t in running if t.user_attrs["process"][1] not in but), None)


def check_exact(spec: Spec, storage: str, proxies: list[Proxy]) -> None:
    """The study has its trials and runs, none twice, none left, and all who worked on it say the same of it."""
    trials, further = trials_of(spec, storage), trials_of(spec, storage, tuning.RUNS)
    counted = [trial for trial in trials if is_counted(trial)]
    assert len(counted) == spec.search.trials
    assert len({tuple(trial.params.values()) for trial in counted}) == spec.search.trials, "two are equal"
    runs = [trial.user_attrs["run"] for trial in further if is_counted(trial)]
    assert len(runs) == len(set(runs)) == (FURTHER if spec.search.seeds > 1 else 0)
    assert not [trial for trial in (*trials, *further) if not trial.state.is_finished()]
    assert all(proxy == proxies[0] for proxy in proxies)
    assert proxies[0].evidence["trials"] == {"complete": spec.search.trials, "pruned": 0, "diverged": 0}


def _binaries() -> Path | None:
    found = shutil.which("pg_ctl")
    if found:
        return Path(found).resolve().parent
    return max(Path("/usr/lib/postgresql").glob("*/bin"), default=None)  # where Debian keeps them


class Postgres:
    """A private server on a free port of the loopback, with a database to each test."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        self._folder = Path(tempfile.mkdtemp(prefix="supar-postgres-"))
        self._as: list[str] = []
        if os.getuid() == 0:  # the server refuses to be root
            shutil.chown(self._folder, "nobody")
            self._as = ["setpriv", "--reuid=nobody", "--clear-groups", "--inh-caps=-all"]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        data = str(self._folder / "data")
        self._run("initdb", "-D", data, "-U", "supar", "-A", "trust", "--no-sync")
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
        self._control = ["-D", data, "-l", str(self._folder / "log"), "-o", options, "-w"]
        self.up()

    def _run(self, program: str, *arguments: str) -> None:
        command = [*self._as, str(self._binaries / program), *arguments]
        done = subprocess.run(
            command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=60
        )
        assert done.returncode == 0, f"{program}: {done.stderr}"

    def database(self, name: str) -> str:
        """URL of a new database."""
        import psycopg

        with psycopg.connect(f"postgresql://supar@127.0.0.1:{self.port}/postgres", autocommit=True) as connection:
            connection.execute(f'create database "{name}"')
        return f"postgresql://supar:secret@127.0.0.1:{self.port}/{name}"

    def connections(self) -> int:
        """How many connections there are, besides the one that asks."""
        import psycopg

        with psycopg.connect(f"postgresql://supar@127.0.0.1:{self.port}/postgres") as connection:
            found = connection.execute(
                "select count(*) - 1 from pg_stat_activity where backend_type = 'client backend'"
            ).fetchone()
        return int(found[0]) if found else 0

    def crash(self) -> None:
        """Every connection is cut, and what was not committed is lost."""
        self._run("pg_ctl", *self._control, "-m", "immediate", "stop")

    def up(self) -> None:
        self._run("pg_ctl", *self._control, "start")

    def restart(self) -> None:
        self.crash()
        self.up()

    def remove(self) -> None:
        self.crash()
        shutil.rmtree(self._folder)


@contextmanager
def postgres_server() -> Iterator[Postgres]:
    pytest.importorskip("psycopg", reason="the tests on PostgreSQL need the extra `postgresql`")
    binaries = _binaries()
    if binaries is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    server = Postgres(binaries)
    try:
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["journal", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage of its own for each test."""
    if request.param == "journal":
        return str(tmp_path / "study.journal")
    server: Postgres = request.getfixturevalue("postgres")
    return server.database(tmp_path.name)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(queue, "STALE_AFTER_S", 0.6)
