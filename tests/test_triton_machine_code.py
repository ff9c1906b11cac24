"""The block engine's Triton kernels as GPUs would run them: what they load, and the machine code that they become.

Triton compiles for GPUs that are not here and brings ptxas and nvdisasm. One subprocess (`python -m` this file) records the
launches that the engine makes, compiles each for its tuned configurations, and prints what it found as JSON.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch

from supar_cli.sparse import block_structure
from supar_cli.sparse.block import Block
from supar_cli.sparse.block_structure import BLOCKS, MOST_PADDED, Structure
from supar_cli.sparse.masks import Mask
from tests.conftest import CHECKOUT, environment

# bytes of a program's shared memory and matrix instructions, by compute capability (CUDA C++ programming guide)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
BF16, FP32 = torch.bfloat16, torch.float32
TOKENS = 4096
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"
)


def engine(alive: Any, block: int) -> Block:
    return Block(Mask.of(np.kron(alive, np.ones((block, block))) > 0), block, "torch")


@pytest.mark.parametrize(("columns", "tiles"), [(16, 1.25), (15, 1 + 4 / 15), (6, 1.5), (1, 2)])
def test_a_gradient_loads_its_rows_once_for_up_to_four_blocks(columns: int, tiles: float) -> None:
    """Tiles of the inputs and of the gradient of the outputs, a live block: one of each where a program makes one block."""
    made = engine(np.arange(16) < np.full((3, 1), columns), 16)
    groups, rows = made.get_buffer("groups"), made.get_buffer("rows")
    assert (len(groups) + len(rows)) / len(rows) == pytest.approx(tiles)
    assert groups[groups >= 0].tolist() == list(range(len(rows)))  # each block once
    for group in groups:
        assert group[0] >= 0 and len(set(rows[group[group >= 0]].tolist())) == 1
    assert groups.numel() <= MOST_PADDED * len(rows)  # else it multiplies more than it saves


def test_a_gradient_of_the_largest_blocks_is_made_of_two_at_once() -> None:
    widths = {block: engine(np.ones((1, 8)), block).get_buffer("groups").shape[1] for block in BLOCKS}
    assert widths == {16: 4, 32: 4, 64: 4, 128: 2}


@needs_triton
def test_compilation_sees_the_kernels_and_no_opaque_operator() -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import default_partition

    graphs = []

    def partition(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(graph)
        return default_partition(graph, inputs, **options)

    def forward_of(graph: Any, inputs: Any) -> Any:
        (returned,) = graph.graph.output_node().args
        found = [node.meta["val"] for node in returned]
        return lambda *_: [torch.zeros(value.shape, dtype=value.dtype) for value in found]  # nothing runs

    layer = Block(engine(np.ones((2, 3)), 16).mask, 16, "triton")
    x, values = torch.randn(9, layer.d_in, requires_grad=True), torch.randn(layer.live, requires_grad=True)
    backend = aot_autograd(fw_compiler=forward_of, partition_fn=partition)
    torch.compile(layer, backend=backend, fullgraph=True)(x, values)
    (graph,) = graphs
    names = [str(node.target) for node in graph.graph.nodes]
    assert sum("triton_kernel_wrapper" in name for name in names) == 3
    assert not any("supar" in name for name in names)


class Launch(NamedTuple):
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


def launches(kernels: Any, block: int, dtype: torch.dtype, precision: str = "ieee") -> dict[str, Launch]:
    """What a layer of live blocks launches: the products forward and transposed, and the gradient."""
    made: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return lambda *arguments, **constants: made.append(Launch(self.kernel, arguments, constants))

    layer = engine(np.ones((4, 4)), block)
    structure = [layer.get_buffer(name) for name in Structure._fields]
    x, values = torch.zeros(TOKENS, 4 * block, dtype=dtype), torch.zeros(layer.live)
    with mock.patch.object(kernels, "wrap_triton", Recorder), multiplying(precision):
        kernels.block_linear(x, values, structure, block)
        kernels.block_linear_grad_input(x, values, structure, block)
        kernels.block_linear_grad_values(x, x, structure, block)
    return dict(zip(("product", "transposed", "gradient"), made, strict=True))


@contextmanager
def multiplying(precision: str) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    yield
    matmul.fp32_precision = before


def compiled(launch: Launch, capability: int, at: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Shared memory and instructions of a launch for these of its configurations. As Triton specialises arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {BF16: "*bf16", FP32: "*fp32", torch.int32: "*i32"}
    names = launch.kernel.arg_names
    given = dict(zip(names, launch.arguments, strict=False))
    signature = {
        name: pointers[value.dtype] if isinstance(value, torch.Tensor) else "i32" for name, value in given.items()
    }
    even = [n for n, value in given.items() if isinstance(value, torch.Tensor) or value % 16 == 0]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in even}
    for config in (launch.kernel.configs[index] for index in at):
        constants = {**launch.constants, **config.kwargs}
        source = ASTSource(
            launch.kernel.fn, {name: signature.get(name, "constexpr") for name in names}, constants, attributes
        )
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        yield {"shared": made.metadata.shared, "tokens": constants["TOKENS"], **instructions(made.asm["cubin"])}


def instructions(cubin: bytes) -> dict[str, int]:
    """How many there are of each kind that matters; LDL and STL move what the registers can't hold."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        text = subprocess.run([tool, file.name], capture_output=True, text=True, check=True).stdout
    return Counter(re.findall(r"\b(HGMMA|HMMA|UTCHMMA|FFMA|LDL|STL)\b", text))


