"""Makes the files that a release's users have, for `tests/test_released.py` to read with later programs.

Run once for a release, with that release's own code: check the release out into a folder, and from there call
`PYTHONPATH=. python tests/released/make.py FOLDER`, FOLDER being a new one such as `v0.1.0`. Every file is written by
that release's commands, run on one thread of a CPU: documents (a spec, proxies, plans, a sweep), runs that finished,
were stopped and were killed, searches cut short in a journal file and in a PostgreSQL database (whose server must be
installed), and folders of `sweep`, `check`, `compare` and `bench`. What the same release makes of them when it goes on to
their ends lies in `FOLDER/expected` and `FOLDER/expected.json`. Losses and times differ from machine to machine; hashes
and masks do not. Names of the machine are replaced in what is kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

import supar_cli

CHECKOUT = Path(supar_cli.__file__).resolve().parent.parent
COMPLETE, FAIL, WAITING = (optuna.trial.TrialState[name] for name in ("COMPLETE", "FAIL", "WAITING"))

SPEC = """\
# What `supar tune-proxy` reads.
kind: supar.spec/v1
model: {family: gpt2, width: 32, layers: 2, heads: 2, context: 16, vocab: 256}
hyperparameters: {lr: 0.01, init_std: 0.08, alpha_input: 4.0, alpha_output: 1.0, weight_decay: 0.1}
data: {source: text.txt}
train: {steps: 12, batch_size: 4, eval_every: 6, eval_batches: 2}
search: {trials: 5, pruner: none, finalists: 2, seeds: 2, lr: [0.005, 0.03], init_std: [0.03, 0.15], lr_fit_octaves: [-1.0, 1.0]}
target: {width: 64, sparsity: {sparsity: 0.5}}
run: {device: cpu}
"""
HAND = """\
# Tuned elsewhere, written by hand.
kind: supar.proxy/v1
model:
  family: gpt2
  width: 16
  layers: 2
  heads: 2
  context: 16
  vocab: 256
hyperparameters: {lr: 0.02, init_std: 0.08, alpha_input: 3.0, alpha_output: 1.0, weight_decay: 0.1}
data:
  source: text.txt
train:
  steps: 8
  batch_size: 4
  eval_every: 4
  eval_batches: 2
target:
  width: 32
  sparsity:
    density: 0.5
