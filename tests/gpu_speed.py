"""Stages of `gpu_first.py` that measure time, so that nothing runs beside them: facts, layers, model and proxy."""

from __future__ import annotations

import platform
import shutil
import statistics
import subprocess
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from supar_cli.bench import layer
from supar_cli.bench.step import RandomTokens
from supar_cli.planning import estimate
from supar_cli.sparse.autotune import LayerCase, device_seconds, draw_inputs, draw_values, interleave, timed
from supar_cli.sparse.block import what_triton_lacks
from supar_cli.training.runtime import Runtime, device_name, peak_flops, versions
from supar_cli.training.trainer import Trainer
from tests.gpu_first import Session
from tests.gpu_stages import run_calling, small_plan

BF16 = torch.bfloat16
EDGE = 8192  # of the square matrices that show a device's peak
COPIED_BYTES = 2**30  # more than caches hold
SHAPE, TOKENS = (4096, 4096), 16384  # of a layer
LARGE: dict[str, dict[str, Any]] = {  # 400 million parameters
    "model": {"width": 512, "layers": 6, "heads": 4, "context": 1024, "vocab": 50304},
    "target": {"width": 2048, "sparsity": {"density": 0.125}},
    "train": {"batch_size": 16},
}
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
BESIDE_GRAPH = 30  # chosen: launches of a step as one graph: batch, rates and what it gave, whatever the model
DECIDED = {"dense": 1.25, "block 64": 1.0, "block 128": 1.0}  # most of a plain layer's time, at the first of DENSITIES
DENSITIES = {"dense": (1 / 8,), "block": (1 / 4, 1 / 2, 1 / 8, 1 / 32)}


def measure_peak(session: Session) -> float:
    """FLOP/s of a plain product of large matrices in bfloat16."""
    edge = 256 if session.is_cpu else EDGE
    a, b = (torch.randn(edge, edge, device=session.device).to(BF16) for _ in range(2))
    device = torch.device(session.device)
    spent = interleave({"product": lambda: a @ b}, 10, device, 3, timer=device_seconds)["product"]
    return float(2 * edge**3 / statistics.median(spent))


def facts(session: Session) -> None:
    """The machine, and whether its peak is the one that supar knows."""
    device = torch.device(session.device)
    session.note("device", device_name(device))
    session.note("versions", versions() | {"machine": platform.platform(), "cuda": torch.version.cuda})
    peak = measure_peak(session)
    session.note("bf16 product, TFLOP/s", peak / 1e12)
    if session.is_cpu:
        session.note("driver, capability, memory", "need CUDA")
        return
    card = torch.cuda.get_device_properties(device)
    session.note("capability", f"{card.major}.{card.minor}, {card.multi_processor_count} multiprocessors")
    session.note("memory, GiB", card.total_memory / 2**30)
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        session.note("driver, clock, power", subprocess.run(asked, capture_output=True, text=True).stdout.strip())
    session.check_equal("what Triton lacks", what_triton_lacks(device), None)
    known = peak_flops(card.name)
    if known is None:
        session.note("share of the peak that supar knows", f"it knows none of {card.name!r}")
    else:
        session.check("share of the peak that supar knows", peak / known, least=0.6, most=1.02)
    numbers = torch.empty(COPIED_BYTES, dtype=torch.int8, device=device)
    copy = torch.empty_like(numbers)
    spent = min(interleave({"copy": lambda: copy.copy_(numbers)}, 5, device, timer=device_seconds)["copy"])
    session.note("copy, TB/s read and written", 2 * numbers.nbytes / spent / 1e12)


def layers(session: Session) -> None:
    """A step of a layer by each engine, refresh included, against a plain dense layer."""
    case = LayerCase(torch.device(session.device), BF16, 512 if session.is_cpu else TOKENS)
    with Runtime(case.device, BF16, False, 1, 1).products():
        _time_layers(session, (256, 256) if session.is_cpu else SHAPE, case)


def _time_layers(session: Session, shape: tuple[int, int], case: LayerCase) -> None:
    whole = layer.draw_mask(shape, 1.0)
    plain = layer.make("dense_bf16", whole, draw_values(whole, case.device), case)
    x, dy = draw_inputs(shape, case, BF16)
    base = {"plain": partial(plain.step, x, dy)}
    spent = interleave(base, 10, case.device, 3, timer=device_seconds)["plain"]
    rate = 6e-12 * whole.size * case.tokens / statistics.median(spent)
    session.check("plain layer, TFLOP/s", rate, least=550, on_gpu=True)
    for name in ("dense", "block 64", "block 128", "block 32", "block 16"):
        engine, _, edge = name.partition(" ")
        densities = DENSITIES[engine]
        # compiled for each size of a block; the smallest ones decide nothing
        for density in densities if session.is_long else densities[: 1 if name in DECIDED else 0]:
            own = replace(case, block=int(edge) if edge else None)
            most = DECIDED.get(name) if density == densities[0] else None
            with session.part(name):
                mask = layer.draw_mask(shape, density, own.block)
                arm = layer.make(engine, mask, draw_values(mask, case.device), own)
                ratio = _ratio({**base, name: partial(arm.step, x, dy)}, name, case.device)
                session.check(f"{name} at {density:g} ÷ plain layer", ratio, most=most, on_gpu=most is not None)


