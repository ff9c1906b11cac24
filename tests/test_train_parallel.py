"""Several processes train one plan: by `--nproc` and by torchrun, whole and in shards, stopped, killed and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import supar_cli
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.training.trainer import Trainer
from tests.conftest import CHECKOUT, TEXT_BYTES, Called, environment, plan_from, proxy_fields, real_text
from tests.parallel_cases import other_masks
from tests.test_train import trained
from tests.test_train_preempted import ended, hear
from tests.test_train_resume import losses

MakePlan = Callable[..., Plan]
Supar = Callable[..., Called]

AGREE = 1e-5  # nats: over 20 steps in float32; measured: 5e-7
SPARSE = {"density": 0.1}


@pytest.fixture
def plan(plan_of: MakePlan, tmp_path: Path) -> Plan:
    """20 steps of a sparse plan, accumulating, in plan.yaml."""
    made = plan_of(train={"steps": 20, "batch_size": 8, "eval_every": 10}, target={"width": 64, "sparsity": SPARSE})
    made = made.model_copy(update={"run": made.run.model_copy(update={"micro_batch_size": 2})})
    write(made, tmp_path)
    return made


@pytest.fixture
def long(plan_of: MakePlan, tmp_path: Path) -> Plan:
    """A run of several seconds, in plan.yaml."""
    train = {"steps": 400, "batch_size": 2, "eval_every": 400}
    made = plan_of(model={"layers": 1}, target={"width": 64, "sparsity": SPARSE}, train=train, run={"log_every": 50})
    write(made, tmp_path)
    return made


def write(plan: Plan, folder: Path) -> None:
    (folder / "plan.yaml").write_text(document.write([plan.model_dump()]), "utf-8")


def assert_close(one: Path, other: Path, agree: float = AGREE) -> None:
    """The same steps, their losses and evaluations within `agree`."""
    a, b = losses(one), losses(other)
    assert [step for step, *_ in a] == [step for step, *_ in b]
    for (_, loss, evaluated), (_, other_loss, other_evaluated) in zip(a, b, strict=True):
        assert abs(loss - other_loss) <= agree and (evaluated is None) == (other_evaluated is None)
        assert evaluated is None or abs(evaluated - other_evaluated) <= agree


def started(folder: Path, *flags: str, out: str = "run", steps: int = 3) -> subprocess.Popen[str]:
    """`supar train` as it does its first steps."""
    command = [sys.executable, "-m", "supar_cli", "train", "plan.yaml", "-o", out, "-q", *flags]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environment(), preexec_fn=hear, **pipes)
    metrics, end = folder / out / "metrics.jsonl", time.monotonic() + 60
    before = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
    while process.poll() is None and time.monotonic() < end:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= before + steps:
            break
        time.sleep(0.005)
    return process


def wait_for_steps(directory: Path, steps: int, process: subprocess.Popen[str]) -> None:
    metrics, end = directory / "metrics.jsonl", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= steps:
            return
        time.sleep(0.005)


def member(launcher: int, rank: int) -> int:
    """The process of a rank that a launcher has started."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == launcher and f"\0RANK={rank}\0".encode() in (entry / "environ").read_bytes():
                    return int(entry.name)
            except OSError:
                continue
    raise AssertionError(f"no rank {rank} below process {launcher}")


def torchrun(
    folder: Path, *flags: str, nodes: int = 1, nproc: int = 2, port: int = 0, stdin: str = "", restarts: int = 0
) -> list[Called]:
    """`torchrun … -m supar_cli train` as so many nodes on loopback, each an agent of its own."""
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=t", "--local-addr=127.0.0.1"]
    start = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}", f"--nproc-per-node={nproc}"]
    start.append(f"--max-restarts={restarts}")
    where = rendezvous if nodes > 1 else ["--standalone"]
    command = [*start, *where, "-m", "supar_cli", "train", *flags]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    agents = [
        subprocess.Popen(command, cwd=folder, env=environment(OMP_NUM_THREADS="1"), **pipes) for _ in range(nodes)
    ]
    said = [agent.communicate(stdin, timeout=120) for agent in agents]
    return [Called(agent.returncode, *texts) for agent, texts in zip(agents, said, strict=True)]


