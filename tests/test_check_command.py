"""`supar check` as a command: exit statuses, tables, what is written, and a check that is continued or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from supar_cli.experiments import coordinates
from supar_cli.files import Record
from supar_cli.planning.plan import Plan
from tests.conftest import Called

Supar = Callable[..., Called]

SMALL = ("--width", "32,64", "--density", "1,0.25", "--seeds", "2", "--steps", "3", "--jobs", "1")


class TestCommand:
    def test_it_writes_judges_and_goes_on(self, supar: Supar, proxy_file: Path, tmp_path: Path) -> None:
        ended = supar("check", *SMALL, "--json")
        assert ended.status in (0, 5)  # so small a model bends; what matters here is what is said and kept
        result = (
            json.loads(ended.out) if ended.status == 0 else json.loads((tmp_path / "check/result.json").read_text())
        )
        assert [(v["what"], v["control"]) for v in result["verdicts"]] == [
            ("supar over density", False),
            ("supar over width", False),
            ("sp over density", True),
            ("mup over density", True),
            ("sp over width", True),
            ("power", False),
        ]
        controls = [v["passed"] for v in result["verdicts"] if v["control"]]
        assert result["verdicts"][-1]["passed"] is not any(controls)
        failed = any(v["passed"] is v["control"] for v in result["verdicts"])
        assert (ended.status == 5) is failed and ("error: " in ended.err) is failed
        assert (tmp_path / "check/activation_over_density.png").stat().st_size > 10_000
        lines = (tmp_path / "check/records.jsonl").read_text().splitlines(keepends=True)
        # a killed check: the last line is cut, two runs are missing
        (tmp_path / "check/records.jsonl").write_text("".join(lines[:-2]) + lines[-2][:40])
        again = supar("check", *SMALL, "--json")
        assert again.status == ended.status
        assert sorted((tmp_path / "check/records.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)

    def test_seeds_are_added_until_it_is_clear(
        self, supar_here: Supar, proxy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A slope that seeds 0 and 1 have by chance: its bound is exceeded at 2 seeds, by less than its interval."""

        def sizes(plan: Plan) -> Record:
            chance = {0: 0.5, 1: 0.14}.get(plan.train.seed, 0.0) if plan.parameterization.name == "supar" else 1.0
            moved = plan.sparsity.density**chance * (plan.model.width / 64) ** chance
            others = dict.fromkeys("bcd", 1.0 if plan.parameterization.name == "supar" else moved)
            steps = [
                {quantity: {"a": 1.0 if step == 0 else moved, **others} for quantity in coordinates.LINEAR}
                | {coordinates.SHARE: {"embedding": 1.0, "final_norm": 1.0}}
                for step in range(2)
            ]
            return {"state": "done", "steps": steps, "losses": [5.0, 5.0]}

        monkeypatch.setattr(coordinates, "measure", sizes)
        ended = supar_here("check", *SMALL)
        assert ended.status == 0 and "of 2 seeds: more seeds may decide; continuing with 4 seeds" in ended.err
        # of its own, four seeds over density and two at the other width; SP at all three, μP over density
        count = 2 * 4 + 1 * 2 + 3 * 2 + 2 * 2
        assert len((tmp_path / "check/records.jsonl").read_text().splitlines()) == count
        ended = supar_here("check", *SMALL, "--max-seeds", "2", "-o", "fewer")
        assert ended.status == 5 and "continuing with" not in ended.err
        # the same folder takes more seeds, and repeats none
        ended = supar_here("check", *SMALL[:4], "--seeds", "4", *SMALL[6:], "-o", "fewer")
        assert ended.status == 0
        assert len((tmp_path / "fewer/records.jsonl").read_text().splitlines()) == count + 2  # the other width's too

    def test_a_hot_rate_is_lowered_until_its_base_is_stable(
        self, supar_here: Supar, proxy_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        coolest = [2**-8]  # in parts of the proxy's rate

        def sizes(plan: Plan) -> Record:
            is_hot = plan.hyperparameters.lr > 0.01 * coolest[0]
            density = 1.0 if plan.parameterization.name == "supar" else plan.sparsity.density
            steps = [
                {
                    quantity: dict.fromkeys("ab", (11.0 if is_hot and step else 1.0) * density)
                    for quantity in coordinates.LINEAR
                }
                | {coordinates.SHARE: {"embedding": 1.0, "final_norm": 1.0}}
                for step in range(2)
            ]
            return {"state": "done", "steps": steps, "losses": [5.0, 5.0]}

        monkeypatch.setattr(coordinates, "measure", sizes)
        ended = supar_here("check", "--width", "64", *SMALL[2:])
        result = json.loads((tmp_path / "check/result.json").read_text())
        assert ended.status == 0 and result["lr_factor"] == coolest[0]
        assert (
            ended.err.count(
                "is too high for slopes to be judged (supar over density: at its base activation of a grows 11-fold)"
            )
            == 4
        )
        assert [note for note in result["notes"] if "all rates are divided by 4" in note] == result["notes"][:4]
        # two seeds of the base at each of four rates, and then those of two densities under SμPar, SP and μP
        assert len((tmp_path / "check/records.jsonl").read_text().splitlines()) == 4 * 2 + 3 * 2 * 2
        coolest[0] = 2**-10
        ended = supar_here("check", "--width", "64", *SMALL[2:], "--force", "--json")
        assert (ended.status, ended.out) == (4, ended.out) and "can't be judged: lr 3.91e-05 is too high" in ended.err
        result = json.loads((tmp_path / "check/result.json").read_text())
        assert [(one["passed"], one["control"]) for one in result["verdicts"]] == [(None, False)]
        assert result["lr_factor"] == 2**-8 and result["figures"] == result["tables"] == []

    def test_one_step_of_a_zero_head_says_that_it_is_too_few(self, supar_here: Supar, proxy_file: Path) -> None:
        zero = ("-s", "model.tied=false", "-s", "parameterization.unembedding_init=zero")
        ended = supar_here("check", *SMALL[:4], "--seeds", "1", "--steps", "1", "--jobs", "1", *zero)
        assert ended.status == 4 and "can't be judged: gain is zero in every step; expected more than 1" in ended.err

    def test_a_folder_of_a_version_that_knew_fewer_quantities_goes_on(
        self, supar_here: Supar, proxy_file: Path, tmp_path: Path
    ) -> None:
        arguments = (
            "--width",
            "32",
            "--density",
            "1,0.5",
            "--seeds",
            "1",
            "--max-seeds",
            "1",
            "--steps",
            "1",
            "--jobs",
            "1",
        )
        before = supar_here("check", *arguments, "-s", "run.loss_chunk_tokens=8")
        path = tmp_path / "check/records.jsonl"
        lines = path.read_text().splitlines()
        older = [json.loads(line) for line in lines]
        for record in older[1:]:
            del record["steps"][0][coordinates.SHARE]
        path.write_text("".join(json.dumps(record) + "\n" for record in older))
        again = supar_here("check", *arguments)
        assert again.status == before.status
        assert path.read_text().splitlines()[len(lines) :] == lines[1:]

    def test_sp_fails(self, supar: Supar, proxy_file: Path, tmp_path: Path) -> None:
        ended = supar("check", *SMALL, "--parameterization", "sp", "-q")
        assert ended.status == 5 and "sp over density" in ended.err
        verdict = json.loads((tmp_path / "check/result.json").read_text())["verdicts"][0]
        assert (verdict["what"], verdict["passed"], verdict["control"]) == ("sp over density", False, False)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--width", "32,x"), "--width x: expected a whole number"),
            (("--width", "0,32"), "--width 0: expected a whole number of at least 1"),
            (("--density", "1,2"), "--density 1,2: 2.0; expected 0 < density <= 1"),
            (("--width", "32", "--density", "1"), "expected at least two sizes of one of them"),
            (("--parameterization", "ntk"), "--parameterization ntk: expected one of supar"),
            (("--width", "32,50"), "--width 32,50: 50 is not a multiple"),
            (("nothing.yaml",), "nothing.yaml: no such file"),
        ],
    )
    def test_bad_input(
        self, supar_here: Supar, proxy_file: Path, unchanged: Any, arguments: tuple[str, ...], message: str
    ) -> None:
        unchanged()
        ended = supar_here("check", *arguments)
        assert (ended.status, ended.out) == (2, "") and message in ended.err
