"""Checkpoint files damaged in every way: the very state that was written is loaded, or a file is named, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supar_cli.errors import InputError, SetupError
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.training import checkpoint_reader
from supar_cli.training.trainer import Trainer
from tests.conftest import TEXT_BYTES, environment, plan_from, proxy_fields, real_text
from tests.fuzzing import Tried, damaged, tries
from tests.test_train import trained

Files = dict[str, bytes]


def state_of(trainer: Trainer) -> dict[str, bytes]:
    """Weights and optimizer state, bit for bit."""
    found = {name: tensor.detach().numpy().tobytes() for name, tensor in trainer.sparse_model.tensors.items()}
    for name, tensor in trainer.sparse_model.tensors.items():
        for key, value in trainer.optimizer.state[tensor].items():
            found[f"{name}/{key}"] = value.numpy().tobytes()
    return found


@dataclass
class Kept:
    """A checkpoint, the one before it, and a trainer to load it into."""

    folder: Path
    files: Files
    before: Files
    trainer: Trainer
    state: dict[str, bytes]
    step: int

    def put(self, files: Files) -> None:
        """Make the folder hold these files and no others."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name, content in files.items():
            (self.folder / name).write_bytes(content)

    def ends(self, files: Files, tried: Tried, also: Callable[[str], bool] = lambda said: True) -> str:
        """How loading these files ends: as `the same state`, `another state` or `refused`, by a message that names them."""
        self.put(files)
        with tried.ends() as end:
            try:
                self.trainer.restore(self.folder)
            except (SetupError, InputError) as error:
                assert str(self.folder) in str(error) and also(str(error)), (error, files.keys())
                how = "refused"
            else:
                same = self.trainer.done == self.step and state_of(self.trainer) == self.state
                how = "the same state" if same else "another state"
            end(how)
        return how


def plan_in(folder: Path) -> Plan:
    (folder / "text.txt").write_bytes(real_text(TEXT_BYTES))
    changes: dict[str, Any] = {
        "model": {"layers": 1, "width": 16, "heads": 1},
        "target": {"width": 16},
        "run": {"checkpoint_every": 3},
        "train": {"steps": 6},
    }
    return plan_from(proxy_fields(str(folder / "text.txt"), **changes))