def mutant(before: str, after: str) -> Any:
    """The kernels' module with a planted change, its operators under other names."""
    source = Path(importlib.import_module("supar_cli.sparse.block_kernels").__file__ or "").read_text()
    assert source.count(before) == 1
    folder = os.environ.get("TRITON_CACHE_DIR")  # removed with what is compiled of it
    with tempfile.NamedTemporaryFile("w", suffix=".py", dir=folder, delete=False) as file:
        file.write(source.replace(before, after).replace("supar::", f"mutant_{Path(file.name).stem}::"))
    spec = importlib.util.spec_from_file_location(Path(file.name).stem, file.name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def measure() -> dict[str, list[dict[str, Any]]]:
    """What each kernel becomes, by kind, dtype, edge and capability, and what planted faults do."""
    from supar_cli.sparse import block_kernels as kernels

    found: dict[str, list[dict[str, Any]]] = {}

    def add(name: str, launch: Launch, at: Iterable[int], capability: int = 90) -> None:
        found[f"{name} {capability}"] = list(compiled(launch, capability, at))

    bf16 = {block: launches(kernels, block, BF16) for block in BLOCKS}
    products, gradients = range(len(kernels.PRODUCT_CONFIGS)), range(len(kernels.GRADIENT_CONFIGS))
    add("product bf16 64", bf16[64]["product"], products)
    add("transposed bf16 128", bf16[128]["transposed"], products)
    for block in (64, 128):
        add(f"gradient bf16 {block}", bf16[block]["gradient"], gradients)
    for capability in (80, 100):
        add("product bf16 128", bf16[128]["product"], [1], capability)
        add("gradient bf16 64", bf16[64]["gradient"], [1], capability)
        add("gradient bf16 128", bf16[128]["gradient"], [1], capability)
    for block, kind in product((16, 32), ("product", "gradient")):
        add(f"{kind} bf16 {block}", bf16[block][kind], [1])
    add("product ieee 64", launches(kernels, 64, FP32)["product"], [1])
    add("gradient ieee 128", launches(kernels, 128, FP32)["gradient"], [0], 80)
    tf32 = launches(kernels, 64, FP32, "tf32")
    add("product tf32 64", tf32["product"], [1])
    for capability in (80, 90):
        add("gradient tf32 64", tf32["gradient"], [0], capability)
    with mock.patch.object(block_structure, "GROUP_WIDTH", 512):
        add("fault: bf16 four of 128 at once", launches(kernels, 128, BF16)["gradient"], [1])
    wide = mutant("tl.dot(dy_tile, x_tile,", "tl.dot(dy_tile.to(tl.float32), x_tile.to(tl.float32),")
    add("fault: bf16 widened", launches(wide, 64, BF16)["gradient"], [1])
    return found


@cache
def measured() -> dict[str, list[dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        around = environment(TRITON_CACHE_DIR=folder, OMP_NUM_THREADS="1", TRITON_INTERPRET="0")
        call = [sys.executable, "-m", "tests.test_triton_machine_code"]
        ended = subprocess.run(call, cwd=CHECKOUT, env=around, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return json.loads(ended.stdout)  # type: ignore[no-any-return]


def problems(name: str, found: dict[str, Any]) -> set[str]:
    """What keeps a kernel from its speed."""
    kind, capability = name.split()[1], int(name.split()[-1])
    wanted = {"ieee": "FFMA"}.get(kind, MATRIX[capability])
    if wanted == "HGMMA" and (found["tokens"] < 64 or name.split()[2] in ("16", "32")):
        wanted = "MMA"  # Hopper's own instructions take 64 rows
    spills = {"spills"} if found.get("LDL", 0) + found.get("STL", 0) else set()
    slow = set() if any(op.endswith(wanted) for op in found) else {"no matrix instruction"}
    large = {"too much shared memory"} if found["shared"] > SHARED_BYTES[capability] else set()
    return spills | slow | large


@needs_triton
def test_no_kernel_spills_and_all_large_blocks_are_multiplied_by_tensor_cores() -> None:
    right = {name: each for name, each in measured().items() if not name.startswith("fault")}
    assert len(right) >= 19 and sum(map(len, right.values())) >= 31
    assert {name: found for name, found in every(right).items() if found} == {}


@needs_triton
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("fault: bf16 four of 128 at once", {"spills", "too much shared memory"}),
        ("fault: bf16 widened", {"no matrix instruction"}),
    ],
)
def test_a_planted_fault_of_a_kernel_is_noticed(name: str, wanted: set[str]) -> None:
    assert every(measured())[f"{name} 90, 0"] == wanted


def every(found: dict[str, list[dict[str, Any]]]) -> dict[str, set[str]]:
    return {f"{name}, {at}": problems(name, one) for name, each in found.items() for at, one in enumerate(each)}


if __name__ == "__main__":
    print(json.dumps(measure()))
