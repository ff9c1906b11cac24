"""Starts `supar` again and again, as `python tests/lives.py`: a line of JSON in, a process number out, its status later.

A process is a fork of this one, which has imported everything and computed nothing: what is tested is how a run ends and
goes on, and not how long Python takes to import torch.
"""

from __future__ import annotations

import json
import os
import sys
from typing import NoReturn

import torch.distributed.checkpoint  # noqa: F401

import supar_cli.cli.train  # noqa: F401
from supar_cli.cli.app import main
from supar_cli.training import trainer  # noqa: F401


def live(arguments: list[str], environment: dict[str, str]) -> NoReturn:
    """Be a `supar` process."""
    os.setpgid(0, 0)
    os.environ.update(environment)
    sys.argv = ["supar", *arguments]
    status = 0
    try:
        main()
    except SystemExit as ended:
        status = int(ended.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)


def serve() -> None:
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            print(os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1]), flush=True)
            continue
        process = os.fork()
        if not process:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(2, 1)
            live(asked["arguments"], asked["environment"])
        print(process, flush=True)


if __name__ == "__main__":
    serve()
