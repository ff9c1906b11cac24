"""What `prepare` hangs on a user's modules: factors on inputs, the sparse engine of CPUs, a check after each load."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from supar_cli.errors import InputError, suggestion
from supar_cli.own.parameters import submodules
from supar_cli.planning.plan import Plan
from supar_cli.sparse.csr import Sparse
from supar_cli.sparse.masks import Mask


class _Multiply:
    """A forward pre-hook: the module's input times a factor that no tensor could take."""

    def __init__(self, name: str, factor: float) -> None:
        self.name, self.factor = name, factor

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Tensor):
            return (args[0] * self.factor, *args[1:]), kwargs
        named = [key for key, value in kwargs.items() if isinstance(value, Tensor)]
        if args or len(named) != 1:
            raise InputError(
                f"model.hooks.{self.name}: its input is not one tensor, so the plan's factor can't be applied"
            )
        return args, {**kwargs, named[0]: kwargs[named[0]] * self.factor}


def multiply_inputs(modules: Mapping[str, nn.Module], factors: Mapping[str, float]) -> None:
    """Multiply the inputs of modules by the plan's factors, each once however often it is asked for, and by no earlier ones."""
    for name, module in modules.items():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, _Multiply) and name not in factors:  # of another plan
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    for name, factor in factors.items():
        if not name:  # on the logits: the user's forward pass applies it
            continue
        # a copied module has copies of its hooks, so the module itself is asked
        found = [hook for hook in modules[name]._forward_pre_hooks.values() if isinstance(hook, _Multiply)]
        for hook in found:
            hook.factor = factor
        if not found:
            modules[name].register_forward_pre_hook(_Multiply(name, factor), with_kwargs=True)


class _SparseForward:
    """The forward pass of an nn.Linear over its live weights; the dense parameter gets their gradients."""

    def __init__(self, name: str, module: nn.Linear, mask: Mask) -> None:
        self.name, self.module = name, module
        self.engine, self.live = Sparse(mask), torch.from_numpy(mask.live())

    def __call__(self, x: Tensor) -> Tensor:
        weight, bias = self.module.weight, self.module.bias
        if x.device.type != "cpu" or weight.device.type != "cpu":
            raise InputError(f"{self.name}: the sparse engine runs on cpu; the model is on {weight.device}")
        y: Tensor = self.engine(x, weight.view(-1).index_select(0, self.live))
        return y if bias is None else y + bias.to(y.dtype)


def require_engine(engine: str | None, model: nn.Module, plan: Plan, masks: Mapping[str, Mask]) -> None:
    """Raise InputError, naming each tensor, where an engine can't multiply with it."""
    if engine is None:
        return
    if engine != "sparse":
        raise InputError(f"engine: {engine!r}; {suggestion(engine, ['sparse', 'None'])}")
    modules, problems = submodules(model, (row.name for row in plan.tensors)), list[str]()
    for name in masks:
        path, _, leaf = name.rpartition(".")
        module = modules.get(path)
        if type(module) is not nn.Linear or leaf != "weight":
            problems.append(
                f"{name}: is a tensor of {type(module).__name__}; the sparse engine needs an nn.Linear's weight"
            )
            continue
        weight = module.weight
        if isinstance(weight, DTensor) or weight.device.type != "cpu" or weight.dtype != torch.float32:
            where = "in shards" if isinstance(weight, DTensor) else f"{weight.dtype} on {weight.device}"
            problems.append(f"{name}: is {where}; the sparse engine needs whole tensors of torch.float32 on cpu")
    if problems:
        raise InputError(*problems)


def use_engine(modules: Mapping[str, nn.Module], masks: Mapping[str, Mask], engine: str | None) -> None:
    """Let masked linear layers multiply with the engine, or as they did before."""
    for name, mask in masks.items():
        module = modules[name.rpartition(".")[0]]
        if isinstance(vars(module).get("forward"), _SparseForward):
            del vars(module)["forward"]
        if engine is not None:
            assert isinstance(module, nn.Linear)
            vars(module)["forward"] = _SparseForward(name, module, mask)


class _AfterLoad:
    """A hook of load_state_dict; neither copies nor pickles of the model take along what it calls."""

    def __init__(self, check: weakref.WeakMethod[Callable[[nn.Module], None]] | None = None) -> None:
        self._check = check

    def __call__(self, module: nn.Module, _: Any) -> None:
        check = self._check() if self._check is not None else None
        if check is not None:
            check(module)

    def __reduce__(self) -> Any:
        return _AfterLoad, ()


_load_hooks: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def call_after_load(module: nn.Module, check: Callable[[nn.Module], None]) -> None:
    """Call a method after each load_state_dict of a module, in place of any earlier one."""
    if (handle := _load_hooks.pop(module, None)) is not None:
        handle.remove()
    hook = _AfterLoad(weakref.WeakMethod(check))
    _load_hooks[module] = module.register_load_state_dict_post_hook(hook)  # type: ignore[no-untyped-call]
