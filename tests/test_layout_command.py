"""`supar layout`: the user's functions found by name, errors in them at their lines, the document and its table."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import supar_cli
from supar_cli.cli import layout as command
from supar_cli.errors import InputError
from supar_cli.planning import document
from supar_cli.planning.layout_document import Layout
from supar_cli.planning.problems import parse
from supar_cli.user_code import calling_user_code, load_function, require_keywords
from tests.conftest import Called

MODEL = """\
import torch
from torch import nn

print("imported")

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.table, self.head = nn.Embedding(50, width), nn.Linear(width, 50, bias=False)
        self.blocks, self.norm = nn.ModuleList(Block(width) for _ in range(2)), nn.LayerNorm(width)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

def make(width):
    print("made")
    return Net(width)

def batch(model):
    return (torch.randint(0, 50, (2, 8)),)

def step(model):
    return model(*batch(model))

def tokens():
    return torch.randint(0, 50, (2, 8))

def pair(model, other):
    return model

def keywords(size=8):
    return {"ids": tokens()[:, :size]}

fixed = [tokens()]

def broken(model):
    return model.nothing

def no_width(size):
    return Net(size)

def raises(width):
    raise ValueError("no such width")

number = 3
"""
SIZES = ("--base", "width=32", "--wider", "width=64")
numbers = itertools.count()


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module of the user's in the working directory: another for each test, as modules are imported once."""
    name = f"usermodel{next(numbers)}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / f"{name}.py").write_text(MODEL)
    yield name
    sys.modules.pop(name, None)


def line_of(text: str) -> int:
    return MODEL[: MODEL.index(text)].count("\n") + 1


def test_the_document_says_what_each_tensor_is(name: str, supar_here: Callable[..., Called]) -> None:
    asked = (f"{name}:make", *SIZES, "--third", "width=96", "--example", f"{name}:batch")
    called = supar_here("layout", *asked, "--explain", "-o", "layout.yaml")
    assert called.status == 0 and called.out == "", called.err
    layout = parse(Layout, document.read_file("layout.yaml")[0])
    assert layout.factory == f"{name}:make" and layout.third == {"width": 96}
    assert {row.role for row in layout.tensors if row.site == "blocks.*.up.weight"} == {"hidden"}
    for said in ("imported", "made", "wrote layout.yaml", "supar tune-proxy --layout layout.yaml --command"):
        assert said in called.err
    rows = {row[0]: row for row in command._table_rows(layout)}
    assert rows["blocks.*.up.weight"][1:4] == ["× 2", "hidden", "128→256 × [32→64]"]
    assert rows["table.weight"][1:] == ["", "embedding", "50 × 32→64", rows["table.weight"][4], "first sum"]
    assert rows["norm.bias"][4] == "0" and rows["table.weight"][4].startswith("std ")
    assert len(rows) == len(command._table_rows(layout)) and "blocks.*.up.weight" in called.err

    printed = supar_here("layout", *asked, "-o", "-", "-q")
    assert parse(Layout, document.read(printed.out, "stdout")[0]) == layout and "wrote" not in printed.err
    as_json = supar_here("layout", *asked[:-2], "--run", f"{name}:step", "--json", "-o", "-")
    assert json.loads(as_json.out)["tensors"][0]["name"] == "table.weight", as_json.err
    for example in ("tokens", "keywords", "fixed"):
        same = supar_here("layout", *asked[:-1], f"{name}:{example}", "-o", "-")
        assert same.out == printed.out, same.err
    other = supar_here("layout", f"{name}:make", *SIZES, "--example", f"{name}:batch")
    assert other.status == 2 and "layout.yaml: exists and differs; expected --force" in other.err  # it may be edited


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["@:mak", *SIZES, "--example", "@:batch"], "@:mak: @ has no mak; did you mean 'make'?"),
        (
            ["@X:make", *SIZES, "--example", "@:batch"],
            "@X:make: no module @X here; did you mean '@'?",
        ),
        (["@.py:make", *SIZES, "--example", "@:batch"], "expected MODULE:FUNCTION, such as @:make"),
        (["make", *SIZES, "--example", "@:batch"], "make: expected MODULE:FUNCTION, such as make:make"),
        (["@:number", *SIZES, "--example", "@:batch"], "@:number: a value of type int; expected a function"),
        (
            ["@:make", *SIZES, "--example", "@:bach"],
            "--example @:bach: @ has no bach; did you mean 'batch'?",
        ),
        (
            ["@:make", *SIZES, "--run", "@:tokens"],
            "--run @:tokens: expected a function that can be called with (model)",
        ),
        (
            ["@:make", *SIZES, "--example", "@:pair"],
            "--example @:pair: expected a function that can be called with (model) or ()",
        ),
        (["@:make", *SIZES], "--example: expected either --example or --run"),
        (["@:make", *SIZES, "--example", "@:batch", "--run", "@:step"], "--example: expected either"),
        (["@:make", "--base", "width=32", "--example", "@:batch"], "--wider: is missing"),
        (
            ["@:no_width", *SIZES, "--example", "@:batch"],
            "@:no_width: missing a required argument: 'size'; expected a function that can be called with (width=32)",
        ),
        (["@:make", "--base", "width", "--wider", "width=x"], "--base width: expected NAME=N[,NAME=N…]"),
        (["@:make", "--base", "width", "--wider", "width=x"], "--wider width=x: expected NAME=N[,NAME=N…]"),
        (["@:make", *SIZES, "--role", "up=hiden"], "--role up=hiden: did you mean 'hidden'?"),
        (["@:make", *SIZES, "--role", "hidden"], "--role hidden: expected NAME=ROLE"),
        (["@:make", *SIZES, "--example", "@:batch", "--role", "ups=hidden"], "'ups'"),
        (["@:make", *SIZES, "--example", "@:batch", "--ignore", "ups"], "'ups'"),
        (["@:make", "--base", "width=32", "--wider", "width=32", "--example", "@:batch"], "nothing scales"),
    ],
)
def test_bad_input_is_told_and_nothing_is_written(
    name: str, supar_here: Callable[..., Called], arguments: list[str], what: str
) -> None:
    called = supar_here("layout", *(one.replace("@", name) for one in arguments))
    assert called.status == 2 and what.replace("@", name) in called.err and "Traceback" not in called.err
    assert called.out == "" and not Path("layout.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "line", "what"),
    [
        (["raises", "batch"], "    raise ValueError", "ValueError: no such width"),
        (["make", "broken"], "    return model.nothing", "AttributeError: 'Net' object has no attribute 'nothing'"),
    ],
)
def test_the_users_own_error_is_at_his_line(
    name: str, supar_here: Callable[..., Called], arguments: list[str], line: str, what: str
) -> None:
    make, example = (f"{name}:{one}" for one in arguments)
    called = supar_here("layout", make, *SIZES, "--example", example)
    assert called.status == 2 and "Traceback" not in called.err
    assert f"error: {Path(f'{name}.py').resolve()}:{line_of(line)}: {what}" in called.err


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("import nothing_like_it", 1, "ModuleNotFoundError: No module named 'nothing_like_it'"),
        ("x = 1\ndef make(width:", 2, "SyntaxError"),
        ("import sys\n\nsys.exit(3)", 3, "SystemExit: 3"),
        ("import json\njson.loads('{')", 2, "JSONDecodeError"),
    ],
)
def test_an_error_of_an_import_too(name: str, text: str, line: int, what: str) -> None:
    Path(f"{name}.py").write_text(text + "\n")
    with pytest.raises(InputError, match=what) as error:
        load_function(f"{name}:make", "--factory")
    assert str(error.value).startswith(f"--factory {name}:make: {Path(f'{name}.py').resolve()}:{line}: ")


