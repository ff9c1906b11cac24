"""Tokenizer files in a folder of a model: what other programs need to read text as the model was trained to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from supar_cli.data import corpus, tokenizer
from supar_cli.data.formats import SUFFIXES, TEXT_KINDS, suffix_of
from supar_cli.errors import InputError, SuparError
from supar_cli.files import naming_read_errors, naming_write_errors, write_file
from supar_cli.planning.plan import Data, Plan

# of a tokenizer.json: what adds to a text's tokens or cuts them, which training does without
INFERENCE = ("truncation", "padding", "post_processor")


def write_tokenizer(plan: Plan, folder: Path) -> list[str]:
    """Write tokenizer.json and tokenizer_config.json of the tokenizer that a plan's model was trained with.

    Returns what was written, or why nothing was. Raises SetupError where the files can't be written.
    """
    data = plan.text
    try:
        if not names_tokenizer(plan):
            what = f"data.source: {data.source}: holds tokens, or is not here, and the plan names no tokenizer"
            raise InputError(f"{what}; expected its tokenizer.json and tokenizer_config.json, copied beside the model")
        if data.tokenizer == "bytes":
            separator = tokenizer.Bytes(data).separator
            assert separator is not None
            content, end, said = _of_bytes(separator)
        else:
            content, end, said = _of_file(plan, data)
    except SuparError as error:
        return [f"no tokenizer is written: {error}"]
    if not _are_here(data):
        said[0] += "; taken for the one that the model was trained with, as the data are not here to show it"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # which transformers 4 and 5 load from tokenizer.json alone
        "model_max_length": plan.decoder.context,
        "clean_up_tokenization_spaces": False,
        **({} if end is None else {"eos_token": end}),
    }
    with naming_write_errors(folder):
        write_file(folder / "tokenizer.json", content)
        write_file(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")
    return said


def names_tokenizer(plan: Plan) -> bool:
    """Whether a plan says which tokenizer made its tokens. One of token files does so only if it names a file.

    Where the data are not here and their names don't say what they are, a vocabulary of 256 is taken for that of bytes.
    """
    data = plan.text
    found = [_is_text(part) for _, part in corpus.parts(data)] or [_is_text(data)]
    is_text = plan.decoder.vocab == corpus.BYTES if None in found and True not in found else True in found
    return is_text or data.tokenizer != "bytes"


def _are_here(data: Data) -> bool:
    return all(corpus.is_here(part) for _, part in corpus.parts(data) or [(1.0, data)])


def _is_text(data: Data) -> bool | None:
    """Whether a tokenizer reads a source; None where it is not here, and its name does not say it."""
    if corpus.is_here(data):
        return corpus.find(data).is_text
    kind = SUFFIXES.get(suffix_of(Path(data.source))[0]) if data.format == "auto" else data.format
    return None if kind is None else kind in TEXT_KINDS


def _of_bytes(separator: int) -> tuple[bytes, str | None, list[str]]:
    """A tokenizer.json whose ids are bytes, as `_of_file` has it. The byte that ends a text, of ASCII, is the special token.

    ByteLevel stands for each byte by a printable character: its own, or for others those from U+0100 on. The special token
    is the character itself, which is cut out of a text before ByteLevel sees it; any other name would be cut out too.
    """
    others = iter(range(0x100, 0x200))
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = [chr(byte if byte in printable else next(others)) for byte in range(corpus.BYTES)]
    letters[separator] = chr(separator)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    document = {
        "version": "1.0",
        **dict.fromkeys(INFERENCE),
        "added_tokens": [{"id": separator, "content": letters[separator], **flags, "special": True}],
        "normalizer": None,
        "pre_tokenizer": level,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {letter: byte for byte, letter in enumerate(letters)}, "merges": []},
    }
    said = f"tokenizer.json: a token a byte; {chr(separator)!r} (id {separator}) ends a text"
    return json.dumps(document, indent=1).encode(), chr(separator), [said]


def _of_file(plan: Plan, data: Data) -> tuple[bytes, str | None, list[str]]:
    """The content of a plan's tokenizer.json without what is for inference, its end token, and what to say of both.

    Raises InputError, SetupError for a file that is not there, can't be used, or is not the one that the model was trained
    with; where the data are not here either, only a vocabulary that is too large shows the latter.
    """
    encoder = tokenizer.load(data)
    assert isinstance(encoder, tokenizer.Vocabulary)
    tokenizer.require_fits(encoder, data, plan.decoder.vocab)
    with naming_read_errors(encoder.path):
        content = encoder.path.read_bytes()
    said = f"tokenizer.json: a copy of {encoder.path}"
    if _are_here(data):
        corpus.identify(data)
    document = json.loads(content)
    changed: dict[str, Any] = {key: None for key in INFERENCE if _is_used(document.get(key))}
    words = [key.replace("_", "-") for key in changed]
    if document["model"].get("dropout") is not None:
        changed["model"], words = {**document["model"], "dropout": None}, [*words, "dropout"]
    if changed:
        content = json.dumps(document | changed).encode()
        said += f", without its {' and '.join(words)}, as in training"
    end = encoder.separator_text
    special = {token["content"] for token in document.get("added_tokens") or []}
    if end is None:
        return content, None, [said, "no end token is known: generation does not stop by itself"]
    if end not in special and end not in tokenizer.ENDS:
        what = "is an ordinary token, which as an end token would be cut out of every text"
        return content, None, [said, f"no end token is written: data.separator {end!r} {what}"]
    return content, end, [f"{said}; {end!r} (id {encoder.separator}) ends a text"]


def _is_used(part: dict[str, Any] | None) -> bool:
    """Whether a part for inference changes tokens: not that of byte-level tokenizers, which only moves offsets."""
    if part is None or part.get("type") == "ByteLevel":
        return False
    return part.get("type") != "Sequence" or any(map(_is_used, part["processors"]))
