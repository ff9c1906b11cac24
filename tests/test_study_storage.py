"""Where studies are kept: outages are waited for, refusals are not, and nobody reads a password."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy import exc

from supar_cli import files
from supar_cli.errors import InputError, SetupError
from supar_cli.jobs import storage
from supar_cli.jobs.queue import SharedStudy, is_counted

from .studies import Postgres
from .studies import postgres as postgres
from .studies import quick as quick
from .studies import url as url


def run_a_trial(study: SharedStudy) -> None:
    trial = study.claim(9)
    assert trial is not None and study.run(trial, lambda t: t.suggest_float("x", 0, 1)) is not None


class TestOutages:
    """A storage whose operations fail as a database's do that is restarted."""

    def away(self) -> optuna.exceptions.StorageInternalError:
        error = optuna.exceptions.StorageInternalError("commit")
        error.__cause__ = exc.OperationalError("select", {}, Exception("the server closed the connection"))
        return error

    def test_an_operation_is_tried_again_and_that_is_said_once(self, monkeypatch) -> None:
        monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.001)
        said: list[str] = []
        failures = iter([self.away()] * 3)

        def operation(value: int) -> int:
            for failure in failures:
                raise failure
            return value

        assert storage.RetryPolicy("postgresql://me:secret@h/d", said.append).retry(operation, 5) == 5
        assert said == ["--study postgresql://h/d: the server closed the connection; trying again for up to 5 minutes"]

    def test_a_transaction_that_was_cut_off_is_no_refusal(self) -> None:
        cut = optuna.exceptions.StorageInternalError("commit")
        cut.__cause__ = exc.PendingRollbackError("can't reconnect until rolled back")
        assert storage.is_connection_error(cut) and storage.is_connection_error(self.away())
        assert not storage.is_connection_error(optuna.exceptions.StorageInternalError("too long"))

    def test_patience_ends(self) -> None:
        def operation() -> None:
            raise self.away()

        with pytest.raises(SetupError, match="--study postgresql://h/d: the server closed the connection"):
            storage.RetryPolicy("postgresql://me:secret@h/d", limit_s=0.0).retry(operation)

    def test_a_database_that_is_away_is_waited_for(self, postgres: Postgres, tmp_path: Path) -> None:
        url, said = postgres.database(tmp_path.name), list[str]()
        study = SharedStudy(url, "s", storage.RetryPolicy(url, said.append))
        impatient = SharedStudy(url, "s", storage.RetryPolicy(url, limit_s=0.0))
        trial = study.claim(1)
        assert trial is not None
        postgres.crash()
        with pytest.raises(SetupError, match="onnection"):
            impatient.trials()
        threading.Timer(1.0, postgres.up).start()
        assert study.run(trial, lambda t: t.suggest_float("x", 0, 1)) is not None
        assert len(said) >= 1 and all("trying again for up to 5 minutes" in message for message in said)
        assert impatient.trials()[0].state.name == "COMPLETE"

    @pytest.mark.parametrize("keeps", [False, True])
    def test_no_connection_is_held_between_operations(
        self, keeps: bool, postgres: Postgres, tmp_path: Path, monkeypatch
    ) -> None:
        if keeps:  # as a pool does, which SQLAlchemy makes unless told otherwise
            monkeypatch.setattr(storage.sqlalchemy, "NullPool", storage.sqlalchemy.QueuePool)
        url = postgres.database(tmp_path.name)
        before, studies = postgres.connections(), [SharedStudy(url, "s") for _ in range(5)]
        for study in studies:
            run_a_trial(study)
        assert (postgres.connections() > before) is keeps
        assert len(studies[0].counted()) == 5

    def test_what_a_database_refuses_is_not_tried_again(self) -> None:
        refused = exc.IntegrityError("insert", {}, Exception("duplicate key"))

        def operation() -> None:
            raise refused

        with pytest.raises(exc.IntegrityError):
            storage.RetryPolicy("postgresql://h/d").retry(operation)

    @pytest.mark.parametrize("lost", ["create_new_trial", "set_trial_param", "set_trial_state_values"])
    def test_a_reply_that_is_lost_after_its_commit_changes_no_total(
        self, lost: str, url: str, monkeypatch, quick: None
    ) -> None:
        if "://" not in url:
            pytest.skip("a journal file is written or not")
        monkeypatch.setattr(storage, "FIRST_PAUSE_S", 0.001)
        study = SharedStudy(url, "s", storage.RetryPolicy(url, lambda _: None))
        backend = study.study._storage
        real = getattr(type(backend), lost)
        losses = iter([self.away()])

        def commits_and_fails(*arguments: Any, **named: Any) -> Any:
            found = real(backend, *arguments, **named)
            for loss in losses:
                raise loss
            return found

        commits_and_fails.__name__, commits_and_fails.__self__ = lost, backend  # type: ignore[attr-defined]
        setattr(backend, lost, lambda *a, **k: study.retries.retry(commits_and_fails, *a, **k))
        began = time.monotonic()
        while sum(map(is_counted, study.trials())) < 3 and time.monotonic() - began < 30:
            trial = study.claim(3)
            if trial is not None:
                assert study.run(trial, lambda t: t.suggest_float("x", 0, 1)) is not None
            time.sleep(0.05)
        assert sum(map(is_counted, study.trials())) == 3
        assert next(losses, None) is None


