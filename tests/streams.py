"""Runs `supar` with standard streams in many states, as `python tests/streams.py`: cases in JSON on stdin, results on stdout.

Each case is a fork of this process, which has imported what it needs: {"arguments", "streams", "encoding", "old"}. With `old`
nothing protects the streams, as it was before.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from typing import Any, NoReturn

import supar_cli.cli.init
import supar_cli.cli.runs
import supar_cli.cli.train
import supar_cli.cli.transfer
import supar_cli.planning.transfer  # noqa: F401
from supar_cli import standard_streams
from supar_cli.cli.app import main
from supar_cli.training import trainer  # noqa: F401


def put(number: int, state: str) -> None:
    """Put a stream of this process into a state: a file's name, or a word."""
    if state == "closed":
        os.close(number)
        return
    if state == "no reader":
        reader, writer = os.pipe()
        os.close(reader)
    elif state in ("full", "read only", "empty"):
        path, flags = ("/dev/full", os.O_WRONLY) if state == "full" else (os.devnull, os.O_RDONLY)
        writer = os.open(path, flags)
    else:
        writer = os.open(state, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(writer, number)
    os.close(writer)


def live(case: dict[str, Any]) -> NoReturn:
    """Be a `supar` process whose interpreter has just started."""
    status: Any = 99
    try:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            state = case["streams"][number]
            put(number, state)
            mode, errors = ("r" if number == 0 else "w"), ("backslashreplace" if number == 2 else "strict")
            how: dict[str, Any] = {"encoding": case["encoding"], "errors": errors, "closefd": False}
            setattr(sys, name, None if state == "closed" else open(number, mode, **how))  # noqa: SIM115
        if case["old"]:
            standard_streams.protect = lambda: None
            standard_streams.lost_output = lambda: None
        sys.argv = ["supar", *case["arguments"]]
        main()
    except SystemExit as ended:
        status = ended.code or 0
        with contextlib.suppress(AttributeError):
            sys.stdout.flush()
            sys.stderr.flush()
    except BaseException:
        status = 98  # a traceback
    os._exit(status)


if __name__ == "__main__":
    cases, found = json.load(sys.stdin), list[int]()
    for one in cases:
        process = os.fork()
        if not process:
            live(one)
        found.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
    json.dump(found, io.TextIOWrapper(sys.stdout.buffer))
