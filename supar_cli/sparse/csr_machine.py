"""Machine code of the sparse engine's loops: compiled once, kept in a file, and loaded from there without importing numba."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm

from supar_cli.files import cache_folder, write_file


def machine_code(kernels: dict[str, Any]) -> bytes:
    """An object file of the kernels by their names, which asks for nothing of numba: they raise no error."""
    target = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), opt=3, codemodel="jitdefault", jit=True
    )
    whole = llvm.parse_assembly("")
    for name, kernel in kernels.items():
        part = llvm.parse_assembly(kernel.inspect_llvm())
        for one in (*part.functions, *part.global_variables):
            if not one.is_declaration and one.name != kernel.native_name:
                one.linkage = "internal"
        part.get_function(kernel.native_name).name = name
        whole.link_in(part)
    passes = llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options(speed_level=1))
    passes.getModulePassManager().run(whole, passes)
    asked = [one.name for one in whole.functions if one.is_declaration and not one.name.startswith(("llvm.", "mem"))]
    if asked:
        raise RuntimeError(f"kernels call {', '.join(asked)}; expected nothing of numba")
    return bytes(target.emit_object(whole))


def folders() -> tuple[Path, Path]:
    """Where the file may lie: beside Python's own compiled modules, or in the user's cache where that is not to be written."""
    return Path(__file__).parent / "__pycache__", cache_folder()


def key() -> bytes:
    """A digest of all that the machine code follows from."""
    sources = [
        Path(__file__).with_name(f"csr_{name}.py").read_bytes() for name in ("kernels", "gelu", "call", "machine")
    ]
    versions = [importlib.metadata.version(name) for name in ("numba", "llvmlite")]
    processor = llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten(), llvm.get_process_triple()
    return hashlib.sha256(repr((sources, versions, processor)).encode()).digest()


@cache
def machine() -> Any:
    """The kernels in memory. Their machine code is kept for other processes, which then don't import numba."""
    mine = key()
    places = [folder / f"kernels-{mine.hex()[:16]}.o" for folder in folders()]
    for place in places:
        with suppress(OSError):
            kept = place.read_bytes()
            if kept[:32] == hashlib.sha256(mine + kept[32:]).digest():  # as it was written, from what is here
                return _loaded(kept[32:])
    with _numba_as_it_comes():
        from supar_cli.sparse import csr_kernels

        code = machine_code({name: getattr(csr_kernels, name) for name in ("product", "gradients", "total")})
    for place in places:
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_file(place, hashlib.sha256(mine + code).digest() + code)
            break
    return _loaded(code)


@contextmanager
def _numba_as_it_comes() -> Iterator[None]:
    """Without the user's settings of numba: the key doesn't have them, and code that checks bounds, say, needs numba."""
    settings = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("NUMBA_")}
    import numba

    try:
        numba.config.reload_config()
        yield
    finally:
        os.environ.update(settings)
        numba.config.reload_config()


def _loaded(code: bytes) -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    loaded = llvm.create_mcjit_compiler(
        llvm.parse_assembly(""), llvm.Target.from_default_triple().create_target_machine()
    )
    loaded.add_object_file(llvm.ObjectFileRef.from_data(code))
    loaded.finalize_object()
    return loaded


def address_of(kernel: str) -> int:
    return int(machine().get_function_address(kernel))
