"""Where studies are kept: a journal file, or a database that may be away for minutes without a study being lost."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, urlencode, urlsplit

import optuna
import sqlalchemy
from sqlalchemy import exc

from supar_cli.errors import InputError, SetupError, SuparError

PATIENCE_S = (
    300.0  # chosen: a database's restart or failover takes seconds to a few minutes; longer is an outage to be told of
)
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0  # chosen: a restart of a second costs little, an outage is not hammered
LINES_BYTES = 2**16  # chosen: more than a line of a journal usually has
RACES = 20  # chosen: processes that make a database's tables at the same time; each round one of them has made it

# the operations of Optuna's storage interface that reach a database
_OPERATIONS = (*sorted(optuna.storages.BaseStorage.__abstractmethods__), "get_trial_id_from_study_id_trial_number")
# of PostgreSQL's client: a host that drops packets is a lost one after seconds, not after TCP's two hours
_POSTGRESQL = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}


class Patience:
    """For how long operations of a storage are tried again while its database is away; says so once per outage."""

    def __init__(self, storage: str, warn: Callable[[str], None] | None = None, limit_s: float = PATIENCE_S) -> None:
        self.storage, self.limit_s = storage, limit_s
        self._away = False
        self._warn = warn or (lambda message: (sys.stderr.write(f"warning: {message}\n"), sys.stderr.flush()))

    def tried(self, operation: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """An operation's result, after as many tries as the limit allows. Raises SetupError when it is over."""
        started, pause, again = time.monotonic(), FIRST_PAUSE_S, False
        while True:
            try:
                found = operation(*args, **named)
                if again:
                    self._away = False
                return found
            except optuna.exceptions.UpdateFinishedTrialError:
                # a try whose reply was lost may have written just this
                if again and _is_written(operation, *args, **named):
                    return True
                raise
            except (OSError, RuntimeError) as error:
                if _interrupts(error):  # Optuna's file lock failed to undo what was cut off
                    raise KeyboardInterrupt from None
                if not isinstance(error, OSError):
                    raise
                raise SetupError(f"--study {shown(self.storage)}: {error.strerror or error}") from None
            except (optuna.exceptions.StorageInternalError, exc.SQLAlchemyError) as error:
                if not _is_away(error):
                    raise
                if time.monotonic() - started > self.limit_s:
                    raise SetupError(f"--study {shown(self.storage)}: {told(error, self.storage)}") from None
                if not self._away:
                    self._away = True
                    what = f"{told(error, self.storage)}; trying again for up to {self.limit_s / 60:.0f} minutes"
                    self._warn(f"--study {shown(self.storage)}: {what}")
                again = True
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _interrupts(error: BaseException | None) -> bool:
    """Whether an error came up while Ctrl-C was handled, and so hides it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def _is_away(error: BaseException) -> bool:
    """Whether an error means that the database can't be reached now, rather than that it refuses what was asked."""
    seen: BaseException | None = error
    while seen is not None:
        # the last of these: Optuna reads on in a transaction that was cut off
        if isinstance(seen, exc.OperationalError | exc.InterfaceError | exc.PendingRollbackError):
            return True
        if getattr(seen, "connection_invalidated", False):
            return True
        seen = seen.__cause__
    return False


def _is_written(operation: Callable[..., Any], trial_id: int, *args: Any, **named: Any) -> bool:
    """Whether a trial is in the very state that the operation, if it is the one that sets states, was to give it."""
    if getattr(operation, "__name__", "") != "set_trial_state_values":
        return False
    state = named.get("state", args[0] if args else None)
    return bool(operation.__self__.get_trial(trial_id).state == state)  # type: ignore[attr-defined]


