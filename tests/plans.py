"""Plans of a small proxy on real text, for tests and for what is run without pytest."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from supar_cli.data import corpus
from supar_cli.planning import document
from supar_cli.planning.plan import Plan
from supar_cli.planning.problems import parse
from supar_cli.planning.spec import Proxy, Target
from supar_cli.planning.transfer import transfer


def proxy_fields(source: str, **changes: dict[str, Any]) -> dict[str, Any]:
    """Data of a small proxy document; each change is merged into the section of its name."""
    fields: dict[str, Any] = {
        "kind": "supar.proxy/v1",
        "model": {"family": "gpt2", "width": 32, "layers": 2, "heads": 2, "context": 16, "vocab": 256},
        "hyperparameters": {"lr": 0.01, "init_std": 0.08, "alpha_input": 1.5, "alpha_output": 2.0, "weight_decay": 0.1},
        "data": {"source": source},
        "train": {"steps": 12, "batch_size": 4, "eval_every": 6, "eval_batches": 2},
        "target": {"width": 64, "sparsity": {"density": 0.25}},
        "run": {"device": "cpu"},
    }
    for name, section in changes.items():
        fields[name] = {**fields.get(name, {}), **section}
    return fields


def plan_from(fields: dict[str, Any], name: Any = "supar") -> Plan:
    """The plan of a proxy document's own target, its data identified."""
    proxy = parse(Proxy, document.read(document.write([fields]), "proxy.yaml")[0])
    if proxy.data is not None and Path(proxy.data.source).exists():
        proxy = proxy.model_copy(update={"data": corpus.identify(proxy.data)})
    return transfer(proxy, Target(**proxy.target.model_dump()), name, allow_low_wpn=True)


def real_text(size_bytes: int) -> bytes:
    """Text of the standard library, repeated up to a size."""
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_bytes()[: size_bytes // 2]
    return (text * (size_bytes // len(text) + 1))[:size_bytes]
