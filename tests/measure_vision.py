"""The best learning rate of perceptrons, nets of convolutions and vision transformers over density and width, on Fashion-MNIST.

`python -m tests.measure_vision FASHION FOLDER` writes into FOLDER what the studies need: arrays of the idx files in FASHION,
the scripts, their layouts, and a document a study, with the records of tests/evidence/vision_records.jsonl; then
`cd FOLDER; env IMAGES=fashion14.npz supar sweep NAME.yaml -o NAME` makes the runs that have no record.
`python -m tests.measure_vision collect FOLDER` gathers the records.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from supar_cli.data import image_files, image_readers
from supar_cli.files import read_jsonl
from supar_cli.planning import document
from supar_cli.planning.plan import Data
from tests.conftest import CHECKOUT, environment

RECORDS = CHECKOUT / "tests/evidence/vision_records.jsonl"
OWN = {"init_std": None, "alpha_input": 1.0, "alpha_output": 1.0, "weight_decay": 0.0}
# tuned on the dense model of width 128 by `supar tune-proxy` (24 random trials of 200 steps, 2 finalists, 2 seeds, a fit of the rate)
VIT = {"lr": 0.003935, "init_std": 0.1495, "alpha_input": 12.83, "alpha_output": 0.6683, "weight_decay": 0.1}
SHAPE = {"family": "vit", "width": 128, "layers": 2, "heads": 4, "image": [28, 28], "channels": 1, "patch": 7}
BASES = {"mlp": 256, "resnet": 32, "resnet5": 32}
FACTORIES = {"mlp": ("mlp", "make"), "bn": ("resnet", "make"), "gn": ("resnet", "make_group_norm")}
FACTORIES["bn5"] = ("resnet5", "make")
SP = ("mup", "sp", "sp-si")


def own(net: str, arms: dict[str, Any], lr: str, steps: int = 120, rows: int = 16, **more: Any) -> dict[str, Any]:
    """The document of a study of a script's net, without its name."""
    sgd = more.pop("sgd", False)
    train: dict[str, Any] = {"optimizer": "sgd" if sgd else "adamw", "betas": [0.9, 0.99], "momentum": 0.9}
    train |= {"steps": steps, "batch_size": rows, "grad_clip": 0.0, "eval_every": steps, "seed": more.pop("seed", 11)}
    return {
        "model": {"family": "own", "layout": f"{net}-layout.yaml"},
        "run": {"command": f"python {FACTORIES[net][0]}.py {{plan}}"},
        "hyperparameters": {"lr": 0.0625 if sgd else 0.00390625, **OWN},
        "train": train,
        "over": {"lr": lr, "density": more.pop("density", [1, "1/16"])},
        "arms": arms,
        "widen": 8,
        **more,
    }


def convolutions(net: str, alphas: list[int], **more: Any) -> dict[str, Any]:
    """As above: an arm for each α_output."""
    arms = {f"a{alpha}": {"parameterization": "supar", "marks": {"shift": 1.0, "regret": 0.03}} for alpha in alphas}
    return own(
        net, arms, "log2:-10..-6/1", own={f"a{alpha}": {"alpha_output": float(alpha)} for alpha in alphas}, **more
    )