class TestAgree:
    """Losses of a sparse plan, evaluations too, with those of one process."""

    @pytest.mark.parametrize(("processes", "parallel"), [(2, "ddp"), (2, "fsdp"), (1, "fsdp")])
    def test_with_one_process(self, plan: Plan, supar: Supar, tmp_path: Path, processes: int, parallel: str) -> None:
        _, history = trained(plan, tmp_path / "one")
        flags = ("-q", "--json", "--nproc", str(processes), "--parallel", parallel)
        done = supar("train", "-o", "many", *flags)
        assert (done.status, done.err) == (0, ""), done.err
        assert_close(tmp_path / "one", tmp_path / "many")
        printed = json.loads(done.out)  # once, though there are several processes
        results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "many")]
        assert printed["masks"] == results[0]["masks"] == results[1]["masks"] and len(results[0]["masks"]) == 12
        assert results[1]["environment"]["processes"] == processes
        assert results[1]["environment"]["parallel"] == parallel
        before, after = supar_cli.weights(tmp_path / "one"), supar_cli.weights(tmp_path / "many")
        for row in plan.tensors:
            assert (before[row.name] != 0).sum() == (after[row.name] != 0).sum()
            # Adam magnifies what rounding does to the smallest gradients: up to a step's own size
            assert float((before[row.name] - after[row.name]).abs().max()) <= 3 * row.lr
        assert history.losses[-1] < history.losses[0] - 0.3

    def test_one_wrong_row_would_be_seen(self, plan: Plan, plan_of: MakePlan, tmp_path: Path) -> None:
        trained(plan, tmp_path / "one")
        other = plan.model_copy(update={"train": plan.train.model_copy(update={"seed": 1})})
        trained(other, tmp_path / "other")
        with pytest.raises(AssertionError):
            assert_close(tmp_path / "one", tmp_path / "other", agree=1e-3)

    def test_two_nodes_of_torchrun(self, plan: Plan, tmp_path: Path, free_port: int) -> None:
        trained(plan, tmp_path / "one")
        done = torchrun(tmp_path, "-o", "many", "-q", "--json", "--parallel", "fsdp", nodes=2, nproc=1, port=free_port)
        assert [called.status for called in done] == [0, 0], done
        assert sorted(bool(called.out) for called in done) == [False, True]
        assert_close(tmp_path / "one", tmp_path / "many")

    def test_a_plan_on_stdin_is_read_once(self, plan: Plan, supar: Supar, tmp_path: Path) -> None:
        trained(plan, tmp_path / "one")
        text = (tmp_path / "plan.yaml").read_text()
        (tmp_path / "plan.yaml").unlink()
        done = supar("train", "-", "-o", "many", "-q", "--nproc", "2", stdin=text)
        assert (done.status, done.err) == (0, "")
        (called,) = torchrun(tmp_path, "-", "-o", "again", "-q", stdin=text)
        assert called.status == 0, called.err
        assert_close(tmp_path / "one", tmp_path / "many")
        assert_close(tmp_path / "many", tmp_path / "again", agree=0.0)


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What `parallel_cases` finds out, by rank."""
    folder = tmp_path_factory.mktemp("cases")
    (folder / "text.txt").write_bytes(real_text(TEXT_BYTES))
    train = {"steps": 20, "batch_size": 8}
    plan = plan_from(proxy_fields(str(folder / "text.txt"), train=train, target={"width": 64, "sparsity": SPARSE}))
    write(plan, folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    cases = str(CHECKOUT / "tests/parallel_cases.py")
    environ = environment(OMP_NUM_THREADS="1")
    done = subprocess.run([*command, cases, "plan.yaml"], cwd=folder, env=environ, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()
    by_rank = json.loads(done.stdout)
    by_rank[0]["plan"] = plan
    return list(by_rank)


class TestTogether:
    def test_another_mask_in_one_process_is_refused_by_all(self, found: list[dict[str, Any]]) -> None:
        text = "rank 1: the mask of blocks.1.attn.k is not that of rank 0; expected the same everywhere"
        assert [one["other_mask"] for one in found] == [["SetupError", text, True]] * 2

    def test_data_that_one_process_lacks_end_all(self, found: list[dict[str, Any]]) -> None:
        for one in found:
            kind, text, shared = one["lost_data"]
            assert (kind, shared) == ("InputError", True)
            assert text.startswith("rank 1: data.source: ") and text.endswith("text.txt.gone: no such file or folder")

    def test_masks_that_one_process_lacks_end_all(self, found: list[dict[str, Any]]) -> None:
        for one in found:
            kind, text, shared = one["lost_masks"]
            assert (kind, shared) == ("SetupError", True) and text.startswith("rank 1: ") and ".gone" in text

    def test_what_the_first_finds_wrong_ends_all(self, found: list[dict[str, Any]]) -> None:
        assert [one["fails_first"] for one in found] == [["InputError", "what rank 0 found", True]] * 2

    def test_what_does_not_fit_is_sharded(self, found: list[dict[str, Any]]) -> None:
        for one in found:
            (fits, why), (too_large, why_not) = one["kinds"]
            assert (fits, too_large) == ("ddp", "fsdp")
            assert why.startswith("ddp: the plan fits a device: about 0.0")
            assert why_not.startswith("fsdp: the plan does not fit a device: about 0.0")

    def test_gradients_go_round_once_a_step(self, found: list[dict[str, Any]]) -> None:
        """Four micro-batches; 2 blocks and the rest are three groups of FSDP, one bucket of DDP."""
        for one in found:
            counts = one["exchanges"]
            assert (counts["ddp held"], counts["ddp not held"]) == (1, 4)
            assert (counts["fsdp held"], counts["fsdp not held"]) == (3, 12)

    def test_a_shard_is_half_of_the_live_weights(self, found: list[dict[str, Any]]) -> None:
        plan, halves = found[0]["plan"], [one["shards"] for one in found]
        for row in plan.tensors:
            for what in ("numbers", "moments"):
                parts = [half[what][row.name] for half in halves]
                assert sum(parts) == row.kept and max(parts) - min(parts) <= max(1, row.shape[-1] * (row.density == 1))
        for half in halves:
            assert half["sharded"] and half["rates"] and half["dense"] == []

    def test_products_are_gathered_in_their_precision_and_averaged_in_float32(
        self, found: list[dict[str, Any]]
    ) -> None:
        """Two micro-batches: each gathers a block for both passes; the last one averages."""
        rows = found[0]["plan"].tensors
        live = sum(row.kept for row in rows if row.density < 1)
        for one in found:
            whole, half = (one["exchanged"][f"fsdp {precision}"] for precision in ("float32", "bfloat16"))
            gathered = half["bytes"]["_allgather_base_ cpu torch.bfloat16"] / 4
            assert 2 * live <= gathered < 2 * live + 100 and "_allgather_base_ cpu torch.bfloat16" not in whole["bytes"]
            assert whole["bytes"]["_allgather_base_ cpu torch.float32"] / 4 > 4 * live
            averaged = "_reduce_scatter_base_ cpu torch.float32"
            assert half["bytes"][averaged] == whole["bytes"][averaged] >= 4 * sum(row.kept for row in rows)
            assert half["kept"] == whole["kept"] == ["torch.float32"]

    def test_what_is_gathered_so_changes_no_product(self, found: list[dict[str, Any]]) -> None:
        """Losses of DDP in bfloat16 to the rounding of its gradients; those in float32 differ from the first step on."""
        for one in found:
            ddp, fsdp, other = (
                one["exchanged"][name]["losses"] for name in ("ddp bfloat16", "fsdp bfloat16", "ddp float32")
            )
            assert fsdp[0] == ddp[0] != other[0] and fsdp == pytest.approx(ddp, abs=2e-3)


@pytest.fixture(scope="module")
def one(found: list[dict[str, Any]]) -> list[float]:
    """The losses of one process that moves to other masks after step 4."""
    trainer = Trainer(found[0]["plan"])
    losses = [trainer.step().loss for _ in range(4)]
    trainer.remask(other_masks(trainer.plan))
    return losses + [trainer.step().loss for _ in range(6)]


class TestRemasked:
    """Two processes move to other masks, with more live weights in some tensors and fewer in others."""

    @pytest.mark.parametrize("kind", ["ddp", "fsdp"])
    def test_as_one_process_does(self, found: list[dict[str, Any]], one: list[float], kind: str) -> None:
        for rank in found:
            assert rank["remasked"][kind]["live"] == pytest.approx(one, abs=AGREE)
            assert rank["remasked"][kind]["restored"] == pytest.approx(one[4:], abs=AGREE)
        staying = Trainer(found[0]["plan"])
        assert [staying.step().loss for _ in range(10)][4:] != pytest.approx(one[4:], abs=1e-3)

    def test_each_holds_its_part_of_the_new_weights(self, found: list[dict[str, Any]]) -> None:
        plan, counts = found[0]["plan"], {name: mask.count for name, mask in other_masks(found[0]["plan"]).items()}
        for kind, parts in (("ddp", 2), ("fsdp", 1)):
            held = [rank["remasked"][kind]["held"] for rank in found]
            for at, row in enumerate(plan.tensors):
                assert held[0][at] + held[1][at] == parts * counts.get(row.name, row.size)

    def test_another_mask_in_one_process_is_refused_by_all(self, found: list[dict[str, Any]]) -> None:
        text = "rank 1: the mask of blocks.1.mlp.up is not that of rank 0; expected the same everywhere"
        assert [one["remasked_apart"] for one in found] == [["SetupError", text, True]] * 2


def test_sgd_in_shards_is_sgd(found: list[dict[str, Any]]) -> None:
    plan = found[0]["plan"]
    train = plan.train.model_copy(update={"optimizer": "sgd", "momentum": 0.9})
    trainer = Trainer(plan.model_copy(update={"train": train}))
    losses = [trainer.step().loss for _ in range(4)]
    assert [one["sgd"] for one in found] == [pytest.approx(losses, abs=AGREE)] * 2


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_loss_of_a_few_tokens_at_a_time_is_that_of_all(found: list[dict[str, Any]], kind: str) -> None:
    trainer = Trainer(found[0]["plan"])
    losses = [*(trainer.step().loss for _ in range(4)), trainer.evaluate()["validation_loss"]]
    assert [one["chunked"][kind] for one in found] == [pytest.approx(losses, abs=AGREE)] * 2


class TestStopped:
    def test_signals_stop_all_and_any_number_goes_on(self, long: Plan, tmp_path: Path) -> None:
        """Saved by two processes whole, by two in shards, by one: each goes on with what the other wrote."""
        trained(long, tmp_path / "whole")
        newest = 0
        for flags, number, status in (
            (("--nproc", "2", "--parallel", "ddp"), signal.SIGTERM, 75),
            (("--nproc", "2", "--parallel", "fsdp"), signal.SIGUSR1, 75),
            ((), signal.SIGTERM, 75),
            (("--nproc", "2", "--parallel", "fsdp"), signal.SIGINT, 130),
        ):
            process = started(tmp_path, *flags)
            process.send_signal(number)
            code, out, err = ended(process)
            assert (code, out) == (status, ""), err
            (*_, folder) = sorted((tmp_path / "run/checkpoints").iterdir())
            step = int(folder.name.removeprefix("step-"))
            assert newest < step < 400
            said = f"stopped at step {step} of 400 by {number.name}; `supar train run` continues from {folder.name}"
            assert err.count(said) == 1 and "Traceback" not in err
            assert len(list(folder.glob("*.safetensors"))) == (2 if "fsdp" in flags else 1)
            newest = step
        code, _, err = ended(started(tmp_path))
        assert (code, err) == (
            0,
            "warning: run: continues with a changed setting: run.parallel: fsdp → auto\n",
        )
        assert_close(tmp_path / "run", tmp_path / "whole", agree=1e-3)  # 400 steps; each seam would show at once
        assert_close_until(tmp_path / "run", tmp_path / "whole", steps=20)

    def test_one_rank_asked_stops_all(self, long: Plan, tmp_path: Path) -> None:
        process = started(tmp_path, "--nproc", "2")
        os.kill(member(process.pid, 1), signal.SIGTERM)
        code, _, err = ended(process)
        assert code == 75 and "by SIGTERM; `supar train run` continues from step-" in err

    def test_the_end_of_the_launcher_is_theirs(self, long: Plan, tmp_path: Path) -> None:
        process = started(tmp_path, "--nproc", "2")
        first = member(process.pid, 0)
        process.kill()
        process.communicate()
        end = time.monotonic() + 30
        while Path(f"/proc/{first}").exists() and time.monotonic() < end:
            time.sleep(0.05)
        assert "the end of its launcher" in json.loads((tmp_path / "run/ended.json").read_text())["text"]
        assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 1

    def test_max_time(self, long: Plan, supar: Supar, tmp_path: Path) -> None:
        done = supar("train", "-o", "run", "-q", "--nproc", "2", "--max-time", "0.3s")
        assert done.status == 75 and "by the limit of 0.3 s" in done.err

    def test_torchruns_restarts_do_not_take_it_up(self, long: Plan, tmp_path: Path) -> None:
        flags = ("-o", "run", "-q", "--max-time", "0.3s")
        (called,) = torchrun(tmp_path, *flags, restarts=1)
        assert called.status == 1 and called.out == ""
        said = [line for line in called.err.splitlines() if line.startswith("warning: stopped at step ")]
        assert len(said) == 2 and said[0] == said[1], called.err
        assert f"at step {len(losses(tmp_path / 'run'))} of 400 by the limit of 0.3 s" in said[0]


def assert_close_until(one: Path, other: Path, steps: int) -> None:
    for (_, loss, _), (_, other_loss, _) in zip(losses(one)[:steps], losses(other)[:steps], strict=True):
        assert abs(loss - other_loss) <= AGREE
