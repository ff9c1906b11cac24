"""The commands around the main path: `init`, `schema`, `explain`, `data`, `doctor`, and the templates they rest on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from supar_cli.cli import documents
from supar_cli.data import batches, corpus
from supar_cli.files import template
from supar_cli.planning import document, templates
from supar_cli.planning.plan import Data, Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy, Spec, Target
from supar_cli.planning.transfer import transfer

from .conftest import PROXY, Called

Supar = Callable[..., Called]

TEMPLATES = ["quickstart", "vit", "gpt2-124m", "interpretability", "paper", "paper-proxy"]
# of sweeps; tests/test_sweep.py plans them
FIGURES = [*(f"fig{number}" for number in (1, 6, 7, 9, 10, 11, 12, 13, 14)), "fig12-400", "nm", "imp"]
FIGURES += ["ppo", "mlp-lr", "vit-lr", "vit-width", "mlp-lr-sgd"]
# parameters of the proxy and of the target, as the templates' comments say them
PARAMETERS = {
    "gpt2-124m": (22_583_552, 124_373_760),
    "interpretability": (6_510_848, 101_540_864),
    "paper": (38_044_160, 608_907_264),
    "paper-proxy": (38_044_160, 608_907_264),
    "quickstart": (443_008, 101_459_968),
    "vit": (102_208, 1_588_480),
}


def proxy_of(name: str, text_file: Path) -> Proxy:
    """A template as a proxy, on small data; a spec's own values stand for tuned ones."""
    read = documents.read_one(str(template(f"{name}.yaml")), "")
    kind: Any = {"supar.proxy/v1": Proxy, "supar.spec/v1": Spec}[read.data["kind"]]
    found = parse(kind, read)
    data_ = found.data if name == "vit" else corpus.identify(Data(source=str(text_file)))
    fields = found.model_dump(include=set(Proxy.keys()))
    return Proxy(**{**fields, "kind": "supar.proxy/v1", "data": data_.model_dump()})


class TestTemplates:
    def test_are_the_ones_listed(self) -> None:
        assert templates.names() == [*TEMPLATES[:2], "own", *TEMPLATES[2:], *FIGURES]

    @pytest.mark.parametrize("name", TEMPLATES)
    def test_have_the_parameters_that_their_comments_say(self, name: str, text_file: Path) -> None:
        proxy = proxy_of(name, text_file)
        text = templates.text(name)
        as_proxy = transfer(proxy, Target(sparsity={"density": 1.0}), "supar")
        as_target = transfer(proxy, proxy.target, "supar")
        assert (as_proxy.parameters, as_target.parameters) == PARAMETERS[name]
        assert all(f"{count:,}" in text for count in PARAMETERS[name])

    @pytest.mark.parametrize("name", TEMPLATES)
    def test_transfer_to_the_sparsity_of_the_readme(self, name: str, text_file: Path) -> None:
        proxy = proxy_of(name, text_file)
        target = Target(**{**proxy.target.model_dump(), "sparsity": {"sparsity": 0.992}})
        plan = transfer(proxy, target, "supar")
        assert {row.density for row in plan.tensors if row.role == "hidden"} == {0.008}

    def test_the_papers_iso_parameter_widths_keep_the_live_weights(self, text_file: Path) -> None:
        text, proxy = templates.text("gpt2-124m"), proxy_of("gpt2-124m", text_file)
        for width, sparsity in ((768, 0.0), (1088, 0.5), (1536, 0.75), (2176, 0.875)):
            target = {**proxy.target.model_dump(), "width": width, "sparsity": {"sparsity": sparsity}}
            plan = transfer(proxy, Target(**target), "supar")
            live = sum(row.kept for row in plan.tensors if row.role == "hidden")
            assert f"{plan.parameters:,} parameters, {live:,} live" in text

    def test_the_paper_proxy_is_what_from_paper_reads(self, supar_here: Supar, text_file: Path, tmp_path: Path) -> None:
        assert supar_here("init", "paper-proxy", "-q").status == 0
        flags = ("--sparsity", "0.992", "--data", str(text_file), "-o", "-", "-q")
        from_file, from_paper = supar_here("transfer", *flags), supar_here("transfer", "--from-paper", *flags)
        assert from_file.out == from_paper.out and "supar.plan/v2" in from_paper.out


