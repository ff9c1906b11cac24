"""Flags in errors: what a flag set wrongly is said of the flag, for every flag of every command and every key of `--set`."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from hypothesis import given
from hypothesis import strategies as st

import supar_cli
from supar_cli.cli.app import NAMES, app
from supar_cli.cli.option_table import OPTIONS, flag_of
from supar_cli.cli.values import keys_of
from supar_cli.errors import InputError
from supar_cli.planning.density import density_from, literal
from supar_cli.planning.document import Document
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse, validate
from supar_cli.planning.spec import Proxy, Sparsity, Spec
from supar_cli.planning.sweep import Sweep

from .conftest import CHECKOUT, PROXY, Called, real_text

SPEC = PROXY.replace("supar.proxy/v1", "supar.spec/v1") + "search: {trials: 2, lr: [0.001, 0.1]}\n"
WRONG = {"sparsity": ["99.2", "1", "x%"], "density": ["0", "3/2"], "data": ["/nope"], "seed": ["-1", "x"]}
WRONG_NUMBERS, WRONG_TEXTS = ["0", "wrong"], ["wrong"]
# what a value that is wrong by itself does not exist for: paths, names, lists of names, and counts that may be 0
ANY_VALUE = (
    "set",
    "out",
    "name",
    "study",
    "compare",
    "picture",
    "tokenizer",
    "field",
    "executor_set",
    "index",
    "ignore",
)
SOURCES = {
    "transfer": ["p.yaml"],
    "sweep": ["p.yaml"],
    "compare": ["p.yaml"],
    "check": ["p.yaml"],
    "tune-proxy": ["s.yaml"],
    "layout": ["flags_model:make", "--base", "width=8", "--wider", "width=16", "--example", "flags_model:make"],
}
SOURCES |= {"inspect": ["text.txt"], "prepare": ["text.txt", "-o", "tokens"]}
FINISHED = str(CHECKOUT / "tests/released/v0.1.0/runs/finished")
SOURCES |= {"evaluate": [FINISHED], "generate": [FINISHED]}


def call(*arguments: str) -> Called:
    """Run a command in this process, as supar_here does, many times in a test."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(list(arguments))
        except SystemExit as ended:
            status = int(ended.code or 0)
    return Called(status, out.getvalue(), err.getvalue())


@pytest.fixture
def documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(real_text(24_000))
    (tmp_path / "p.yaml").write_text(PROXY)
    (tmp_path / "flags_model.py").write_text("def make(width):\n    return None\n")
    (tmp_path / "s.yaml").write_text(SPEC)
    assert call("transfer", "p.yaml", "-q", "-o", "plan.yaml").status == 0


def commands() -> Iterator[tuple[list[str], Any]]:
    """Every command and its Typer command; `data inspect` is one."""
    group: Any = typer.main.get_command(app)
    for name in NAMES:
        found = group.get_command(None, name)
        below = getattr(found, "commands", {"": found})
        yield from (([name, *filter(None, [sub])], one) for sub, one in below.items())


def flags() -> Iterator[tuple[list[str], str, str]]:
    """(command, option, wrong value) of every flag that has a wrong value."""
    for words, command in commands():
        for name in [param.name for param in command.params if param.name in OPTIONS]:
            option = OPTIONS[name]
            if (
                option.argument
                or option.type is bool
                or name in ANY_VALUE
                or name in ("max_restarts", "rewind", "temperature")  # 0 is one of their values
            ):
                continue
            by_type = WRONG_NUMBERS if option.type in (int, float) else WRONG_TEXTS
            yield from ((words, name, value) for value in WRONG.get(name, by_type))