def read(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module", params=["whole", "sharded"])
def kept(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """A checkpoint of one file, and one of a file for each of two processes."""
    folder = tmp_path_factory.mktemp(request.param)
    plan = plan_in(folder)
    trainer = Trainer(plan)
    if request.param == "whole":
        trained(plan, folder / "run")
    else:
        (folder / "plan.yaml").write_text(document.write([plan.model_dump()]), "utf-8")
        flags = ("-o", "run", "-q", "--nproc", "2", "--parallel", "fsdp")
        command = [sys.executable, "-m", "supar_cli", "train", *flags]
        done = subprocess.run(
            command, cwd=folder, env=environment(OMP_NUM_THREADS="1"), capture_output=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    before, newest = checkpoint_reader.available(folder / "run/checkpoints")
    trainer.restore(newest)
    made = Kept(newest, read(newest), read(before), trainer, state_of(trainer), trainer.done)
    assert len([name for name in made.files if name.endswith(".safetensors")]) == (1 if request.param == "whole" else 2)
    return made


def fitted(files: Files, **fields: Any) -> Files:
    """Files with a manifest whose hashes fit, as of a writer that is wrong."""
    made = json.loads(files["manifest.json"]) | fields
    listed = made.get("files")
    for name in listed if isinstance(listed, dict) else []:
        if name in files:
            listed[name] = "sha256:" + hashlib.sha256(files[name]).hexdigest()
    made.pop("hash", None)
    try:
        made["hash"] = document.content_hash(made)
    except ValueError:  # of what has no JSON
        made["hash"] = "none"
    return files | {"manifest.json": json.dumps(made).encode()}


class TestDamaged:
    def test_files(self, kept: Kept, tried: Tried) -> None:
        """One file damaged, or lost, or two swapped."""
        names = sorted(kept.files)

        @tries(300)
        @given(st.data())
        def check(data: st.DataObject) -> None:
            name = data.draw(st.sampled_from(names))
            kind, files, touched = (
                data.draw(st.sampled_from(["damage"] * 8 + ["lose", "swap"])),
                dict(kept.files),
                {name},
            )
            if kind == "damage":
                files[name] = data.draw(damaged(files[name], kept.before.get(name, b"")))
                if name == "manifest.json":  # a whole one, of another step, makes the other files wrong
                    touched.update(names)
            elif kind == "lose":
                del files[name]
            else:
                other = data.draw(st.sampled_from(names))
                files[name], files[other] = files[other], files[name]
                touched.add(other)
            how = kept.ends(files, tried, lambda said: any(one in said for one in touched))
            if how == "the same state":
                assert files == kept.files or (
                    name == "manifest.json"
                    and json.loads(files["manifest.json"]) == json.loads(kept.files["manifest.json"])
                )
            assert how != "another state"

        check()
        assert tried.counts["refused"] > 200 and kept.ends(kept.files, Tried()) == "the same state"

    def test_every_byte_of_a_header_counts(self, kept: Kept, tried: Tried) -> None:
        """And every file as a whole: the first and last bytes of each, and the tensors of another step."""
        for name in kept.files:
            content = kept.files[name]
            places = [*range(0, min(len(content), 40)), *range(max(0, len(content) - 8), len(content))]
            for at in places:
                files = kept.files | {name: content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]}
                assert kept.ends(files, tried, lambda said, name=name: name in said) == "refused"
            if name.endswith(".safetensors"):
                files = kept.files | {name: kept.before[name]}
                assert kept.ends(files, tried, lambda said, name=name: name in said) == "refused"

    def test_without_verification_other_states_are_loaded(
        self, kept: Kept, tried: Tried, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """That the test above can fail."""
        hashes = json.loads(kept.files["manifest.json"])["files"]
        monkeypatch.setattr(checkpoint_reader, "file_hash", lambda path: hashes[path.name])
        name = next(name for name in kept.files if name.endswith(".safetensors"))
        for at in range(1, 200):
            content = bytearray(kept.files[name])
            content[-at * 7] ^= 1
            kept.ends(kept.files | {name: bytes(content)}, tried)
        assert tried.counts["another state"] > 100


def edits(value: Any) -> st.SearchStrategy[Any]:
    """Other values for a manifest's."""
    numbers = st.integers() | st.integers(-(2**70), 2**70) | st.floats()
    plain = st.none() | st.booleans() | numbers | st.text(max_size=8) | st.just([]) | st.just({})
    return plain | st.just([value]) | st.just({"a": value}) | st.just(str(value))


class TestManifest:
    def test_fields(self, kept: Kept, tried: Tried) -> None:
        """A field edited, dropped or added, hashes left or made to fit."""
        manifest = json.loads(kept.files["manifest.json"])
        places: list[tuple[str, ...]] = [(key,) for key in manifest]
        places += [(key, inner) for key in ("masks", "files") for inner in manifest[key]]

        @tries(250)
        @given(st.data())
        def check(data: st.DataObject) -> None:
            edited, place = deepcopy(manifest), data.draw(st.sampled_from(places))
            inside = edited[place[0]] if len(place) == 2 else edited
            kind = data.draw(st.sampled_from(["edit", "edit", "drop", "rename", "add"]))
            if kind == "edit":
                inside[place[-1]] = data.draw(edits(inside[place[-1]]))
            elif kind == "add":
                inside[data.draw(st.text(max_size=8) | st.sampled_from(["../x", "/etc/passwd", "", "\0"]))] = "sha256:0"
            else:
                value = inside.pop(place[-1])
                if kind == "rename":
                    inside[place[-1] + data.draw(st.text(min_size=1, max_size=4))] = value
            fits = data.draw(st.booleans())
            files = kept.files | {"manifest.json": json.dumps(edited).encode()}
            how = kept.ends(fitted(files) if fits else files, tried)
            assert how != "another state" and (fits or how == "refused" or edited == manifest)

        check()
        assert tried.counts["refused"] > 150

    def test_a_file_more_than_it_names(self, kept: Kept, tried: Tried) -> None:
        """Its tensors would be read too."""
        for name, content in kept.files.items():
            if name.endswith(".safetensors"):
                files = kept.files | {f"more-{name}": content}
                assert kept.ends(files, tried, lambda said, name=name: f"more-{name}" in said) == "refused"

    def test_a_file_less_with_hashes_that_fit(self, kept: Kept, tried: Tried) -> None:
        for name in kept.files:
            if name.endswith(".safetensors"):
                manifest = json.loads(kept.files["manifest.json"])
                del manifest["files"][name]
                files = {key: content for key, content in kept.files.items() if key != name}
                files["manifest.json"] = json.dumps(manifest).encode()
                assert kept.ends(fitted(files), tried) == "refused"

    @pytest.mark.parametrize("step", [-1, 0, 7, 10**30])
    def test_a_step_that_the_plan_has_not(self, kept: Kept, step: int, tried: Tried) -> None:
        assert kept.ends(fitted(kept.files, step=step), tried) == "refused"


def header_of(content: bytes) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and its data."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def with_header(header: Any, data: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


huge = st.sampled_from([-1, 0, 1, 2**31, 2**62, 2**64, 10**40])
numbers = st.lists(st.integers(-2, 70_000) | huge, max_size=4)
anything = st.none() | st.booleans() | huge | st.floats() | st.text(max_size=6) | numbers | st.just({})


@st.composite
def other_headers(draw: st.DrawFn, content: bytes) -> bytes:
    """A file whose header was written wrongly: sizes, types, offsets, keys, what says which part of a tensor it is."""
    header, data = header_of(content)
    kinds = ["bytes", "length", "shape", "dtype", "offsets", "drop", "rename", "value", "more", "metadata", "nested"]
    kinds += ["sharding"] * 6 * ("DCP_SHARDING_INFO" in header.get("__metadata__", {}))
    kind = draw(st.sampled_from(kinds))
    key = draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    if kind == "bytes":
        return with_header(draw(damaged(json.dumps(header).encode())), data)
    if kind == "length":
        size = draw(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1]))
        return with_header(header, data, size)
    if kind == "nested":
        return with_header(b'{"__metadata__": ' + b"[" * draw(st.integers(1, 200_000)), data)
    if kind in ("shape", "offsets"):
        header[key]["shape" if kind == "shape" else "data_offsets"] = draw(numbers)
    elif kind == "dtype":
        header[key]["dtype"] = draw(st.sampled_from(["F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "X"]))
    elif kind == "drop":
        del header[key]
    elif kind == "rename":
        header[draw(st.text(max_size=20) | st.just(key + "x"))] = header.pop(key)
    elif kind == "value":
        header[key] = draw(anything)
    elif kind == "more":
        header["optimizer/embedding/" + draw(st.text(max_size=5))] = header[key]
    elif kind == "metadata":
        header["__metadata__"] = draw(anything | st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
    else:
        header["__metadata__"]["DCP_SHARDING_INFO"] = draw(other_shardings(header["__metadata__"]["DCP_SHARDING_INFO"]))
    return with_header(header, data)


@st.composite
def other_shardings(draw: st.DrawFn, text: str) -> str:
    """What says where in its tensor each part lies, written wrongly."""
    kind = draw(st.sampled_from(["text", "drop", "value", "offsets", "offsets", "offsets"]))
    if kind == "text":
        return draw(
            st.text(max_size=20) | st.just("[" * 100_000) | damaged(text.encode()).map(lambda b: b.decode("latin-1"))
        )
    info = json.loads(text)
    key = draw(st.sampled_from(sorted(info)))
    if kind == "drop":
        del info[key]
    elif kind == "value":
        info[key] = draw(anything | st.builds(lambda value: {"saved_offsets": value}, anything))
    else:
        info[key]["saved_offsets"] = draw(numbers)
    return json.dumps(info)


class TestHeaders:
    def test_a_writer_that_is_wrong(self, kept: Kept, tried: Tried) -> None:
        """The hashes fit: what its headers say is loaded where that can be, and refused by name where not."""

        @tries(400)
        @given(st.data())
        def check(data: st.DataObject) -> None:
            name = data.draw(st.sampled_from(sorted(name for name in kept.files if name.endswith(".safetensors"))))
            kept.ends(fitted(kept.files | {name: data.draw(other_headers(kept.files[name]))}), tried)

        check()
        assert tried.counts["refused"] > 250
