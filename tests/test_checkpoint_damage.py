"""Damaged checkpoints, whole and in shards: each is refused by the name of its file, or loads as the state that was saved."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supar_cli.errors import InputError, SetupError
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.training import checkpoint
from supar_cli.training.trainer import Trainer
from tests.conftest import TEXT_BYTES, environment, plan_from, proxy_fields, real_text

TIMES = int(os.environ.get("SUPAR_FUZZ", "1"))
BOUNDED = settings(
    max_examples=100 * TIMES,
    deadline=None,
    derandomize=TIMES == 1,
    suppress_health_check=list(HealthCheck),
    database=None,
)
MODEL = {"layers": 1, "context": 16}


class Case:
    """A checkpoint, the state it holds, and a trainer to load it."""

    def __init__(self, folder: Path, *flags: str) -> None:
        (folder / "text.txt").write_bytes(real_text(TEXT_BYTES))
        fields = proxy_fields(str(folder / "text.txt"), model=MODEL, target={"width": 32})
        self.plan: Plan = plan_from(fields)
        (folder / "plan.yaml").write_text(document.write([self.plan.model_dump()]), "utf-8")
        command = [sys.executable, "-m", "supar_cli", "train", "-o", "run", "-q", *flags]
        environ = environment(OMP_NUM_THREADS="1")
        done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        (self.path,) = checkpoint.available(folder / "run/checkpoints")
        self.files = sorted(path.name for path in self.path.iterdir())
        self.contents = {name: (self.path / name).read_bytes() for name in self.files}
        self.trainer = Trainer(self.plan)
        checkpoint.load(self.path, self.trainer)
        self.state = self.now()
        self.scratch = folder / "scratch"
        self.ends: Counter[str] = Counter()

    def now(self) -> dict[str, torch.Tensor]:
        return checkpoint.Snapshot.of(self.trainer).tensors

    def forget(self) -> None:
        with torch.no_grad():
            for tensor in self.trainer.prepared.tensors.values():
                tensor.fill_(7.0)
        self.trainer.optimizer.state.clear()

    def write(self, changes: dict[str, bytes | None]) -> Path:
        """The checkpoint with some files changed, or deleted, in a folder of its own."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        path = self.scratch / self.path.name
        path.mkdir(parents=True)
        for name, content in {**self.contents, **changes}.items():
            if content is not None:
                (path / name).write_bytes(content)
        return path

    def load(self, path: Path, exact: bool = True) -> str:
        """How loading ended: `refused`, naming the folder, or `loaded`, and then with the state that was saved."""
        self.forget()
        try:
            steps = checkpoint.load(path, self.trainer)
        except (SetupError, InputError) as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1, error
            self.ends["refused"] += 1
            return "refused"
        self.ends["loaded"] += 1
        if exact:
            found = self.now()
            assert steps == 12 and found.keys() == self.state.keys()
            assert [key for key, value in found.items() if not torch.equal(value, self.state[key])] == []
        return "loaded"


