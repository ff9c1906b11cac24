"""Stages of `gpu_first.py` that measure no time: waits, engines, training, ranks, survival, and the tests that need CUDA."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import supar_cli
from supar_cli.bench.layer import draw_mask
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.sparse import autotune
from supar_cli.sparse.autotune import LayerCase, draw_inputs, draw_values, layer_step
from supar_cli.sparse.linear import Engine
from supar_cli.sparse.masks import Mask
from supar_cli.training.prepare import to_dense
from supar_cli.training.runtime import Runtime
from supar_cli.training.trainer import Trainer
from tests.gpu_first import CHECKOUT, Session
from tests.plans import plan_from, proxy_fields, real_text

PACKAGE = str(Path(supar_cli.__file__).parent)
SMALL = {"model": {"width": 64, "layers": 4, "heads": 4, "context": 128}, "target": {"width": 256}}
BLOCKS = {"sparsity": {"density": 0.25, "pattern": "block", "block": 32}}
ENGINE_MARKS = {"float32": 1e-4, "bfloat16": 6e-3, "tf32": 2e-3}  # relative errors of products
TF32_LEAST = 2e-5  # factors of 11 bits: what is nearer was made in float32
CURVES = {  # by name: the run section, and how far the first losses may be from the CPU's in float32
    "float32": ({"precision": "float32"}, 5e-3),
    "float32, one graph": ({"precision": "float32", "cuda_graph": "on"}, 5e-3),
    "tf32": ({"precision": "tf32"}, 0.02),
    "bfloat16": ({"precision": "bfloat16"}, 0.06),
    "bfloat16, one graph": ({"precision": "bfloat16", "cuda_graph": "on"}, 0.06),
    "bfloat16, compiled": ({"precision": "bfloat16", "compile": "on"}, 0.06),
    "bfloat16, compiled, one graph": ({"precision": "bfloat16", "compile": "on", "cuda_graph": "on"}, 0.06),
}
REHEARSED = ("float32", "bfloat16")  # of them, those that a CPU can run
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "blocks of 32": ({"engine": "block"}, {"target": BLOCKS}),
    "llama, two heads a key": ({}, {"model": {"family": "llama", "heads": 4, "kv_heads": 2}}),
    "llama, alibi": ({}, {"model": {"family": "llama", "positions": "alibi"}}),
}
FIRST = 6  # losses that are compared: rounding grows with the steps
ENDED_S = 60
TOLD = "called a synchronizing CUDA operation"  # by torch, in its debug mode
RESUMED = 0.02  # of a loss: sums of a resumed run may be in another order


def small_plan(session: Session, device: str = "", **changes: dict[str, Any]) -> Plan:
    """A plan of the dense engine, not compiled, on the session's device; smaller where it is a CPU."""
    text = session.folder / "text.txt"
    if not text.exists():
        text.write_bytes(real_text(100_000))
    shapes = {} if session.is_cpu else SMALL
    sections = {name: {**shapes.get(name, {}), **changes.get(name, {})} for name in {*shapes, *changes}}
    run = {"device": device or session.device, "compile": "off", "engine": "dense", **sections.pop("run", {})}
    return plan_from(proxy_fields(str(text), run=run, **sections))


def run_calling(trainer: Trainer, calls: dict[int, Callable[[], object]]) -> None:
    """Run a plan and make each call before the step of its number, as the steps of a run are made."""

    def call() -> None:
        calls.get(trainer.done, lambda: None)()

    trainer.run(stop=call)


def _place() -> str:
    """The line of supar that is being run in this thread."""
    lines = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
    return lines[-1] if lines else "autograd"


@contextmanager
def _watching(waits: Counter[str], on_cuda: bool) -> Iterator[None]:
    """Counts what the host waits for by file and line: what CUDA's debug mode tells, and events."""

    def tell(message: Warning | str, *_: Any, **__: Any) -> None:
        if TOLD in str(message):
            waits[f"wait at {_place()}"] += 1

    def wait(event: Any) -> None:
        waits[f"event at {_place()}"] += 1
        wait_for(event)

    wait_for = torch.cuda.Event.synchronize
    with warnings.catch_warnings(), mock.patch.object(torch.cuda.Event, "synchronize", wait):
        warnings.simplefilter("always")
        warnings.showwarning = tell
        if on_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if on_cuda:
                torch.cuda.set_sync_debug_mode("default")


def waits(session: Session) -> None:
    """A plain step of a run waits for one event, kernel by kernel and as one graph; the control's, whose loss is read, for more."""
    others, events = _count_waits(session, "eager", lambda loss: loss)
    session.check("waits of 8 steps but for events, eager", others, most=0)
    session.check("events that 8 steps wait for, eager", events, most=8)
    others, _ = _count_waits(session, "a loss that is read", lambda loss: loss * (loss.item() > 0))
    session.check("waits that are seen of 8 steps whose loss is read", others, least=8, on_gpu=True)
    if session.is_cpu:
        session.note("one graph", "needs CUDA")
        return
    others, events = _count_waits(session, "one graph", lambda loss: loss, cuda_graph="on")
    session.check("waits of 8 steps but for events, one graph", others, most=0)
    session.check("events that 8 steps wait for, one graph", events, most=8)


