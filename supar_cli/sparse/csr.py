"""The sparse engine on CPU, for unstructured masks: compressed rows and their transpose, products at live weights only.

Time and memory follow the live weights. Kernels are numba's where it is installed (`pip install numba`), else
torch's: `embedding_bag` with per-sample weights for the products, `sampled_addmm` for the gradient of the values.

Shape suffixes: N tokens, I in, O out, L live weights in row-major order.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from supar_cli.errors import InputError
from supar_cli.sparse.linear import Engine
from supar_cli.sparse.masks import Mask


def numba_version() -> str | None:
    """The version of the numba installed, None where there is none."""
    return importlib.metadata.version("numba") if importlib.util.find_spec("numba") else None


class Sparse(Engine):
    """`mask` is (out, in). Sums are in float32, whatever the precision of X and Y."""

    starts: Tensor  # (out + 1,): where each row's weights begin
    columns_L: Tensor
    order_L: Tensor  # positions among the live weights, by column and then row
    starts_by_column: Tensor  # (in + 1,)
    rows_L: Tensor  # in that order

    def __init__(self, mask: Mask, kernels: Literal["auto", "numba", "torch"] = "auto") -> None:
        super().__init__(mask)
        self.shape = mask.shape
        if kernels == "auto":
            kernels = "torch" if numba_version() is None else "numba"
        self.kernels, self.applies_gelu = kernels, kernels == "numba"
        out, width = mask.shape
        rows_L, columns_L = np.divmod(mask.live(), width)
        order_L = np.argsort(columns_L.astype(np.min_scalar_type(width)), kind="stable")  # of 16 bits by radix
        buffers = {
            "starts": np.concatenate(([0], np.cumsum(np.bincount(rows_L, minlength=out)))),
            "columns_L": columns_L,
            "order_L": order_L,
            "starts_by_column": np.concatenate(([0], np.cumsum(np.bincount(columns_L, minlength=width)))),
            "rows_L": rows_L[order_L],
        }
        for name, value in buffers.items():
            self.register_buffer(name, torch.from_numpy(value.astype(np.int32)), persistent=False)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, x: Tensor, values: Tensor, gelu: str | None = None) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        if self.kernels == "torch":  # transposed once, here, for both passes
            x = x.reshape(-1, x.shape[-1]).t().contiguous().t().view(x.shape)
        return _Product.apply(x, values, self, {} if gelu is None else {"gelu": gelu})  # type: ignore[no-any-return,no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values_L: Tensor, engine: Sparse, gelu: dict[str, str]) -> Tensor:
        ctx.save_for_backward(x, values_L)
        ctx.engine, ctx.gelu = engine, gelu
        y_NO = PRODUCT[engine.kernels](engine, _rows(x), values_L.detach(), **gelu)
        return y_NO.to(x.dtype).view(*x.shape[:-1], engine.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, values_L = ctx.saved_tensors
        if torch.is_grad_enabled():  # autograd's own sign; the loops' results would pass for constants
            what = "the sparse engine makes no gradients of gradients, which create_graph=True asks for"
            raise InputError(f"engine: {what}; expected another engine")
        gradients, wanted = GRADIENTS[ctx.engine.kernels], ctx.needs_input_grad[:2]
        by_x, by_values = gradients(ctx.engine, _rows(x), _rows(gradient), values_L.detach(), *wanted, **ctx.gelu)
        return None if by_x is None else by_x.to(x.dtype).view(x.shape), by_values, None, None


def _rows(x: Tensor) -> Tensor:
    """(…, width) as float32 (N, width), in any memory order."""
    return x.detach().reshape(-1, x.shape[-1]).float()


def _torch_product(engine: Sparse, x_NI: Tensor, values_L: Tensor) -> Tensor:
    """Products by torch's own operations, on transposed activations; the result is transposed in memory too.

    torch transposes with one thread: activations that come from another such layer are transposed already.
    """
    return _bags(x_NI.t().contiguous(), engine.columns_L, engine.starts, values_L)


def _torch_gradients(
    engine: Sparse, x_NI: Tensor, gradient_NO: Tensor, values_L: Tensor, by_x: bool, by_values: bool
) -> tuple[Tensor | None, Tensor | None]:
    gradient_ON = gradient_NO.t().contiguous()
    x_gradient = values_gradient = None
    if by_x:
        x_gradient = _bags(gradient_ON, engine.rows_L, engine.starts_by_column, values_L[engine.order_L])
    if by_values:
        # measured: three times as fast with both factors stored weight-major, not token-major
        x_IN = x_NI.t().contiguous()
        values_gradient = torch.sparse.sampled_addmm(_pattern(engine), gradient_ON, x_IN.t(), beta=0.0).values()
    return x_gradient, values_gradient


def _pattern(engine: Sparse) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warning that its CSR tensors are in beta
        zeros_L = torch.zeros(len(engine.columns_L))
        return torch.sparse_csr_tensor(engine.starts, engine.columns_L, zeros_L, engine.shape, check_invariants=False)


def _bags(x_IN: Tensor, index_L: Tensor, starts: Tensor, values_L: Tensor) -> Tensor:
    """(N, O): each output a bag of rows of Xᵀ, summed with the values as weights."""
    values_L = values_L.float()
    if not len(index_L) or not x_IN.numel():
        return x_IN.new_zeros(x_IN.shape[1], len(starts) - 1)
    return F.embedding_bag(index_L, x_IN, starts[:-1], mode="sum", per_sample_weights=values_L).t()


def _numba_product(engine: Sparse, x_NI: Tensor, values_L: Tensor, gelu: str | None = None) -> Tensor:
    """Products by compiled loops over tiles of tokens."""
    from supar_cli.sparse import csr_run

    values_L = values_L.float().contiguous()
    return csr_run.product(x_NI.contiguous(), engine.starts, engine.columns_L, values_L, gelu)


def _numba_gradients(
    engine: Sparse,
    x_NI: Tensor,
    gradient_NO: Tensor,
    values_L: Tensor,
    by_x: bool,
    by_values: bool,
    gelu: str | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Both come from one loop: who needs one alone drops the other."""
    from supar_cli.sparse import csr_run

    by_column = engine.starts_by_column, engine.rows_L, engine.order_L
    values_L = values_L.float().contiguous()
    found = csr_run.gradients(x_NI.contiguous(), gradient_NO.contiguous(), *by_column, values_L, gelu)
    return found[0] if by_x else None, found[1] if by_values else None


PRODUCT: dict[str, Callable[..., Tensor]] = {"torch": _torch_product, "numba": _numba_product}
GRADIENTS: dict[str, Callable[..., Any]] = {"torch": _torch_gradients, "numba": _numba_gradients}