@pytest.fixture(scope="module", params=["whole", "shards"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    flags = ("--nproc", "2", "--parallel", "fsdp") if request.param == "shards" else ()
    made = Case(tmp_path_factory.mktemp(request.param), *flags)
    assert len(made.files) == (4 if request.param == "shards" else 3)
    return made


places = st.floats(0, 1, exclude_max=True)


def at(content: bytes, place: float) -> int:
    return int(place * len(content))


def rehashed(case: Case, changes: dict[str, bytes]) -> dict[str, bytes]:
    """The changes, and a manifest whose hashes fit them."""
    manifest = json.loads(case.contents["manifest.json"])
    del manifest["hash"]
    for name, content in changes.items():
        manifest["files"][name] = "sha256:" + hashlib.sha256(content).hexdigest()
    manifest["hash"] = document.content_hash(manifest)
    return {**changes, "manifest.json": json.dumps(manifest).encode()}


def test_as_written_it_loads(case: Case) -> None:
    assert case.load(case.write({})) == "loaded"


@BOUNDED
@given(file=places, place=places, bit=st.integers(0, 7))
def test_a_flipped_bit(case: Case, file: float, place: float, bit: int) -> None:
    name = case.files[int(file * len(case.files))]
    content = bytearray(case.contents[name])
    content[at(content, place)] ^= 1 << bit
    assert case.load(case.write({name: bytes(content)})) == "refused" or name == "manifest.json"  # in its white space


@BOUNDED
@given(file=places, place=places, how=st.sampled_from(["cut", "torn", "zeros", "longer", "deleted", "another's"]))
def test_a_file_that_is_not_whole(case: Case, file: float, place: float, how: str) -> None:
    index = int(file * len(case.files))
    name, other = case.files[index], case.files[(index + 1) % len(case.files)]
    content = case.contents[name]
    end = at(content, place)
    changed = {
        "cut": content[:end],
        "torn": content[:end] + bytes(reversed(content[end:])),
        "zeros": content[:end] + bytes(len(content) - end),
        "longer": content + content[: end + 1],
        "deleted": None,
        "another's": case.contents[other],
    }[how]
    ended = case.load(case.write({name: changed}))
    assert ended == "refused" or changed == content or name == "manifest.json"


@BOUNDED
@given(
    key=st.sampled_from(["kind", "step", "plan", "data", "masks", "files", "hash"]), value=st.data(), fits=st.booleans()
)
def test_a_field_of_the_manifest(case: Case, key: str, value: st.DataObject, fits: bool) -> None:
    simple = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8)
    )
    new = value.draw(simple | st.lists(simple, max_size=2) | st.dictionaries(st.text(max_size=8), simple, max_size=2))
    manifest = json.loads(case.contents["manifest.json"])
    same = manifest[key] == new and type(manifest[key]) is type(new)
    manifest[key] = new
    if fits and key != "hash":
        del manifest["hash"]
        manifest["hash"] = document.content_hash(manifest)
    path = case.write({"manifest.json": json.dumps(manifest).encode()})
    assert case.load(path) == "refused" or same


@BOUNDED
@given(data=st.data())
def test_a_header_that_nobody_wrote(case: Case, data: st.DataObject) -> None:
    """Its hashes fit: what reads it has to bear it, whatever it says of lengths, shapes, kinds and shards."""
    name = next(name for name in case.files if name.endswith(".safetensors"))
    content = case.contents[name]
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if data.draw(st.booleans()):
        raw = bytearray(content[: 8 + length])
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        changed = bytes(raw) + content[8 + length :]
    else:
        keys = [key for key in header if key != "__metadata__"]
        key = data.draw(st.sampled_from(keys))
        number = st.sampled_from([-1, 0, 1, 3, 2**31, 2**53, 2**63, 2**64, 10**30])
        what = data.draw(st.sampled_from(["shape", "data_offsets", "dtype", "gone", "shards"]))
        if what in ("shape", "data_offsets"):
            header[key][what] = data.draw(st.lists(number, max_size=3))
        elif what == "dtype":
            header[key]["dtype"] = data.draw(st.sampled_from(["F64", "I8", "BF16", "Q4", "", 3]))
        elif what == "gone":
            del header[key]
        else:
            offsets = data.draw(st.lists(number, max_size=2) | st.none() | st.text(max_size=3))
            sharding = {one: {"saved_offsets": [0] * len(header[one]["shape"])} for one in keys}
            sharding[key] = data.draw(st.sampled_from([{"saved_offsets": offsets}, {}, 3]))
            header["__metadata__"] = {"format": "pt", "DCP_SHARDING_INFO": json.dumps(sharding)}
        text = json.dumps(header).encode()
        changed = len(text).to_bytes(8, "little") + text + content[8 + length :]
    case.load(case.write(rehashed(case, {name: changed})), exact=False)


def test_how_they_ended(case: Case) -> None:
    """Last: enough was tried, and little of it loaded."""
    assert case.ends["refused"] >= 200 * TIMES, case.ends
    assert case.ends["loaded"] <= case.ends["refused"] / 4, case.ends
    sys.stderr.write(f"\n{case.path.parent.parent.parent.name}: {dict(case.ends)}\n")


def test_without_the_hashes_a_wrong_state_would_load(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(name for name in case.files if name.endswith(".safetensors"))
    content = bytearray(case.contents[name])
    content[8 + int.from_bytes(content[:8], "little") + 2] ^= 64  # in the first tensor
    path = case.write({name: bytes(content)})
    assert case.load(path) == "refused"
    nothing: Callable[..., Any] = lambda *_: None  # noqa: E731
    monkeypatch.setattr(checkpoint, "_verify", nothing)
    with pytest.raises(AssertionError):
        case.load(path)
