"""The documents and scripts that supar ships, as text: files of their own, and the paper's figures, which share lines."""

from __future__ import annotations

from textwrap import dedent

from supar_cli import files

FIGURES = "figures"  # the file of all figures

Lines = dict[tuple[str, ...], tuple[str, str]]  # by the path of its key: the comment above a line, and the line


def names() -> list[str]:
    """The names of all templates, in the order of use, sweeps last; none where the installation lacks them."""
    found = {path.stem for path in files.template("quickstart.yaml").parent.glob("*.yaml")}
    figures = {path[0] for path in _read_figures()} if FIGURES in found else set()
    by_number = sorted(figures, key=lambda name: (not name.startswith("fig"), len(name), name))
    return [*sorted(found - {FIGURES}, key=_rank), *by_number]


def scripts() -> list[str]:
    """The names of the training scripts of models that supar did not make, such as `gpt.py`."""
    return sorted(path.name for path in files.template("own").glob("*.py"))


ORDER = ("quickstart", "vit", "own", "gpt2-124m", "interpretability", "paper", "paper-proxy")


def _rank(name: str) -> tuple[int, str]:
    return ORDER.index(name) if name in ORDER else len(ORDER), name


def text(name: str) -> str:
    """A template's text with its comments. A figure has a small document, and most one of the paper's size."""
    if name in scripts():
        return files.template(f"own/{name}").read_text("utf-8")
    figures = _read_figures()
    if (name,) not in figures:
        return files.template(f"{name}.yaml").read_bytes().decode("utf-8")
    lines = _figure(figures, name)
    title = figures[name,][0].rpartition("\n\n")[2].lstrip()
    small, full = (
        dedent("".join(above + line for path, (above, line) in lines.items() if path[0] == size))
        for size in ("small", "full")
    )
    return "---\n".join([title + small, *filter(None, [full])]).replace("NAME", name)


def _figure(figures: Lines, name: str) -> Lines:
    """A figure's lines by size, section and key: those of the figure that it is like, at its own sizes, with its own in their place."""
    found: Lines = {}
    if (name, "like") in figures:
        like = _figure(figures, figures[name, "like"][1].partition(":")[2].strip())
        found = {path: line for path, line in like.items() if (name, path[0]) in figures}
    for path, (above, line) in figures.items():
        if path[0] == name and len(path) > 2:
            known, _ = found.get(path[1:], ("", ""))
            found[path[1:]] = above or known, line
    sections = list(dict.fromkeys(path[:2] for path in found))  # a new key of a section follows its other keys
    return {path: found[path] for path in sorted(found, key=lambda path: sections.index(path[:2]))}


def _read_figures() -> Lines:
    """The lines of the figures' file; a comment belongs to the line below it."""
    found: Lines = {}
    path: tuple[str, ...] = ()
    above = ""
    for line in files.template(f"{FIGURES}.yaml").read_text("utf-8").splitlines(keepends=True):
        content = line.lstrip()
        if not content or content.startswith("#"):
            above += line
            continue
        depth = (len(line) - len(content)) // 2
        path = (*path[:depth], content.partition(":")[0])
        found[path], above = (above, line), ""
    return found
