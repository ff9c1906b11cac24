"""The `supar` command: its subcommands by name, each imported only when called, and how errors end the process."""

import errno
import gc
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import typer
import typer.core
import typer.main

from supar_cli import standard_streams
from supar_cli.errors import InputError, PeerLost, SetupError, SuparError, TransferWarning, suggestion
from supar_cli.training.launch.environment import is_rank_process, is_worker_rank
from supar_cli.version import __version__

SETTINGS: dict[str, Any] = {"rich_markup_mode": None, "pretty_exceptions_enable": False}
HELP_NAMES = {"help_option_names": ["-h", "--help"]}
COMMANDS = {  # in the order of use
    "From nothing to a sparse model": {
        "demo": "Show in minutes whether a dense learning rate holds when sparse, under SP and SμPar; write demo/.",
        "init": "Write a template to start from.",
        "tune-proxy": "Search hyperparameters on a small dense proxy; write proxy.yaml.",
        "transfer": "Turn a proxy and a target sparsity into a plan; write plan.yaml.",
        "train": "Train a plan; write runs/NAME/.",
    },
    "Look": {
        "explain": "Show the formula, numbers and source behind a plan's values.",
        "runs": "List runs: state, progress, last losses.",
        "show": "Show a run: state, plan, environment, curve.",
        "report": "Put runs, sweeps, checks and plans on one HTML page; write report.html.",
        "evaluate": "Score a run on text: loss, perplexity and bits per byte, with standard errors.",
        "generate": "Continue a prompt with a run's model, or begin a document; print the text as it comes.",
    },
    "Measure": {
        "check": "Check that activations and updates keep their size over density and width; exit 5 if not.",
        "sweep": "Measure whether the best hyperparameter stays the same over density or width; write sweeps/NAME/.",
        "compare": "Compare SP, μP and SμPar over sparsities without re-tuning; write compare/NAME/.",
        "bench": "Benchmark time and memory of masked training against plain dense training.",
    },
    "Your own model, data, documents, machine": {
        "layout": "Read from your own model what each tensor is and what scales; write layout.yaml.",
        "prune": "Prune a run by magnitude, and plan the training of what is left; write pruned.yaml.",
        "export": "Write a run's model as a folder that other programs load; write export/.",
        "data": "Inspect a corpus, or prepare one as a token file.",
        "help": "Print a page of the manual, or what a key of a document means.",
        "schema": "Print the JSON Schema of a document, for editors.",
        "doctor": "Show versions, devices and data, and time one step.",
    },
}
NAMES = [name for group in COMMANDS.values() for name in group]
# what a system may lack without a file to name: a folder for temporary files, space, open files, memory, processes; None is
# that of the libraries' own errors, such as matplotlib's without a folder to write to
LACKS = (None, errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)
# the modules of commands that have none of their own name
MODULES = {
    "explain": "transfer",
    "show": "runs",
    "report": "runs",
    "compare": "sweep",
    "schema": "init",
}