class TestInit:
    def test_writes_the_template_and_prints_it_to_a_pipe(self, supar: Supar, tmp_path: Path) -> None:
        called = supar("init")
        text = templates.text("quickstart")
        assert (called.status, called.out) == (0, text)
        assert (tmp_path / "supar.yaml").read_text("utf-8") == text
        assert "next: supar tune-proxy\n" in called.err

    def test_keeps_a_file_that_differs(self, supar_here: Supar, tmp_path: Path, unchanged: Any) -> None:
        (tmp_path / "supar.yaml").write_text("mine\n")
        unchanged()
        called = supar_here("init", "paper")
        assert called.status == 2 and "supar.yaml: exists and differs" in called.err

    def test_lists_and_names_close_misses(self, supar_here: Supar) -> None:
        assert [line.split()[0] for line in supar_here("init", "--list").out.splitlines()] == [
            *TEMPLATES[:2],
            "own",
            *TEMPLATES[2:],
            *FIGURES,
            "gpt.py",
            "llama.py",
            "mlp.py",
            "ppo.py",
            "resnet.py",
        ]
        called = supar_here("init", "papr")
        assert called.status == 2 and "did you mean 'paper'?" in called.err

    def test_writes_a_script_and_names_its_layout(self, supar_here: Supar, tmp_path: Path) -> None:
        called = supar_here("init", "gpt.py", "-o", "mine.py")
        assert called.status == 0 and (tmp_path / "mine.py").read_text("utf-8") == templates.text("gpt.py")
        assert "next: supar layout mine:make --base width=64" in called.err and "--example mine:example" in called.err
        called = supar_here("init", "resnet.py")
        assert "next: supar layout resnet:make --base width=32 " in called.err and "-o layout.yaml" in called.err


class TestSchema:
    @pytest.mark.parametrize(("kind", "name"), [("spec", "vit"), ("sweep", "vit-lr")])
    def test_knows_each_familys_keys(self, supar_here: Supar, kind: str, name: str) -> None:
        check = jsonschema.Draft202012Validator(json.loads(supar_here("schema", kind).out))
        sound = document.read(templates.text(name), name)[0].data
        assert list(check.iter_errors(sound)) == []
        for change in ({"family": "gpt2"}, {"patch": "2"}, {"pooling": "max"}, {"experts": 8}):
            assert list(check.iter_errors({**sound, "model": {**sound["model"], **change}})), change

    @pytest.mark.parametrize("kind", ["spec", "proxy", "plan", "sweep"])
    def test_accepts_what_supar_accepts_and_refuses_an_unknown_key(
        self, supar_here: Supar, kind: str, text_file: Path
    ) -> None:
        schema = json.loads(supar_here("schema", kind).out)
        jsonschema.Draft202012Validator.check_schema(schema)
        check = jsonschema.Draft202012Validator(schema)
        proxy = proxy_of("quickstart", text_file)
        name = {"spec": "quickstart", "proxy": "paper-proxy", "sweep": "fig1"}.get(kind)
        if name:
            sound = document.read(templates.text(name), name)[0].data
        else:
            sound = transfer(proxy, proxy.target, "supar").model_dump()
        assert list(check.iter_errors(sound)) == []
        for broken in (
            {**sound, "unknown": 1},
            {**sound, "model": {**sound["model"], "widht": 1}},
            {**sound, "model": {**sound["model"], "width": "128"}},
            {**sound, "model": {**sound["model"], "width": -1}},
            {key: value for key, value in sound.items() if key != "hyperparameters"},
        ):
            assert list(check.iter_errors(broken))


@pytest.fixture
def plan(supar_here: Supar, proxy_file: Path, tmp_path: Path) -> Path:
    assert supar_here("transfer", "--sparsity", "0.75", "-q").status == 0
    return tmp_path / "plan.yaml"


