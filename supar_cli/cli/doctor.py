"""`supar doctor`: what this machine can run: versions, devices, corpus, and a timed step."""

from __future__ import annotations

import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from supar_cli.cli import console
from supar_cli.cli.app import single
from supar_cli.data import corpus
from supar_cli.errors import SetupError, SuparError
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Data, Proxy, Spec, Target
from supar_cli.planning.transfer import transfer
from supar_cli.version import __version__

EXTRAS = {
    "hf": "tokenizers",
    "gp": "scipy",
    "sparse": "numba",
    "postgresql": "psycopg",
    "ray": "ray",
    "slurm": "submitit",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
}
STEPS = 8


def doctor(
    data: console.DataOption = None,
    device: console.DeviceOption = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps timed, after two that are not.")] = STEPS,
    as_json: console.Json = False,
    quiet: console.Quiet = False,
) -> None:
    """Show versions, devices and data, and time a training step of the quickstart's proxy. Exit 3 if something is wrong."""
    talk = console.Talk(quiet)
    problems: list[str] = []
    result: dict[str, Any] = {
        "supar": __version__,
        "python": platform.python_version(),
        "packages": _packages(problems),
        "extras": {name: find_spec(module) is not None for name, module in EXTRAS.items()},
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        },
    }
    for name, found in (
        ("devices", _devices),
        ("data", lambda: _data(data)),
        ("step", lambda: _step(data, device, steps)),
    ):
        try:
            result[name] = found()
        except (SuparError, ImportError) as error:
            problems.append(f"{name}: {error}")
            result[name] = None
    result["problems"] = problems
    console.emit([result], "-", None, force=True, as_json=as_json, talk=talk)
    if problems:
        raise SetupError("; ".join(problems))


def _packages(problems: list[str]) -> dict[str, str | None]:
    """Versions of what supar itself requires."""
    found: dict[str, str | None] = {}
    try:
        wanted = requires("supar-cli") or []
    except PackageNotFoundError:
        problems.append("packages: supar is not installed; run `pip install .`")
        wanted = ["torch", "numpy", "typer", "pydantic"]
    for line in wanted:
        if "extra ==" in line:
            continue
        name = line.split(";")[0].split("<")[0].split(">")[0].split("=")[0].split("!")[0].strip()
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
            problems.append(f"packages: {line} is not installed")
    return found


def _devices() -> dict[str, Any]:
    import torch

    cards = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        cards.append(
            {
                "name": card.name,
                "memory_gib": round(card.total_memory / 2**30, 1),
                "capability": f"{card.major}.{card.minor}",
                "bfloat16": card.major >= 8,
            }
        )
    backends = {"gloo": torch.distributed.is_gloo_available(), "nccl": torch.distributed.is_nccl_available()}
    return {
        "cuda_build": torch.version.cuda,
        "cuda": cards,
        "cpu_threads": torch.get_num_threads(),
        "distributed": [name for name, there in backends.items() if there],
    }


def _data(source: str | None) -> dict[str, Any]:
    section = corpus.identified(Data(source=source or "stdlib"))
    found = corpus.find(section)
    size = sum(path.stat().st_size for path in found.files)
    return {"source": section.source, "files": len(found.files), "bytes": size, "hash": section.hash}


def _step(source: str | None, device: str | None, steps: int) -> dict[str, Any]:
    """A step of the quickstart's proxy, timed."""
    from supar_cli.training.trainer import Trainer

    plan = _quickstart(source, device)
    trainer = Trainer(plan)
    for _ in range(2):  # chosen: the first allocate, and compile where that is on
        trainer.step()
    started = time.perf_counter()
    for _ in range(steps):
        trainer.step()  # reads the loss, so it has ended on any device
    seconds = (time.perf_counter() - started) / steps
    tokens = plan.train.batch_size * plan.decoder.context
    return {
        "model": f"quickstart proxy: width {plan.decoder.width}, {plan.decoder.layers} layers, {tokens} tokens a step",
        "device": str(trainer.runtime.device),
        "precision": str(trainer.runtime.precision).removeprefix("torch."),
        "compiled": trainer.runtime.compiles,
        "milliseconds": round(1000 * seconds, 2),
        "tokens_per_s": round(tokens / seconds),
    }


def _quickstart(source: str | None, device: str | None) -> Plan:
    path = console.template("quickstart")
    spec = parse(Spec, console.read_one(str(path), "the installation lacks its templates; install again"))
    fields = {name: getattr(spec, name) for name in ("model", "hyperparameters", "parameterization", "train")}
    section = corpus.identified(Data(source=source or "stdlib"))
    run = spec.run.model_copy(update={"device": device or "auto"})
    proxy = Proxy(kind="supar.proxy/v1", **fields, data=section, run=run)
    return transfer(proxy, Target(sparsity=spec.target.sparsity), allow_low_wpn=True)


app = single(doctor)
