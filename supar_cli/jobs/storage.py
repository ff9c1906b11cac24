"""Where studies are kept: a journal file, or a database that may be unreachable for minutes without loss of a study."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import optuna
import sqlalchemy
from sqlalchemy import exc

from supar_cli.errors import InputError, SetupError, SuparError
from supar_cli.files import append_lines

RETRY_LIMIT_S = 300.0  # chosen: restarts and failovers take seconds to a few minutes; a longer outage is an error
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 5.0  # chosen: short enough for a restart of a second, rare enough in an outage
CREATE_ATTEMPTS = 20  # chosen: for processes that make the same tables at the same time; one succeeds in each round

# the operations of Optuna's storage interface that reach a database
_OPERATIONS = (*sorted(optuna.storages.BaseStorage.__abstractmethods__), "get_trial_id_from_study_id_trial_number")
# PostgreSQL's client settings: an unreachable host is noticed after seconds, not after TCP's two hours
_POSTGRESQL = {"connect_timeout": 10, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3}


class RetryPolicy:
    """Retries operations of a storage while its database is unreachable, up to a limit; warns once per outage."""

    def __init__(
        self, storage: str, warn: Callable[[str], object] | None = None, limit_s: float = RETRY_LIMIT_S
    ) -> None:
        self.storage, self.limit_s = storage, limit_s
        self._is_away = False
        self._warn = warn or (lambda message: sys.stderr.write(f"warning: {message}\n"))

    def retry(self, operation: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """An operation's result, after as many tries as the limit allows. Raises SetupError when it is over."""
        started, pause_s, is_retry = time.monotonic(), FIRST_PAUSE_S, False
        while True:
            try:
                found = operation(*args, **named)
                self._is_away = False
                return found
            except optuna.exceptions.UpdateFinishedTrialError:
                # an attempt whose reply was lost may already have written this
                if is_retry and _is_written(operation, *args, **named):
                    return True
                raise
            except (OSError, RuntimeError) as error:
                if _hides_interrupt(error):  # Optuna's file lock raised this because Ctrl-C interrupted it
                    raise KeyboardInterrupt from None
                if isinstance(error, OSError):
                    raise SetupError(f"--study {redact_url(self.storage)}: {error.strerror or error}") from None
                raise
            except (optuna.exceptions.StorageInternalError, exc.SQLAlchemyError) as error:
                if not is_connection_error(error):
                    raise
                what = f"--study {redact_url(self.storage)}: {error_text(error, self.storage)}"
                if time.monotonic() - started > self.limit_s:
                    raise SetupError(what) from None
                if not self._is_away:
                    self._is_away = True
                    self._warn(f"{what}; trying again for up to {self.limit_s / 60:.0f} minutes")
            is_retry = True
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _chain(error: BaseException | None, link: str) -> Iterator[BaseException]:
    """An error and, by their `__cause__` or `__context__`, those behind it."""
    while error is not None:
        yield error
        error = getattr(error, link)


def _hides_interrupt(error: BaseException) -> bool:
    """Whether an error came up while Ctrl-C was handled, and so hides it."""
    return any(isinstance(one, KeyboardInterrupt) for one in _chain(error, "__context__"))


def is_connection_error(error: BaseException) -> bool:
    """Whether an error means that the database can't be reached now, rather than that it refuses what was asked."""
    # PendingRollbackError: Optuna keeps using a transaction that was broken off
    lost = exc.OperationalError | exc.InterfaceError | exc.PendingRollbackError
    causes = _chain(error, "__cause__")
    return any(isinstance(one, lost) or getattr(one, "connection_invalidated", False) for one in causes)


def _is_written(operation: Callable[..., Any], trial_id: int, *args: Any, **named: Any) -> bool:
    """Whether a trial is in the very state that the operation, if it is the one that sets states, was to give it."""
    if getattr(operation, "__name__", "") != "set_trial_state_values":
        return False
    state = named.get("state", args[0] if args else None)
    return bool(operation.__self__.get_trial(trial_id).state == state)  # type: ignore[attr-defined]


