"""`supar transfer` and `explain`: a proxy and a target become a plan, and its numbers are worked out."""

import json
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import supar_cli
from supar_cli.cli import documents, terminal
from supar_cli.cli.options import Flags, command, require_one
from supar_cli.cli.values import parameterization
from supar_cli.errors import InputError, TransferWarning
from supar_cli.files import template
from supar_cli.planning import advice
from supar_cli.planning.density import Share
from supar_cli.planning.document import Document
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy

PLAN = "plan.yaml"


@command(
    "proxy sparsity density masks values width layers heads kv_heads head_width ffn_width context batch_size steps",
    "tokens tokens_per_parameter parameterization pattern block distribution updates data tokenizer field format seed",
    "from_paper allow_low_wpn explain dry_run",
    "set out force json quiet verbose",
    heads={"help": "Attention heads. [default: the proxy's head width]"},
    parameterization={
        "help": "supar, mup, sp, sp-si (SP with sparse-aware init), or a half of supar: supar-init-only, supar-lr-only.",
        "default": "supar",
        "read": parameterization,
    },
)
def transfer(flags: Flags) -> None:
    """Turn a tuned proxy into a plan for a wide, sparse target that states every number of its training.

    Examples:
      supar transfer --sparsity 0.992
      supar transfer proxy.yaml --width 2048 --density 1/128 -o wide.yaml
    """
    log = terminal.Log(flags.quiet)
    for name in ("masks", "values"):
        if (given := getattr(flags, name)) is not None:
            from supar_cli.cli.runs import find_run  # which imports what reads results

            setattr(flags, name, find_run(given, log))
            if not getattr(flags, name).exists():
                raise InputError(
                    f"{flags.places[name]}: is not there; expected a run, a safetensors file or a folder of them"
                )
    require_one(flags, "density", "sparsity")
    for name in ("density", "sparsity", "pattern", "block", "distribution"):  # masks say all of it
        require_one(flags, "masks", name)
    read = _read_proxy(flags)
    tuned = read.data.get("data") if isinstance(read.data, dict) else None
    tuned_on = tuned.get("hash") if isinstance(tuned, dict) else None
    evidence = read.data.get("evidence") if isinstance(read.data, dict) else None
    documents.apply(read, flags)
    levels = [(word, share) for word in ("sparsity", "density") for share in getattr(flags, word) or []] or [("", None)]
    with _folder(flags) as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", TransferWarning)
        numbers = [""] if len(levels) == 1 else [f"-{at}" for at in range(len(levels))]
        plans = [
            _plan(read, flags, Path(folder), number, *level) for number, level in zip(numbers, levels, strict=True)
        ]
        if folder:
            terminal.keep_files(Path(folder), [plan.model_dump() for plan in plans], flags, PLAN)
    terminal.log_plans(plans, flags, log)
    messages = [message for plan in plans for message in advice.warnings(plan, tuned_on, evidence)]
    for message in dict.fromkeys([*messages, *(str(one.message) for one in caught)]):
        log.warn(message)
    if flags.dry_run:
        return
    terminal.emit([plan.model_dump() for plan in plans], flags, log, PLAN)
    if not terminal.prints(flags) and all(plan.data is not None for plan in plans):
        log.next("supar train" + (f" {flags.out}" if flags.out else ""))


def _folder(flags: Flags) -> AbstractContextManager[str]:
    """A folder for the files of masks and values until it is known that they may be written; none where there are none."""
    if flags.masks is None and flags.values is None:
        return nullcontext("")
    from tempfile import TemporaryDirectory  # its imports would take as long as the plan

    return TemporaryDirectory()


def _read_proxy(flags: Flags) -> Document:
    missing = "expected a proxy, which `supar tune-proxy` writes, or --from-paper"
    if not flags.from_paper:
        return documents.read_one(flags.proxy or "proxy.yaml", missing)
    if flags.proxy is not None:
        raise InputError("--from-paper: cannot be combined with a proxy document; expected only one of them")
    return documents.read_one(str(template("paper-proxy.yaml")), missing, "--from-paper")


def _plan(read: Document, flags: Flags, folder: Path, number: str, word: str, share: Share | None) -> Plan:
    """The plan of the document's target; `word` (sparsity or density) sets its level if given.

    Its masks and values, if it has any, are written into a folder, under the plan's name and, of values, with a number.
    """
    name = Path(PLAN if flags.out in (None, "-") else flags.out).stem
    masks, values = f"{name}.masks.safetensors", f"{name}.values{number}.safetensors"
    level = f"--{word} {share}" if "," in flags.places.get(word, "") else flags.places.get(word, "")
    documents.override(read, ("target", "sparsity"), {word: share}, {word: level})
    proxy = parse(Proxy, read).beside(read.name)
    options: dict[str, Any] = {
        name: vars(flags)[name] for name in ("parameterization", "allow_low_wpn", "masks", "values")
    }
    with documents.with_locations(read), documents.naming_flags(flags):
        plan = supar_cli.transfer(proxy, **options, masks_out=folder / masks, values_out=folder / values)
    return plan.with_files(flags.masks and masks, flags.values and values)  # sought beside the plan


@command(
    "plan tensor role json",
    json={"help": "Write a JSON list, one item per plan, to stdout."},
)
def explain(flags: Flags) -> None:
    """Show the formula behind every number of a plan with its values put in, and where the plan differs from it.

    Examples:
      supar explain plan.yaml mlp.up
      supar explain runs/NAME --role embedding
    """
    from supar_cli.planning.explain import legend

    source, missing = documents.plan_file(flags.plan), "expected a plan, which `supar transfer` writes"
    if flags.tensor is None and flags.plan and not Path(flags.plan).suffix and Path("plan.yaml").exists():
        missing += f"; for a tensor of that name: supar explain plan.yaml {flags.plan}"
    plans = [parse(Plan, read) for read in documents.read_all(source, missing)]
    explained = [supar_cli.explain(plan, flags.tensor, flags.role) for plan in plans]
    if flags.json:
        terminal.to_stdout(json.dumps([one.as_json() for one in explained], indent=1) + "\n")
        return
    titles = [f"{source}, plan {i} of {len(plans)}" for i in range(1, len(plans) + 1)] if len(plans) > 1 else [source]
    texts = [one.text(title) for title, one in zip(titles, explained, strict=True)]
    terminal.to_stdout("\n".join([*texts, "\n".join(legend(explained)) + "\n"]))
