"""The command line as a process: exit status, exact stdout, messages with file and line, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import supar_cli
from supar_cli.planning import document
from tests.conftest import PROXY, Called, environment

Supar = Callable[..., Called]

BAD_PROXIES: dict[str, tuple[str, str, str]] = {
    "unknown key": (
        "  layers: 2",
        "  layers: 2\n  widht: 3",
        "6: model.widht: unknown key 'widht'; did you mean 'width'?",
    ),
    "duplicate key": (
        "  heads: 2",
        "  heads: 2\n  width: 64",
        "7: model.width: the key 'width' appears twice; first on line 4",
    ),
    "sparsity 1": (
        "sparsity: 0.5",
        "sparsity: 1.0",
        "18: target.sparsity.sparsity: 1.0 leaves no weights; expected 0 <= sparsity < 1",
    ),
    "negative width": ("  width: 32", "  width: -32", "4: model.width: should be greater than 0, not -32"),
    "heads": (
        "  heads: 2",
        "  heads: 5",
        "6: model.heads: 5 heads don't divide the width 32; expected a divisor of it",
    ),
    "target heads": (
        "  width: 64",
        "  width: 64\n  heads: 5",
        "17: target.heads: 5 heads don't divide the width 64; expected a divisor of it",
    ),
    "target width": (
        "  width: 64",
        "  width: 72",
        "16: target.width: 72 is not a multiple of the proxy's head width 16; expected a multiple of it, or other heads",
    ),
    "override": (
        "    sparsity: 0.5",
        "    sparsity: 0.5\n    overrides: {attn.x: 0.5}",
        "19: target.sparsity.overrides: attn.x matches no hidden tensor; expected a site (",
    ),
    "text for a number": ("  steps: 12", "  steps: many", "13: train.steps: should be a valid integer, not 'many'"),
    "missing data": ("  source: text.txt", "  source: none.txt", "11: data.source: none.txt: no such file or folder"),
    "truncated": (
        "target:\n  width: 64\n  sparsity:\n    sparsity: 0.5\n",
        "target: {width: 64,",
        "16: not valid YAML: while parsing a flow ",
    ),
}


class TestTransferRefuses:
    @pytest.mark.parametrize("case", BAD_PROXIES)
    def test_by_file_line_and_place(self, supar: Supar, proxy_file: Path, unchanged: Any, case: str) -> None:
        old, new, message = BAD_PROXIES[case]
        assert PROXY.count(old) == 1
        proxy_file.write_text(PROXY.replace(old, new))
        unchanged()
        ended = supar("transfer")
        assert (ended.status, ended.out) == (2, "")
        (line,) = ended.err.splitlines()
        assert line.startswith("error: proxy.yaml:" + message)

    def test_every_problem_at_once(self, supar: Supar, proxy_file: Path, unchanged: Any) -> None:
        proxy_file.write_text(PROXY.replace("steps: 12", "steps: 0").replace("  layers: 2", "  layers: two"))
        unchanged()
        ended = supar("transfer")
        assert ended.status == 2 and [line.split(": ")[1:3] for line in ended.err.splitlines()] == [
            ["proxy.yaml:5", "model.layers"],
            ["proxy.yaml:13", "train.steps"],
        ]

    def test_an_empty_stdin_naming_pipefail(self, supar: Supar, text_file: Path, unchanged: Any) -> None:
        unchanged()
        ended = supar("transfer", "-")
        assert (ended.status, ended.out) == (2, "")
        assert ended.err.startswith("error: <stdin>: standard input is empty; ") and "`set -o pipefail`" in ended.err

    @pytest.mark.parametrize(
        ("arguments", "what"),
        [
            (
                ["--sparsity", "half"],
                "--sparsity half: 'half' is not a number; expected a number such as 0.992, 99.2% or 127/128",
            ),
            (["--sparsity", "0.5,,0.6"], "'' is not a number"),
            (["--sparsity", "nan"], "--sparsity nan: 'nan' is not a number"),
            (["--density", "1/0"], "--density 1/0: '1/0' is not a number"),
            (["--density", "3/2"], "error: --density 3/2: 3/2; expected 0 < density <= 1"),
            (["--sparsity", "0.5", "--density", "0.5"], "expected only one of them"),
            (
                ["--parameterization", "ntk"],
                "--parameterization ntk: expected one of supar, mup, sp, sp-si, supar-init-only, supar-lr-only",
            ),
            (["--width", "-64"], "error: --width -64: should be greater than 0, not -64"),
            (["--set", "train.lr=1"], "error: -s train.lr=1: unknown key 'lr'"),
            (["--set", "train"], "--set train: expected A.B=VALUE"),
            (["--set", "kind.x=1"], "expected a path of keys"),
            (["none.yaml"], "none.yaml: no such file; expected a proxy, which `supar tune-proxy` writes"),
            (["--out", "."], "is a folder"),
            (["--sparsity", "0.999"], "weights per neuron"),
        ],
    )
    def test_bad_flags(
        self, supar_here: Supar, proxy_file: Path, unchanged: Any, arguments: list[str], what: str
    ) -> None:
        unchanged()
        ended = supar_here("transfer", *arguments)
        assert (ended.status, ended.out) == (2, "")
        assert ended.err.splitlines()[-1].startswith("error: ") and what in ended.err

    def test_a_document_that_is_no_proxy(
        self, supar_here: Supar, tmp_path: Path, text_file: Path, unchanged: Any
    ) -> None:
        (tmp_path / "proxy.yaml").write_text("kind: supar.plan/v1\n")
        unchanged()
        ended = supar_here("transfer")
        assert (ended.status, ended.err) == (
            2,
            "error: proxy.yaml:1: kind: is 'supar.plan/v1' (`supar train` trains it); expected supar.proxy/v1\n",
        )


class TestTransfer:
    def test_writes_the_plan_and_prints_the_same_to_a_pipe(
        self, supar: Supar, proxy_file: Path, tmp_path: Path
    ) -> None:
        ended = supar("transfer")
        assert ended.status == 0
        assert ended.out == (tmp_path / "plan.yaml").read_text()
        assert yaml.safe_load(ended.out) == document.read(ended.out, "plan")[0].data
        assert ended.err.splitlines()[-1] == "wrote plan.yaml"
        assert "sparsity 0.5, density 0.5; width 64, 2 layers" in ended.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.yaml", "proxy.yaml", "text.txt"]

    def test_the_parent_is_the_proxy_in_the_file_whatever_the_flags(self, supar_here: Supar, proxy_file: Path) -> None:
        loaded = supar_cli.load(proxy_file)
        parents = []
        for flags in ([], ["--sparsity", "0.75", "--width", "96", "--steps", "3"]):
            ended = supar_here("transfer", "-o", "-", *flags)
            parents.append(yaml.safe_load(ended.out)["parents"])
        assert parents[0] == parents[1]
        identified = yaml.safe_load(ended.out)["data"]["hash"]
        with_hash = loaded.model_copy(update={"data": loaded.data.model_copy(update={"hash": identified})})
        assert parents[0] == {"proxy": with_hash.hash()}

    def test_stdout_only(self, supar: Supar, proxy_file: Path, unchanged: Any) -> None:
        unchanged()
        ended = supar("transfer", "-", "-o", "-", "-q", stdin=PROXY)
        assert (ended.status, ended.err) == (0, "")
        assert ended.out.startswith("kind: supar.plan/v2\n")

    def test_another_file_and_json(self, supar_here: Supar, proxy_file: Path, tmp_path: Path) -> None:
        ended = supar_here("transfer", "-o", "new/a.yaml", "--json", "-q")
        assert (ended.status, ended.err) == (0, "")
        assert ended.out == "" and not (tmp_path / "plan.yaml").exists()
        plan = supar_here("transfer", "-o", "-", "-q").out
        assert json.loads((tmp_path / "new/a.yaml").read_text()) == yaml.safe_load(plan)

    def test_several_levels_are_a_stream(self, supar_here: Supar, proxy_file: Path) -> None:
        ended = supar_here("transfer", "-o", "-", "--sparsity", "0.5,0.75,0.992", "--allow-low-wpn")
        plans = list(yaml.safe_load_all(ended.out))
        assert [plan["sparsity"]["density"] for plan in plans] == [0.5, 0.25, 0.008]
        ended = supar_here("transfer", "-o", "-", "--density", "0.5,1/4", "--json")
        assert [plan["sparsity"]["sparsity"] for plan in json.loads(ended.out)] == [0.5, 0.75]

    def test_flags_and_settings_stand_for_keys(self, supar_here: Supar, proxy_file: Path, text_file: Path) -> None:
        ended = supar_here(
            *(
                "transfer",
                "-o",
                "-",
                "--density",
                "0.25",
                "--width",
                "96",
                "--layers",
                "3",
                "--tokens",
                "6400",
                "--seed",
                "5",
            ),
            *("--pattern", "fixed_fan_in", "--distribution", "erk", "--parameterization", "mup", "--context", "32"),
            *("--set", "hyperparameters.lr=1e-3", "-s", "target.sparsity.overrides.mlp=0.5", "-s", "meta.note=off"),
        )
        assert ended.status == 0, ended.err
        plan = yaml.safe_load(ended.out)
        assert (plan["model"]["width"], plan["model"]["layers"], plan["model"]["heads"]) == (96, 3, 6)
        assert (plan["train"]["steps"], plan["train"]["seed"], plan["parameterization"]["name"]) == (50, 5, "mup")
        assert plan["hyperparameters"]["lr"] == 0.001
        assert plan["sparsity"] == {
            "density": 0.25,
            "sparsity": 0.75,
            "pattern": "fixed_fan_in",
            "draw": "live",
            "distribution": "erk",
            "overrides": {"mlp": 0.5},
            "source": {"kind": "random"},
            "updates": None,
        }

    def test_a_file_that_differs_is_kept_unless_forced(
        self, supar_here: Supar, proxy_file: Path, tmp_path: Path
    ) -> None:
        assert supar_here("transfer").status == 0
        first = (tmp_path / "plan.yaml").read_text()
        assert supar_here("transfer").status == 0  # the same content is no conflict
        ended = supar_here("transfer", "--sparsity", "0.75")
        assert (ended.status, ended.out) == (2, "")
        assert "error: plan.yaml: exists and differs; expected --force" in ended.err
        assert (tmp_path / "plan.yaml").read_text() == first
        assert supar_here("transfer", "--sparsity", "0.75", "--force").status == 0
        assert yaml.safe_load((tmp_path / "plan.yaml").read_text())["sparsity"]["sparsity"] == 0.75

    def test_a_pipe_is_fed_and_a_link_stays_a_link(self, supar: Supar, proxy_file: Path, tmp_path: Path) -> None:
        pipe, link = tmp_path / "pipe", tmp_path / "link.yaml"
        os.mkfifo(pipe)
        (tmp_path / "plans").mkdir()
        link.symlink_to("plans/plan.yaml")
        plan = supar("transfer", "-q", "-o", "-").out
        held = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        try:
            for flags in ((), ("--force",)):
                written = supar("transfer", "-q", "-o", "pipe", *flags)
                assert (written.status, written.out) == (0, "") and pipe.is_fifo()
                assert os.read(held, 1 << 20).decode() == plan
        finally:
            os.close(held)
        assert supar("transfer", "-q", "-o", "link.yaml", "--force").out == ""
        assert link.is_symlink() and (tmp_path / "plans/plan.yaml").read_text() == plan

    def test_dry_run_writes_nothing_and_shows_sizes(self, supar_here: Supar, proxy_file: Path, unchanged: Any) -> None:
        unchanged()
        ended = supar_here("transfer", "--dry-run")
        assert (ended.status, ended.out) == (0, "")
        # 256·64 + 16·64 + 5·64 dense, 2·12·64² hidden
        assert "parameters 116,032; live 66,880; hidden 49,152 of 98,304 live" in ended.err
        assert "12 steps, 768 tokens" in ended.err

    def test_warnings_are_said_even_when_quiet(self, supar_here: Supar, proxy_file: Path) -> None:
        ended = supar_here("transfer", "-q", "--sparsity", "0.9")
        assert ended.status == 0
        (line,) = ended.err.splitlines()
        assert line.startswith("warning: blocks.0.attn.q: 6.4 weights per neuron")


class TestPipes:
    @pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs pseudo-terminals")
    def test_a_dead_reader_loses_nothing(self, proxy_file: Path, tmp_path: Path) -> None:
        # --layers 120: far more than a pipe holds, so that the writer meets the closed end
        command = f"{sys.executable} -m supar_cli transfer --layers 120 | head -1"
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True, timeout=60)
        assert done.stdout == b"kind: supar.plan/v2\n"
        assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr
        assert len(yaml.safe_load((tmp_path / "plan.yaml").read_text())["tensors"]) == 3 + 120 * 8

    @pytest.mark.parametrize("no_color", [False, True])
    def test_no_color_is_obeyed_on_a_terminal(self, tmp_path: Path, no_color: bool) -> None:
        code = (
            "from supar_cli.cli.terminal import Progress\n"
            "with Progress('run') as shown:\n    shown.progress(1, 2, 0.5); shown.warn('[red]as it is[/red]')"
        )
        pty = pytest.importorskip("pty", reason="needs pseudo-terminals")
        ours, theirs = pty.openpty()
        env = environment(TERM="xterm-256color", **({"NO_COLOR": "1"} if no_color else {}))
        with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=env, stderr=theirs) as process:
            os.close(theirs)
            shown = b""
            while True:
                try:
                    part = os.read(ours, 65536)
                except OSError:  # Linux's end of file of a pseudo-terminal
                    break
                if not part:
                    break
                shown += part
        os.close(ours)
        warning = b"warning:" if no_color else b"\x1b[33mwarning:\x1b[0m"
        assert process.returncode == 0 and warning + b" [red]as it is[/red]" in shown
        # what a terminal of 80 columns shows at Ctrl-C, twice, fits behind the bar, which is erased with it
        bars = [
            line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())) if "━" in line
        ]
        assert bars and max(map(len, bars)) <= 80 - len("^C^C")
        colours = [code for code in (b"\x1b[3", b"\x1b[9", b"\x1b[38") if code in shown]
        assert (colours == []) is no_color


class TestTop:
    def test_version(self, supar: Supar) -> None:
        ended = supar("--version")
        assert (ended.status, ended.out, ended.err) == (0, f"{supar_cli.__version__}\n", "")

    @pytest.mark.parametrize(
        "arguments", [["transfre"], ["transfer", "--sparsty", "0.5"], ["train", "--steps", "0"], ["--bogus"]]
    )
    def test_what_is_unknown_is_bad_input(self, supar_here: Supar, arguments: list[str]) -> None:
        ended = supar_here(*arguments)
        assert (ended.status, ended.out) == (2, "")
        assert ended.err != "" and "Traceback" not in ended.err

    def test_help_lists_the_commands(self, supar_here: Supar) -> None:
        ended = supar_here("--help")
        assert ended.status == 0 and all(
            f"  {word} " in ended.out for word in ("tune-proxy", "transfer", "train", "doctor")
        )
