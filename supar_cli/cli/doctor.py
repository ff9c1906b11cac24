"""`supar doctor`: what this machine can run: versions, devices, corpus, and a timed step."""

import os
import platform
import shutil
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from typing import Any

import supar_cli
from supar_cli.cli import documents, terminal
from supar_cli.cli.options import Flags, command
from supar_cli.data import corpus
from supar_cli.errors import SetupError, SuparError
from supar_cli.planning.plan import Data, Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy, Spec

EXTRAS = {
    "tokens": "tokenizers",
    "hf": "pyarrow",
    "gp": "scipy",
    "sparse": "numba",
    "postgresql": "psycopg",
    "ray": "ray",
    "slurm": "submitit",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
}


@command(
    "data device steps json quiet",
    steps={"help": "Timed steps, after two warm-up steps.", "default": 8, "minimum": 1},
)
def doctor(flags: Flags) -> None:
    """Show versions, devices and data, and time a training step of the quickstart's proxy. Exit 3 if something is wrong.

    Examples:
      supar doctor
      supar doctor --device cuda --json
    """
    source, device = flags.data or "stdlib", flags.device or "auto"
    packages, problems = _packages()
    errors = [*problems]
    result: dict[str, Any] = {
        "supar": supar_cli.__version__,
        "python": platform.python_version(),
        "packages": packages,
        "extras": {name: find_spec(module) is not None for name, module in EXTRAS.items()},
        "machine": {
            "platform": f"{platform.system()} {platform.machine()}",
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "free_disk_gib": round(shutil.disk_usage(".").free / 2**30, 1),
        },
    }
    step = partial(_step, source, device, flags.steps)
    for name, examine in (("devices", _devices), ("data", partial(_data, source)), ("step", step)):
        try:
            with documents.naming_flags(flags):
                result[name] = examine()
        except (SuparError, ImportError) as error:
            problems.append(f"{name}: {error}")
            errors.append(str(error))
            result[name] = None
    terminal.print_documents([result | {"problems": problems}], flags, always=True)
    if problems:
        raise SetupError("\n".join(dict.fromkeys(errors)))


def _packages() -> tuple[dict[str, str | None], list[str]]:
    """Versions of the packages that supar requires (None if not installed), and the problems found."""
    found: dict[str, str | None] = {}
    problems = []
    try:
        required = [line for line in requires("supar-cli") or [] if "extra ==" not in line]
    except PackageNotFoundError:
        problems.append("packages: supar is not installed; run `pip install .`")
        required = ["torch", "numpy", "typer", "pydantic"]
    for line in required:
        name = line.split(";")[0].split("<")[0].split(">")[0].split("=")[0].split("!")[0].strip()
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
            problems.append(f"packages: {line} is not installed")
    return found, problems


def _devices() -> dict[str, Any]:
    import torch

    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    backends = {"gloo": torch.distributed.is_gloo_available(), "nccl": torch.distributed.is_nccl_available()}
    return {
        "cuda_build": torch.version.cuda,
        "cuda": [
            {
                "name": card.name,
                "memory_gib": round(card.total_memory / 2**30, 1),
                "capability": f"{card.major}.{card.minor}",
                "bfloat16": card.major >= 8,
            }
            for card in cards
        ],
        "cpu_threads": torch.get_num_threads(),
        "distributed": [name for name, is_available in backends.items() if is_available],
    }


def _data(source: str) -> dict[str, Any]:
    section = corpus.identify(Data(source=source))
    files = corpus.find(section).files
    size = sum(path.stat().st_size for path in files)
    return {"source": section.source, "files": len(files), "bytes": size, "hash": section.hash}


def _step(source: str, device: str, steps: int) -> dict[str, Any]:
    """A step of the quickstart's proxy, timed."""
    from supar_cli.training.trainer import Trainer

    plan = _quickstart(source, device)
    trainer = Trainer(plan)
    for _ in range(2):  # chosen: the first steps allocate memory and, if enabled, compile
        trainer.step()
    started = time.perf_counter()
    for _ in range(steps):
        trainer.step()  # reads the loss: on any device all but the last update is complete
    seconds = (time.perf_counter() - started) / steps
    tokens = plan.train.batch_size * plan.decoder.context
    return {
        "model": f"quickstart proxy: width {plan.decoder.width}, {plan.decoder.layers} layers, {tokens} tokens a step",
        "device": str(trainer.runtime.device),
        "precision": trainer.runtime.precision_name,
        "compiled": trainer.runtime.compiles,
        "milliseconds": round(1000 * seconds, 2),
        "tokens_per_s": round(tokens / seconds),
    }


def _quickstart(source: str, device: str) -> Plan:
    """The plan of the quickstart's proxy, as sparse as its target."""
    path, _ = documents.find(None)
    spec = parse(Spec, documents.read_one(path, "the installation lacks its templates; reinstall supar"))
    proxy = Proxy(
        kind="supar.proxy/v1",
        **{name: getattr(spec, name) for name in ("model", "hyperparameters", "parameterization", "train")},
        data=Data(source=source),
        run=spec.run.model_copy(update={"device": device}),
    )
    level = spec.target.sparsity.model_dump()
    return supar_cli.transfer(proxy, allow_low_wpn=True, **level)