def _count_waits(session: Session, what: str, change: Callable[[Tensor], Tensor], **run: Any) -> tuple[int, int]:
    """How often 8 steps of a run wait, and how often for events; `change` is made to the loss."""
    train = {"steps": 16, "eval_every": 16, "grad_clip": 1.0}
    trainer = Trainer(small_plan(session, train=train, run={"log_every": 16, **run}))
    loss_of, found = trainer.task.loss, Counter[str]()
    trainer.task.loss = lambda *args: change(loss_of(*args))  # type: ignore[method-assign]
    with ExitStack() as stack:
        begin = partial(stack.enter_context, _watching(found, not session.is_cpu))
        run_calling(trainer, {6: begin, 14: stack.close})
    session.note(f"what 8 steps wait for, {what}", dict(found))
    events = sum(count for place, count in found.items() if place.startswith("event"))
    return found.total() - events, events


def engines(session: Session) -> None:
    """The dense engine, whose weight is kept or filled, against float64."""
    _compare(session, None)


def block_16(session: Session) -> None:
    _compare(session, 16)


def block_32(session: Session) -> None:
    _compare(session, 32)


def block_64(session: Session) -> None:
    _compare(session, 64)


def block_128(session: Session) -> None:
    _compare(session, 128)


def _compare(session: Session, block: int | None) -> None:
    """Y and the gradients of X and of live values against float64, twice with the same bits; whole rows and columns are dead."""
    # tokens on a GPU: as many as make Triton sum in spans, in the bucket of the stage `layers`
    shape, tokens = ((256, 384), 300) if session.is_cpu else ((768, 1024), 9000)
    alive, edge = draw_mask(shape, 0.25, block).alive().copy(), block or 64
    alive[-edge:], alive[:, :edge] = False, False
    mask = Mask.of(alive)
    # Triton compiles 13 kernels for each precision of a block
    words = ["bfloat16", *(("float32", "tf32") if block in (None, 32) or session.is_long else ())]
    for word in words:
        if word == "tf32" and (session.is_cpu or torch.cuda.get_device_capability() < (8, 0)):
            session.note(word, "needs CUDA of capability 8.0")
            continue
        precision = torch.bfloat16 if word == "bfloat16" else torch.float32
        runtime = Runtime(torch.device(session.device), precision, False, 1, 1, is_tf32=word == "tf32")
        for is_filled in (False, True)[: 1 if block else 2]:
            case = LayerCase(runtime.device, precision, tokens, block, is_filled)
            name = f"{'block' if block else 'dense'}{', filled' * is_filled}, {word}"
            with runtime.products():
                engine = autotune.make("block" if block else "dense", mask, case)
                found, again = (_products(engine, mask, case) for _ in range(2))
            errors = [_error(one, other) for one, other in zip(found, _exact(mask, case), strict=True)]
            mark = ENGINE_MARKS[word]
            session.check(f"largest error of Y, dX, dW, {name}", max(errors), most=mark)
            if word == "tf32":
                session.check(f"least error of them, {name}", min(errors), least=TF32_LEAST)
            same = all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
            session.check_equal(f"the same bits twice, {name}", same, True)


def _products(engine: Engine, mask: Mask, case: LayerCase) -> tuple[Tensor, ...]:
    values, (x, dy) = draw_values(mask, case.device), draw_inputs(mask.shape, case, case.precision)
    y = layer_step(engine, values, x, dy)
    assert x.grad is not None and values.grad is not None
    return y.detach(), x.grad, values.grad


def _exact(mask: Mask, case: LayerCase) -> tuple[Tensor, ...]:
    """The same in float64 on the CPU, of factors in the case's precision."""
    values, (x, dy) = draw_values(mask, case.device), draw_inputs(mask.shape, case, case.precision)
    weight = to_dense(values.detach().to(case.precision).double().cpu(), mask)
    x, dy = x.detach().double().cpu(), dy.double().cpu()
    return x @ weight.T, dy @ weight, (dy.T @ x)[torch.from_numpy(mask.alive())]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double().cpu() - exact).norm() / exact.norm())