def vit(over: dict[str, Any], others: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    """The document of a study of the vision transformer."""
    arms: dict[str, Any] = {"SμPar": {"marks": {"shift": 0.75, "regret": 0.02}}}
    arms |= {name: {"parameterization": name, "marks": {"shift": 2.0, "regret": 0.2}} for name in others}
    train = {"steps": 200, "batch_size": 32, "grad_clip": 10.0, "eval_every": 200, "eval_batches": 60, "seed": 11}
    data = {"kind": "images", "source": "fashion"}
    sections = {"model": {**SHAPE, "classes": 10}, "hyperparameters": VIT, "data": data, "train": train}
    return {**sections, "over": {"lr": "x:-1..1/1", **over}, "arms": arms, "seeds": 3, "widen": 7, **more}


def studies() -> dict[str, dict[str, Any]]:
    """Every study by its name."""
    marks = {"shift": 0.75, "regret": 0.03}
    four = {name: {"parameterization": name, "marks": marks} for name in ("supar", *SP)}
    sparse = {"target": {"sparsity": {"density": "1/16"}}}
    found = {
        "mlp-lr": own("mlp", four, "log2:-11..-7/1", 200, 64, seeds=3),
        "mlp-lr-sgd": own("mlp", four, "log2:-6..-2/1", 200, 64, seeds=6, sgd=True),
        "conv-bn-a4-1200": convolutions("bn", [4], seeds=3, steps=1200),
        "conv-bn5-a4": convolutions("bn5", [4], seeds=3),
        "vit-fashion": vit({"density": [1, "1/16"]}, SP),
        "vit-fashion-8": vit({"density": [1, "1/16"]}, seeds=8),
        "vit-fashion-width": vit({"width": [96, 192, 384]}),
        "vit-fashion-width-16": vit({"width": [96, 192, 384]}, **sparse),
    }
    for net in ("bn", "gn", "bn5"):
        found[f"conv-{net}-search"] = convolutions(net, [1, 4, 8, 16], density=[1], seeds=3, seed=0)
    for name, alpha, seeds in (("bn", 4, 12), ("bn", 1, 12), ("gn", 16, 12), ("gn", 1, 6)):
        found[f"conv-{name}-a{alpha}"] = convolutions(name, [alpha], seeds=seeds)
    return found


def write(fashion: Path, folder: Path) -> None:
    """Write what the studies need into a folder, and the records that there are."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fashion").symlink_to(fashion.resolve())
    arrays: dict[str, Any] = {}
    data = Data(kind="images", source=str(fashion))
    for names, to_score in ((("x", "y"), False), (("x_test", "y_test"), True)):
        files = image_files.find(data, to_score=to_score)
        (split, *_), _ = image_readers.read(files, data, print)
        rows = slice(2000 if to_score else None)
        pixels = split.pixels[rows, 0].reshape(-1, 14, 2, 14, 2).mean((2, 4)).round().astype(np.uint8)
        arrays |= dict(zip(names, (pixels, split.labels[rows]), strict=True))
    np.savez(folder / "fashion14.npz", **arrays)
    for name in ("mlp", "resnet"):
        shutil.copy(CHECKOUT / f"templates/own/{name}.py", folder)
    wide = (folder / "resnet.py").read_text("utf-8").replace("KERNEL = 3 ", "KERNEL = 5 ")
    (folder / "resnet5.py").write_text(wide, "utf-8")
    for net, (script, function) in FACTORIES.items():
        sizes = [f"--{key}=width={times * BASES[script]}" for key, times in (("base", 1), ("wider", 2), ("third", 3))]
        call = [sys.executable, "-m", "supar_cli", "layout", f"{script}:{function}", *sizes]
        call += ["--example", f"{script}:example", "-o", f"{net}-layout.yaml", "-q"]
        subprocess.run(call, cwd=folder, env=environment(IMAGES="fashion14.npz"), check=True)
    for name, study in studies().items():
        whole = {"kind": "supar.sweep/v1", "name": name, **study}
        (folder / f"{name}.yaml").write_text(document.write([whole]), "utf-8")
    for record in read_jsonl(RECORDS, "run"):
        path = folder / record.pop("study") / "records.jsonl"
        path.parent.mkdir(exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def collected(folder: Path) -> Iterator[str]:
    """The records of all studies in a folder, a line each."""
    for name in studies():
        for record in read_jsonl(folder / name / "records.jsonl", "run"):
            yield json.dumps({"study": name, **record}, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    if sys.argv[1] == "collect":
        RECORDS.write_text("".join(collected(Path(sys.argv[2]))), "utf-8")
    else:
        write(Path(sys.argv[1]), Path(sys.argv[2]))
