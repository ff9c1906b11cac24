"""`supar evaluate`: figures against the harness' definition, token by token in float64, and faults that it would show."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import supar_cli
from supar_cli.data import prepare
from supar_cli.errors import InputError, SetupError, UnusableResult
from supar_cli.exporting import evaluate as evaluation
from supar_cli.exporting import loaded_model
from supar_cli.planning.spec import Data
from tests.conftest import plan_from, proxy_fields, real_text
from tests.test_cli import Supar

CONTEXT = 16
STEPS = {"steps": 6, "batch_size": 4, "eval_every": 6, "eval_batches": 1}
SOURCE = real_text(20_000).decode()
LONG = "naïve café 𝔘𝔫𝔦 日本語 — Ā\u0301 \ufffd <0x00> Ġ </s>"
# from shorter than the context to longer, at its edges, not of ASCII; 39 of them
TEXTS = [SOURCE[100 * n : 100 * n + n] for n in (1, 2, 15, 16, 17, 18, 31, 32, 33, 34, 97)]
TEXTS += ["", LONG, "\U0010ffff", "é" * 8, *(SOURCE[90 * n : 90 * n + 3 * n % 41 + 1] for n in range(24))]
FEW = {"few": TEXTS[8:15], "alike": [SOURCE[500:900], SOURCE[900:1300], SOURCE[1300:1700]]}
Model = Any


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "text.txt").write_text(SOURCE)
    for name, texts in (("texts", TEXTS), *FEW.items()):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"page": text}) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A sparse run on bytes, long enough to use its context."""
    train = STEPS | {"steps": 40, "eval_every": 40}
    supar_cli.train(plan_from(proxy_fields(str(folder / "text.txt"), train=train)), folder / "runs/bytes")
    return folder / "runs/bytes"


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    from tests.test_tokenizer import plain

    made = plain()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.fixture(scope="module")
def run_of_vocabulary(folder: Path, vocabulary: Path) -> Path:
    data = {"source": str(folder / "texts.jsonl"), "field": "page", "tokenizer": str(vocabulary)}
    plan = plan_from(proxy_fields("", data=data, model={"vocab": 300}, train=STEPS))
    supar_cli.train(plan, folder / "runs/vocabulary")
    return folder / "runs/vocabulary"


FAULTS = (
    "first of a window is not scored",
    "overlap is scored twice",
    "separator is scored",
    "last window does not reach back",
)


def counts_of(at: int, count: int, fault: str) -> float:
    """How often token `at` of `count` is scored: once, but for a fault."""
    if fault == FAULTS[0]:
        return float(at % CONTEXT > 0)
    last = (count - 1) // CONTEXT * CONTEXT  # where the last window's own tokens begin
    return 2.0 if fault == FAULTS[1] and count - CONTEXT <= at < last else 1.0


@torch.no_grad()
def by_definition(model: Model, documents: list[list[int]], end: int, fault: str = "") -> list[np.ndarray]:
    """For each document (nats, how often it counts) of its tokens, each after the context that the harness gives it.

    There the tokens are predicted in groups of the context's length, the first token too, after the one that separates
    documents. All of a group begin their context at one place, as far before its last token as the model can see: the last
    group, which has fewer, sees tokens that it does not predict again.
    """
    documents = [[*tokens, end] if fault == FAULTS[2] else tokens for tokens in documents]
    found = [np.zeros((len(tokens), 2)) for tokens in documents]
    alike: dict[int, list[tuple[list[int], int, int]]] = {}  # by the length of the context, to be predicted at once
    for number, tokens in enumerate(documents):
        for at in range(len(tokens)):
            end_of_group = (at // CONTEXT + 1) * CONTEXT
            first = (end_of_group if fault == FAULTS[3] else min(end_of_group, len(tokens))) - CONTEXT - 1
            before = [end, *tokens[:at]] if first < 0 else tokens[first:at]
            alike.setdefault(len(before), []).append((before, number, at))
    for group in alike.values():
        rows = model(torch.tensor([before for before, *_ in group]))[:, -1].log_softmax(-1)
        for row, (_, number, at) in zip(rows, group, strict=True):
            tokens, counts = documents[number], counts_of(at, len(documents[number]), fault)
            found[number][at] = -float(row[tokens[at]]) * counts, counts
    return found


def sums_of(scores: list[np.ndarray]) -> np.ndarray:
    """(nats, tokens) of each document."""
    return np.array([one.sum(0) for one in scores])


def figures(scores: list[np.ndarray], sizes: list[int]) -> dict[str, float]:
    nats, tokens = sums_of(scores).sum(0)
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(nats / tokens),
        "bits_per_byte": nats / sum(sizes) / math.log(2),
    }


