"""Tokenizer files beside a model: other programs make of a text the tokens that the model was trained on."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from supar_cli.data import tokenizer
from supar_cli.exporting import tokenizer_files
from supar_cli.exporting.tokenizer_files import write_tokenizer
from supar_cli.planning.plan import Plan
from tests.conftest import environment
from tests.test_tokenizer import ADDITIONS, TEXTS, plain

tokenizers = pytest.importorskip("tokenizers")
Plans = Callable[..., Plan]

PLANES = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x20000), (0x20000, 0x110000)]
HARD = [
    "\0",
    "Ā",
    "Ġ",
    "Ċ",
    "<0x00>",
    "<|endoftext|>",
    "</s>",
    "\ufffd",
    "\ufeff",
    "e\u0301\u0323",
    "\u200d",
    "\x1b[0m",
]
HARD += ["\r\n", "\t", "   ", " .", " 's", "don 't", "\x7f", "\x85", "|"]


def random_texts(count: int) -> list[str]:
    """Texts of all planes of Unicode, a third of them of what tokenizers treat in a way of their own."""
    drawn = random.Random(0)

    def piece() -> str:
        return drawn.choice(HARD) if drawn.random() < 0.3 else chr(drawn.randrange(*drawn.choice(PLANES)))

    return ["".join(piece() for _ in range(drawn.randrange(40))) for _ in range(count)]


def auto(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="reading the files as a user does needs transformers")
    return transformers.AutoTokenizer.from_pretrained(folder)


def plain_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    return [one.ids for one in tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)]


def other_than_bytes(folder: Path, texts: list[str]) -> int:
    """The texts whose ids are not their bytes."""
    pairs = zip(plain_ids(folder, texts), texts, strict=True)
    return sum(ids != list(text.encode()) for ids, text in pairs)


class TestBytes:
    @pytest.mark.parametrize("separator", [None, "\n", " ", "|"])
    def test_ids_are_bytes_and_come_back(self, tmp_path: Path, plan_of: Plans, separator: str | None) -> None:
        assert len(write_tokenizer(plan_of(data={"separator": separator}), tmp_path)) == 1
        texts = random_texts(1000)
        assert {len(character.encode()) for character in "".join(texts)} == {1, 2, 3, 4}
        assert other_than_bytes(tmp_path, texts) == 0
        loaded, one = auto(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert loaded(texts)["input_ids"] == [list(text.encode()) for text in texts]
        for text in texts:
            ids = list(text.encode())
            assert loaded.encode(text, add_special_tokens=False) == ids
            assert loaded.decode(ids) == one.decode(ids, skip_special_tokens=False) == text

    @pytest.mark.parametrize("name", ["Ā", "<0x00>", "<|endoftext|>"])
    def test_another_name_of_the_end_token_would_swallow_texts(self, tmp_path: Path, plan_of: Plans, name: str) -> None:
        """The control of the test above: a special token is cut out of every text that holds its name."""
        write_tokenizer(plan_of(), tmp_path)
        text = (tmp_path / "tokenizer.json").read_text()
        (tmp_path / "tokenizer.json").write_text(text.replace(json.dumps("\0"), json.dumps(name)))
        texts = random_texts(1000)
        assert other_than_bytes(tmp_path, texts) >= sum(name in text for text in texts) > 0

    def test_settings_are_those_of_the_run(self, tmp_path: Path, plan_of: Plans) -> None:
        """A vocabulary of more than bytes leaves ids without a token, which decode to nothing."""
        write_tokenizer(plan_of(model={"vocab": 300, "context": 24}), tmp_path)
        loaded = auto(tmp_path)
        assert (loaded.eos_token_id, loaded.bos_token_id, loaded.is_fast) == (0, None, True)
        assert (loaded.model_max_length, len(loaded), loaded.decode([72, 299, 105])) == (24, 256, "Hi")
        assert not json.loads((tmp_path / "tokenizer_config.json").read_text())["clean_up_tokenization_spaces"]

    def test_needs_no_other_package(self, tmp_path: Path, plan_of: Plans) -> None:
        (tmp_path / "plan.yaml").write_text(json.dumps(plan_of().model_dump()))
        code = """if True:
            import sys, pathlib
            from supar_cli.planning.plan import read_plan
            from supar_cli.exporting.tokenizer_files import write_tokenizer
            print(*write_tokenizer(read_plan(pathlib.Path("plan.yaml")), pathlib.Path(".")))
            sys.exit(bool({"torch", "tokenizers", "transformers"} & set(sys.modules)))
        """
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True)
        assert done.stdout == b"tokenizer.json: a token a byte; '\\x00' (id 0) ends a text\n", done.stderr
        assert done.returncode == 0 and (tmp_path / "tokenizer.json").exists()


@pytest.fixture
def given(tmp_path: Path, plan_of: Plans) -> Callable[..., tuple[Plan, Path, Path]]:
    """The plan of a model trained with a tokenizer, the tokenizer's file, and an empty folder."""

    def make(made: Any, **data: Any) -> tuple[Plan, Path, Path]:
        path, folder = tmp_path / "given.json", tmp_path / "out"
        folder.mkdir(exist_ok=True)
        made.save(str(path))
        return plan_of(data={"tokenizer": str(path), **data}, model={"vocab": 300}), path, folder

    return make