run: {device: cpu}
"""
SWEEP = """\
# What `supar sweep` reads.
kind: supar.sweep/v1
name: rates
title: Learning rate over density
model: {family: gpt2, width: 16, layers: 1, heads: 2, context: 16, vocab: 256}
hyperparameters: {lr: 0.02, init_std: 0.08, alpha_input: 3.0, alpha_output: 1.0, weight_decay: 0.1}
data: {source: text.txt}
train: {steps: 24, batch_size: 4, eval_every: 24, eval_batches: 4}
over: {lr: "x:-1..0/1", density: [1.0, 0.25]}  # the best is at the end, which extends it
parameterizations: [sp, supar]
own: {sp: {init_std: 0.06}}
seeds: 2
widen: 2
run: {device: cpu}
"""
TUNED, BY_HAND = "proxies/tuned.yaml", "proxies/hand.yaml"
# what `supar transfer` is called with for each plan; between them they have most of what a plan may say
PLANS = {
    "gpt2": f"{TUNED} --steps 8",
    "gpt2-bias": f"{BY_HAND} --sparsity 0.75 --seed 3 --tokens 640 -s model.bias=true -s run.micro_batch_size=2 "
    "-s parameterization.weight_decay_rule=sqrt",
    "llama-gqa-erk": f"{BY_HAND} --density 0.4 --distribution erk -s model.family=llama -s model.tied=false "
    "-s model.kv_heads=1 -s 'target.sparsity.overrides={attn.q: 0.5, blocks.1.mlp.up: 0.25}' "
    "-s 'run.engine={mlp: dense}' -s parameterization.unembedding_init=zero -s train.schedule=cosine",
    "blocks": f"{BY_HAND} --width 64 --pattern block --block 16 --density 1/4",
    "fixed-fan-in": f"{BY_HAND} --pattern fixed_fan_in --sparsity 0.3 -s model.positions=alibi",
    "bernoulli": f"{BY_HAND} --pattern bernoulli -s model.activation=swiglu -s train.schedule=constant",
    "sgd": f"{BY_HAND} --ffn-width 96 -s train.optimizer=sgd -s hyperparameters.lr=0.1 -s hyperparameters.weight_decay=0.0",
    "mup": f"{BY_HAND} --parameterization mup -s parameterization.weight_decay_rule=coupled",
    "sp": f"{BY_HAND} --parameterization sp -s parameterization.residual_init=gpt2",
    "init-only": f"{BY_HAND} --parameterization supar-init-only -s train.grad_clip=0.0",
    "lr-only": f"{BY_HAND} --parameterization supar-lr-only -s 'train.betas=[0.8, 0.99]'",
    "completep": f"{BY_HAND} --layers 4 -s model.family=llama -s model.tied=false -s parameterization.depth_rule=completep",
    "long": f"{BY_HAND} --width 16 --layers 1 --steps 24 -s train.eval_every=6 "
    "-s run.checkpoint_every=12 -s run.keep=1 -s run.log_every=6",
    "short": f"{BY_HAND} --width 16 --layers 1 -s train.optimizer=sgd -s train.momentum=0.0",
}
LONG, HALF = 24, 12  # steps of the run that is stopped and killed, and of its checkpoint
STUDIES = {
    "sweep": "sweep sweep.yaml --jobs 1",
    "check": f"check {BY_HAND} --width 16,32 --density 1,0.25 --seeds 2 --max-seeds 2 --steps 2 --batch-size 4 "
    "-s model.layers=1 --jobs 1",
    "compare": f"compare {BY_HAND} --width 16 --layers 1 --density 1,0.25 --seeds 2 --steps 24 "
    "-s train.eval_every=24 -s widen=2 --jobs 1",
}
BENCH = (
    "bench step --device cpu --precision float32 --compile off --engine dense --width 32 --heads 2 --layers 1 "
    "--context 16 --batch-size 4 --steps 5"
)


def load(path: Path) -> Any:
    return supar_cli.load(path)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def curve(run: Path) -> list[list[Any]]:
    """[step, loss, validation loss or None] of a run's metrics."""
    records = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [[record["step"], record["loss"], record.get("validation_loss")] for record in records]


def tensors(run: Path) -> dict[str, str]:
    """A digest of every tensor that `weights` gives of a run."""
    return {name: digest(tensor.numpy().tobytes()) for name, tensor in supar_cli.weights(run).items()}


