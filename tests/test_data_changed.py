"""Data that change under a run, or between their hash and the first window: named, never trained on."""

from __future__ import annotations

import errno
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supar_cli.data import batches, corpus, tokens
from supar_cli.errors import InputError, SetupError
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.planning.spec import Data
from supar_cli.training.trainer import Trainer
from tests.conftest import TEXT_BYTES, Called, environment, plan_from, proxy_fields, real_text
from tests.test_data import write_shard
from tests.test_train import trained
from tests.test_train_resume import assert_same_run

Supar = Callable[..., Called]
BACK = (
    "expected the data that the run started with: restore them, and the same command continues from the last checkpoint"
)


def written(folder: Path, kind: str) -> tuple[Path, Path]:
    """A small corpus of a kind: what a plan names, and the file of it that training reads from."""
    text = real_text(TEXT_BYTES)
    if kind == "text":
        (folder / "text.txt").write_bytes(text)
        return folder / "text.txt", folder / "text.txt"
    (folder / "corpus").mkdir()
    tokens = list(text)
    if kind == "nanogpt":
        for name, part in (("train", tokens[:-3000]), ("val", tokens[-3000:])):
            (folder / "corpus" / f"{name}.bin").write_bytes(np.array(part, "<u2").tobytes())
        return folder / "corpus", folder / "corpus/train.bin"
    write_shard(folder / "corpus/x_train_0.bin", tokens[:-3000])
    write_shard(folder / "corpus/x_val_0.bin", tokens[-3000:])
    return folder / "corpus", folder / "corpus/x_train_0.bin"


def plan_for(source: Path) -> Plan:
    changes: dict[str, Any] = {"train": {"eval_every": 3}, "run": {"checkpoint_every": 2}}
    return plan_from(proxy_fields(str(source), **changes))


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, change: Callable[[], None]) -> None:
    """Have something happen once, between two steps of whatever is trained."""
    done, take = list[int](), Trainer.step

    def stepping(self: Trainer, diagnose: bool = False) -> Any:
        if self.done == step and not done:
            done.append(step)
            change()
        return take(self, diagnose)

    monkeypatch.setattr(Trainer, "step", stepping)