class TestGivenFile:
    @pytest.mark.parametrize("name", [None, *ADDITIONS])
    def test_tokens_are_those_of_training(self, given: Any, name: str | None) -> None:
        made = plain()
        made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)  # only moves offsets
        if name is not None:
            ADDITIONS[name](made)
        plan, path, folder = given(made)
        (said,) = write_tokenizer(plan, folder)
        texts = [text for text in TEXTS if "<" not in text] * 3
        wanted = [ids.tolist()[:-1] for ids in tokenizer.load(plan.text).encode(iter(texts))]
        loaded = auto(folder)
        assert wanted == plain_ids(folder, texts) == loaded(texts)["input_ids"]
        assert (loaded.eos_token, loaded.eos_token_id, loaded.bos_token) == ("</s>", made.token_to_id("</s>"), None)
        is_copy = (folder / "tokenizer.json").read_bytes() == path.read_bytes()
        assert is_copy == (name is None) == ("without its" not in said)
        shutil.copy(path, folder / "tokenizer.json")  # the control: the file itself
        assert (plain_ids(folder, texts) == wanted) == (name is None)

    @pytest.mark.parametrize(("separator", "end"), [("</s>", "</s>"), ("<|endoftext|>", "<|endoftext|>"), ("he", None)])
    def test_an_ordinary_token_does_not_become_the_end_of_all_texts(
        self, given: Any, separator: str, end: str | None
    ) -> None:
        """`he` separates the documents in training. As an end token it would be cut out of `hell`, which has its own id."""
        made = plain("<|endoftext|>" if separator == "<|endoftext|>" else "</s>")
        plan, _, folder = given(made, separator=separator)
        said = write_tokenizer(plan, folder)
        loaded = auto(folder)
        assert loaded.eos_token == end and (f"data.separator {separator!r} is an ordinary token" in said[-1]) == (
            not end
        )
        assert loaded("hell")["input_ids"] == [258]
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": separator}))
        assert (auto(folder)("hell")["input_ids"] == [258]) == (end is not None)  # the control

    def test_says_where_no_end_is_known(self, given: Any) -> None:
        plan, _, folder = given(plain("<fin>"))
        assert write_tokenizer(plan, folder)[-1].startswith("no end token is known")
        assert auto(folder).eos_token is None

    @pytest.mark.parametrize("fault", ["gone", "larger", "other", "none"])
    def test_another_file_is_not_written(self, given: Any, fault: str) -> None:
        plan, path, folder = given(plain())
        document = json.loads(path.read_text())
        if fault == "gone":
            path.unlink()
        elif fault != "none":
            model = document["model"]
            model["vocab"] = dict(zip(model["vocab"], reversed(model["vocab"].values()), strict=True))
            model["vocab"] |= {"larger": 300} if fault == "larger" else {}
            path.write_text(json.dumps(document))
        said = write_tokenizer(plan, folder)
        words = {"gone": "no such file", "larger": "model.vocab: 300 is less than", "other": "or the tokenizer"}
        assert words.get(fault, "a copy of") in said[0]
        assert bool(list(folder.iterdir())) == (fault == "none") == (not said[0].startswith("no tokenizer is written"))

    def test_says_what_data_that_are_gone_can_not_show(self, given: Any, plan_of: Plans, text_file: Path) -> None:
        plan, _, folder = given(plain())
        plans = [plan_of(), plan]
        text_file.unlink()
        for one in plans:
            assert "as the data are not here to show it" in write_tokenizer(one, folder)[0]
            assert len(list(folder.iterdir())) == 2


class TestWhichTokenizer:
    def tokens(self, folder: Path) -> Path:
        np.arange(9000, dtype="<u2").__mod__(250).tofile(folder / "ids.bin")
        return folder / "ids.bin"

    def test_token_files_name_none(self, tmp_path: Path, plan_of: Plans, given: Any) -> None:
        path = self.tokens(tmp_path)
        (said,) = write_tokenizer(plan_of(data={"source": str(path)}), tmp_path)
        assert "holds tokens" in said and "expected its tokenizer.json and tokenizer_config.json" in said
        assert not (tmp_path / "tokenizer.json").exists()
        plan, _, folder = given(plain(), source=str(path))  # but where the plan does
        assert "a copy of" in write_tokenizer(plan, folder)[0]

    def test_a_mixture_has_that_of_its_texts(self, tmp_path: Path, plan_of: Plans, text_file: Path) -> None:
        path = self.tokens(tmp_path)
        for sources, written in (([path, path], False), ([path, text_file], True)):
            parts = [{"source": str(one), "weight": 1.0} for one in sources]
            plan = plan_of(data={"source": "mixture", "sources": parts})
            write_tokenizer(plan, tmp_path)
            assert (tmp_path / "tokenizer.json").exists() == written

    @pytest.mark.parametrize(
        ("source", "section", "vocab", "known"),
        [
            ("gone.txt", {}, 300, True),
            ("gone.jsonl.gz", {}, 300, True),
            ("gone.bin", {}, 256, False),
            ("gone", {"format": "nanogpt"}, 256, False),
            ("gone", {"format": "text"}, 300, True),
            ("gone", {}, 256, True),
            ("gone", {}, 300, False),
            ("gone.bin", {"tokenizer": "gone.json"}, 256, True),
            ("stdlib", {}, 300, True),
        ],
    )
    def test_data_that_are_not_here(
        self, plan_of: Plans, source: str, section: dict[str, Any], vocab: int, known: bool
    ) -> None:
        plan = plan_of(model={"vocab": vocab})
        plan = plan.model_copy(update={"data": plan.text.model_copy(update={"source": source, **section})})
        assert tokenizer_files.names_tokenizer(plan) == known
