"""Standard streams that are closed, full, without a reader, or without Unicode: commands end as they do without them."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from tests.conftest import CHECKOUT, environment
from tests.fuzzing import MORE

MakePlan = Callable[..., Plan]
Case = tuple[tuple[str, ...], str, str, str]  # arguments, stdout, stderr, encoding

STATES = ("file", "closed", "full", "read only", "no reader")
LOSING = ("full", "read only")  # somebody may be waiting for what is lost
ENCODINGS = ("utf-8", "latin-1", "ascii")
COMMANDS = (
    ("transfer", "proxy.yaml", "--sparsity", "0.5", "-o", "-"),
    ("explain", "plan.yaml", "mlp.down"),  # its formulas have Greek letters
    ("init", "--list"),
    ("--help",),
    ("runs", "nowhere"),  # an error
    ("train", "--no-such-option"),
)


TRAIN = ("train", "plan.yaml", "-o")
TRAINED = (("file", "file"), ("closed", "closed"), ("full", "full"), ("file", "no reader"))
# before, missing streams, a full stderr and letters that an encoding lacks ended a command with a traceback
BEFORE = (
    (COMMANDS[0], "closed", "file", "utf-8"),
    (COMMANDS[0], "file", "closed", "utf-8"),
    (COMMANDS[0], "file", "full", "utf-8"),
    (COMMANDS[1], "file", "file", "ascii"),
    (COMMANDS[1], "file", "file", "latin-1"),
)


def run_all(folder: Path, cases: list[Case], old: int) -> list[tuple[int, bytes, bytes]]:
    """[(status, what a file got of stdout, of stderr)] of commands with streams in states; the first `old` as they were."""
    asked = []
    for at, (arguments, out, err, encoding) in enumerate(cases):
        states = [f"{name}{at}" if state == "file" else state for name, state in (("out", out), ("err", err))]
        stdin = ("closed", "empty")[at % 2]
        asked.append({"arguments": arguments, "streams": [stdin, *states], "encoding": encoding, "old": at < old})
    command = [sys.executable, str(CHECKOUT / "tests/streams.py")]
    pipes: Any = {"input": json.dumps(asked).encode(), "capture_output": True, "timeout": 300}
    done = subprocess.run(command, cwd=folder, env=environment(OMP_NUM_THREADS="1"), **pipes)
    assert done.returncode == 0, done.stderr.decode()
    texts = [[(folder / f"{name}{at}") for name in ("out", "err")] for at in range(len(cases))]
    read = [[path.read_bytes() if path.exists() else b"" for path in paths] for paths in texts]
    return [(status, *two) for status, two in zip(json.loads(done.stdout), read, strict=True)]  # type: ignore[misc]


def test_no_command_depends_on_them(proxy_file: Path, plan_of: MakePlan, tmp_path: Path) -> None:
    """A document that is lost is a failure, where its reader didn't leave; a message that is lost is none."""
    (tmp_path / "plan.yaml").write_text(document.write([plan_of().model_dump()]), "utf-8")
    every = list(itertools.product(COMMANDS, STATES, STATES, ENCODINGS))
    cases: list[Case] = [(command, "file", "file", "utf-8") for command in COMMANDS]
    cases += random.Random(18).sample(every, min(len(every), 36 * MORE))
    runs = [((*TRAIN, f"run{at}"), *states, "ascii") for at, states in enumerate(TRAINED)]
    found = run_all(tmp_path, [*BEFORE, *cases, *runs], old=len(BEFORE))
    assert not {status for status, *_ in found[: len(BEFORE)]} & {0, 2, 3}
    found = found[len(BEFORE) :]
    plain = {case[0]: one for case, one in zip(cases[: len(COMMANDS)], found[: len(COMMANDS)], strict=True)}
    assert [status for status, *_ in plain.values()] == [0, 0, 0, 0, 2, 2]
    for (command, out_state, err_state, encoding), (status, out, err) in zip([*cases, *runs], found, strict=True):
        usual, printed, _ = plain.get(command, found[-len(runs)])
        is_lost = usual == 0 and out_state in LOSING and printed
        assert status == (3 if is_lost else usual), (command, out_state, err_state, encoding, err)
        text = err.decode(encoding)
        assert "Traceback" not in text
        if err_state == "file" and is_lost:
            assert "error: standard output: can't be written: " in text
        if out_state == "file":
            assert bool(out.decode(encoding if command[0] != "--help" else "utf-8")) == bool(printed)
    results = [json.loads((tmp_path / f"run{at}/result.json").read_bytes()) for at in range(len(TRAINED))]
    assert len({result["validation_loss"] for result in results}) == 1
    assert all(list((tmp_path / f"run{at}/checkpoints").iterdir()) for at in range(len(TRAINED)))


@given(st.dictionaries(st.sampled_from("abc"), st.text(st.characters(exclude_categories=["Cs", "Cc"]))))
def test_a_document_is_read_as_it_was_in_every_encoding(data: dict[str, str]) -> None:
    text = document.write_ascii([data])
    assert text.isascii() and document.read(text, "stdout")[0].data == data


def test_escapes_without_quotes_would_not_be_read_so() -> None:
    """The control of the test above."""
    escaped = document.write([{"a": "é"}]).encode("ascii", "backslashreplace").decode()
    assert document.read(escaped, "stdout")[0].data != {"a": "é"}