def flip(path: Path) -> None:
    """Change one byte where it lies."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"xx")


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda path: os.truncate(path, 4000), r"was truncated to 4,000 of its [0-9,]+ bytes"),
    "emptied": (lambda path: path.write_bytes(b""), r"was truncated to 0 of its [0-9,]+ bytes"),
    "written to": (flip, "was written to"),
    "longer": (append, "was written to"),
}


class TestUnderTheRun:
    @pytest.mark.parametrize(
        ("kind", "change"),
        [("text", "cut"), ("text", "written to"), ("nanogpt", "longer"), ("nanogpt", "emptied"), ("llmc", "cut")],
    )
    def test_ends_it_by_name_and_put_back_it_ends_as_the_whole(
        self, supar_here: Supar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, change: str
    ) -> None:
        source, file = written(tmp_path, kind)
        plan, before = plan_for(source), file.read_bytes()
        (tmp_path / "plan.yaml").write_text(document.write([plan.model_dump()]), "utf-8")
        spoil, what = CHANGES[change]
        at_step(monkeypatch, 5, lambda: spoil(file))
        called = supar_here("train", "-o", "run", "-q")
        assert (called.status, called.out) == (3, "") and len(called.err.splitlines()) == 1
        assert f"error: {file}: " in called.err and f" since its hash was taken; {BACK}\n" in called.err
        assert re.search(what, called.err)
        kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
        assert kept == ["step-00000002", "step-00000004"]
        called = supar_here("train", "-o", "run", "-q")  # as it lies there now, it is other data
        assert called.status in (2, 3) and source.name in called.err and "Traceback" not in called.err
        file.write_bytes(before)
        assert supar_here("train", "-o", "run", "-q").status == 0
        trained(plan, tmp_path / "whole")
        assert_same_run(tmp_path / "run", tmp_path / "whole")

    @pytest.mark.parametrize("deleted", [False, True])
    def test_a_file_in_its_place_is_of_the_next_start_only(
        self, supar_here: Supar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deleted: bool
    ) -> None:
        """The file that was hashed is open still, and is what the run goes on with."""
        source, file = written(tmp_path, "nanogpt")
        plan, other = plan_for(source), tmp_path / "other"
        (tmp_path / "plan.yaml").write_text(document.write([plan.model_dump()]), "utf-8")
        trained(plan, tmp_path / "whole")
        other.write_bytes(bytes(len(file.read_bytes())))
        at_step(monkeypatch, 5, file.unlink if deleted else lambda: other.replace(file))
        assert supar_here("train", "-o", "run", "-q").status == 0
        assert_same_run(tmp_path / "run", tmp_path / "whole")
        called = supar_here("train", "-o", "run", "-q")
        what = (
            "no training split, only one for validation" if deleted else "is not the data this document was made with"
        )
        assert called.status == 2 and f"corpus{':' if deleted else ''} {what}" in called.err

    def test_unseen_it_would_be_another_experiment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What the checks are for: without them a run goes on with other data to another end, and says nothing."""
        source, file = written(tmp_path, "text")
        plan = plan_for(source)
        trained(plan, tmp_path / "whole")

        def unchecked(self: Any, at: int, count: int) -> bytes:
            return os.pread(self.number, count, at)

        monkeypatch.setattr(tokens.StampedFile, "read", unchecked)
        at_step(monkeypatch, 5, lambda: file.write_bytes(file.read_bytes()[::-1]))
        trained(plan, tmp_path / "run")
        with pytest.raises(AssertionError):
            assert_same_run(tmp_path / "run", tmp_path / "whole")

    def test_a_disk_that_fails_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        source, _ = written(tmp_path, "text")
        split = batches.load(Data(source=str(source)), vocab=256, context=8).train

        def broken(*_: Any) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "pread", broken)
        with pytest.raises(SetupError, match=r"text\.txt: can't be read: Input/output error; expected the data"):
            split.batch(0, 0, 2, 8)


class TestBeforeTheFirstWindow:
    """What is read is what was hashed, though another writes to it at the worst moment."""

    @pytest.mark.parametrize("change", [flip, append, Path.unlink], ids=["written to", "longer", "gone"])
    @pytest.mark.parametrize("moment", ["hashed", "read"])
    @pytest.mark.parametrize("kind", ["text", "nanogpt", "folder"])
    def test_another_content_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, moment: str, change: Callable[[Path], Any]
    ) -> None:
        if kind == "folder":  # of texts, which are held in memory
            source = tmp_path / "folder"
            source.mkdir()
            for name in ("one", "two", "three"):
                (source / f"{name}.txt").write_bytes(real_text(2000))
            file = source / "two.txt"
        else:
            source, file = written(tmp_path, kind)
        known = corpus.identify(Data(source=str(source)))
        where, name = {"hashed": (corpus, "content_hash"), "read": (batches._Reader, "segments")}[moment]
        call, calls = getattr(where, name), list[Any]()

        def spoiled(*arguments: Any) -> Any:
            calls.append(call(*arguments))
            if len(calls) == 1:
                change(file)
            return calls[-1]

        monkeypatch.setattr(where, name, spoiled)
        with pytest.raises(SetupError, match=rf"{file.name}: (changed while it was read|was written to|can't be read)"):
            batches.load(known, vocab=256, context=8)
        assert calls

    def test_a_change_in_the_same_tick_of_the_clock_shows(self, tmp_path: Path) -> None:
        """Made, stamped and written to at once, as often as a clock of 100 Hz would miss some of."""
        for turn in range(30):
            path = tmp_path / f"{turn}.txt"
            path.write_bytes(b"a" * 100)
            with pytest.raises(SetupError), tokens.require_unchanged([path]):
                flip(path)

    def test_files_that_stay_are_read(self, tmp_path: Path) -> None:
        path = tmp_path / "a.txt"
        path.write_bytes(bytes(100))
        with tokens.require_unchanged([path]) as stamps:
            read = tokens.TokenFile(tokens.StampedFile(path, stamps[path]), "u1")
        assert np.array_equal(np.asarray(read), np.zeros(100)) and len(read[90:200]) == 10

    def test_a_file_that_is_no_more_what_was_stamped_is_not_opened(self, tmp_path: Path) -> None:
        path, other = tmp_path / "a.txt", tmp_path / "b.txt"
        for one in (path, other):
            one.write_bytes(bytes(100))
        stamp = tokens.Stamp.of(path)
        os.utime(other, ns=(stamp.changed, stamp.changed))  # the same size and time: another file all the same
        other.replace(path)
        with pytest.raises(SetupError, match=r"a\.txt: was written to"):
            tokens.TokenFile(tokens.StampedFile(path, stamp), "u1")