def open_study(
    storage: str, name: str, patience: Patience | None = None, *, join: bool = False, at_once: bool = False
) -> optuna.Study:
    """The study in a journal file or, for a text with `://`, in any Optuna storage.

    With `join` it must be there already, as for a worker. With `at_once` a database that is away is not waited for, as at
    a command's start, where its URL may be wrong. Raises SetupError, and InputError for what is no URL.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    patience = patience or Patience(storage)
    try:
        backend = _backend(storage, join) if at_once else patience.tried(_backend, storage, join)
        for operation in _OPERATIONS:
            setattr(backend, operation, functools.partial(patience.tried, getattr(backend, operation)))
        if join:
            return optuna.load_study(study_name=name, storage=backend)
        return optuna.create_study(storage=backend, study_name=name, load_if_exists=True)
    except SuparError:
        raise
    except exc.NoSuchModuleError:
        raise _no_url(storage) from None
    except ImportError as error:
        raise SetupError(f"--study {shown(storage)}: no driver for it is installed: {error}") from None
    except KeyError:
        raise SetupError(f"--study {shown(storage)}: {_ELSEWHERE}") from None
    except Exception as error:  # each storage has its own errors; none of them is ours
        raise SetupError(f"--study {shown(storage)}: can't be opened: {told(error, storage)}") from None


_ELSEWHERE = "this worker's machine doesn't have the study; expected a database, or a file on a disk that all share"


class _Journal(optuna.storages.journal.JournalFileBackend):  # type: ignore[misc]
    """Optuna's journal file, which a full disk or a kill in the middle of a line doesn't make unreadable."""

    def __init__(self, path: str) -> None:
        self._path, self._own_lock = path, optuna.storages.journal.JournalFileSymlinkLock(path)
        super().__init__(path, lock_obj=self._own_lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Write lines, after the last one that is whole."""
        lines = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs).encode()
        self._own_lock.acquire()
        try:
            with open(self._path, "r+b") as file:
                end = _end_of_lines(file)
                file.truncate(end)  # what is behind was never read
                try:
                    file.seek(end)
                    file.write(lines)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self._path, end)  # all of them or none
                    raise
        finally:
            self._own_lock.release()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Lines from this one on. Raises SetupError where one is corrupt."""
        try:
            yield from super().read_logs(log_number_from)
        except ValueError as error:
            what = "expected a copy of it from before, or another --study"
            raise SetupError(f"--study {self._path}: a corrupt journal: {error}; {what}") from None


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last line that ends does."""
    at = file.seek(0, os.SEEK_END)
    while at:
        start = max(0, at - LINES_BYTES)
        file.seek(start)
        found = file.read(at - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        at = start
    return 0


def _backend(storage: str, join: bool) -> Any:
    if "://" not in storage:
        if join and not Path(storage).exists():
            raise SetupError(f"--study {storage}: {_ELSEWHERE}")
        return optuna.storages.JournalStorage(_Journal(storage))
    url = _url(storage)
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.drivername in ("postgresql+psycopg", "postgresql+psycopg2"):
        options["connect_args"] = {key: value for key, value in _POSTGRESQL.items() if key not in url.query}
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")  # Optuna formats it
    for race in range(RACES):
        try:
            return optuna.storages.get_storage(optuna.storages.RDBStorage(text, options))
        except (exc.ProgrammingError, exc.IntegrityError, optuna.exceptions.StorageInternalError) as error:
            if race == RACES - 1 or _is_away(error):
                raise  # else another process made the same tables at the same time
            time.sleep(0.1)
    raise AssertionError


def _url(storage: str) -> sqlalchemy.URL:
    """The URL with PostgreSQL's driver named. Raises SetupError when there is none."""
    try:
        url = sqlalchemy.make_url(storage)
    except (exc.ArgumentError, ValueError):
        raise _no_url(storage) from None
    if url.drivername not in ("postgresql", "postgres"):
        return url
    for driver in ("psycopg", "psycopg2"):
        if importlib.util.find_spec(driver) is not None:
            return url.set(drivername=f"postgresql+{driver}")
    raise SetupError(f"--study {shown(storage)}: needs a driver: pip install 'psycopg[binary]'")


def _no_url(storage: str) -> InputError:
    return InputError(f"--study {shown(storage)}: no URL of a database; expected postgresql://HOST/NAME")


def absolute(storage: str) -> str:
    """A storage as another process finds it, whatever folder it runs in."""
    return storage if "://" in storage else str(Path(storage).absolute())


def shown(storage: str) -> str:
    """A storage as it may stand in a document or a message: without user and password."""
    if "://" not in storage:
        return storage
    parts = urlsplit(storage)
    query = [(key, value) for key, value in parse_qsl(parts.query) if "pass" not in key.lower()]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(query)).geturl()


def told(error: BaseException, storage: str) -> str:
    """What a storage's error says, in one line and without the password."""
    while not isinstance(error, exc.DBAPIError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, exc.PendingRollbackError):
        return "the connection was cut"
    origin = getattr(error, "orig", None) or error
    text = " ".join(str(origin).split()) or type(origin).__name__
    return text.replace(storage, shown(storage)) if not (secret := _password(storage)) else text.replace(secret, "***")


def _password(storage: str) -> str | None:
    try:
        parts = urlsplit(storage)
        found = parts.password or dict(parse_qsl(parts.query)).get("password")
    except ValueError:
        return None
    return found or None
