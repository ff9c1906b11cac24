"""The manual's pages on reading and taking away a model, run as a reader would, one after the other in one folder and session."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import supar_cli
from supar_cli.cli.app import app
from supar_cli.cli.help import PAGES

from .test_readme import blocks

pytest.importorskip("transformers", reason="the pages open an export with transformers")
Session = dict[str, Any]


def run(language: str, block: str, session: Session) -> None:
    """Run a block's commands in this process, where torch is imported already, or its Python in the session."""
    if language == "python":
        exec(compile(block, "page", "exec"), session)
        return
    for line in block.replace("\\\n", " ").splitlines():
        program, *arguments = shlex.split(line)
        assert program == "supar", line
        with pytest.raises(SystemExit) as ended:
            app(arguments)
        assert not ended.value.code, line


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """What the reader's session holds after both pages."""
    session: Session = {"__name__": "reader"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("tutorial"))
        for page in ("interpretability", "export"):
            for language, block in blocks(PAGES / f"{page}.md"):
                if language in ("sh", "python"):
                    run(language, block, session)
        yield session


def test_every_neuron_has_the_floor_that_the_page_names(read: Session) -> None:
    assert read["count"].min() >= 4 and read["count"].sum() == read["masks"]["blocks.0.mlp.up"].sum()


def test_ablation_moves_the_loss_and_leaves_the_model_as_it_was(read: Session) -> None:
    grown, estimates, names, places = zip(*read["tried"], strict=True)
    assert max(grown) > 0 and sum(estimates) == pytest.approx(sum(grown), rel=0.5)
    assert all(read["masks"][name][place] for name, place in zip(names, places, strict=True))
    stored = supar_cli.weights("runs/circuits")
    assert all(torch.equal(read["model"].get_parameter(f"{name}.weight"), stored[name]) for name in read["masks"])


def test_an_ablation_that_stays_is_seen(read: Session) -> None:
    """The control of the test above: the page's function without its last line but one."""
    ((_, block),) = [found for found in blocks(PAGES / "interpretability.md") if "def cost" in found[1]]
    session = {**read, "model": supar_cli.model("runs/circuits")}
    session["up"], session["down"] = (getattr(session["model"].blocks[0].mlp, name).weight for name in ("up", "down"))
    run("python", block.replace("weight[index] = kept", "pass"), session)
    assert not torch.equal(session["up"], supar_cli.weights("runs/circuits")["blocks.0.mlp.up"])


def test_the_export_is_the_model(read: Session) -> None:
    assert type(read["theirs"]).__name__ == "GPT2LMHeadModel" and read["difference"] < 1e-4
    changed = read["theirs"](read["inputs"].flip(1)).logits - read["model"](read["inputs"])
    assert changed.abs().max() > 1e-2  # the control: other inputs


def test_blocks_that_fail_are_seen(read: Session) -> None:
    with pytest.raises(AssertionError, match="no-such-run"):
        run("sh", "supar export no-such-run -o elsewhere", read)
    with pytest.raises(NameError):
        run("python", "print(neuron_of_another_page)", read)