def _ratio(runs: dict[str, Any], name: str, device: torch.device) -> float:
    spent = interleave(runs, 8, device, 2, timer=device_seconds)
    return statistics.median(a / b for a, b in zip(spent[name], spent["plain"], strict=True))


def model(session: Session) -> None:
    """A step of a model of 400 million parameters: its share of the measured peak, its parts and its memory."""
    peak, device = measure_peak(session), torch.device(session.device)
    for compiled in ("off",) if session.is_cpu else ("on", "off")[: 2 if session.is_long else 1]:
        begun_s = time.perf_counter()
        trainer = _large_trainer(session, compiled)
        built_s, plan = time.perf_counter() - begun_s, trainer.plan
        if not session.is_cpu:
            torch.cuda.reset_peak_memory_stats()
        first_s = timed(trainer.step, device)
        step_s = statistics.median(timed(trainer.step, device) for _ in range(2 if session.is_cpu else 6))
        tokens = plan.train.batch_size * plan.decoder.context
        what = f"compile {compiled}, {plan.parameters / 1e6:.0f}M parameters, {tokens} tokens"
        session.note(f"seconds to build, of the first step, of a step, {what}", [built_s, first_s, step_s])
        share = tokens / step_s * plan.flops_per_token / peak
        least = 0.45 if compiled == "on" else None
        session.check(f"share of the measured peak, {what}", share, least=least, on_gpu=True)
        if session.is_cpu:
            session.note("peak memory", "needs CUDA")
        else:
            rows = trainer.runtime.micro_batch
            told = estimate.state_bytes(plan, "dense", 2) + estimate.activation_bytes(plan, rows, 2, fused=True)
            held = torch.cuda.max_memory_allocated()
            session.note("peak memory, and its estimate, GiB", [held / 2**30, told / 2**30])
            session.check(f"peak memory ÷ its estimate, {what}", held / told, least=0.7, most=1.3)
        _check_parts(session, trainer, step_s, what)
        del trainer


def _large_trainer(session: Session, compiled: str) -> Trainer:
    changes = {} if session.is_cpu else LARGE
    train = {"steps": 20, "eval_every": 20, "grad_clip": 1.0, **changes.get("train", {})}
    run = {"precision": "float32" if session.is_cpu else "bfloat16", "compile": compiled, **changes.get("run", {})}
    plan = small_plan(session, **{**changes, "train": train, "run": run})
    return Trainer(plan, RandomTokens(plan))


def _check_parts(session: Session, trainer: Trainer, step_s: float, what: str) -> None:
    for tensor in trainer.sparse_model.tensors.values():
        tensor.grad = torch.zeros_like(tensor)
    parts = {"refresh": (trainer.sparse_model.sync_engines, 0.05), "AdamW": (trainer.optimizer.step, 0.10)}
    for name, (call, most) in parts.items():
        spent = interleave({name: call}, 5, trainer.runtime.device, timer=device_seconds)[name]
        share = statistics.median(spent) / step_s
        session.check(f"{name}'s share of a step, {what}", share, most=most, on_gpu=True)


def proxy(session: Session) -> None:
    """Steps of a small proxy, as runs make them: kernel by kernel and as one CUDA graph, eager and compiled."""
    cases = {"eager": {}, "eager, one graph": {"cuda_graph": "on"}}
    compiled = {"compile": "on"}
    cases |= {"compiled": compiled, "compiled, one graph": {**compiled, "cuda_graph": "on"}}
    milliseconds: dict[str, float] = {}
    for name, run in cases.items():
        if session.is_cpu and run:
            session.note(name, "needs CUDA")
            continue
        with session.part(name):
            milliseconds[name] = _proxy_step(session, name, run)
    for name in ("eager", "compiled"):
        if graph := milliseconds.get(f"{name}, one graph"):
            session.check(f"a step as one graph ÷ {name}", graph / milliseconds[name], most=1.0)


def _proxy_step(session: Session, name: str, run: dict[str, Any]) -> float:
    """Milliseconds of a step, without the launches of a profiled one."""
    train = {"steps": 60, "eval_every": 60, "batch_size": 4 if session.is_cpu else 16}
    trainer = Trainer(small_plan(session, train=train, run={"log_every": 100, **run}))
    stamps: list[float] = []
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [] if session.is_cpu else [torch.profiler.ProfilerActivity.CUDA]
    profile = torch.profiler.profile(activities=activities)
    stamp = lambda: stamps.append(time.perf_counter())  # noqa: E731
    run_calling(trainer, {10: stamp, 50: stamp, 54: profile.start, 58: profile.stop})
    step_ms = 1000 * (stamps[1] - stamps[0]) / 40
    launches = sum(event.count for event in profile.key_averages() if event.key.startswith(LAUNCHES)) / 4
    session.note(f"milliseconds of a step, {name}", step_ms)
    if not launches:
        session.note(f"launches of a step, {name}", "the profiler sees none")
    else:
        session.check(f"launches of a step, {name}", launches, most=BESIDE_GRAPH if "cuda_graph" in run else None)
    return step_ms
