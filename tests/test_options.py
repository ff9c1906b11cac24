"""The table of options: no row is idle, every path is a key of a document, and flags are applied as `override` says."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import typer.main

from supar_cli.cli.app import NAMES, app
from supar_cli.cli.documents import apply
from supar_cli.cli.option_table import GROUPS, OPTIONS, Option, flag_of
from supar_cli.cli.options import Flags, command, require_one
from supar_cli.errors import InputError
from supar_cli.planning.document import Document
from supar_cli.planning.plan import Plan
from supar_cli.planning.schema import Section, section_of
from supar_cli.planning.spec import Proxy, Spec
from supar_cli.planning.sweep import Sweep


def parameters(command: Any) -> set[str]:
    """The names of what a command and the commands below it take."""
    below = getattr(command, "commands", {}).values()
    return {one.name for one in command.params}.union(*map(parameters, below))


def test_every_option_is_of_a_command() -> None:
    group: Any = typer.main.get_command(app)
    taken = {name for one in NAMES for name in parameters(group.get_command(None, one))}
    assert set(OPTIONS) - taken == set()


def test_every_option_is_in_one_group_of_the_help() -> None:
    grouped = [name for members in GROUPS.values() for name in members.split()]
    assert sorted(grouped) == sorted(name for name, option in OPTIONS.items() if not option.argument)


def is_key(kind: type[Section], path: str) -> bool:
    """Whether a document of a kind has a key at a path."""
    first, _, rest = path.partition(".")
    if first not in kind.keys():  # noqa: SIM118
        return False
    below = {section_of(kind.keys()[first], tag) for tag in (None, "own")}  # of a model: supar's own, or the user's
    return not rest or any(section is not None and is_key(section, rest) for section in below)


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.path])
def test_every_path_is_a_key_of_a_document(name: str) -> None:
    assert any(is_key(kind, OPTIONS[name].path) for kind in (Spec, Proxy, Plan, Sweep))


def test_a_path_that_is_no_key_is_found() -> None:
    assert not is_key(Proxy, "target.widht") and not is_key(Proxy, "target.width.x") and is_key(Proxy, "target.width")


def flags_of(*names: str, **values: Any) -> Flags:
    """What a command that takes these options is called with."""
    found: list[Flags] = []
    options = {name: OPTIONS[name] for text in names for name in text.split()}
    command(*names)(found.append)(**{name: option.default for name, option in options.items()} | values)
    return found[0]


class TestFlags:
    def test_an_option_that_is_not_taken_is_none_and_an_unknown_one_an_error(self) -> None:
        flags = flags_of("width quiet", width=64)
        assert (flags.width, flags.quiet, flags.layers) == (64, False, None)
        with pytest.raises(AttributeError, match="widht"):
            _ = flags.widht

    def test_a_text_is_read_by_the_rows_function(self) -> None:
        assert flags_of("density", density="1/4,0.5").density == ["1/4", 0.5]
        with pytest.raises(InputError, match=r"^--max-time 3: expected a time"):
            flags_of("max_time", max_time="3")

    def test_two_that_exclude_each_other(self) -> None:
        require_one(flags_of("sparsity density", sparsity="0.5"), "density", "sparsity")
        with pytest.raises(InputError, match=r"^--density: cannot be combined with --sparsity"):
            require_one(flags_of("sparsity density", sparsity="0.5", density="0.5"), "density", "sparsity")

    def test_a_command_may_change_a_column_and_not_the_table(self) -> None:
        before = dict(OPTIONS)
        changed = command("steps", steps={"help": "Other words.", "minimum": 3})(print)
        made = inspect.signature(changed).parameters["steps"].default
        assert made.help == "Other words." and before == OPTIONS
        with pytest.raises(InputError, match=r"^--steps 2: expected a whole number of at least 3$"):
            changed(steps="2")

    def test_the_flag_of_a_name(self) -> None:
        assert flag_of("tokens_per_parameter") == "--tokens-per-parameter"
        made = Option(bool, "Go on.", default=True).parameter("resume").default
        assert made.param_decls == ("--resume/--no-resume",)


class TestApply:
    def applied(self, data: dict[str, Any], flags: Flags, **how: Any) -> dict[str, Any]:
        read = Document(data, "x.yaml")
        apply(read, flags, **how)
        return dict(read.data)

    def test_what_a_changed_value_drops_is_dropped(self) -> None:
        data = {"target": {"width": 64, "heads": 4, "tokens": 9}, "data": {"source": "a", "hash": "h"}}
        flags = flags_of("width steps data", width=128, steps=3, data="b")
        target = {"width": 128, "heads": None, "tokens": None, "steps": 3}
        assert self.applied(data, flags) == {"target": target, "data": {"source": "b", "hash": None}}

    def test_the_same_data_elsewhere_keep_their_hash(self) -> None:
        data = {"data": {"source": "a", "hash": "h"}}
        found = self.applied(data, flags_of("data", data="b"), same_data=True)
        assert found == {"data": {"source": "b", "hash": "h"}}

    def test_a_flag_comes_after_a_setting(self) -> None:
        flags = flags_of("width set", width=32, set=["target.width=16", "a.b=off"])
        assert self.applied({}, flags) == {"target": {"width": 32}, "a": {"b": "off"}}

    @pytest.mark.parametrize("setting", ["train", "=1", "kind.x=1"])
    def test_a_setting_that_cannot_be(self, setting: str) -> None:
        with pytest.raises(InputError, match=r"^(--set|-s) "):
            self.applied({"kind": "supar.spec/v1"}, flags_of("set", set=[setting]))
