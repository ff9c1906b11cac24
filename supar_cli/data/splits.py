"""What a file's path says: its split (training, validation or test), and whether it is only about data."""

from __future__ import annotations

from pathlib import Path

SPLITS = {  # the words by which the Hugging Face Hub splits data sets
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("train", "training"), "train"),
}
_CARDS = ("readme", "license", "licence", "copying", "notice", "citation", "datasetcard")


def words_of(name: str) -> list[str]:
    """The words of letters in a name, in lower case."""
    return "".join(letter if letter.isalpha() else " " for letter in name.lower()).split()


def split_word(path: Path) -> str:
    """The split that a path below its folder names: test wherever it says so, else the one nearest to its end."""
    found: list[str] = []
    for part in reversed(path.parts):
        found += sorted({SPLITS[word] for word in words_of(part) if word in SPLITS}, reverse=True)
    return "test" if "test" in found else next(iter(found), "")


def is_card(path: Path) -> bool:
    """Whether a file is a card of data, a licence or the like, by its name."""
    first = next(iter(words_of(path.name)), "")
    return first in _CARDS and path.suffix.lower() in ("", ".md", ".txt", ".rst")