def error_of_ratio(sums: np.ndarray) -> float:
    """The standard error of Σ nats / Σ tokens, by the delta method: that of the mean of what each part adds to it."""
    nats, tokens = sums.T
    parts = (nats - nats.sum() / tokens.sum() * tokens) / tokens.mean()
    return float(np.std(parts, ddof=1) / math.sqrt(len(parts)))


class TestDefinition:
    def test_figures_are_those_of_the_harness(self, folder: Path, run: Path) -> None:
        found = supar_cli.evaluate(run, folder / "texts.jsonl", field="page", device="cpu")
        documents, sizes = [list(text.encode()) for text in TEXTS], [len(text.encode()) for text in TEXTS]
        model = supar_cli.model(run).double()
        scores = by_definition(model, documents, 0)
        wanted = figures(scores, sizes)
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
        counts = {"tokens": sum(sizes), "bytes": sum(sizes), "documents": len(TEXTS) - 1, "context": CONTEXT}
        assert {key: found[key] for key in counts} == counts and found["warnings"] == []
        for fault in FAULTS:
            wrong = figures(by_definition(model, documents, 0, fault), sizes)
            assert wrong["loss"] != pytest.approx(wanted["loss"], rel=1e-4), fault
        characters = figures(scores, [len(text) for text in TEXTS])  # bytes counted as characters
        assert characters["bits_per_byte"] != pytest.approx(found["bits_per_byte"], rel=1e-3)

    def test_standard_errors_are_over_documents_if_there_are_many(self, folder: Path, run: Path) -> None:
        found = supar_cli.evaluate(run, folder / "texts.jsonl", field="page")
        documents = [list(text.encode()) for text in TEXTS if text]
        sums = sums_of(by_definition(supar_cli.model(run).double(), documents, 0))
        assert found["standard_errors"] == {"over": "documents", "count": len(documents)}
        assert found["loss_se"] == pytest.approx(error_of_ratio(sums), rel=1e-5)
        assert found["bits_per_byte_se"] == pytest.approx(found["loss_se"] / math.log(2))
        assert found["perplexity_se"] == pytest.approx(found["perplexity"] * found["loss_se"])
        means = sums[:, 0] / sums[:, 1]  # the control: as if all documents were of one length
        assert np.std(means, ddof=1) / math.sqrt(len(means)) != pytest.approx(found["loss_se"], rel=0.02)

    @pytest.mark.parametrize("name", FEW)
    def test_of_few_documents_the_larger_standard_error_counts(self, folder: Path, run: Path, name: str) -> None:
        """That over documents where they differ more than their windows do, as windows of one document are alike."""
        found = supar_cli.evaluate(run, folder / f"{name}.jsonl", field="page")
        documents = [list(text.encode()) for text in FEW[name] if text]
        scores = by_definition(supar_cli.model(run).double(), documents, 0)
        windows = [one[at : at + CONTEXT].sum(0) for one in scores for at in range(0, len(one), CONTEXT)]
        errors = {"documents": error_of_ratio(sums_of(scores)), "windows": error_of_ratio(np.array(windows))}
        over = "windows" if name == "alike" else "documents"
        count = len(windows) if over == "windows" else len(documents)
        assert found["windows"] == len(windows) and found["standard_errors"] == {"over": over, "count": count}
        assert found["loss_se"] == pytest.approx(max(errors.values()), rel=1e-5) == pytest.approx(errors[over])

    def test_one_window_has_no_standard_error(self, folder: Path, run: Path, supar: Supar) -> None:
        said = supar("evaluate", str(run), "--tokens", "3").err
        assert "3 tokens of 1 document (no standard error of one window)" in said and "±" not in said

    def test_batches_and_padding_change_nothing(self, folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = supar_cli.evaluate(run, folder / "texts.jsonl", field="page")
        monkeypatch.setattr(evaluation, "TOKENS_AT_ONCE", 1)
        one_by_one = supar_cli.evaluate(run, folder / "texts.jsonl", field="page")
        assert one_by_one["loss"] == pytest.approx(whole["loss"], rel=1e-6)

    @pytest.mark.parametrize("count", [1, 40, 300])
    def test_the_first_tokens_alone(self, folder: Path, run: Path, count: int) -> None:
        found = supar_cli.evaluate(run, folder / "texts.jsonl", field="page", tokens=count)
        documents, left = [], count
        for text in TEXTS:
            documents.append(list(text.encode())[:left])
            left -= len(documents[-1])
        scores = by_definition(supar_cli.model(run).double(), documents, 0)
        assert found["tokens"] == found["bytes"] == count and f"first tokens up to {count}" in found["data"][0]["part"]
        assert found["loss"] == pytest.approx(figures(scores, [count])["loss"], rel=1e-6)


def with_data(monkeypatch: pytest.MonkeyPatch, run: Path, **changes: str) -> Model:
    """The model of a run whose data section is taken for another, in float64."""
    plan, model = loaded_model.load(run, "cpu")
    changed = plan.model_copy(update={"data": plan.text.model_copy(update=changes)})
    monkeypatch.setattr(loaded_model, "load", lambda *_: (changed, model))
    return copy.deepcopy(model).double()


class TestSeparator:
    def test_is_the_runs(self, folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = with_data(monkeypatch, run, separator="|")
        documents = [list(text.encode()) for text in TEXTS[8:15]]
        found = supar_cli.evaluate(run, folder / "few.jsonl", field="page")["loss"]
        right, wrong = (figures(by_definition(model, documents, end), [1])["loss"] for end in (ord("|"), 0))
        assert found == pytest.approx(right, rel=1e-6) != pytest.approx(wrong, rel=1e-6)

    def test_without_one_first_tokens_and_their_bytes_are_left_out(
        self, run_of_vocabulary: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        from tests.test_tokenizer import plain

        plain("<fin>").save(str(tmp_path / "t.json"))
        model = with_data(monkeypatch, run_of_vocabulary, tokenizer=str(tmp_path / "t.json"))
        texts = [f"{at}: {SOURCE[at * 50 : at * 50 + 40]}" for at in range(5)]  # each begins with a token of one byte
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        documents = [one.ids for one in plain("<fin>").encode_batch(texts)]
        scores = [by_definition(model, [tokens], first)[0] for first, *tokens in documents]
        wanted = figures(scores, [len(text.encode()) - 1 for text in texts])
        found = supar_cli.evaluate(run_of_vocabulary, tmp_path / "a.jsonl")
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
        assert found["data"][0]["separator"] is None and "no token of it is known" in found["warnings"][0]


class TestVocabulary:
    def test_tokens_of_a_tokenizer_and_bytes_of_the_text(
        self, folder: Path, run_of_vocabulary: Path, vocabulary: Path
    ) -> None:
        import tokenizers

        reader = tokenizers.Tokenizer.from_file(str(vocabulary))
        reader.encode_special_tokens = True  # `</s>` in a text is text
        reader.decoder = tokenizers.decoders.ByteLevel()
        documents = [reader.encode(text).ids for text in TEXTS]
        sizes, end = [len(text.encode()) for text in TEXTS], reader.token_to_id("</s>")
        scores = by_definition(supar_cli.model(run_of_vocabulary).double(), documents, end)
        wanted = figures(scores, sizes)
        found = supar_cli.evaluate(run_of_vocabulary, folder / "texts.jsonl", field="page")
        assert {key: found[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)
        assert found["tokens"] == sum(map(len, documents)) < found["bytes"] == sum(sizes)
        assert "trained on a part of it" in found["warnings"][0] and found["data"][0]["separator"] == "</s>"
        first = supar_cli.evaluate(run_of_vocabulary, folder / "texts.jsonl", field="page", tokens=101)
        before = next(n for n in range(len(documents)) if sum(map(len, documents[: n + 1])) > 101)
        within = reader.decode(documents[before][: 101 - sum(map(len, documents[:before]))])
        assert first["bytes"] == sum(sizes[:before]) + len(within.encode())

    def test_another_tokenizer_is_said_and_a_larger_one_refused(
        self, folder: Path, run: Path, run_of_vocabulary: Path, vocabulary: Path, tmp_path: Path
    ) -> None:
        texts = folder / "few.jsonl"
        swapped = json.loads(vocabulary.read_text())
        swapped["model"]["vocab"] |= {"he": 257, "ll": 256}
        for name, text, said in (("same", vocabulary.read_text(), False), ("other", json.dumps(swapped), True)):
            (tmp_path / f"{name}.json").write_text(text)
            found = supar_cli.evaluate(run_of_vocabulary, texts, field="page", tokenizer=str(tmp_path / f"{name}.json"))
            assert any("whose ids may be others" in message for message in found["warnings"]) == said
        with pytest.raises(InputError, match=r"model\.vocab: 256 is less than the 263 tokens of the tokenizer"):
            supar_cli.evaluate(run, texts, field="page", tokenizer=str(vocabulary))

    def test_token_files_have_the_loss_of_their_text(
        self, folder: Path, run_of_vocabulary: Path, tmp_path: Path
    ) -> None:
        data = Data(source=str(folder / "texts.jsonl"), field="page", tokenizer=str(folder / "tokenizer.json"))
        prepare.prepare(data, tmp_path / "tokens", lambda *_: None)
        ids = np.concatenate([np.fromfile(tmp_path / f"tokens/{name}.bin", "<u2") for name in ("train", "val")])
        ids.tofile(tmp_path / "all.bin")
        found = supar_cli.evaluate(run_of_vocabulary, tmp_path / "all.bin")
        text = supar_cli.evaluate(run_of_vocabulary, folder / "texts.jsonl", field="page")
        assert found["loss"] == pytest.approx(text["loss"], rel=1e-6)
        assert (found["tokens"], found["documents"]) == (text["tokens"], text["documents"])
        assert "taken for those of the run's tokenizer" in found["warnings"][0]
        assert found["bits_per_byte"] is found["bits_per_byte_se"] is found["bytes"] is None and found["why_no_bytes"]

    def test_without_a_separator_the_first_token_is_not_scored(self, run: Path, tmp_path: Path) -> None:
        ids = np.frombuffer(SOURCE[:100].encode(), np.uint8).astype("<u2")
        ids.tofile(tmp_path / "ids.bin")
        found = supar_cli.evaluate(run, tmp_path / "ids.bin")
        scores = by_definition(supar_cli.model(run).double(), [ids[1:].tolist()], int(ids[0]))
        assert found["loss"] == pytest.approx(figures(scores, [1])["loss"], rel=1e-6) and found["tokens"] == 99
        for wrong in (256, -1):
            np.save(tmp_path / "ids.npy", np.array([*ids, wrong], np.int32))
            with pytest.raises(SetupError, match=f"token {wrong}; expected 0 to 255, the model's vocabulary"):
                supar_cli.evaluate(run, tmp_path / "ids.npy")


class TestSources:
    def test_all_sources_of_a_mixture(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "other.txt").write_text(SOURCE[:5000])
        sources = [{"source": str(path), "weight": 1.0} for path in (folder / "text.txt", tmp_path / "other.txt")]
        plan = plan_from(proxy_fields("mixture", data={"source": "mixture", "sources": sources}, train=STEPS))
        supar_cli.train(plan, tmp_path / "run")
        found = supar_cli.evaluate(tmp_path / "run")
        assert [one["source"] for one in found["data"]] == [str(one["source"]) for one in sources]
        assert (found["documents"], found["tokens"]) == (2, 2500)


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            ({"tokens": 0}, "tokens: 0; expected a whole number above 0"),
            ({"format": "jsonl"}, "format: says how --data is read; expected --data too"),
            ({"data": "gone.txt"}, "data.source: gone.txt: no such file or folder"),
            ({"data": "empty.txt"}, "data.source: empty.txt: no token to score"),
            ({"data": "empty.jsonl"}, "data.source: empty.jsonl: no token to score"),
            ({"data": "empty.txt", "format": "words"}, "format: "),
            ({"precision": "float16"}, "precision: "),
            ({"device": "abacus"}, "run.device: 'abacus' is not a valid device"),
        ],
    )
    def test_bad_input(self, run: Path, here: Path, arguments: dict[str, Any], problem: str) -> None:
        (here / "empty.txt").touch()
        (here / "empty.jsonl").write_text('{"text": ""}\n')
        with pytest.raises(InputError) as caught:
            supar_cli.evaluate(run, **arguments)
        assert str(caught.value).startswith(problem)

    def test_a_model_that_diverged(self, folder: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        plan, model = loaded_model.load(run, "cpu")
        model.final_norm.weight.data.fill_(math.nan)
        monkeypatch.setattr(loaded_model, "load", lambda *_: (plan, model))
        with pytest.raises(UnusableResult, match="its loss is not finite") as caught:
            supar_cli.evaluate(run, folder / "few.jsonl", field="page")
        assert caught.value.exit_status == 4
        model.final_norm.weight.data.fill_(1e5)  # the control: a loss beyond what a perplexity can say is one
        found = supar_cli.evaluate(run, folder / "few.jsonl", field="page")
        assert found["loss"] > 700 and found["perplexity"] is found["perplexity_se"] is None

    def test_text_for_a_run_of_token_files(self, folder: Path, tmp_path: Path) -> None:
        np.frombuffer(SOURCE.encode(), np.uint8).astype("<u2").tofile(tmp_path / "ids.bin")
        supar_cli.train(plan_from(proxy_fields(str(tmp_path / "ids.bin"), train=STEPS)), tmp_path / "run")
        with pytest.raises(InputError, match="hold tokens, whose tokenizer is not known; expected --tokenizer FILE"):
            supar_cli.evaluate(tmp_path / "run", folder / "few.jsonl", field="page")
        found = supar_cli.evaluate(tmp_path / "run", folder / "few.jsonl", field="page", tokenizer="bytes")
        assert "the run's tokenizer is not known" in found["warnings"][0]


def test_the_command_leaves_the_run_as_it_is(supar_here: Supar, folder: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "runs/mine")
    before = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")}
    texts = str(folder / "texts.jsonl")
    done = supar_here("evaluate", "mine", "--data", texts, "--field", "page", "--json")
    record = json.loads(done.out)
    assert done.status == 0 and record == supar_cli.evaluate(tmp_path / "runs/mine", texts, field="page") | {
        "checkpoint": record["checkpoint"]
    }
    assert f"{record['bits_per_byte']:.4f} ± {record['bits_per_byte_se']:.4f} bits per byte" in done.err
    after = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in tmp_path.rglob("*")}
    assert after == before
    held_out = supar_here("evaluate", "-o", "scores.yaml")
    assert held_out.status == 0 and held_out.out == "" and "what the run holds out" in held_out.err
    gone = supar_here("evaluate", "mine", "--data", "gone")
    assert gone.status == 2 and gone.err.endswith("error: --data gone: gone: no such file or folder\n")
