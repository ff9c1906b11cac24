"""Documents and token files that nobody meant: each command gives a result or a clean error, and leaves nothing half-written."""

from __future__ import annotations

import contextlib
import copy
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supar_cli.cli.app import app
from supar_cli.errors import SuparError
from supar_cli.experiments import dry_run
from supar_cli.planning import document, templates
from supar_cli.planning.spec import Proxy
from supar_cli.training.run_directory import RunHistory
from supar_cli.training.trainer import Trainer
from tests.conftest import TEXT_BYTES, plan_from, proxy_fields, real_text
from tests.fuzzing import MORE, tries
from tests.mutation import changed, garbled, garbled_bytes

STATUSES = {0, 2, 3, 4, 5, 75}
PLANS = ["plan", "plan", "llama", "block"]


class Ends:
    """A folder with valid documents in it, and how commands on changed ones ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.counts: Counter[str] = Counter()
        (folder / "text.txt").write_bytes(real_text(TEXT_BYTES))
        fields = proxy_fields("text.txt", model={"layers": 1}, train={"steps": 2, "batch_size": 2})
        with contextlib.chdir(folder):
            llama = {"layers": 1, "family": "llama", "kv_heads": 1, "tied": False}
            erk = {"sparsity": {"density": 0.25, "distribution": "erk", "overrides": {"attn.q": 0.5}}}
            block = {"width": 64, "sparsity": {"density": 0.5, "pattern": "block", "block": 16}}
            plan = plan_from(fields)
            self.documents: dict[str, Any] = {
                "plan": plan.model_dump(),
                "llama": plan_from(
                    {**fields, "model": {**fields["model"], **llama}, "target": {**fields["target"], **erk}}
                ).model_dump(),
                "block": plan_from({**fields, "target": {**fields["target"], **block}}).model_dump(),
                "proxy": Proxy.model_validate(copy.deepcopy(fields)).model_dump(),
                "spec": {
                    **{key: value for key, value in fields.items() if key not in ("kind", "target")},
                    "kind": "supar.spec/v1",
                    "search": {"trials": 2, "lr": [0.001, 0.1]},
                },
                "sweep": document.read(templates.text("fig6"), "fig6")[0].data,
            }
        self.texts = {name: document.write([data]) for name, data in self.documents.items()}

    def files(self) -> dict[str, bytes]:
        kept = (path for path in sorted(self.folder.rglob("*")) if path.is_file() and path.suffix != ".journal")
        return {str(path): path.read_bytes() for path in kept}

    def call(self, *arguments: str) -> int:
        """The exit status of a command; it said nothing of a bug, and wrote nothing where it failed."""
        before = self.files()
        out, err = io.StringIO(), io.StringIO()
        status: Any = 0
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                app(list(arguments))
            except SystemExit as ended:
                status = ended.code or 0
            except SuparError as error:
                raise AssertionError("an error escaped the application") from error
        assert status in STATUSES, (status, err.getvalue())
        assert "Traceback" not in err.getvalue()
        if status:
            assert err.getvalue().strip() and out.getvalue() == ""
        if status == 2:
            assert self.files() == before
            assert all(line.startswith(("error: ", "  ", "warning: ")) for line in err.getvalue().splitlines()), (
                err.getvalue()
            )
        self.counts[f"{arguments[0]} {status}"] += 1
        return int(status)


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ends]:
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("fuzz")
    patch.setenv("XDG_CACHE_HOME", str(folder.parent / "cache"))
    made = Ends(folder)
    yield made
    patch.undo()


def written(ends: Ends, name: str, draw: st.DataObject) -> str:
    """The name of the file that holds a changed document of a kind."""
    path = ends.folder / f"{name}.yaml"
    kind = draw.draw(st.sampled_from(PLANS)) if name == "plan" else name
    if draw.draw(st.booleans()):
        path.write_text(changed(draw, ends.documents[kind]), "utf-8")
    else:
        path.write_bytes(garbled(draw, ends.texts[kind]))
    return path.name


def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends after a few steps, whatever its plan says, as it would by a signal."""
    run = Trainer.run

    def soon(trainer: Trainer, directory: Path | None = None, **flags: Any) -> RunHistory:
        return run(trainer, directory, **{**flags, "stop": lambda: "enough" if trainer.done >= 2 else None})

    monkeypatch.setattr(Trainer, "run", soon)


@tries(150)
@given(draw=st.data())
def test_a_proxy(ends: Ends, draw: st.DataObject) -> None:
    name = written(ends, "proxy", draw)
    ends.call("transfer", name, "--sparsity", "0.9", "-o", "-", "-q")


@tries(150)
@given(draw=st.data())
def test_a_plan_is_explained_and_shown(ends: Ends, draw: st.DataObject) -> None:
    name = written(ends, "plan", draw)
    ends.call("explain", name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dry_run, "time_run", lambda plan, step_of=None: (1.0, 0.1))  # what it times is trained below
        ends.call("train", name, "--dry-run")


@tries(120)
@given(draw=st.data())
def test_a_plan_is_trained(ends: Ends, draw: st.DataObject) -> None:
    name = written(ends, "plan", draw)
    with pytest.MonkeyPatch.context() as patch:
        short(patch)
        ends.call("train", name, "-o", "run", "-q", "--force")