class Maker:
    """The folder of the files, and the program that makes them."""

    def __init__(self, folder: Path, aside: Path) -> None:
        self.folder, self.aside = folder, aside
        self.expected: dict[str, Any] = {"program": supar_cli.__version__}
        keep = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
        cache = str(aside / "cache")
        self.environment = keep | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": cache}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "supar_cli", *arguments]
        pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        # Ctrl-C is heard though this may be a background job, which ignores it
        hear: Any = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, **pipes, **hear)

    def supar(self, *arguments: str, may_fail: bool = False) -> int:
        process = self.start(*arguments)
        said = process.communicate()[1]
        if process.returncode not in ((0, 5) if may_fail else (0,)):
            raise SystemExit(f"supar {' '.join(arguments)} ended with {process.returncode}:\n{said}")
        return process.returncode

    def documents(self) -> None:
        text = (CHECKOUT / "LICENSE").read_bytes()
        (self.folder / "text.txt").write_bytes(2 * text)
        (self.folder / "proxies").mkdir()
        for name, content in (("spec.yaml", SPEC), (BY_HAND, HAND), ("sweep.yaml", SWEEP)):
            (self.folder / name).write_text(content)

    def search(self, server: Any) -> None:
        """A search stopped by Ctrl-C in its fourth trial, in a file; and one with three of its trials in a database."""
        path, kept = self.folder / "search.journal", self.aside / "kept.journal"
        study = ("--study", path.name)
        for _ in range(20):
            path.unlink(missing_ok=True)
            process = self.start("tune-proxy", "spec.yaml", "-o", TUNED, *study)
            self.wait(process, lambda: bool(trials(path)[3:]) and bool(trials(path)[3].params))
            process.send_signal(signal.SIGINT)
            process.communicate()
            if [trial.state for trial in trials(path)] == [*[COMPLETE] * 3, FAIL, WAITING]:  # given back
                break
        else:
            raise SystemExit("the search can't be stopped in its fourth trial")
        path.write_text(self.anonymous(path.read_text("utf-8")))
        shutil.copy(path, kept)
        self.supar("tune-proxy", "spec.yaml", "-o", TUNED, *study)
        kept.replace(path)

        url, part = server.database("search"), ["search.trials=3", "search.finalists=1", "search.seeds=1"]
        settings = [word for setting in (*part, "search.lr_fit_octaves=[]") for word in ("-s", setting)]
        self.supar("tune-proxy", "spec.yaml", "-o", str(self.aside / "part.yaml"), "--study", url, *settings)
        dump = ["pg_dump", "-h", "127.0.0.1", "-p", str(server.port), "-U", "supar", "--inserts", "--no-owner"]
        done = subprocess.run([*dump, "--no-privileges", "search"], capture_output=True, text=True, check=True)
        # psql's own commands and a server's settings are of no use to another server
        lines = [line for line in done.stdout.splitlines() if line and not line.startswith(("\\", "--", "SET "))]
        (self.folder / "search.sql").write_text(self.anonymous("\n".join(lines) + "\n"))
        whole = self.aside / "whole.yaml"
        self.supar("tune-proxy", "spec.yaml", "-o", str(whole), "--study", url)
        found = {"journal": self.folder / TUNED, "postgresql": whole}
        proxies = {name: load(file) for name, file in found.items()}
        self.expected["search"] = {
            name: {"hyperparameters": proxy.hyperparameters.model_dump(), "study": proxy.evidence["study"]["name"]}
            for name, proxy in proxies.items()
        }

    def plans(self) -> None:
        """Plans, their hashes, and how each is trained."""
        (self.folder / "plans").mkdir()
        self.expected["proxies"] = {path: load(self.folder / path).hash() for path in (TUNED, BY_HAND)}
        self.expected["plans"] = {}
        for name, command in PLANS.items():
            arguments, path, run = shlex.split(command), f"plans/{name}.yaml", self.aside / "plans" / name
            self.supar("transfer", *arguments, "-o", path, "-q")
            plan = load(self.folder / path)
            self.supar("train", path, "-o", str(run), "-q")
            masks = json.loads((run / "result.json").read_text("utf-8"))["masks"]
            found = {"transfer": arguments, "hash": plan.hash(), "parents": plan.parents}
            self.expected["plans"][name] = found | {"curve": curve(run), "masks": masks}

    def runs(self) -> None:
        """A run that finished, one stopped by SIGTERM after its checkpoint, and one of two processes that were killed."""
        self.supar("train", "plans/short.yaml", "-o", "runs/finished", "-q")
        parallel = {"stopped": [], "killed": ["--nproc", "2", "--parallel", "fsdp"]}
        for name, flags in parallel.items():
            run, whole = self.folder / "runs" / name, self.aside / name
            arguments = ["train", "plans/long.yaml", "-q", *flags, "-o"]
            self.supar(*arguments, str(whole))
            target = self.folder / "expected" / name
            target.mkdir(parents=True)
            for file in ("metrics.jsonl", "result.json"):
                shutil.copy(whole / file, target / file)
            for _ in range(20):
                shutil.rmtree(run, ignore_errors=True)
                process = self.start(*arguments, str(run))
                self.wait(process, functools.partial(is_past_its_checkpoint, run))
                if name == "stopped":
                    process.terminate()
                else:
                    for number in [*children(process.pid), process.pid]:
                        os.kill(number, signal.SIGKILL)
                process.communicate()
                left = sorted(path.name for path in (run / "checkpoints").iterdir())
                if len(left) == 1 and not (run / "result.json").exists() and left[0] < f"step-{LONG:08d}":
                    break
            else:
                raise SystemExit("the run can't be stopped between its checkpoint and its end")
        checkpoints = {name: max((self.folder / "runs" / name / "checkpoints").iterdir()) for name in parallel}
        self.expected["resumed_at"] = {name: int(path.name.removeprefix("step-")) for name, path in checkpoints.items()}
        self.expected["weights"] = {name: tensors(self.folder / "runs" / name) for name in ("finished", *parallel)}

    def studies(self) -> None:
        """Folders of studies as a killed command leaves them: half of their runs recorded, the next one cut."""
        self.expected["studies"] = {}
        for name, command in STUDIES.items():
            arguments = shlex.split(command)
            part, whole = self.folder / "studies" / name, self.folder / "expected" / name
            status = self.supar(*arguments, "-q", "-o", f"studies/{name}", may_fail=True)
            for picture in part.glob("*.png"):
                picture.unlink()
            shutil.copytree(part, whole)
            (part / "result.json").unlink()
            lines = (whole / "records.jsonl").read_text("utf-8").splitlines(keepends=True)
            kept = len(lines) // 2
            (part / "records.jsonl").write_text("".join(lines[:kept]) + lines[kept][:40])
            self.expected["studies"][name] = {"command": arguments, "status": status, "recorded": kept}
        self.supar(*shlex.split(BENCH), "-q", "-o", "bench.yaml")
        self.expected["bench"] = shlex.split(BENCH)

    def wait(self, process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
        """Return as soon as something is so, or the process has ended."""
        while process.poll() is None and not reached():
            time.sleep(0.002)

    def anonymous(self, text: str) -> str:
        from supar_cli.jobs.queue import machine

        return text.replace(machine(), "machine").replace(socket.gethostname(), "host")

    def finish(self) -> None:
        (self.folder / "expected.json").write_text(json.dumps(self.expected, indent=1, ensure_ascii=False) + "\n")
        for path in self.folder.rglob("*"):
            if path.suffix in (".json", ".jsonl", ".yaml"):
                text = path.read_text("utf-8")
                assert socket.gethostname() not in text and str(self.aside) not in text, path


def trials(journal: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials of a journal's study; none where there is none yet."""
    try:
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
        (name,) = optuna.get_all_study_names(storage)
        return list(optuna.load_study(study_name=name, storage=storage).get_trials())
    except (ValueError, KeyError, OSError):
        return []


def is_past_its_checkpoint(run: Path) -> bool:
    path = run / f"checkpoints/step-{HALF:08d}/manifest.json"
    return path.exists() and len((run / "metrics.jsonl").read_text("utf-8").splitlines()) > HALF + 1


def children(process: int) -> list[int]:
    """The processes below one, at any depth."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    own = [number for number, parent in parents.items() if parent == process]
    return [number for child in own for number in (child, *children(child))]


def main() -> None:
    from tests.studies import postgres_server

    folder = Path(sys.argv[1]).resolve()
    folder.mkdir()
    with tempfile.TemporaryDirectory() as aside, postgres_server() as server:
        maker = Maker(folder, Path(aside))
        maker.documents()
        maker.search(server)
        maker.plans()
        maker.runs()
        maker.studies()
        maker.finish()


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    main()