@pytest.mark.usefixtures("documents")
class TestPlace:
    def test_of_every_flag_of_every_command_is_the_flag(self) -> None:
        wrong, tried = [], 0
        for words, name, value in flags():
            flag, tried = flag_of(name), tried + 1
            ended = call(*words, *SOURCES.get(words[-1], []), flag, value)
            if ended.status not in (2, 3) or f"error: {flag} {value}: " not in ended.err.splitlines()[-1] + "\n":
                wrong.append((words, flag, value, ended))
        assert wrong == [] and tried > 120

    @pytest.mark.parametrize("ending", ["json", "force", "quiet", "verbose"])
    def test_of_a_file_is_the_file_though_its_name_ends_like_a_flag(self, ending: str) -> None:
        Path(f"x.{ending}").write_text('[{"text": "an array"}]')
        assert call("data", "inspect", f"x.{ending}", "--format", "jsonl").err.startswith(f"error: x.{ending}:")

    def test_where_there_is_no_document_keys_are_flags(self) -> None:
        Path("wide.bin").write_bytes(bytes([7, 0, 0, 0]) * 4096)
        Path("empty").mkdir()
        for source, words in (("wide.bin", "--dtype uint32"), ("empty", "error: empty: no data in it")):
            said = call("data", "inspect", source).err
            assert words in said and "data." not in said

    def test_of_every_key_that_is_set_is_the_setting(self) -> None:
        value, tried = "[{a: 1}]", 0  # what no key of a document takes
        for words in (["transfer", "p.yaml"], ["train"], ["tune-proxy", "s.yaml"], ["sweep", "p.yaml"]):
            kind: Any = {"transfer": Proxy, "train": Plan, "tune-proxy": Spec, "sweep": Sweep}[words[0]]
            for key in keys_of(kind):
                if key in (
                    "parents",
                    "meta",
                    "evidence",
                ):  # the first says that supar wrote it; the others take anything
                    continue
                ended = call(*words, "-q", "-s", f"{key}={value}")
                assert "pydantic" not in ended.err and "Input" not in ended.err, (kind, key)
                assert ended.status == 2 and ended.err.startswith(f"error: -s {key}={value}: "), (kind, key, ended)
                tried += 1
        assert tried > 300

    def test_is_the_line_where_no_flag_set_it(self) -> None:
        Path("p.yaml").write_text(PROXY.replace("width: 64", "width: 65"))
        assert call("transfer", "p.yaml", "-q").err.startswith("error: p.yaml:16: target.width: 65 is not a multiple")
        assert call("transfer", "p.yaml", "-q", "--width", "66").err.startswith(
            "error: --width 66: 66 is not a multiple"
        )

    def test_of_a_section_that_was_set_names_the_key_in_it(self) -> None:
        ended = call("transfer", "p.yaml", "-q", "-s", "target={width: wide}")
        assert ended.err == "error: -s target={width: wide}: target.width: should be a valid integer, not 'wide'\n"

    def test_a_percentage_taken_for_a_share_is_suggested(self) -> None:
        said = call("transfer", "p.yaml", "--sparsity", "99.2").err
        assert said == "error: --sparsity 99.2: 99.2; expected 0 <= sparsity < 1; did you mean 0.992?\n"

    def test_control_a_document_without_flags_blames_its_line(self) -> None:
        read = Document(
            {"target": {"width": 0}}, "p.yaml", {("target", "width"): 4}, {("target", "width"): "--width 0"}
        )
        assert str(read.problem(("target", "width"), "is 0")) == "--width 0: is 0"
        read.flags.clear()  # what every problem said before flags were remembered
        assert str(read.problem(("target", "width"), "is 0")) == "p.yaml:4: target.width: is 0"


NUMERALS = st.decimals(min_value=0, max_value=99, places=6, allow_nan=False)


class TestShares:
    @given(NUMERALS)
    def test_a_percentage_is_exact(self, percent: Any) -> None:
        assert literal(f"{percent}%") == Fraction(percent) / 100
        assert density_from("sparsity", f"{percent}%") == 1 - Fraction(percent) / 100

    @given(st.integers(1, 10**6), st.integers(1, 10**6))
    def test_a_fraction_is_exact(self, above: int, below: int) -> None:
        assert literal(f"{above}/{below}") == Fraction(above, below)

    @pytest.mark.parametrize("level", [0.992, "127/128", "99.2%", 0])
    def test_a_number_stands_for_the_section(self, level: Any) -> None:
        assert validate(Sparsity, level, "sparsity") == Sparsity(sparsity=level)
        fields = {**parse_proxy().model_dump(), "target": {"sparsity": level}}
        assert parse(Proxy, Document(fields)).target.sparsity == Sparsity(sparsity=level)

    @pytest.mark.usefixtures("documents")
    @pytest.mark.parametrize(
        "written", ["sparsity: 0.75", "sparsity: 3/4", "sparsity: 75%", "sparsity: {density: 1/4}"]
    )
    def test_are_the_same_wherever_they_are_given(self, written: str) -> None:
        Path("q.yaml").write_text(PROXY.replace("  sparsity:\n    sparsity: 0.5\n", f"  {written}\n"))
        by_flag, by_file = (
            call("transfer", "p.yaml", "-o", "-", "-q", "--sparsity", "75%"),
            call("transfer", "q.yaml", "-o", "-", "-q"),
        )
        assert (
            by_file.status == 0
            and by_file.out.partition("sparsity")[2].splitlines()[1:]
            == by_flag.out.partition("sparsity")[2].splitlines()[1:]
        )
        assert call("transfer", "q.yaml", "-q", "-o", "-", "--density", "1/2").out.count("density: 0.5") > 1
        assert call("transfer", "q.yaml", "-q", "-o", "-", "-s", "target.sparsity.pattern=bernoulli").status == 0


