"""`supar train` as a process and within one: what it refuses, what it prints, pipes and several plans."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from tests.conftest import Called, environment

Supar = Callable[..., Called]
MakePlan = Callable[..., Plan]


@pytest.fixture
def plan(plan_of: MakePlan, tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(document.write([plan_of(target={"width": 32}).model_dump()]), "utf-8")
    return path


def line_of(path: Path, text: str, which: int = 1) -> int:
    """Number of the first (or another) line that has a text."""
    found = [number for number, line in enumerate(path.read_text().splitlines(), 1) if text in line]
    return found[which - 1]


def edited(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = yaml.safe_load(path.read_text())
    change(data)
    path.write_text(document.write([data]))


class TestRefusesByLine:
    """Before torch is imported: what the document alone shows to be wrong."""

    def refused(self, ended: Called, *starts: str) -> None:
        assert (ended.status, ended.out) == (2, "")
        lines = ended.err.splitlines()
        assert len(lines) == len(starts)
        for line, start in zip(lines, starts, strict=True):
            assert line.startswith(f"error: plan.yaml:{start}")

    def test_an_unknown_key(self, supar: Supar, plan: Path, unchanged: Any) -> None:
        plan.write_text(plan.read_text().replace("  grad_clip: 1.0", "  grad_clp: 1.0"))
        unchanged()
        at = line_of(plan, "grad_clp")
        self.refused(supar("train"), f"{at}: train.grad_clp: unknown key 'grad_clp'; did you mean 'grad_clip'?")

    def test_the_rest(self, supar_here: Supar, plan: Path, unchanged: Any) -> None:
        good = plan.read_text()
        unchanged()
        at = line_of(plan, "name: blocks.0.attn.q,")
        index = [row["name"] for row in yaml.safe_load(good)["tensors"]].index("blocks.0.attn.q")
        width, steps = line_of(plan, "  width: 32"), line_of(plan, "  steps: 12", 2)
        for old, new, start in (
            (
                "kept: 256,",
                "kept: 257,",
                f"{at}: tensors[{index}].kept: 257; expected 256, density 0.25 of 1024 weights",
            ),
            (
                "\n  steps: 12",
                "\n  steps: 12\n  steps: 13",
                f"{steps + 1}: train.steps: the key 'steps' appears twice; first on line {steps}",
            ),
            ("  width: 32", "  width: -32", f"{width}: model.width: should be greater than 0, not -32"),
            ("  heads: 2", "  heads: 3", f"{width + 2}: model.heads: 3 heads don't divide the width 32"),
            ("  grad_clip: 1.0\n", "", f"{line_of(plan, 'train:')}: train: the key 'grad_clip' is missing"),
            (
                "tokens: 768",
                "tokens: 800",
                f"{line_of(plan, 'tokens: 768')}: train.tokens: 800 is not 12 steps of 4 sequences of 16 tokens; expected 768",
            ),
            (
                "sparsity: 0.75",
                "sparsity: 0.5",
                f"{line_of(plan, 'density: 0.25')}: sparsity.density: 0.25 and sparsity 0.5 don't add up to 1",
            ),
            ("\n  steps: 12", "\n  steps: twelve", f"{steps}: train.steps: should be a valid integer, not 'twelve'"),
            (
                "sparsity: 0.75",
                "sparsity: 1.0",
                f"{line_of(plan, 'sparsity: 0.75')}: sparsity.sparsity: should be less than 1, not 1.0",
            ),
        ):
            assert old in good
            plan.write_text(good.replace(old, new, 1))
            self.refused(supar_here("train"), start)
            plan.write_text(good)

    def test_a_plan_cut_between_its_sections(self, supar_here: Supar, plan: Path, tmp_path: Path) -> None:
        text = plan.read_text()
        plan.write_text(text[: text.index("\ntrain:") + 1])
        ended = supar_here("train")
        assert (ended.status, ended.out) == (2, "") and ended.err.startswith("error: plan.yaml")
        plan.write_text(text[: text.index("\nrun:") + 1])  # every key that is left is whole
        ended = supar_here("train")
        assert (ended.status, ended.out) == (2, "") and "the keys run, meta are missing" in ended.err
        assert not (tmp_path / "runs").exists()

    @pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
    def test_a_truncated_plan(self, supar_here: Supar, plan: Path, unchanged: Any, share: float) -> None:
        text = plan.read_text()
        plan.write_text(text[: int(share * len(text))])
        unchanged()
        ended = supar_here("train")
        assert (ended.status, ended.out) == (2, "")
        assert all(line.startswith("error: plan.yaml:") for line in ended.err.splitlines())

    def test_an_empty_stdin_and_a_missing_file(
        self, supar: Supar, supar_here: Supar, text_file: Path, unchanged: Any
    ) -> None:
        unchanged()
        ended = supar("train", "-")
        assert (ended.status, ended.out) == (2, "") and "`set -o pipefail`" in ended.err
        ended = supar_here("train")
        assert (ended.status, ended.err) == (
            2,
            "error: plan.yaml: no such file; expected a plan, which `supar transfer` writes\n",
        )

    def test_no_level_and_no_document(self, supar_here: Supar, plan: Path, unchanged: Any) -> None:
        unchanged()
        ended = supar_here("train", "--index", "1")
        assert (ended.status, ended.out) == (
            2,
            "",
        ) and "--index 1: plan.yaml holds 1 documents; expected 0 to 0" in ended.err


class TestRefusesTheModel:
    """What shows only when the plan meets the model, the data or the device; still nothing is written."""

    def test_a_shape_that_is_not_the_models(self, supar: Supar, plan: Path, unchanged: Any) -> None:
        def change(data: dict[str, Any]) -> None:
            row = next(row for row in data["tensors"] if row["name"] == "blocks.0.mlp.up")
            row |= {"shape": [64, 32], "kept": 512}

        edited(plan, change)
        unchanged()
        ended = supar("train")
        assert (ended.status, ended.out) == (2, "")
        assert ended.err.splitlines() == [
            f"error: plan.yaml:{line_of(plan, 'tensors:')}: tensors: the plan's tensors are not the model's; "
            "expected the same names and shapes:",
            "  blocks.0.mlp.up: the plan has (64, 32), the model (128, 32)",
        ]

    def test_a_tensor_removed_renamed_or_doubled(self, supar_here: Supar, plan: Path, unchanged: Any) -> None:
        good = plan.read_text()
        unchanged()
        line = next(line for line in good.splitlines() if "name: blocks.1.mlp.up," in line)
        for new, what in (
            ("", ["  blocks.1.mlp.up: in the model only"]),
            (
                line.replace("mlp.up", "mlp.upp") + "\n",
                ["  blocks.1.mlp.upp: in the plan only", "  blocks.1.mlp.up: in the model only"],
            ),
        ):
            plan.write_text(good.replace(line + "\n", new))
            ended = supar_here("train")
            assert (ended.status, ended.out, ended.err.splitlines()[1:]) == (2, "", what)
        plan.write_text(good.replace(line, f"{line}\n{line}"))
        assert "tensors: blocks.1.mlp.up appears twice" in supar_here("train").err
        plan.write_text(good)

    def test_data_and_device(self, supar_here: Supar, plan: Path, text_file: Path, unchanged: Any) -> None:
        content = text_file.read_bytes()
        unchanged()
        source = line_of(plan, "  source: /")  # the data, by their path
        text_file.unlink()
        assert supar_here("train").err.startswith(f"error: plan.yaml:{source}: data.source: ")
        text_file.write_bytes(content + b"!")
        ended = supar_here("train")
        assert ended.status == 2 and f"error: plan.yaml:{source + 4}: data.hash: " in ended.err
        text_file.write_bytes(content)
        ended = supar_here("train", "--device", "gpu")
        assert (ended.status, ended.err) == (
            2,
            "error: --device gpu: 'gpu' is not a valid device; expected auto, cpu, cuda or cuda:N\n",
        )
        assert supar_here("train", "--device", "cuda:99").status == 3

    def test_out_that_is_a_file(self, supar_here: Supar, plan: Path, unchanged: Any) -> None:
        unchanged()
        ended = supar_here("train", "-o", "text.txt")
        assert (ended.status, ended.err) == (2, "error: text.txt: is a file; expected a folder for --out\n")


def test_a_corrupt_token_file_is_a_matter_of_the_environment(
    supar: Supar, plan_of: MakePlan, tmp_path: Path, text_file: Path
) -> None:
    tokens = np.full(2000, 300, "<u2")  # the vocabulary has 256
    (tmp_path / "tokens.bin").write_bytes(tokens.tobytes())
    made = plan_of(data={"source": str(tmp_path / "tokens.bin")})
    (tmp_path / "plan.yaml").write_text(document.write([made.model_dump()]))
    ended = supar("train")
    assert (ended.status, ended.out) == (3, "")
    assert "tokens.bin: token " in ended.err and "is 300; expected less than the vocabulary size 256" in ended.err
    assert "Traceback" not in ended.err


class TestTrain:
    def test_a_pipe_from_proxy_to_result(self, proxy_file: Path, tmp_path: Path) -> None:
        supar = f"{sys.executable} -m supar_cli"
        command = f"set -o pipefail; {supar} transfer --sparsity 0.5,0.75 | {supar} train - --steps 3 --index 1 --json"
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, timeout=120
        )
        said = done.stderr.decode()
        assert done.returncode == 0, said
        result = json.loads(done.stdout)
        (directory,) = (tmp_path / "runs").iterdir()
        assert result == json.loads((directory / "result.json").read_text())
        assert result["steps"] == 3 and directory.name.startswith("supar-w64-l2-s0.75-")
        # 16·64·1.25 of positions, embedding and gains, and a quarter of the hidden weights
        assert result["live_parameters"] == 256 * 64 + 16 * 64 + 5 * 64 + 2 * 12 * 64 * 64 // 4
        assert len((directory / "metrics.jsonl").read_text().splitlines()) == 3
        assert "steps 12 → 3, warm-up 1 → 0" in said and "validation loss" in said

    def test_every_plan_of_a_stream_in_order(self, supar_here: Supar, proxy_file: Path, tmp_path: Path) -> None:
        assert supar_here("transfer", "--sparsity", "0.5,0.75", "--width", "32", "-q").status == 0
        ended = supar_here("train", "--steps", "2", "-q")
        assert (ended.status, ended.err) == (0, "")
        results = list(yaml.safe_load_all(ended.out))
        assert [result["steps"] for result in results] == [2, 2] and len(list((tmp_path / "runs").iterdir())) == 2
        ended = supar_here("train", "-o", "one")
        assert ended.status == 2 and "holds 2 plans; expected --index" in ended.err
        assert not (tmp_path / "one").exists()

    def test_quiet_json_and_the_run_directory_again(self, supar_here: Supar, plan: Path, tmp_path: Path) -> None:
        ended = supar_here("train", "-o", "run", "-q", "--json")
        assert (ended.status, ended.err) == (0, "")
        assert json.loads(ended.out)["steps"] == 12
        ended = supar_here("train", "run", "--resume")
        assert ended.status == 0 and "run: is already complete" in ended.err
        assert yaml.safe_load(ended.out) == json.loads((tmp_path / "run/result.json").read_text())
        ended = supar_here("train", "-o", "run", "--force", "--set", "train.seed=1", "-q")
        assert ended.status == 0 and yaml.safe_load((tmp_path / "run/plan.yaml").read_text())["train"]["seed"] == 1

    def test_dry_run_writes_nothing(self, supar_here: Supar, plan: Path, unchanged: Any) -> None:
        unchanged()
        ended = supar_here("train", "--dry-run", "--steps", "100")
        assert (ended.status, ended.out) == (0, "")
        assert "100 steps, 6,400 tokens" in ended.err


class TestOutOfMemory:
    @pytest.mark.parametrize(
        "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=str
    )
    @pytest.mark.parametrize("where", ["__init__", "run"])
    def test_it_is_a_message(
        self, supar_here: Supar, plan: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
    ) -> None:
        from supar_cli.training.trainer import Trainer

        def fail(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(Trainer, where, fail)
        ended = supar_here("train", "-q")
        assert (ended.status, ended.out) == (3, "") and ended.err.startswith("error: out of memory; expected a smaller")


def test_what_a_killed_save_left_is_removed(supar_here: Supar, plan: Path, tmp_path: Path) -> None:
    left = tmp_path / "run/checkpoints/.step-00000001.4711"
    assert supar_here("train", "-o", "run", "-q").status == 0
    left.mkdir()
    (tmp_path / "run/result.json").unlink()  # killed between the last checkpoint and the result
    assert supar_here("train", "-o", "run", "-q", "--resume").status == 0
    assert not left.exists() and [p.name for p in left.parent.iterdir()] == ["step-00000012"]


def test_the_python_transfer_reshapes_as_the_flags_do(proxy_file: Path, supar_here: Supar, tmp_path: Path) -> None:
    import supar_cli

    shaped = proxy_file.read_text().replace("  width: 64\n", "  width: 64\n  heads: 4\n  ffn_width: 96\n")
    assert shaped != proxy_file.read_text()
    proxy_file.write_text(shaped)
    assert supar_here("transfer", "--width", "96", "--pattern", "bernoulli", "-q").status == 0
    proxy = supar_cli.load(proxy_file)
    assert supar_cli.transfer(proxy, width=96, pattern="bernoulli") == supar_cli.load(tmp_path / "plan.yaml")  # type: ignore[arg-type]