def test_a_missing_driver_is_named_at_the_start(monkeypatch) -> None:
    monkeypatch.setattr(storage.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SetupError, match=r"needs a driver: pip install 'psycopg\[binary\]'"):
        SharedStudy("postgresql://me:secret@h/d", "s")


@pytest.mark.parametrize(
    ("url", "without"),
    [
        ("postgresql://me:secret@h:5/d?sslmode=require", "postgresql://h:5/d?sslmode=require"),
        ("postgresql://h/d?user=me&password=secret", "postgresql://h/d?user=me"),
        ("folder/s.journal", "folder/s.journal"),
    ],
)
def test_no_password_is_shown(url: str, without: str) -> None:
    assert storage.redact_url(url) == without
    assert "secret" not in storage.error_text(ValueError(f"can't parse {url}"), url)


def test_no_url_is_bad_input_and_a_study_that_a_worker_lacks_is_its_machines_fault(tmp_path: Path) -> None:
    for wrong in ("postgresq://h/d", "postgresql://h:port/d"):
        with pytest.raises(InputError, match="expected postgresql://HOST/NAME"):
            SharedStudy(wrong, "s")
    with pytest.raises(SetupError, match="on a disk that all share"):
        SharedStudy(str(tmp_path / "elsewhere.journal"), "s", join=True)
    SharedStudy(str(tmp_path / "here.journal"), "s")
    with pytest.raises(SetupError, match="on a disk that all share"):
        SharedStudy(str(tmp_path / "here.journal"), "another", join=True)


@pytest.mark.parametrize("call", ["symlink", "rename", "unlink"])
@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_at_any_moment_of_a_files_lock_is_ctrl_c(
    call: str, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna's lock cleans up by calls that then fail, and whose errors stand before the interrupt."""
    study = SharedStudy(str(tmp_path / "study.journal"), "s")
    real, pressed = getattr(os, call), iter([True])

    def interrupted(*arguments: Any) -> Any:
        press = next(pressed, False)
        if press and not after:
            raise KeyboardInterrupt
        found = real(*arguments)
        if press:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(os, call, interrupted)
    with pytest.raises(KeyboardInterrupt):
        study.claim(1)
    assert next(pressed, None) is None


class TestJournal:
    """A line that a full disk or a kill has torn costs that line; a corrupt one is named."""

    @pytest.mark.parametrize("torn", [b'{"op_code":4,"torn', b"x" * (files.LINES_BYTES + 7), b"\x00\xff"])
    def test_a_torn_line_is_no_line(self, torn: bytes, tmp_path: Path) -> None:
        path = tmp_path / "s.journal"
        run_a_trial(SharedStudy(str(path), "s"))
        with path.open("ab") as file:
            file.write(torn)
        run_a_trial(SharedStudy(str(path), "s", join=True))
        assert [t.state.name for t in SharedStudy(str(path), "s", join=True).trials()] == ["COMPLETE", "COMPLETE"]
        assert torn[-9:] not in path.read_bytes() and path.read_bytes().endswith(b"\n")

    def test_a_full_disk_loses_nothing_that_was_there(self, tmp_path: Path) -> None:
        path = tmp_path / "s.journal"
        study = SharedStudy(str(path), "s")
        run_a_trial(study)
        whole = path.read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 9, hard))
        try:
            with pytest.raises(SetupError, match=r"--study .*s\.journal: "):
                study.claim(9)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
        assert path.read_bytes() == whole and not list(tmp_path.glob("*.lock*"))
        run_a_trial(study)
        assert len(SharedStudy(str(path), "s", join=True).trials()) == 2

    def test_a_corrupt_line_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "s.journal"
        run_a_trial(SharedStudy(str(path), "s"))
        content = path.read_bytes()
        path.write_bytes(content.replace(b'"op_code"', b'"op_c', 1))
        with pytest.raises(SetupError, match=r"--study .*s\.journal: not a journal, or a damaged one: "):
            SharedStudy(str(path), "s")