def parse_proxy() -> Proxy:
    return parse(Proxy, Document({"kind": "supar.proxy/v1", **{key: value for key, value in FIELDS.items()}}))


FIELDS: dict[str, Any] = {
    "model": {"family": "gpt2", "width": 32, "layers": 2, "heads": 2, "context": 16, "vocab": 256},
    "hyperparameters": {"lr": 0.01, "init_std": 0.08, "alpha_input": 1.5, "alpha_output": 2.0, "weight_decay": 0.1},
    "train": {"steps": 12, "batch_size": 4},
}


class TestPython:
    """Public functions raise the command line's words, at the keyword."""

    @pytest.mark.parametrize(
        ("function", "keywords", "words"),
        [
            (
                "transfer",
                {"sparsity": 99.2},
                "sparsity: 99.2; expected 0 <= sparsity < 1; did you mean 0.992?",
            ),
            ("transfer", {"sparsty": 0.9}, "sparsty: unknown key 'sparsty'; did you mean 'sparsity'?"),
            ("transfer", {"densty": 0.9}, "densty: unknown key 'densty'; did you mean 'density'?"),
            ("check", {"seeds": "x"}, "seeds: 'x'; expected a whole number above 0"),
            ("check", {"sedes": 3}, "sedes: unknown keyword; did you mean 'seeds'?"),
            ("check", {"max_seeds": 0}, "max_seeds: 0; expected a whole number above 0"),
            (
                "check",
                {"width": 33},
                "width: 33 is not a multiple of the proxy's head width 16; expected a multiple of it",
            ),
            ("check", {"density": "99.2"}, "density: 99.2; expected 0 < density <= 1; did you mean 0.992?"),
            ("demo", {"steps": 0}, "steps: 0; expected a whole number above 0"),
            ("demo", {"jobs": 0}, "jobs: 0; expected a whole number above 0"),
        ],
    )
    def test_words(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, keywords: Any, words: str
    ) -> None:
        monkeypatch.chdir(tmp_path)
        given_first = [] if function == "demo" else [parse_proxy()]
        with pytest.raises(InputError) as caught:
            getattr(supar_cli, function)(*given_first, **keywords)
        assert str(caught.value) == words

    @pytest.mark.parametrize("function", ["tune", "sweep", "compare"])
    def test_an_unknown_keyword_of_the_workers(
        self, function: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        monkeypatch.chdir(tmp_path)
        document = {"kind": "supar.spec/v1", **FIELDS}
        if function != "tune":
            document |= {"kind": "supar.sweep/v1", "name": "x", "over": {"lr": "x:0..0/1", "density": [1.0]}}
            document |= {"parameterizations": ["supar"]}
        from supar_cli.planning.kinds import parse_any

        with pytest.raises(InputError, match=r"^jbos: unknown keyword; did you mean 'jobs'\?$"):
            getattr(supar_cli, function)(parse_any(Document(document)), jbos=2)

    def test_a_section_made_in_python(self) -> None:
        with pytest.raises(InputError, match=r"^sparsity: should be a number or a fraction such as 1/128 or null$"):
            Sparsity(sparsity=[])


PLAIN = {  # each command that writes a document: its flags, and the file that it writes without `-o`
    "init": (["init"], "supar.yaml"),
    "transfer": (["transfer", "p.yaml"], "plan.yaml"),
    "schema": (["schema"], None),
    "report": (["report", "p.yaml"], "report.html"),
}


@pytest.mark.usefixtures("documents")
class TestOut:
    """`-o FILE` is the file alone; without it the document goes to a default file and where stdout is read; -q keeps it."""

    @pytest.mark.parametrize("command", PLAIN)
    def test_names_the_only_place(self, command: str) -> None:
        arguments, default = PLAIN[command]
        Path("plan.yaml").unlink()
        alone = call(*arguments, "-q", "-o", "own")
        assert (alone.status, alone.out, alone.err) == (0, "", "")
        assert default is None or not Path(default).exists()
        stdout = call(*arguments, "-q", "-o", "-")
        assert stdout.out == Path("own").read_text("utf-8") and (default is None or not Path(default).exists())
        plain = call(*arguments, "-q")
        assert default is None or Path(default).read_text("utf-8") == stdout.out
        assert plain.out == ("" if command == "report" else stdout.out)  # a page is written for a browser

    def test_is_json_where_json_says_so(self) -> None:
        assert call("transfer", "p.yaml", "-q", "--json", "-o", "plan.json").out == ""
        assert json.loads(Path("plan.json").read_text()) == yaml.safe_load(
            call("transfer", "p.yaml", "-q", "-o", "-").out
        )
        Path("plan.yaml").unlink()
        printed = call("transfer", "p.yaml", "-q", "--json")
        assert json.loads(printed.out) == json.loads(Path("plan.json").read_text())
        assert Path("plan.yaml").read_text().startswith("kind: ")  # the default file is YAML
        assert call("report", "p.yaml", "-q", "--json", "-o", "report.json").out == ""
        assert json.loads(Path("report.json").read_text())["kind"] == "supar.report/v1"

    def test_of_a_folder_is_silent_too(self) -> None:
        assert call("data", "prepare", "text.txt", "-q", "-o", "tokens").out == ""
        train = ["train", "plan.yaml", "-q", "--steps", "2", "--device", "cpu"]
        assert call(*train, "-o", "a").out == ""
        assert yaml.safe_load(call(*train).out)["kind"] == "supar.result/v1"
        assert json.loads(call(*train, "-o", "b", "--json").out)["kind"] == "supar.result/v1"

    def test_a_run_has_the_name_that_is_given_and_is_the_newest(self) -> None:
        ended = call("train", "plan.yaml", "--steps", "2", "--device", "cpu", "--name", "first")
        assert ended.status == 0 and Path("runs/first/result.json").is_file()
        assert ended.err.splitlines()[-1] == "next: supar show runs/first · supar report runs/first"
        assert call("show").err.startswith("the newest run: runs/first\nruns/first: finished")
        assert "runs/first: finished" in call("report").err
        assert call("show", "first").err.startswith("runs/first: finished")
        assert "runs/first: finished" in call("report", "first", "-o", "named.html").err
        for name in ("a/b", "..", ""):
            assert call("train", "plan.yaml", "--name", name).err.startswith(f"error: --name {name}: "), name
        assert "cannot be combined" in call("train", "plan.yaml", "--name", "x", "-o", "y").err

    def test_there_is_no_newest_run(self) -> None:
        assert (
            call("show").err
            == call("report").err
            == ("error: runs: holds no run; expected a run directory, which `supar train` writes\n")
        )
        assert call("runs", "text.txt").err.startswith("error: text.txt: is a file; expected a folder of runs")

    def test_every_step_names_the_next_one(self) -> None:
        for arguments, command in (
            (["init", "-o", "spec.yaml"], "supar tune-proxy spec.yaml"),
            (["transfer", "p.yaml", "-o", "x.yaml"], "supar train x.yaml"),
        ):
            assert call(*arguments).err.splitlines()[-1] == f"next: {command}"


@pytest.mark.usefixtures("documents")
class TestDocuments:
    @pytest.mark.parametrize(
        ("command", "text", "said"),
        [
            ("transfer", "model: {width: 3}", "x.yaml:1: kind: is missing; expected supar.proxy/v1"),
            ("check", "model: {width: 3}", "x.yaml:1: kind: is missing; expected one of supar.spec/v1, supar.proxy/v1"),
            (
                "train",
                PROXY,
                "x.yaml:1: kind: is 'supar.proxy/v1' (`supar transfer` makes a plan of it); expected supar.plan/v2",
            ),
            ("transfer", SPEC, "x.yaml:1: kind: is 'supar.spec/v1' (`supar tune-proxy` makes a proxy of it); expected"),
            (
                "transfer",
                "model:\n\twidth: 3",
                "x.yaml:2: not valid YAML: a tab; expected spaces, by which YAML indents",
            ),
            (
                "transfer",
                PROXY.replace("vocab: 256", "vocab: 100"),
                "x.yaml:8: model.vocab: 100 is less than the 256 tokens",
            ),
        ],
    )
    def test_of_the_wrong_kind_say_what_to_do(self, command: str, text: str, said: str) -> None:
        Path("x.yaml").write_text(text)
        ended = call(command, "x.yaml", "-q")
        assert ended.status == 2 and ended.err.startswith(f"error: {said}")

    def test_a_setting_that_does_not_fit_the_data(self) -> None:
        said = call("transfer", "p.yaml", "-q", "-s", "model.vocab=100").err
        assert said.startswith("error: -s model.vocab=100: 100 is less than the 256 tokens of the tokenizer 'bytes'")
        assert call("train", "plan.yaml", "-s", "tensors=[]").err.endswith("has 0 items; expected at least 1\n")
