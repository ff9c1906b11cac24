"""A tokenizer.json is a vocabulary: whatever it adds or cuts for inference, a text's tokens are those of the text alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from supar_cli.data import batches, corpus, prepare, tokenizer
from supar_cli.errors import InputError, SetupError
from supar_cli.planning.spec import Data
from tests.fuzzing import tries
from tests.test_data_formats import write

tokenizers = pytest.importorskip("tokenizers")
TEXTS = ["hello world " * 9, "old <s>news</s> here", "a <|endoftext|> in a text", "", "é" * 40]
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())


def plain(end: str = "</s>") -> Any:
    """A byte-level BPE with special tokens <s>, `end` and <pad>, and ordinary added ones."""
    vocab = {letter: at for at, letter in enumerate(ALPHABET)} | {"he": 256, "ll": 257, "hell": 258}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("h", "e"), ("l", "l"), ("he", "ll")]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(["<s>", end, "<pad>"])
    made.add_tokens(["news"])
    return made


def truncate(made: Any) -> None:
    made.enable_truncation(7, stride=2)


def pad(made: Any) -> None:
    made.enable_padding(pad_id=made.token_to_id("<pad>"), pad_token="<pad>", length=64)


def bracket(made: Any) -> None:
    ends = [(word, made.token_to_id(word)) for word in ("<s>", "</s>")]
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, ends)


def drop(made: Any) -> None:
    made.model.dropout = 0.9


ADDITIONS: dict[str, Callable[[Any], None]] = {"truncate": truncate, "pad": pad, "bracket": bracket, "drop": drop}


def saved(path: Path, made: Any) -> Data:
    made.save(str(path))
    return Data(tokenizer=str(path))


def encoded(data: Data, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in tokenizer.load(data).encode(iter(texts))]


def as_text(texts: list[str], end: list[int]) -> list[list[int]]:
    """The tokens of texts by the model alone, `news` apart, and the separator."""
    bare = plain()
    bare.encode_special_tokens = True
    return [bare.encode(text, add_special_tokens=False).ids + end for text in texts]


class TestVocabulary:
    @given(names=st.sets(st.sampled_from(sorted(ADDITIONS)), min_size=1))
    @tries(40)
    def test_takes_nothing_of_what_is_for_inference(self, tmp_path: Path, names: set[str]) -> None:
        made = plain()
        for name in sorted(names):
            ADDITIONS[name](made)
        data = saved(tmp_path / "t.json", made)
        end = made.token_to_id("</s>")
        found = encoded(data, TEXTS * 3)
        assert found == as_text(TEXTS * 3, [end])
        assert all(end not in ids[:-1] for ids in found)  # </s> in a text stays text
        before = tokenizers.Tokenizer.from_file(data.tokenizer)  # the control: how it was read
        assert [[*one.ids, end] for one in before.encode_batch(TEXTS * 3)] != found

    def test_special_tokens_in_texts_stay_text(self, tmp_path: Path) -> None:
        """The control stands alone here: with nothing else in the file, the old reading made `</s>` of a text the separator."""
        data = saved(tmp_path / "t.json", plain())
        (_, (*ids, end), *_) = encoded(data, TEXTS)
        assert end not in ids and plain().token_to_id("<s>") not in ids
        assert end in tokenizers.Tokenizer.from_file(data.tokenizer).encode(TEXTS[1]).ids

    def test_a_unigram_model_finds_none_either(self, tmp_path: Path) -> None:
        pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -5.0 - at) for at, letter in enumerate("</s>a"))]
        made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, 0))
        made.add_special_tokens(["</s>"])
        assert encoded(saved(tmp_path / "t.json", made), ["a</s>a"]) == [[6, 2, 3, 4, 5, 6, 1]]
        made.encode_special_tokens = True
        assert made.encode("a</s>a").ids == [6, 1, 6]  # the control: that alone does not keep it from it

    def test_what_can_only_be_the_separator_is_refused(self, tmp_path: Path) -> None:
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        data = saved(tmp_path / "t.json", made)
        assert encoded(data, ["a b"]) == [[1, 0, 2]]
        with pytest.raises(
            InputError, match=r"t\.json: a text holds '</s>', which this tokenizer reads as the separator"
        ):
            encoded(data, ["a </s> a"])

    def test_is_as_large_as_its_largest_id(self, tmp_path: Path) -> None:
        document = json.loads(plain().to_str())
        document["model"]["vocab"]["hell"] = 70_000
        (tmp_path / "t.json").write_text(json.dumps(document))
        data = Data(tokenizer=str(tmp_path / "t.json"))
        assert tokenizer.load(data).vocab == 70_001 > tokenizers.Tokenizer.from_file(data.tokenizer).get_vocab_size()

    @pytest.mark.parametrize("end", tokenizer.ENDS)
    def test_knows_its_separator(self, tmp_path: Path, end: str) -> None:
        data = saved(tmp_path / "t.json", plain(end))
        assert encoded(data, ["he"]) == [[256, plain(end).token_to_id(end)]] and tokenizer.load(data).warnings() == []

    def test_or_says_that_it_knows_none(self, tmp_path: Path) -> None:
        data = saved(tmp_path / "t.json", plain("<stop>"))
        assert encoded(data, ["he"]) == [[256]]
        assert "documents, so they run into each other; data.separator names one" in tokenizer.load(data).warnings()[0]
        named = data.model_copy(update={"separator": "<stop>"})
        assert encoded(named, ["he"]) == [[256, plain("<stop>").token_to_id("<stop>")]]
        with pytest.raises(InputError, match=r"data\.separator: '<end>' is not a token of .*t\.json"):
            tokenizer.load(data.model_copy(update={"separator": "<end>"}))

    def test_of_bytes_has_one_byte_for_a_separator(self) -> None:
        assert encoded(Data(separator="\n"), ["ab"]) == [[97, 98, 10]]
        with pytest.raises(InputError, match=r"data\.separator: 'ab' is not one byte"):
            tokenizer.load(Data(separator="ab"))

    def test_may_be_named_by_its_folder(self, tmp_path: Path) -> None:
        saved(tmp_path / "tokenizer.json", plain())
        assert corpus.tokenizer_file(Data(tokenizer=str(tmp_path))) == tmp_path / "tokenizer.json"
        with pytest.raises(
            InputError, match=r"data\.tokenizer: gpt2: no such file; expected .* a folder with one, as save_pretrained"
        ):
            corpus.tokenizer_file(Data(tokenizer="gpt2"))

    @pytest.mark.parametrize(
        "content", ["{}", "[]", '{"model": {"type": "BPE"}}', "\0", '{"model": 3, "added_tokens": 4}']
    )
    def test_what_is_none_is_named(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(SetupError, match=r"t\.json: not a tokenizer\.json"):
            tokenizer.load(Data(tokenizer=str(tmp_path / "t.json")))


class TestPrepare:
    @pytest.mark.parametrize(
        ("largest", "names"), [(65_535, ["train.bin", "val.bin"]), (65_536, ["train.npy", "val.npy"])]
    )
    def test_writes_integers_that_hold_the_vocabulary(self, tmp_path: Path, largest: int, names: list[str]) -> None:
        document = json.loads(plain().to_str())
        document["model"]["vocab"]["hell"] = largest
        (tmp_path / "t.json").write_text(json.dumps(document))
        write(tmp_path / "x.jsonl", b"".join(json.dumps({"text": text}).encode() + b"\n" for text in TEXTS * 20))
        section = Data(source=str(tmp_path / "x.jsonl"), tokenizer=str(tmp_path / "t.json"))
        made = prepare.prepare(section, tmp_path / "o", lambda *_: None)
        assert [path.name for path in made.files] == names == sorted(path.name for path in (tmp_path / "o").iterdir())
        direct = batches.load(section, vocab=70_000, context=8)
        written = batches.load(Data(source=str(tmp_path / "o")), vocab=largest + 1, context=8)
        for one, other, count in zip(
            (direct.train, direct.validation), (written.train, written.validation), made.files.values(), strict=True
        ):
            ids = [np.asarray(split.segments[0].tokens) for split in (one, other)]
            assert np.array_equal(*ids) and count == len(ids[0]) and ids[0].max() == largest == made.vocab - 1

    def test_takes_away_what_it_wrote_before_in_another_format(self, tmp_path: Path) -> None:
        write(tmp_path / "a.txt", b"some words " * 30)
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / "train.npy").touch()
        prepare.prepare(Data(source=str(tmp_path / "a.txt")), tmp_path / "o", lambda *_: None)
        assert sorted(path.name for path in (tmp_path / "o").iterdir()) == ["train.bin", "val.bin"]

    def test_an_id_that_integers_do_not_hold_is_refused(self, tmp_path: Path) -> None:
        """The control: as `astype` it would be stored modulo 65,536."""
        parts = [np.array([1, 70_000], np.uint32)]
        assert parts[0].astype("<u2")[1] == 4464
        with pytest.raises(InputError, match=r"train: token 70000 does not fit uint16"):
            prepare._write(tmp_path / "train", iter(parts), np.dtype("<u2"), lambda *_: None)


class TestBytesAsText:
    @given(content=st.binary(max_size=24) | st.text(max_size=9).map(str.encode))
    @example(content="aé€𝄞".encode())
    @example(content=b"\xe2\x82a\xf0\x9d\x84\xe2\x82\xac\xff\xc3")
    @tries(150)
    def test_bytes_come_as_whole_characters(self, content: bytes) -> None:
        pieces = list(tokenizer.Bytes(Data()).decode(content))
        assert len(pieces) == len(content) + 1
        assert "".join(pieces) == content.decode("utf-8", "replace")
        for at in range(len(content) + 1):  # nothing comes late: what is not out yet may begin a character
            whole, out = content[:at].decode("utf-8", "replace"), "".join(pieces[:at])
            assert whole.startswith(out) and set(whole[len(out) :]) <= {"\ufffd"} and len(whole) - len(out) <= 3

    def test_a_token_beyond_the_bytes_has_no_text(self) -> None:
        assert "".join(tokenizer.Bytes(Data()).decode([97, 0xE2, 256, 98])) == "a\ufffd\ufffdb"


def by_level() -> Any:
    """A byte-level BPE: a token is a byte, or two letters."""
    made = plain()
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


def by_fallback() -> Any:
    """As Llama's: pieces with a mark for a space, and a token for each byte of other characters."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "é", "▁a"]
    vocab = {piece: at for at, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [("▁", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    steps = [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    made.decoder = tokenizers.decoders.Sequence([*steps, tokenizers.decoders.Strip(" ", 1, 0)])
    return made


@pytest.mark.parametrize("make", [by_level, by_fallback])
class TestVocabularyAsText:
    @given(text=st.text(st.sampled_from("aé€𝄞 "), max_size=8).map("a{}".format))
    @tries(60)
    def test_text_comes_back(self, tmp_path: Path, make: Callable[[], Any], text: str) -> None:
        made, found = make(), tokenizer.load(saved(tmp_path / "t.json", make()))
        ids = made.encode(text).ids
        pieces = list(found.decode(ids))
        assert len(pieces) == len(ids) + 1 and "".join(pieces) == made.decode(ids) == text
        if make is by_level:  # of this text every character comes by itself, when it is whole
            assert list(filter(None, pieces)) == list(text)

    @given(ids=st.lists(st.integers(0, 300), max_size=20))
    @example(ids=[67, 2 + 0x80])  # a valid byte, and one that spoils it
    @tries(80)
    def test_any_tokens_have_some(self, tmp_path: Path, make: Callable[[], Any], ids: list[int]) -> None:
        made, found = make(), tokenizer.load(saved(tmp_path / "t.json", make()))
        text = "".join(found.decode(ids))
        text.encode()
        known = [one for one in ids if made.id_to_token(one) is not None]
        assert text.count("\ufffd") >= len(ids) - len(known)
        if known == ids and make is by_level:
            assert text == made.decode(ids, skip_special_tokens=False)

    def test_a_token_by_itself_does_not(self, make: Callable[[], Any]) -> None:
        """The control: a token's own text is no part of a character's."""
        ids = make().encode("a€").ids
        assert "".join(make().decode([one]) for one in ids) != "a€"