class TestExplain:
    def test_works_a_formula_out_to_the_number_in_the_plan(self, supar_here: Supar, plan: Path) -> None:
        called = supar_here("explain", "plan.yaml", "blocks.0.mlp.up")
        row = next(
            row for row in parse(Plan, document.read_file(str(plan))[0]).tensors if row.name == "blocks.0.mlp.up"
        )
        assert called.status == 0
        assert f"η/(m_d·m_ρ) = 0.01/(2·0.25) = {row.lr:.6g}" in called.out
        assert f"= {row.init_std:.6g}" in called.out and math.isclose(row.init_std, 0.08 / math.sqrt(0.5))
        assert "arXiv 2405.15743" in called.out

    def test_fits_a_terminal_of_80_columns(self, supar_here: Supar, plan: Path) -> None:
        assert max(map(len, supar_here("explain").out.splitlines())) <= 80

    def test_says_where_a_plan_was_edited(self, supar_here: Supar, plan: Path) -> None:
        assert "edited" not in supar_here("explain").out
        lines = plan.read_text().splitlines()
        at = next(i for i, line in enumerate(lines) if "blocks.1.attn.o" in line)
        lines[at] = lines[at].replace("lr: 0.02", "lr: 0.03")
        plan.write_text("\n".join(lines) + "\n")
        called = supar_here("explain", "plan.yaml", "attn.o", "--json")
        (told,) = json.loads(called.out)
        assert [row["lr"]["edited"] for row in told["tensors"]] == [False, True]
        text = supar_here("explain", "plan.yaml", "attn.o").out
        assert "edited: the plan has 0.03, the rule gives 0.02" in text
        assert " ".join(text.split()).count("lr·λ equals the proxy's") == 1, "only where lr is the rule's"

    @pytest.mark.parametrize(
        ("arguments", "what"),
        [
            (["plan.yaml", "blocks.0.mlp.upp"], "did you mean"),
            (["plan.yaml", "--role", "hiden"], "expected embedding, hidden"),
            (["none.yaml"], "none.yaml: no such file"),
        ],
    )
    def test_names_what_is_not_there(
        self, supar_here: Supar, plan: Path, unchanged: Any, arguments: list[str], what: str
    ) -> None:
        unchanged()
        called = supar_here("explain", *arguments)
        assert (called.status, called.out) == (2, "") and what in called.err