class Command(typer.core.TyperCommand):
    """A command whose help shows its options in groups, then its examples."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        from supar_cli.cli.option_table import GROUPS

        groups: dict[str, list[Any]] = {}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                groups.setdefault(getattr(param, "rich_help_panel", None) or "Input and output", []).append(record)
        for group in filter(groups.get, ("Arguments", *GROUPS)):
            with formatter.section(group):
                formatter.write_dl(groups[group])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Examples"):
            formatter.write("".join(f"  {line.strip()}\n" for line in (self.epilog or "").splitlines()))


class Group(typer.core.TyperGroup):
    """Several commands; a name that is close to an unknown one is named."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if not ctx.resilient_parsing and self.get_command(ctx, args[0]) is None:
            raise InputError(f"{args[0]}: no such command; {suggestion(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)


def show_help(ctx: typer.Context) -> None:
    """Show the help of a group that is called without a command."""
    if ctx.invoked_subcommand is None:
        sys.stderr.write(ctx.get_help() + "\n")
        raise typer.Exit(InputError.exit_status)


def application(*functions: Callable[..., None], help: str | None = None) -> typer.Typer:
    """A Typer application of one command, or, with `help`, of several named commands."""
    made = typer.Typer(**SETTINGS, add_completion=False, cls=Group, help=help)
    if help is not None:
        made.callback(invoke_without_command=True)(show_help)
    for function in functions:
        made.command(cls=Command, context_settings=HELP_NAMES, epilog=getattr(function, "examples", None))(function)
    return made


def _require_system() -> None:
    """Raise SetupError on a system such as Windows, which lacks what runs need, and in a folder that was removed."""
    try:
        for name in ("fcntl", "resource"):
            importlib.import_module(name)
        os.getcwd()  # without one the libraries of torch would end the process
    except ImportError:
        what = f"this Python has no module {name}; supar runs on Linux and macOS (on Windows: in WSL)"
        raise SetupError(what) from None
    except FileNotFoundError:
        raise SetupError("the working directory was removed; expected to be in one that exists") from None


class LazyGroup(Group):
    """Imports the module of the one command that is called, and ends the process with the status of its error."""

    def list_commands(self, ctx: Any) -> list[str]:
        return NAMES

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in NAMES:
            return None
        if cmd_name not in self.commands:
            name = cmd_name.replace("-", "_")
            found = getattr(importlib.import_module(f"supar_cli.cli.{MODULES.get(name, name)}"), name)
            gc.enable()
            command = typer.main.get_command(found if isinstance(found, typer.Typer) else application(found))
            command.name = cmd_name
            self.commands[cmd_name] = command
        return self.commands[cmd_name]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        for group, commands in COMMANDS.items():
            with formatter.section(group):
                formatter.write_dl(list(commands.items()))

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command; what is wrong with the command line is reported as any other error is."""
        try:
            status = super().main(*args, **{**extra, "standalone_mode": False})
        except typer.TyperException as error:
            _report(usage_problem(error))
            status = InputError.exit_status
        raise SystemExit(status)

    def invoke(self, ctx: Any) -> Any:
        warnings.simplefilter("ignore", TransferWarning)
        try:
            _require_system()
            return super().invoke(ctx)
        except SuparError as error:
            # the main process reports errors that all processes share, and errors that only follow from a lost process
            if not is_worker_rank() or not (error.is_collective or isinstance(error, PeerLost)):
                rank = f"rank {os.environ['RANK']}: " if is_worker_rank() else ""
                _report(rank + str(error))
            raise SystemExit(error.exit_status) from None
        except OSError as error:  # the environment's, such as a name that is too long or a folder that may not be read
            if error.filename is None and error.errno not in LACKS:
                raise
            _report(f"{error.filename or 'this system'}: {error.strerror or error}")
            raise SystemExit(SetupError.exit_status) from None
        except UnicodeEncodeError as error:  # a name of the command line that a document can't hold
            if error.reason != "surrogates not allowed":
                raise
            name = error.object[max(0, error.start - 20) : error.end + 20].strip()
            expected = "expected names in it (PYTHONUTF8=1 makes it UTF-8)"
            _report(f"{name}: has bytes outside of this locale's encoding; {expected}")
            raise SystemExit(SetupError.exit_status) from None
        except KeyboardInterrupt:
            if not is_worker_rank():
                sys.stderr.write("interrupted\n")
            raise SystemExit(130) from None


def usage_problem(error: typer.TyperException) -> str:
    """What Typer says of a command line, in the form of supar's problems."""
    found: dict[str, Any] = vars(error)
    ctx, option = found.get("ctx"), found.get("option_name")
    see = f"see `{ctx.command_path} --help`" if ctx else "see --help"
    if "possibilities" in found:
        close = found["possibilities"]
        return f"{option}: no such option; " + (f"did you mean {close[0]}?" if close else see)
    if option is not None:
        return f"{option}: " + ("takes no value" if "does not take" in error.message else "expected a value")
    if (param := found.get("param")) is not None:
        is_argument = param.param_type_name == "argument"
        return f"{param.make_metavar(ctx) if is_argument else param.opts[0]}: is missing; {see}"
    return f"{error.message.rpartition('(')[2].rstrip(')')}: unexpected argument; {see}"


def _report(problems: str) -> None:
    """Write problems to stderr, a line each."""
    from supar_cli.cli.text import fit

    for line in problems.splitlines():
        sys.stderr.write(fit(line if line.startswith(("  ", "error:")) else f"error: {line}") + "\n")


app = typer.Typer(
    **SETTINGS,
    cls=LazyGroup,
    context_settings=HELP_NAMES,
    epilog="Start with `supar demo`.",
    help="Tune hyperparameters on a small dense proxy transformer, transfer them with SμPar to a wide sparse target, and train it.",
)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    ctx: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Options of `supar` itself."""
    show_help(ctx)


def main() -> None:
    """Entry point of the `supar` script."""
    gc.disable()  # measured: garbage collection during imports frees nothing and takes a thirtieth of a short command's time
    standard_streams.protect()
    status: Any = 1
    try:
        app()
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    lost = standard_streams.lost_output()
    if lost is not None and status == 0:
        status = SetupError.exit_status
        sys.stderr.write(f"error: standard output: can't be written: {lost.strerror}\n")
    if is_rank_process():
        # torch's threads may use the interpreter during its shutdown, which would kill the process by SIGABRT after its work is done
        os._exit(status if isinstance(status, int) else 1)
    sys.exit(status)