def test_a_fault_of_supar_is_none_of_the_users(
    name: str, supar_here: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supar_cli, "layout", dict.fromkeys)  # takes no such keywords
    with pytest.raises(TypeError, match="fromkeys"):
        supar_here("layout", f"{name}:make", *SIZES, "--example", f"{name}:batch")
    with pytest.raises(InputError, match=r"^as it was$"), calling_user_code():
        raise InputError("as it was")


def test_functions_in_packages_and_classes_are_found(name: str) -> None:
    Path("package").mkdir()
    Path("package/__init__.py").write_text("")
    Path("package/models.py").write_text("class Net:\n    @staticmethod\n    def make(width): return width\n")
    assert load_function("package.models:Net.make", "make")(3) == 3
    with pytest.raises(InputError, match=r"no module package.model here; did you mean 'package.models'\?"):
        load_function("package.model:make", "make")
    require_keywords(lambda **sizes: sizes, "make", {"width": 3})
    for name in ("package", "package.models"):
        sys.modules.pop(name)


def test_notes_are_warnings_and_questions_are_errors(
    name: str, supar_here: Callable[..., Called], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("layout", f"{name}:make", *SIZES, "--example", f"{name}:batch", "-o", "layout.yaml")
    assert supar_here(*asked).status == 0
    found = parse(Layout, document.read_file("layout.yaml")[0])
    given: dict[str, Any] = {}

    def read(make: Any, **keywords: Any) -> Layout:
        given.update(keywords, make=make)
        if keywords["roles"] is None:
            raise InputError("router.weight: hidden or unembedding?", "mixer.weight: hidden or unembedding?")
        return found.model_copy(update={"notes": ["a number moves with the size"]})

    monkeypatch.setattr(supar_cli, "layout", read, raising=False)
    questions = supar_here(*asked, "-q")
    assert questions.status == 2 and questions.err.count("error: ") == 2
    answered = supar_here(
        *asked, "-q", "-f", "--role", "a.b=hidden", "--role", "c=norm", "--ignore", "d", "--target", "width=4096"
    )
    assert answered.status == 0 and answered.err == "warning: a number moves with the size\n"
    assert given.pop("make").__name__ == "make" and given.pop("example").__name__ == "batch"
    assert given == {
        "base": {"width": 32},
        "wider": {"width": 64},
        "third": None,
        "target": {"width": 4096},
        "roles": {"a.b": "hidden", "c": "norm"},
        "ignore": ["d"],
    }


def test_a_function_that_does_not_take_its_arguments_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "supar_cli.user_code._line_of", lambda error: None
    )  # called by supar, it has no line in the function
    wrong: Any = lambda: None  # noqa: E731
    told = r"^batches: TypeError: .* takes 0 positional arguments but 2 were given$"
    with pytest.raises(InputError, match=told), calling_user_code("batches"):
        wrong(0, 0)
    with pytest.raises(TypeError), calling_user_code():
        wrong(0, 0)