def training(session: Session) -> None:
    """Losses of the same plan here and on the CPU, in all precisions, eager, compiled and as one graph."""
    train = {"steps": 16, "eval_every": 16, "batch_size": 4, "grad_clip": 1.0}

    def losses(device: str, run: dict[str, Any], **changes: dict[str, Any]) -> list[float]:
        return Trainer(small_plan(session, device, train=train, run=run, **changes)).run().losses

    cpu = losses("cpu", {"precision": "float32"})
    for name, (run, mark) in CURVES.items():
        if session.is_cpu and name not in REHEARSED:
            session.note(name, "needs CUDA")
            continue
        with session.part(name):
            found = losses(session.device, run)
            session.check(f"first losses off the CPU's, {name}", _apart(found[:FIRST], cpu[:FIRST]), most=mark)
            session.check(f"what the loss fell by, {name}", found[0] - found[-1], least=0.3)
    for name, (run, changes) in MODELS.items():
        with session.part(name):
            run = {**run, "precision": "float32"}
            pair = [losses(device, run, **changes)[:FIRST] for device in ("cpu", session.device)]
            session.check(f"first losses off the CPU's, float32, {name}", _apart(*pair), most=5e-3)


def _apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _start(plan: Path, *flags: str) -> subprocess.Popen[str]:
    """`supar train` of a plan in its folder, as a process."""
    path = os.pathsep.join((str(CHECKOUT), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "supar_cli", "train", plan.name, "-q", *flags]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.Popen(command, cwd=plan.parent, env=environment, stderr=subprocess.PIPE, text=True)


def _ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status and the messages of a process, which is asked to stop after a while: a rank has a session of its own."""
    try:
        error = process.communicate(timeout=ENDED_S)[1]
    except subprocess.TimeoutExpired:
        process.terminate()
        error = f"no end after {ENDED_S} s: {process.communicate()[1]}"
    return process.returncode, error


def _long_plan(session: Session) -> tuple[Plan, Path]:
    run = {"precision": "float32", "checkpoint_every": 20, "log_every": 20}
    plan = small_plan(session, train={"steps": 120, "eval_every": 120}, run=run)
    path = session.folder / "plan.yaml"
    path.write_text(document.write([plan.model_dump()]), "utf-8")
    return plan, path


def _result(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "result.json").read_text("utf-8")))


def ranks(session: Session) -> None:
    """A rank over NCCL, by DDP and by FSDP, ends as the run in one process."""
    plan, path = _long_plan(session)
    kinds = ("ddp", "fsdp")
    begun = {kind: _start(path, "--nproc", "1", "--parallel", kind, "--out", kind) for kind in kinds}
    whole = Trainer(plan).run().evaluations[-1][1]
    for kind, process in begun.items():
        status, error = _ended(process)
        session.check_equal(f"exit status, {kind}", status, 0)
        if status:
            session.note(f"what it said, {kind}", error[-500:])
            continue
        result = _result(path.parent / kind)
        session.check_equal(f"how the model is held, {kind}", result["environment"]["parallel"], kind)
        session.check(f"loss off that of one process, {kind}", abs(result["validation_loss"] - whole), most=RESUMED)


def survival(session: Session) -> None:
    """A run that SIGKILL ends, and then SIGTERM, and that is continued, ends as one that is whole."""
    plan, path = _long_plan(session)
    metrics, out = path.parent / "run/metrics.jsonl", ("--out", "run")

    def steps() -> int:
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def cut(number: signal.Signals, after: int) -> tuple[int, int, str]:
        process = _start(path, *out)
        while process.poll() is None and steps() < after:
            time.sleep(0.002)
        process.send_signal(number)
        status, error = _ended(process)
        return status, steps(), error

    for number, after, wanted in ((signal.SIGKILL, 30, -signal.SIGKILL), (signal.SIGTERM, 70, 75)):
        status, done, error = cut(number, after)
        session.check_equal(f"exit status after {number.name} in step {done}", status, int(wanted))
        if status != wanted:
            session.note("what it said", error[-500:])
    newest = sorted((path.parent / "run/checkpoints").iterdir())[-1].name
    session.check("the step of SIGTERM's checkpoint", int(newest.removeprefix("step-")), least=70)
    status, error = _ended(_start(path, *out))
    session.check_equal("exit status of the continued run", status, 0)
    if status:
        session.note("what it said", error[-500:])
        return
    apart = abs(_result(path.parent / "run")["validation_loss"] - Trainer(plan).run().evaluations[-1][1])
    session.check("loss off that of the whole run", apart, most=0.0 if session.is_cpu else RESUMED)


def tests(session: Session) -> None:
    """The tests that need CUDA, where pytest is installed; a rehearsal collects them."""
    if importlib.util.find_spec("pytest") is None:
        session.note("pytest -m cuda", "pytest is not installed")
        return
    files = [str(path) for path in Path(__file__).parent.glob("test_*.py") if "mark.cuda" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", *files]
    command += ["--collect-only"] if session.is_cpu else []
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    session.check_equal("exit status of pytest -m cuda", done.returncode, 0)
    session.note("its last lines", done.stdout.splitlines()[-8:])