class TestTokenFile:
    def test_is_read_as_the_array_it_holds(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        values = np.random.default_rng(0).integers(0, 2**16, 1000).astype("<u2")
        path = tmp_path / "a.bin"
        path.write_bytes(b"head" + values.tobytes())
        monkeypatch.setattr(tokens, "AT_ONCE", 64)
        read = tokens.TokenFile(tokens.StampedFile(path, tokens.Stamp.of(path)), "<u2", 4)
        assert len(read) == 1000 and read.max() == values.max() and np.array_equal(np.asarray(read), values)
        for part in (slice(10, 20), slice(None, 7), slice(990, None), slice(400, 400), slice(5, 3), slice(-5, None)):
            assert np.array_equal(np.asarray(read[part]), values[part])
            assert np.array_equal(np.asarray(read[100:900][part], np.int64), values[100:900][part])

    def test_reads_that_come_in_pieces_are_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, pread = tmp_path / "a.bin", os.pread
        path.write_bytes(bytes(range(256)))
        read = tokens.TokenFile(tokens.StampedFile(path, tokens.Stamp.of(path)), "u1")
        monkeypatch.setattr(os, "pread", lambda number, count, at: pread(number, min(count, 100), at))
        assert np.asarray(read).tolist() == list(range(256))

    def test_more_shards_than_a_process_may_open_at_first(self, tmp_path: Path) -> None:
        for i in range(120):
            (tmp_path / f"x_{'val' if i == 7 else 'train'}_{i:03}.bin").write_bytes(bytes(64))

        def few() -> None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

        code = (
            "from supar_cli.data import batches\n"
            "from supar_cli.planning.spec import Data\n"
            "print(batches.load(Data(source='.'), vocab=256, context=8).train.windows(9))"
        )
        command: Any = [sys.executable, "-c", code]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(), preexec_fn=few, capture_output=True, text=True, timeout=60
        )
        assert done.stdout == f"{119 * 24}\n", done.stderr

    def test_and_where_it_may_not_the_file_is_named(self, tmp_path: Path) -> None:
        for i in range(120):
            (tmp_path / f"{i:03}.bin").write_bytes(bytes(64))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        opened = list[Any]()
        path = tmp_path / "000.bin"
        stamp = tokens.Stamp.of(path)
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
        try:
            with pytest.raises(SetupError, match=r"000\.bin: can't be read: Too many open files"):
                for _ in range(120):
                    opened.append(tokens.TokenFile(tokens.StampedFile(path, stamp), "u1"))
        finally:
            opened.clear()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_unreadable_names_are_refused(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b", str(tmp_path / ("y" * 5000))):
        with pytest.raises(InputError, match=r"data\.source: "):
            batches.load(Data(source=name), vocab=256, context=8)
        (tmp_path / "a.txt").write_bytes(b"a" * 100)
        with pytest.raises(InputError, match=r"data\.tokenizer: "):
            batches.load(Data(source=str(tmp_path / "a.txt"), tokenizer=name), vocab=256, context=8)
