"""Numbers of the forward pass that move with the size of the model: written constants, and widths of attention heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from supar_cli.own.record import Number


def compare(base: Sequence[Number], wider: Sequence[Number], place: Callable[[str], str]) -> list[str]:
    """A note for each number that differs, with both values and the module, all layers together.

    `place`: a module's name with `*` for the number of its layer.
    """
    if [one[:2] for one in base] != [one[:2] for one in wider]:
        return ["base and wider do not run the same operations: numbers that move with the size were not looked for"]
    found: dict[str, int] = {}
    for (module, operation, narrow), (_, _, wide) in zip(base, wider, strict=True):
        if narrow == wide:
            continue
        pairs = [f"{a:.6g} at base, {b:.6g} at wider" for a, b in zip(narrow, wide, strict=False) if a != b]
        where = place(module) or "the model itself"
        note = f"{where}: {operation} with {'; '.join(pairs) or f'{len(narrow)} numbers at base, {len(wide)} at wider'}"
        found[note] = found.get(note, 0) + 1
    return [f"{note} ({count} times)" if count > 1 else note for note, count in found.items()]