@tries(60)
@given(draw=st.data())
def test_a_spec(ends: Ends, draw: st.DataObject) -> None:
    name = written(ends, "spec", draw)
    with pytest.MonkeyPatch.context() as patch:
        short(patch)
        patch.setattr(
            "supar_cli.experiments.search.search", lambda *_, **__: (_ for _ in ()).throw(SuparErrorOfTests("enough"))
        )
        ends.call("tune-proxy", name, "-o", "-", "-q")


class SuparErrorOfTests(SuparError):
    exit_status = 4


@tries(60)
@given(draw=st.data())
def test_a_sweep(ends: Ends, draw: st.DataObject) -> None:
    from supar_cli.jobs import runs as records

    name = written(ends, "sweep", draw)
    with pytest.MonkeyPatch.context() as patch:

        def enough(*_: Any, **__: Any) -> None:
            raise SuparErrorOfTests("enough")

        patch.setattr(records, "open_study_folder", enough)
        patch.setattr(records, "require_runnable", lambda *_, **__: None)
        ends.call("sweep", name, "--data", "text.txt", "-q")


@tries(120)
@given(draw=st.data())
def test_token_files(ends: Ends, draw: st.DataObject) -> None:
    """nanoGPT's and llm.c's files, JSONL, text and tokenizer.json, random or changed, inspected and trained on."""
    kind = draw.draw(st.sampled_from(["bin", "llmc", "jsonl", "txt", "tokenizer"]))
    tokens = np.arange(4000, dtype="<u2") % 256
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    lines = b"".join(json.dumps({"text": "some words, and more of them"}).encode() + b"\n" for _ in range(50))
    whole = {
        "bin": tokens.tobytes(),
        "llmc": header.tobytes() + tokens.tobytes(),
        "jsonl": lines,
        "txt": real_text(8000),
        "tokenizer": TOKENIZER,
    }[kind]
    content = garbled_bytes(draw, whole) if draw.draw(st.booleans()) else draw.draw(st.binary(max_size=300))
    suffix = {"llmc": "bin", "tokenizer": "json"}.get(kind, kind)
    (ends.folder / f"data.{suffix}").write_bytes(content)
    plan = copy.deepcopy(ends.documents["plan"])
    plan["data"] |= {"source": f"data.{suffix}", "hash": None}
    flags: list[str] = []
    if kind == "tokenizer":
        plan["data"] |= {"source": "text.txt", "tokenizer": "data.json"}
        flags = ["--tokenizer", "data.json"]
    (ends.folder / "plan.yaml").write_text(document.write([plan]), "utf-8")
    ends.call("data", "inspect", plan["data"]["source"], *flags, "-q")
    with pytest.MonkeyPatch.context() as patch:
        short(patch)
        ends.call("train", "plan.yaml", "-o", "run", "-q", "--force")


TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"a": 0, "the": 1, "[UNK]": 2}, "unk_token": "[UNK]"},
    }
).encode()


FOUND = {
    "a run of more tokens than an integer holds": ("proxy", ("train", "steps"), 2**63 - 1, 2),
    "a decay whose timescale is no number": ("plan", ("tensors", 2, "weight_decay"), 5e-324, 0),
    "a name that no file can have": ("plan", ("data", "source"), "x" * 3000, 2),
    "a tokenizer with a name that no file can have": ("plan", ("data", "tokenizer"), "x" * 3000, 2),
    "a width of nothing": ("proxy", ("model", "width"), 0, 2),
}
COMMANDS = {
    "proxy": [["transfer", "proxy.yaml", "-o", "-"]],
    "plan": [["train", "plan.yaml", "-o", "run", "-q", "--force"], ["explain", "plan.yaml"]],
}


@pytest.mark.parametrize("name", FOUND)
def test_what_longer_runs_have_found(ends: Ends, name: str) -> None:
    kind, (*above, key), value, status = FOUND[name]
    data = copy.deepcopy(ends.documents[kind])
    here = data
    for part in above:
        here = here[part]
    here[key] = value
    (ends.folder / f"{kind}.yaml").write_text(json.dumps(data), "utf-8")
    first, *_ = [ends.call(*command) for command in COMMANDS[kind]]
    assert first == status


def test_a_tokenizer_that_lacks_what_it_needs(ends: Ends) -> None:
    (ends.folder / "data.json").write_bytes(TOKENIZER.replace(b'"unk_token": "[UNK]"', b'"unk_token": "[UNX]"'))
    assert ends.call("data", "inspect", "text.txt", "--tokenizer", "data.json", "-q") == 3


def test_enough_was_tried_and_some_of_it_ran(ends: Ends, record_property: Callable[[str, object], None]) -> None:
    record_property("tried", ", ".join(f"{count} {how}" for how, count in sorted(ends.counts.items())))
    total, ran = sum(ends.counts.values()), sum(n for name, n in ends.counts.items() if name.endswith((" 0", " 75")))
    assert total >= 800 * max(1, MORE) and total / 20 < ran < total, ends.counts


def test_a_traceback_would_be_seen(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("supar_cli.cli.transfer.parse", bug)
    (ends.folder / "proxy.yaml").write_text(ends.texts["proxy"])
    with pytest.raises(ZeroDivisionError):
        ends.call("transfer", "proxy.yaml", "--sparsity", "0.9", "-o", "-")