class TestData:
    def test_prepared_tokens_are_those_of_the_text(self, supar_here: Supar, tmp_path: Path) -> None:
        (tmp_path / "text").mkdir()
        for i in range(40):
            (tmp_path / "text" / f"{i}.txt").write_text(f"document {i} " * (i + 3))
        called = supar_here("data", "prepare", "text", "-o", "bins", "--json")
        told = json.loads(called.out)
        direct = batches.load(Data(source=str(tmp_path / "text")), vocab=256, context=8)
        prepared = batches.load(Data(source=str(tmp_path / "bins")), vocab=256, context=8)
        for name in ("train", "validation"):
            one, other = (getattr(tokens, name).segments[0].tokens for tokens in (direct, prepared))
            assert np.array_equal(one, other) and told[name] == len(one) > 0
        assert told["hash"] == prepared.hash
        assert sorted(path.name for path in (tmp_path / "bins").iterdir()) == ["train.bin", "val.bin"]

    def test_one_file_holds_out_its_tail(self, supar_here: Supar, tmp_path: Path) -> None:
        lines = "".join(json.dumps({"body": f"line {i}"}) + "\n" for i in range(100))
        (tmp_path / "a.jsonl").write_text(lines)
        assert supar_here("data", "prepare", "a.jsonl", "-o", "bins", "--field", "body", "-q").status == 0
        direct = batches.load(Data(source=str(tmp_path / "a.jsonl"), field="body"), vocab=256, context=8)
        prepared = batches.load(Data(source=str(tmp_path / "bins")), vocab=256, context=8)
        for name in ("train", "validation"):
            one, other = (getattr(tokens, name).segments[0].tokens for tokens in (direct, prepared))
            assert np.array_equal(one, other)

    def test_a_tokenizer_is_part_of_the_datas_identity(
        self, supar_here: Supar, text_file: Path, tmp_path: Path
    ) -> None:
        tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
        hashes, counts = set(), set()
        for words in ({"<unk>": 0, "import": 1}, {"<unk>": 0, "import": 1, "self": 2}):
            made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
            made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
            made.save(str(tmp_path / "tokenizer.json"))
            told = json.loads(
                supar_here("data", "inspect", str(text_file), "--tokenizer", "tokenizer.json", "--json").out
            )
            hashes.add(told["hash"])
            counts.add(told["vocab"])
        assert len(hashes) == 2 and counts == {2, 3}
        called = supar_here("data", "prepare", str(text_file), "-o", "bins", "--tokenizer", "tokenizer.json", "--json")
        assert json.loads(called.out)["vocab"] == 3

    def test_inspect_says_how_tokens_are_read(self, supar_here: Supar, tmp_path: Path) -> None:
        np.array([7, 300, 12] * 50, "<u2").tofile(tmp_path / "a.bin")
        told = json.loads(supar_here("data", "inspect", "a.bin", "--json").out)
        assert (told["format"], told["vocab"], told["first"][:3]) == ("nanogpt", 301, [7, 300, 12])
        assert told["tokens"] == {"train": 135, "validation": 15} and told["separator"] is told["documents"] is None

    def test_inspect_says_what_is_read_how_and_what_is_wrong_with_it(self, supar_here: Supar, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        lines = [json.dumps({"body": "some words " * 99}) + "\n"] * 40
        for split in ("train", "dev", "test"):
            (tmp_path / "d" / f"{split}.jsonl").write_text("".join(lines[:-1]) + '{"body": "a \\udc00"}\n')
        (tmp_path / "d" / "README.md").touch()
        called = supar_here("data", "inspect", "d", "--field", "body", "--json")
        told = json.loads(called.out)
        assert told["first_files"] == {"train": ["train.jsonl"], "validation": ["dev.jsonl"]}
        assert told["split"] == "by their names" and set(told["left_out"].values()) == {"README.md", "test.jsonl"}
        assert (told["documents"], told["tokens_per_document"]) == (80, round(sum(told["tokens"].values()) / 80, 1))
        assert told["separator"] == {"token": "\\0", "id": 0, "count": {"train": 40, "validation": 40}}
        assert told["largest_id"] == told["vocab"] - 1 == 0xEF
        what = "d/train.jsonl:40: lone surrogate U+DC00 is not UTF-8; 1 such in the file"
        assert what in told["undecodable"] and f"warning: {what}, read as U+FFFD\n" in called.err
        assert "data: left out: test.jsonl (a test split; it is never trained on)\n" in called.err

    def test_commands_that_take_data_take_how_they_are_read(
        self, supar_here: Supar, plan: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "x.jsonl").write_text('{"body": "some words of a document"}\n' * 400)
        for command in (
            ["transfer", "-o", "x.yaml"],
            ["sweep", "--over", "lr=0.01,0.02", "-o", "s"],
            ["check", "-o", "c"],
        ):
            (tmp_path / "proxy.yaml").write_text(PROXY)
            called = supar_here(*command, "--data", "x.jsonl", "--field", "none", "--format", "jsonl", "-q")
            read = command[0] != "transfer"  # which hashes data and does not read them
            assert called.status == (2 if read else 0), called.err
            assert (
                not read or "no text under 'none'; expected data.field (--field), one of its keys: body" in called.err
            )
        planned = parse(Plan, document.read_file(str(tmp_path / "x.yaml"))[0]).data
        assert (planned.field, planned.format) == ("none", "jsonl")
        assert planned.hash == corpus.identify(Data(source="x.jsonl", field="none", format="jsonl")).hash

    @pytest.mark.parametrize(
        ("arguments", "status", "what"),
        [
            (["inspect", "none.txt"], 2, "none.txt: no such file"),
            (["inspect", "odd.bin"], 3, "odd.bin: a corrupt token file"),
            (["inspect", "text.txt", "--format", "parquet"], 2, "--format"),
            (["prepare", "odd.bin", "-o", "bins"], 2, "holds tokens"),
            (["prepare", "text.txt", "-o", "text.txt"], 2, "is a file"),
            (["prepare", "text.txt", "-o", "taken"], 2, "train.bin: exists"),
            (["prepare", "text.txt", "-o", "bins", "--tokenizer", "none.json"], 2, "none.json: no such file"),
            (["prepare", "tiny.txt", "-o", "."], 2, "too few for a validation split"),
        ],
    )
    def test_refusals_leave_nothing(
        self,
        supar_here: Supar,
        text_file: Path,
        tmp_path: Path,
        unchanged: Any,
        arguments: list[str],
        status: int,
        what: str,
    ) -> None:
        (tmp_path / "odd.bin").write_bytes(b"\1\2\3")
        (tmp_path / "tiny.txt").write_bytes(b"abc")
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "train.bin").write_bytes(b"\1\2")
        unchanged()
        called = supar_here("data", *arguments)
        assert (called.status, called.out) == (status, "") and what in called.err


class TestDoctor:
    def test_says_what_runs_here(self, supar_here: Supar, text_file: Path) -> None:
        called = supar_here("doctor", "--data", str(text_file), "--device", "cpu", "--steps", "1", "--json")
        told = json.loads(called.out)
        assert called.status == 0 and told["problems"] == []
        assert told["step"]["device"] == "cpu" and told["step"]["milliseconds"] > 0
        assert told["packages"]["torch"] and told["data"]["bytes"] == text_file.stat().st_size

    def test_what_is_wrong_is_named_and_ends_with_3(self, supar_here: Supar) -> None:
        called = supar_here("doctor", "--data", "none.txt", "--device", "cuda:99", "--steps", "1", "--json")
        told = json.loads(called.out)
        assert called.status == 3 and told["step"] is None and told["data"] is None
        assert [problem.split(":")[0] for problem in told["problems"]] == ["data", "step"]
        assert "none.txt" in called.err and "error:" in called.err
