"""What an earlier release's users have goes on working: `tests/released/make.py` made it, with that release's own program."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

import supar_cli
from supar_cli.planning.plan_sections import Values
from tests.conftest import environment
from tests.released.make import curve, tensors
from tests.studies import Postgres
from tests.studies import postgres as postgres

RELEASED = Path(__file__).parent / "released" / "v0.1.0"
EXPECTED: dict[str, Any] = json.loads((RELEASED / "expected.json").read_text("utf-8"))
PLANS: dict[str, dict[str, Any]] = EXPECTED["plans"]
ANOTHER_RATIO = ("sgd",)  # of FFN width to width than the proxy's: rules that are mended later may give other numbers
ANOTHER_DRAW = ("blocks",)  # rows of blocks are even in new plans
CHECKED = ("gpt2-bias", "llama-gqa-erk", "blocks", "fixed-fan-in", "sgd", "sp", "completep")  # each draws many pictures

# nats; other instruction sets than the release's (AVX2, SSE4) moved losses of plans by up to 1e-6, those of resumed runs by
# up to 3e-7, and those of studies, whose highest rates make small differences large, by up to 1.5e-4
AGREE, AGREE_RESUMED, AGREE_STUDY = 1e-5, 1e-6, 1e-3
JUDGED = (0, 5)  # statuses of a command that measures: passed, and violated


# what commands import when they need it, here once for all of them
SERVER = "import jinja2, matplotlib.pyplot, optuna, rich.table; import tests.lives; tests.lives.serve()"


class Release:
    """A copy of the files, and `supar` in it: processes forked from one that has imported all they need."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._said = folder, folder / "said"
        environ = environment(OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", XDG_CACHE_HOME=str(folder / "cache"))
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with self._said.open("ab") as said:
            self._server = subprocess.Popen(
                [sys.executable, "-c", SERVER], cwd=folder, env=environ, stderr=said, **pipes
            )

    def _ask(self, **asked: Any) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def supar(self, *arguments: str, status: tuple[int, ...] = (0,)) -> str:
        """What a command has said, on both streams; it ends with one of the statuses."""
        before = self._said.stat().st_size
        ended = self._ask(wait=self._ask(arguments=arguments, environment={}))
        said = self._said.read_bytes()[before:].decode()
        assert ended in status and "Traceback" not in said, f"supar {' '.join(arguments)}: {ended}\n{said}"
        return said

    def copied(self, path: str, name: str) -> str:
        """A folder of the release, copied aside to be gone on with."""
        shutil.copytree(self.folder / path, self.folder / "continued" / name)
        return f"continued/{name}"

    def close(self) -> None:
        self._server.communicate()


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    folder = tmp_path_factory.mktemp("released") / "files"
    shutil.copytree(RELEASED, folder)
    made = Release(folder)
    yield made
    made.close()


@pytest.fixture(autouse=True)
def here(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    """The documents name their data by a relative path."""
    monkeypatch.chdir(release.folder)


def load(path: str, kind: str) -> Any:
    found: Any = supar_cli.load(path)
    assert found.kind.startswith(f"supar.{kind}/")
    return found


def assert_agree(one: list[list[Any]], other: list[list[Any]], agree: float) -> None:
    """Curves of the same steps, evaluated after the same ones."""
    assert [(step, value is None) for step, _, value in one] == [(step, value is None) for step, _, value in other]
    for (step, loss, value), (_, other_loss, other_value) in zip(one, other, strict=True):
        assert abs(loss - other_loss) <= agree and abs((value or 0) - (other_value or 0)) <= agree, f"step {step}"


def result(run: str | Path) -> dict[str, Any]:
    return dict(json.loads(Path(run, "result.json").read_text("utf-8")))


def records(folder: str | Path) -> list[dict[str, Any]]:
    """The whole lines of a study's records."""
    lines = Path(folder, "records.jsonl").read_text("utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class TestDocuments:
    def test_are_what_they_were(self) -> None:
        spec, sweep = load("spec.yaml", "spec"), load("sweep.yaml", "sweep")
        assert spec.search.trials == 5 and sweep.name == "rates"
        for path, hash_ in EXPECTED["proxies"].items():
            assert load(path, "proxy").hash() == hash_, path
        tuned = load("proxies/tuned.yaml", "proxy")
        assert tuned.evidence["trials"]["complete"] == 5 and tuned.parents["spec"].startswith("sha256:")

    def test_files_are_those_of_the_plans(self) -> None:
        assert {path.stem for path in Path("plans").glob("*.yaml")} == set(PLANS)


@pytest.mark.parametrize("name", PLANS)
class TestPlan:
    def test_has_its_hash_and_differs_nowhere_from_the_rules(self, release: Release, name: str) -> None:
        found = load(f"plans/{name}.yaml", "plan")
        assert found.hash() == PLANS[name]["hash"] and found.parents == PLANS[name]["parents"]
        assert "edited" not in release.supar("explain", f"plans/{name}.yaml")

    def test_is_made_again_by_the_same_command(self, release: Release, name: str) -> None:
        path = f"again/{name}.yaml"
        release.supar("transfer", *PLANS[name]["transfer"], "-o", path, "-q")
        found = load(path, "plan")
        assert found.parents == PLANS[name]["parents"]
        is_sparse = found.live < found.parameters
        assert found.values.draw == ("live" if is_sparse else "positions")
        assert found.sparsity.draw == ("live" if is_sparse and not found.sparsity.block else "positions")
        sparsity = found.sparsity.model_copy(update={"draw": "positions"})
        then = found.model_copy(update={"values": Values(), "sparsity": sparsity})
        assert (found.hash() == then.hash()) != is_sparse  # another draw is another experiment
        assert then.hash() == PLANS[name]["hash"] or name in (*ANOTHER_RATIO, *ANOTHER_DRAW)

    def test_is_trained_to_the_same_losses(self, release: Release, name: str) -> None:
        run = f"trained/{name}"
        release.supar("train", f"plans/{name}.yaml", "-o", run, "-q")
        assert_agree(curve(Path(run)), PLANS[name]["curve"], AGREE)
        found = result(run)
        assert found["masks"] == PLANS[name]["masks"] and found["plan"] == PLANS[name]["hash"]


@pytest.mark.parametrize("name", CHECKED)
def test_a_plan_is_checked(release: Release, name: str) -> None:
    # after a single step of a zero unembedding there is no gain to fit a slope to
    flags = ("--steps", "2", "--seeds", "1", "--max-seeds", "1", "--batch-size", "2", "--jobs", "1")
    out = f"checked/{name}"
    release.supar("check", f"plans/{name}.yaml", *flags, "-o", out, "-q", status=JUDGED)
    assert result(out)["verdicts"] and all(record["state"] == "done" for record in records(out))


def test_an_edit_and_another_loss_are_seen(release: Release) -> None:
    text = Path("plans/gpt2.yaml").read_text("utf-8")
    row = next(line for line in text.splitlines() if "name: blocks.0.attn.q," in line)
    rate = yaml.safe_load(row)[0]["lr"]
    Path("edited.yaml").write_text(text.replace(row, row.replace(f"lr: {rate}", f"lr: {2 * rate}")))
    assert load("edited.yaml", "plan").hash() != PLANS["gpt2"]["hash"]
    assert "edited" in release.supar("explain", "edited.yaml")
    release.supar("train", "edited.yaml", "-o", "trained/edited", "-q")
    with pytest.raises(AssertionError):
        assert_agree(curve(Path("trained/edited")), PLANS["gpt2"]["curve"], AGREE)


class TestRuns:
    @pytest.mark.parametrize("by", ["plan", "directory"])
    @pytest.mark.parametrize("name", EXPECTED["resumed_at"])
    def test_one_that_was_cut_goes_on_to_the_same_end(self, release: Release, name: str, by: str) -> None:
        run, step = release.copied(f"runs/{name}", f"{name}-by-{by}"), EXPECTED["resumed_at"][name]
        release.supar("train", *(("plans/long.yaml", "-o", run) if by == "plan" else (run,)), "-q")
        found, expected = result(run), result(f"expected/{name}")
        assert found["resumed_at"] == step and curve(Path(run))[:step] == curve(Path(f"runs/{name}"))[:step]
        assert_agree(curve(Path(run)), curve(Path(f"expected/{name}")), AGREE_RESUMED)
        for key in ("plan", "data", "masks", "steps", "live_parameters"):
            assert found[key] == expected[key], key
        assert found["validation_loss"] == pytest.approx(expected["validation_loss"], rel=0, abs=AGREE_RESUMED)

    def test_one_that_is_complete_stays_so(self, release: Release) -> None:
        run = Path(release.copied("runs/finished", "finished"))
        before = {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".safetensors", ".json")}
        assert "is already complete" in release.supar("train", str(run))
        assert {path: path.read_bytes() for path in before} == before

    @pytest.mark.parametrize("name", EXPECTED["weights"])
    def test_weights_are_read(self, name: str) -> None:
        assert tensors(Path("runs", name)) == EXPECTED["weights"][name]
        (checkpoint,) = Path("runs", name, "checkpoints").iterdir()
        assert set(EXPECTED["weights"][name]) == {row.name for row in load(f"{checkpoint}/plan.yaml", "plan").tensors}

    def test_are_listed_and_shown(self, release: Release) -> None:
        listed = {Path(one["run"]).name: one for one in json.loads(release.supar("runs", "runs", "--json", "-q"))}
        states = {"finished": "finished", "stopped": "preempted", "killed": "killed"}
        assert {name: one["state"] for name, one in listed.items()} == states
        for name, state in states.items():
            shown = json.loads(release.supar("show", f"runs/{name}", "--json", "-q"))
            (*_, (step, loss, _)) = curve(Path("runs", name))
            assert (shown["state"], shown["step"], shown["loss"]) == (state, step, loss)
            assert listed[name]["validation_loss"] == shown["validation_loss"] is not None
            assert "edited" not in release.supar("explain", f"runs/{name}")


def test_a_report_shows_all_of_it(release: Release) -> None:
    whole = {f"expected/{name}": name for name in EXPECTED["studies"]}
    parts = [f"studies/{name}" for name in EXPECTED["studies"]]
    runs = ["runs/finished", "runs/stopped", "runs/killed"]
    paths = [*runs, *whole, *parts, "plans/gpt2.yaml", "proxies/tuned.yaml", "proxies/hand.yaml"]
    page = json.loads(release.supar("report", *paths, "--json", "-q"))
    assert Path("report.html").stat().st_size > 10_000
    found = {part["source"]: part for part in page["parts"]}
    assert list(found) == paths
    assert [found[run]["state"].partition(":")[0] for run in runs] == ["finished", "preempted", "killed"]
    for path in whole:
        assert verdicts(found[path]["verdicts"]) == verdicts(result(path)["verdicts"])
        assert len(found[path]["figures"]) == len(result(path)["figures"])


def verdicts(found: list[dict[str, Any]]) -> list[tuple[str, bool | None, bool]]:
    """Without their texts, whose last digits are a machine's own."""
    return [(one["what"], one["passed"], one["control"]) for one in found]


def numbers(value: Any) -> list[float]:
    """Every number of plain data, in order."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [float(value)] if isinstance(value, int | float) and not isinstance(value, bool) else []
    return own + [number for part in parts for number in numbers(part)]


def common(value: Any, then: Any) -> Any:
    """The part of plain data that was there then: keys were added since."""
    if isinstance(value, dict) and isinstance(then, dict):
        return {key: common(value[key], then[key]) for key in then}
    if isinstance(value, list) and isinstance(then, list) and len(value) == len(then):
        return [common(one, other) for one, other in zip(value, then, strict=True)]
    return value


@pytest.mark.parametrize("name", EXPECTED["studies"])
def test_a_study_goes_on_and_repeats_no_run(release: Release, name: str) -> None:
    asked, folder = EXPECTED["studies"][name], release.copied(f"studies/{name}", name)
    before, expected = records(folder), {record["run"]: record for record in records(f"expected/{name}")}
    assert len(before) == asked["recorded"] < len(expected)
    release.supar(*asked["command"], "-o", folder, "-q", status=(asked["status"], 5))  # 5: its controls pass
    after = records(folder)
    assert after[: len(before)] == before
    repeated = len(before) if name == "check" else 0  # its records lack a quantity that is measured by now
    assert len(after) == len(expected) + repeated and {record["run"] for record in after} == set(expected)
    for record in after[len(before) :]:
        for key in ("loss", "losses"):
            there = numbers(expected[record["run"]].get(key))
            assert numbers(record.get(key)) == pytest.approx(there, rel=0, abs=AGREE_STUDY), record
    found, then = result(folder), result(f"expected/{name}")
    # that version did not judge whether a measurement has power, and of comparisons nothing
    known = [one for one in found["verdicts"] if one["what"] != "power" and name != "compare"]
    decided = [one for one in known if one["passed"] is not None or name != "sweep"]  # two seeds decide little
    assert set(verdicts(decided)) <= set(verdicts(then["verdicts"])) and found["parents"] == then["parents"]
    assert [one["what"] for one in known] == [one["what"] for one in then["verdicts"]]
    for key in ("arms", "levels"):  # a sweep's and a comparison's numbers; a check has none but its verdicts'
        shared = common(found.get(key), then.get(key))
        assert numbers(shared) == pytest.approx(numbers(then.get(key)), rel=0.01, abs=0.01)


def test_a_benchmark_is_compared_with_an_earlier_one(release: Release) -> None:
    # which of them is faster is the machines' matter, and so is whether that is a violation
    release.supar(*EXPECTED["bench"], "--compare", "bench.yaml", "-o", "now.yaml", "-q", status=JUDGED)
    then, now = (yaml.safe_load(Path(name).read_text("utf-8")) for name in ("bench.yaml", "now.yaml"))
    rows = {row["what"]: row for row in now["compared"]}
    assert set(rows) == {"masked dense ÷ supar", "plain dense ÷ supar"}
    assert rows["masked dense ÷ supar"]["then"] == pytest.approx(then["masked_dense_ratio"], abs=1e-4)
    assert all(row["now"] > 0 for row in rows.values())


class TestSearch:
    """A search that was stopped after three of its five trials makes the other two, and no more."""

    def goes_on(self, release: Release, kind: str, study: str, storage: optuna.storages.BaseStorage) -> None:
        expected = EXPECTED["search"][kind]

        def complete(name: str = expected["study"]) -> list[tuple[Any, ...]]:
            trials = optuna.load_study(study_name=name, storage=storage).get_trials()
            found = [trial for trial in trials if trial.state.name == "COMPLETE"]
            return [(trial.number, trial.params, trial.value, trial.datetime_complete) for trial in found]

        before = complete()
        assert len(before) == 3
        said = release.supar("tune-proxy", "spec.yaml", "-o", f"{kind}.yaml", "--study", study)
        assert "3 trials done, 5 wanted" in said
        assert complete()[:3] == before and len(complete()) == 5
        # further runs: two finalists with a second seed, two rates for the fit with two seeds
        assert set(optuna.get_all_study_names(storage)) == {expected["study"], expected["study"] + "-runs"}
        assert len(complete(expected["study"] + "-runs")) == 2 + 4
        proxy = load(f"{kind}.yaml", "proxy")
        assert proxy.evidence["study"]["name"] == expected["study"]
        # the rate is a parabola's lowest point, which shows more of the losses' last digits
        assert proxy.hyperparameters.model_dump() == pytest.approx(expected["hyperparameters"], rel=5e-3)
        release.supar("transfer", f"{kind}.yaml", "-o", f"{kind}-plan.yaml", "-q")

    def test_in_a_journal_file(self, release: Release) -> None:
        shutil.copy("search.journal", "continued.journal")
        backend = optuna.storages.journal.JournalFileBackend("continued.journal")
        self.goes_on(release, "journal", "continued.journal", optuna.storages.JournalStorage(backend))

    def test_in_a_database(self, release: Release, postgres: Postgres) -> None:
        import psycopg

        url = postgres.database("search")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(Path("search.sql").read_bytes())
        storage = optuna.storages.RDBStorage(url.replace("postgresql://", "postgresql+psycopg://"))
        self.goes_on(release, "postgresql", url, storage)
