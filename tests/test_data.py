"""Token streams: what a batch depends on, how corpora are split, and what is refused with which name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from supar_cli.data import batches, corpus
from supar_cli.data.batches import Mixture, Segment, Split
from supar_cli.errors import InputError, SetupError
from supar_cli.planning.problems import validate
from supar_cli.planning.spec import Data, override
from tests.conftest import real_text


def split_of(*lengths: int) -> Split:
    """Segments whose tokens count on from 0, so that a token says where it came from."""
    ends = np.cumsum(lengths)
    starts = ends - np.array(lengths)
    made = [Segment(f"s{i}", np.arange(a, b)) for i, (a, b) in enumerate(zip(starts, ends, strict=True))]
    return Split(made, int(ends[-1]))


def loaded(source: Path, context: int = 8, vocab: int = 256, **section: Any) -> batches.Tokens:
    return batches.load(Data(source=str(source), **section), vocab=vocab, context=context)


def text_of(split: Split) -> bytes:
    return b"".join(np.asarray(segment.tokens).astype(np.uint8).tobytes() for segment in split.segments)


class TestBatch:
    def test_is_a_pure_function_of_seed_and_step(self) -> None:
        one, other = split_of(500), split_of(500)
        one.batch(3, 99, 4, 8)  # whatever was drawn before plays no part
        for step in (0, 7, 10**6):
            assert torch.equal(one.batch(3, step, 4, 8)[0], other.batch(3, step, 4, 8)[0])

    def test_changes_with_the_seed_and_with_the_step(self) -> None:
        split = split_of(5000)
        drawn = {tuple(split.batch(seed, step, 4, 8)[0][:, 0].tolist()) for seed in range(3) for step in range(20)}
        assert len(drawn) == 60  # a repetition has odds of 60²/2 in 5000⁴

    def test_is_the_one_it_always_was(self) -> None:
        # a run is continued by a later supar or numpy only if these stay; written down from numpy 2.4
        inputs, _ = split_of(10_000).batch(0, 0, 4, 8)
        assert inputs[:, 0].tolist() == [1017, 7284, 9157, 2607]

    def test_targets_are_the_next_tokens(self) -> None:
        inputs, targets = split_of(300).batch(0, 5, 6, 16)
        assert inputs.shape == targets.shape == (6, 16) and inputs.dtype == torch.int64
        assert torch.equal(targets, inputs + 1)  # the tokens count on

    def test_a_larger_batch_begins_with_the_smaller_one(self) -> None:
        split = split_of(300)
        assert torch.equal(split.batch(1, 2, 8, 4)[0][:3], split.batch(1, 2, 3, 4)[0])

    def test_windows_never_cross_segments_and_all_are_reachable(self) -> None:
        lengths = (5, 12, 3, 9, 20)  # windows of 9: none, 4, none, 1, 12
        split = split_of(*lengths)
        assert split.windows(9) == 17
        starts = [split.window(index, 9) for index in range(17)]
        assert [int(window[0]) for window in starts] == [*range(5, 9), 20, *range(29, 41)]
        for window in starts:
            assert (np.diff(window) == 1).all()
        with pytest.raises(IndexError):
            split.window(17, 9)

    def test_draws_spread_over_all_windows(self) -> None:
        # 4000 draws over 20 windows: χ² with 19 degrees is above 43.8 with P = .001 for a fair draw; the seed is fixed
        split = split_of(28)
        first = torch.cat([split.batch(0, step, 40, 8)[0][:, 0] for step in range(100)]).numpy()
        counts = np.bincount(first, minlength=20)
        assert ((counts - 200) ** 2 / 200).sum() < 43.8
        assert ((np.bincount(first // 2, minlength=20) - 200) ** 2 / 200).sum() > 43.8  # the control: half never drawn


class TestMixture:
    WEIGHTS = (3.0, 1.0, 0.5)

    def mixture(self, *weights: float) -> Mixture:
        """Splits whose tokens tell them apart: thousands."""
        splits = [Split([Segment("s", 1000 * at + np.arange(900))], 10_000) for at in range(len(weights))]
        return Mixture(splits, list(weights))

    def test_is_a_pure_function_of_seed_and_step(self) -> None:
        one, other = self.mixture(*self.WEIGHTS), self.mixture(*self.WEIGHTS)
        one.batch(3, 99, 4, 8)
        for step in (0, 7, 10**6):
            assert torch.equal(one.batch(3, step, 4, 8)[0], other.batch(3, step, 4, 8)[0])
        whole, part = one.batch(3, 7, 8, 4), one.batch(3, 7, 8, 4, slice(2, 5))
        assert all(torch.equal(a[2:5], b) for a, b in zip(whole, part, strict=True))

    def test_draws_sources_by_their_weights(self) -> None:
        # 8000 draws, standard errors of 43, 38 and 28 at most: 4.5 of them are exceeded with P = 7e-6, and the seed is fixed
        rows = torch.cat([self.mixture(*self.WEIGHTS).batch(0, step, 80, 8)[0][:, 0] for step in range(100)])
        counts = torch.bincount(rows // 1000, minlength=3).tolist()
        expected = [8000 * weight / sum(self.WEIGHTS) for weight in self.WEIGHTS]
        off = [
            abs(count - mean) / (mean * (1 - mean / 8000)) ** 0.5 for count, mean in zip(counts, expected, strict=True)
        ]
        assert max(off) < 4.5
        equal = [abs(count - 8000 / 3) / (8000 * 2 / 9) ** 0.5 for count in counts]
        assert max(equal) > 20  # the control: not drawn alike

    def test_of_one_source_is_that_source(self) -> None:
        one = self.mixture(2.5)
        for step in range(5):
            assert torch.equal(one.batch(0, step, 4, 8)[0], one.splits[0].batch(0, step, 4, 8)[0])
            assert torch.equal(one.evaluation(step, 5, 4, 8)[0], one.splits[0].evaluation(step, 5, 4, 8)[0])

    def test_evaluates_each_source_in_proportion(self) -> None:
        mixed = self.mixture(*self.WEIGHTS)
        rows = torch.cat([mixed.evaluation(index, 9, 8, 8)[0][:, 0] for index in range(9)])
        assert torch.bincount(rows // 1000).tolist() == [48, 16, 8]
        assert len(set(rows.tolist())) == 72  # of 72, none twice
        assert mixed.windows(9) == int(892 / (3 / 4.5))

    def test_another_source_takes_its_place(self) -> None:
        mixed = {"source": "mixture", "sources": [{"source": "a.txt", "weight": 1}], "hash": "sha256:0"}
        assert Data.model_validate(override(mixed, {"source": "b.txt"})) == Data(source="b.txt")

    def test_is_loaded_from_its_sources(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"a" * 3000)
        (tmp_path / "b.jsonl").write_text('{"body": "bb"}\n' * 1000)
        sources = [
            {"source": str(tmp_path / "a.txt"), "weight": 1},
            {"source": str(tmp_path / "b.jsonl"), "weight": 3, "field": "body"},
        ]
        section = Data.model_validate({"sources": sources})
        found = batches.load(section, vocab=256, context=8)
        text = bytes(found.train.batch(0, 0, 400, 8)[0].flatten().to(torch.uint8).tolist())
        assert 0.15 < text.count(b"a") / len(text) < 0.35 and b"bb\0" in text and section.source == "mixture"
        assert found.hash == corpus.identify(section).hash
        with pytest.raises(InputError, match=r"b\.jsonl:1: no text under 'text'"):
            batches.load(
                Data.model_validate({"sources": [sources[0], {**sources[1], "field": "text"}]}), vocab=256, context=8
            )

    @pytest.mark.parametrize(
        ("section", "what"),
        [
            ({"source": "a.txt"}, "data.source: a.txt is given beside sources"),
            ({"field": "body"}, "data.field: body is given beside sources"),
            ({"sources": [{"source": "a", "weight": 0}]}, "data.sources[0].weight: should be greater than 0"),
            ({"sources": [{"source": "a", "weigth": 1, "weight": 1}]}, "unknown key 'weigth'; did you mean 'weight'?"),
            ({"encoding": "klingon", "sources": []}, "data.encoding: klingon is not known"),
        ],
    )
    def test_what_is_wrong_with_it_is_named(self, section: dict[str, Any], what: str) -> None:
        with pytest.raises(InputError, match=re.escape(what)):
            validate(Data, {"sources": [{"source": "b.txt", "weight": 1}], **section}, "data")


class TestEvaluation:
    def test_covers_the_split_evenly_and_always_alike(self) -> None:
        split = split_of(108)  # 100 windows of 9
        starts = [split.evaluation(i, 5, 4, 8)[0][:, 0].tolist() for i in range(5)]
        assert [start for batch in starts for start in batch] == list(range(0, 100, 5))
        assert starts[2] == split.evaluation(2, 5, 4, 8)[0][:, 0].tolist()


class TestSplit:
    def test_one_file_holds_out_its_tail(self, tmp_path: Path) -> None:
        text = real_text(1005)
        (tmp_path / "a.txt").write_bytes(text)
        tokens = loaded(tmp_path / "a.txt")
        assert text_of(tokens.train) == text[:905] and text_of(tokens.validation) == text[905:]

    def test_a_folder_is_split_by_file_with_a_separator(self, tmp_path: Path) -> None:
        for i in range(30):
            (tmp_path / f"f{i:02}.txt").write_bytes(b"%02d" % i * 20)
        found = corpus.find(Data(source=str(tmp_path)))
        assert len(found.validation) == 1  # about one in twenty
        tokens = loaded(tmp_path)
        documents = [set(text_of(split).rstrip(b"\0").split(b"\0")) for split in (tokens.train, tokens.validation)]
        assert [len(part) for part in documents] == [29, 1] and not documents[0] & documents[1]

    def test_adding_a_file_moves_no_other(self, tmp_path: Path) -> None:
        for i in range(60):
            (tmp_path / f"f{i}.txt").write_text("x" * 30)
        before = corpus.find(Data(source=str(tmp_path)))
        (tmp_path / "new.txt").write_text("y")
        after = corpus.find(Data(source=str(tmp_path)))
        assert set(before.train) <= set(after.train) and set(before.validation) <= set(after.validation)
        assert len(before.validation) > 1

    def test_a_file_named_for_validation_is_it(self, tmp_path: Path) -> None:
        for name in ("a_train.txt", "a_val.txt", "validity.txt"):
            (tmp_path / name).write_bytes(name.encode() * 4)
        tokens = loaded(tmp_path)
        assert text_of(tokens.validation) == b"a_val.txt" * 4

    def test_the_standard_library_is_text_without_tests(self) -> None:
        found = corpus.find(Data())
        names = [path.relative_to(found.root).parts for path in found.files]
        assert ("argparse.py",) in names and len(names) > 300
        assert not any({"test", "tests", "site-packages"} & set(parts) for parts in names)
        assert not set(found.train) & set(found.validation)


class TestJsonl:
    def test_texts_are_read_with_a_separator(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(json.dumps({"text": f"é{i:03}", "other": 1}) for i in range(20)) + "\n\n", "utf-8")
        tokens = loaded(path)
        whole = text_of(tokens.train) + text_of(tokens.validation)
        assert whole == b"".join(f"é{i:03}\0".encode() for i in range(20))

    def test_another_field(self, tmp_path: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"body": "' + "ab" * 100 + '"}\n')
        assert text_of(loaded(path, field="body").train).startswith(b"abab")

    @pytest.mark.parametrize(
        ("line", "what"),
        [
            ("{not json", "line 3 is not JSON: "),
            ("\xff", "line 3 is not JSON: "),
            ("[" * 100_000, "line 3 is not JSON: nested too deeply"),
            ('{"txt": "a", "id": 7}', "no text under 'text'; expected data.field (--field), one of its keys: txt, id"),
            ('{"text": null}', "'text' is null; expected a text"),
            ('{"text": 3}', "'text' is a number; expected a text"),
            ('{"text": {"a": "b"}}', "'text' is an object; expected a text"),
            ("[1]", "is a list; expected a JSON object"),
            ('"x"', "is a text; expected a JSON object"),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path: Path, line: str, what: str) -> None:
        path = tmp_path / "a.jsonl"
        path.write_bytes(b'{"text": "good"}\n\n' + line.encode("latin-1") + b'\n{"text": "good"}\n')
        with pytest.raises(InputError, match=re.escape(f"a.jsonl:3: {what}")):
            loaded(path)


def write_shard(
    path: Path, tokens: list[int], *, magic: int = 20240520, version: int = 1, count: int | None = None
) -> None:
    """A shard as llm.c writes it: 256 int32, of which the first three are magic, version and count; then uint16."""
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())


class TestTokenFiles:
    def test_nanogpt(self, tmp_path: Path) -> None:
        values = [(7 * i) % 50_000 for i in range(400)]
        (tmp_path / "train.bin").write_bytes(np.array(values, "<u2").tobytes())
        (tmp_path / "val.bin").write_bytes(np.array(values[:50], "<u2").tobytes())
        tokens = loaded(tmp_path, vocab=50_257)
        assert [tokens.train.total, tokens.validation.total] == [400, 50]
        assert tokens.train.window(300, 5).tolist() == values[300:305]

    def test_llmc(self, tmp_path: Path) -> None:
        for i in range(3):
            write_shard(tmp_path / f"fine_train_{i}.bin", [1000 * i + j for j in range(100)])
        write_shard(tmp_path / "fine_val_0.bin", list(range(9000, 9050)))
        tokens = loaded(tmp_path, vocab=50_257)
        assert tokens.train.windows(9) == 3 * 92  # shards are segments
        assert tokens.train.window(92, 9).tolist() == list(range(1000, 1009))
        assert tokens.validation.window(0, 3).tolist() == [9000, 9001, 9002]

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            ({"count": 99}, "its header counts 99 tokens, it holds 100"),
            ({"count": 101}, "its header counts 101 tokens, it holds 100"),
            ({"magic": 20240801}, r"not an llm\.c shard of version 1 \(uint16\) or 7 \(uint32\)"),
            ({"version": 7}, r"not an llm\.c shard of version 1"),
            ({"magic": 20250101}, r"not an llm\.c shard"),
        ],
    )
    def test_a_corrupt_shard_is_named(self, tmp_path: Path, change: dict[str, Any], what: str) -> None:
        path = tmp_path / "shard.bin"
        write_shard(path, list(range(100)), **change)
        with pytest.raises(SetupError, match=rf"shard\.bin: .*{what}"):
            loaded(path, format="llmc", vocab=50_257)

    @pytest.mark.parametrize("bytes_kept", [4, 1023, 1024, 1025, 1024 + 199])
    def test_a_truncated_shard_is_named(self, tmp_path: Path, bytes_kept: int) -> None:
        path = tmp_path / "shard.bin"
        write_shard(path, list(range(100)))
        path.write_bytes(path.read_bytes()[:bytes_kept])
        with pytest.raises(SetupError, match=r"shard\.bin: "):
            loaded(path, vocab=50_257)

    @pytest.mark.parametrize("size_bytes", [0, 201])
    def test_a_nanogpt_file_of_half_tokens_is_named(self, tmp_path: Path, size_bytes: int) -> None:
        path = tmp_path / "tokens.bin"
        path.write_bytes(bytes(size_bytes))
        with pytest.raises(SetupError, match=rf"tokens\.bin: a corrupt token file: {size_bytes} bytes"):
            loaded(path)

    def test_a_token_beyond_the_vocabulary_is_named_with_its_place(self, tmp_path: Path) -> None:
        values = np.arange(100) % 50
        values[37] = 256
        path = tmp_path / "tokens.bin"
        path.write_bytes(values.astype("<u2").tobytes())
        tokens = loaded(path)
        tokens.train.window(20, 9)
        with pytest.raises(
            SetupError, match=r"tokens\.bin: token 37 is 256; expected less than the vocabulary size 256"
        ):
            tokens.train.window(35, 9)


class TestTokenizer:
    @pytest.fixture
    def made(self, tmp_path: Path) -> Path:
        tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hf")
        words = {"<unk>": 0, "the": 1, "cat": 2, "sat": 3, "<|endoftext|>": 4}
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save(str(tmp_path / "tokenizer.json"))
        return tmp_path / "tokenizer.json"

    def test_a_tokenizer_json_encodes_with_its_end_of_text(self, tmp_path: Path, made: Path) -> None:
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "the cat sat"}\n{"text": "the dog"}\n' * 30)
        tokens = loaded(path, vocab=5, tokenizer=str(made))
        assert tokens.train.window(0, 7).tolist() == [1, 2, 3, 4, 1, 0, 4]

    def test_a_model_with_a_smaller_vocabulary_is_refused(self, tmp_path: Path, made: Path, text_file: Path) -> None:
        with pytest.raises(InputError, match=r"model\.vocab: 4 is less than the 5 tokens"):
            loaded(text_file, vocab=4, tokenizer=str(made))

    def test_what_is_no_tokenizer_is_named(self, tmp_path: Path, text_file: Path) -> None:
        pytest.importorskip("tokenizers", reason="needs the extra hf")
        (tmp_path / "broken.json").write_text("{}")
        with pytest.raises(SetupError, match=r"broken\.json: not a tokenizer\.json"):
            loaded(text_file, tokenizer=str(tmp_path / "broken.json"))
        with pytest.raises(InputError, match=r"data\.tokenizer: .*none\.json: no such file"):
            loaded(text_file, tokenizer=str(tmp_path / "none.json"))


class TestIdentity:
    def test_the_hash_sees_content_names_and_nothing_else(self, tmp_path: Path) -> None:
        def hash_of(folder: str, **files: str) -> str:
            (tmp_path / folder).mkdir()
            for name, text in files.items():
                (tmp_path / folder / f"{name}.txt").write_text(text)
            return corpus.content_hash(corpus.find(Data(source=str(tmp_path / folder))))

        one = hash_of("one", a="x", b="y")
        assert one == hash_of("moved", a="x", b="y")
        assert len({one, hash_of("c", a="x", b="z"), hash_of("d", a="x", c="y"), hash_of("e", a="xy", b="")}) == 4

    def test_changed_data_is_refused_by_name(self, text_file: Path) -> None:
        known = corpus.identify(Data(source=str(text_file)))
        batches.load(known, vocab=256, context=8)
        text_file.write_bytes(text_file.read_bytes()[:-1] + b"!")
        with pytest.raises(InputError, match=r"data\.hash: .*text\.txt is not the data this document was made with"):
            batches.load(known, vocab=256, context=8)


class TestRefusals:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"data\.source: .*none\.txt: no such file or folder"):
            loaded(tmp_path / "none.txt")

    @pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
    def test_empty(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(InputError, match=r"empty\.(txt: the file is empty|jsonl: 0 bytes are too few)"):
            loaded(tmp_path / name)

    def test_a_folder_without_corpus_files(self, tmp_path: Path) -> None:
        (tmp_path / "image.png").write_bytes(b"x")
        with pytest.raises(
            InputError, match=r"no data in it; image\.png: of no format that supar reads; expected \.txt, .* files"
        ):
            loaded(tmp_path)

    def test_a_folder_of_several_formats(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x")
        (tmp_path / "b.jsonl").write_text("{}")
        with pytest.raises(InputError, match=r"several formats \(jsonl, text\)"):
            loaded(tmp_path)

    @pytest.mark.parametrize(("size_bytes", "which"), [(8, "8 training"), (9, "0 validation"), (80, "8 validation")])
    def test_too_small_for_a_window(self, tmp_path: Path, size_bytes: int, which: str) -> None:
        (tmp_path / "a.txt").write_bytes(b"x" * size_bytes)
        with pytest.raises(InputError, match=rf"{which} tokens; expected 9 or more in one file"):
            loaded(tmp_path / "a.txt")

    def test_just_large_enough(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"x" * 90)
        assert loaded(tmp_path / "a.txt").validation.windows(9) == 1