def open_study(
    storage: str, name: str, retries: RetryPolicy | None = None, *, join: bool = False, at_once: bool = False
) -> optuna.Study:
    """The study in a journal file or, for a text with `://`, in any Optuna storage.

    With `join` it must be there already, as for a worker. With `at_once` an unreachable database is not waited for:
    at a command's start its URL may be wrong. Raises SetupError, and InputError for what is not a URL.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    retries = retries or RetryPolicy(storage)
    try:
        backend = _backend(storage, join) if at_once else retries.retry(_backend, storage, join)
        for operation in _OPERATIONS:
            setattr(backend, operation, functools.partial(retries.retry, getattr(backend, operation)))
        if join:
            return optuna.load_study(study_name=name, storage=backend)
        return optuna.create_study(storage=backend, study_name=name, load_if_exists=True)
    except SuparError:
        raise
    except exc.NoSuchModuleError:
        raise _not_a_url(storage) from None
    except ImportError:
        what = "expected a journal file or postgresql://HOST/NAME, or the package that connects to this database"
        raise SetupError(f"--study {redact_url(storage)}: no driver for it is installed; {what}") from None
    except KeyError:
        raise SetupError(f"--study {redact_url(storage)}: {_NOT_HERE}") from None
    except Exception as error:  # each storage has its own errors; none of them is ours
        raise SetupError(f"--study {redact_url(storage)}: can't be opened: {error_text(error, storage)}") from None


_NOT_HERE = "this worker's machine doesn't have the study; expected a database, or a file on a disk that all share"


class _Journal(optuna.storages.journal.JournalFileBackend):  # type: ignore[misc]
    """Optuna's journal file, which a full disk or a kill in the middle of a line doesn't make unreadable."""

    def __init__(self, path: str) -> None:
        self._path, self._own_lock = Path(path), optuna.storages.journal.JournalFileSymlinkLock(path)
        super().__init__(path, lock_obj=self._own_lock)

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        self._own_lock.acquire()
        try:
            append_lines(self._path, "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in logs))
        finally:
            self._own_lock.release()

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        """Lines from this one on. Raises SetupError where one is corrupt."""
        try:
            yield from super().read_logs(log_number_from)
        except ValueError as error:
            what = "expected a journal that supar wrote; restore it from a backup, or choose another --study"
            raise SetupError(f"--study {self._path}: not a journal, or a damaged one: {error}; {what}") from None


def _backend(storage: str, join: bool) -> Any:
    if "://" not in storage:
        if join and not Path(storage).exists():
            raise SetupError(f"--study {storage}: {_NOT_HERE}")
        return optuna.storages.JournalStorage(_Journal(storage))
    url = _url(storage)
    # connected only while an operation runs: a server's limit of connections holds for a cluster's worth of workers
    options: dict[str, Any] = {"poolclass": sqlalchemy.NullPool}
    if url.drivername.startswith("postgresql+psycopg"):
        options["connect_args"] = {key: value for key, value in _POSTGRESQL.items() if key not in url.query}
    text = url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")  # Optuna formats it
    attempts = CREATE_ATTEMPTS
    while True:
        try:
            return optuna.storages.get_storage(optuna.storages.RDBStorage(text, options))
        except (exc.ProgrammingError, exc.IntegrityError, optuna.exceptions.StorageInternalError) as error:
            attempts -= 1
            if not attempts or is_connection_error(error):
                raise  # else another process made the same tables at the same time
            time.sleep(0.1)


def _url(storage: str) -> sqlalchemy.URL:
    """The URL with PostgreSQL's driver named. Raises SetupError when there is none."""
    try:
        url = sqlalchemy.make_url(storage)
    except (exc.ArgumentError, ValueError):
        raise _not_a_url(storage) from None
    if url.drivername not in ("postgresql", "postgres"):
        return url
    for driver in ("psycopg", "psycopg2"):
        if importlib.util.find_spec(driver) is not None:
            return url.set(drivername=f"postgresql+{driver}")
    raise SetupError(f"--study {redact_url(storage)}: needs a driver: pip install 'psycopg[binary]'")


def _not_a_url(storage: str) -> InputError:
    return InputError(f"--study {redact_url(storage)}: not the URL of a database; expected postgresql://HOST/NAME")


def absolute(storage: str) -> str:
    """The storage's address for processes in any working directory."""
    return storage if "://" in storage else str(Path(storage).absolute())


def folder_beside(storage: str, suffix: str) -> Path:
    """The folder of a study's further files: beside its journal, for a database in the working directory."""
    return Path("proxy" if "://" in storage else storage).with_suffix(suffix)


def redact_url(storage: str) -> str:
    """The storage's address for documents and messages: without user and password."""
    if "://" not in storage:
        return storage
    parts = urlsplit(storage)
    query = [(key, value) for key, value in parse_qsl(parts.query) if "pass" not in key.lower()]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=urlencode(query)).geturl()


def error_text(error: BaseException, storage: str) -> str:
    """What a storage's error says, in one line and without the password."""
    causes = list(_chain(error, "__cause__"))
    error = next((one for one in causes if isinstance(one, exc.DBAPIError)), causes[-1])
    if isinstance(error, exc.PendingRollbackError):
        return "the connection was cut"
    text = " ".join(str(getattr(error, "orig", None) or error).split()) or type(error).__name__
    secret = _password(storage)
    return text.replace(secret, "***") if secret else text.replace(storage, redact_url(storage))


def _password(storage: str) -> str | None:
    with suppress(ValueError):
        parts = urlsplit(storage)
        return parts.password or dict(parse_qsl(parts.query)).get("password")
    return None
