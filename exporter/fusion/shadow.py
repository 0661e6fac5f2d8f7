"""Shadow modules: second module trees over the tensors of a user's, so that nothing is ever set on the user's own."""

from __future__ import annotations

import contextlib
import copy
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sam3x.errors import SourceError

_TREE = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (dict, list, set, OrderedDict)
_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.CheckpointWrapper": "_checkpoint_wrapped_module",
}
"""Class of a module that only runs another → the name it holds that under."""
_QUANTIZED = ("torch.ao.nn.", "torch.nn.quantized", "torch.nn.intrinsic.quantized")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s, ``DataParallel``'s and their like; any other as it is."""
    while True:
        names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__)
        held = next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)
        if held is None:
            return module
        module = module.__dict__["_modules"][held]


def check_module(module: nn.Module) -> None:
    """Refuse what cannot be captured: weights elsewhere than on the CPU or not float32, quantized, sharded, lazy, scripted.

    Inputs are float32 on the CPU, so the weights must be too: converting them would change or copy the module.

    Raises:
        SourceError: names the module or the weight.
    """
    for path, child in module.named_modules():
        name = f"'{path}'" if path else "the encoder"
        kind = f"{type(child).__module__}.{type(child).__qualname__}"
        if kind.startswith(_QUANTIZED) and ".quantized" in kind:
            raise SourceError(
                f"{name} is quantized ({kind})",
                remedy="Give the module as it was before, and choose the precision of the weights with --precision.",
            )
        if isinstance(child, torch.jit.ScriptModule):
            raise SourceError(f"{name} is scripted ({kind})", remedy="Give the module as it was before torch.jit.")
        if kind.startswith("torch.distributed.fsdp."):
            raise SourceError(
                f"the weights of {name} are sharded (FullyShardedDataParallel)",
                remedy="Load the full state dict into a module that is not wrapped.",
            )
    for path, value in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(value):
            raise SourceError(
                f"'{path}' has no shape yet: its module is lazy and has never run",
                remedy="Run the module once, then export it.",
            )
        if is_traceable_wrapper_subclass(value):
            raise SourceError(
                f"'{path}' is no plain tensor but {type(value).__module__}.{type(value).__qualname__}",
                remedy="Give the module as it was before its weights were quantized or distributed.",
            )
        if value.device.type == "meta":
            raise SourceError(f"'{path}' is on meta and has no values", remedy="Load the weights first.")
        if value.device.type != "cpu":
            raise SourceError(f"'{path}' is on {value.device}, export needs the CPU", remedy="Call module.cpu() first.")
        if value.is_floating_point() and value.dtype != torch.float32:
            raise SourceError(f"'{path}' is {value.dtype}, export takes torch.float32", remedy="Call module.float() first.")


def shallow_copy(module: nn.Module) -> nn.Module:
    """Another object of the same class over the same ``__dict__`` entries; setting an attribute leaves the original alone."""
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__ = dict(module.__dict__)
    return copied


def shadow_of(module: nn.Module) -> nn.Module:
    """A second module tree over the same tensors, in eval mode; see ``Shadows``."""
    return Shadows().of(module)


class Shadows:
    """Second trees over one set of tensors: parameters over the same memory become one, whoever holds them.

    Wrappers are left out (``unwrapped``), and so is ``torch.compile``, whether it wraps a module, its call or its
    ``forward``: what it compiled is bound to the original. A module that stands in two places becomes two over the same
    tensors, as torch.export cannot tell its two paths apart inside a branch.
    """

    def __init__(self) -> None:
        self._first: dict[int, tuple[nn.Module, nn.Module]] = {}  # the original too: an id is its own only while it lives
        self._tensors: dict[object, Tensor] = {}
        self.made: list[nn.Module] = []

    def of(self, module: nn.Module) -> nn.Module:
        start = len(self.made)
        shadow = self._tree(module, {})
        while start < len(self.made):  # what is held without being registered: the shadow of it that is, else one of its own
            own = self.made[start].__dict__
            own.update({name: self._held(value) for name, value in own.items() if name not in _TREE})
            start += 1
        return shadow

    def _tree(self, module: nn.Module, above: Mapping[int, nn.Module]) -> nn.Module:
        module = unwrapped(module)
        if id(module) in above:
            return above[id(module)]
        shadow = shallow_copy(module)
        self._first.setdefault(id(module), (module, shadow))
        self.made.append(shadow)
        above = {**above, id(module): shadow}
        own = shadow.__dict__
        for name in ("_parameters", "_buffers"):
            own[name] = {key: None if value is None else self._tensor(value) for key, value in module.__dict__[name].items()}
        own["_modules"] = {
            name: None if child is None else self._tree(child, above) for name, child in module.__dict__["_modules"].items()
        }
        own["training"] = False
        own["_compiled_call_impl"] = None
        forward = own.get("forward")
        if hasattr(forward, "_torchdynamo_orig_callable"):
            del own["forward"]
        elif isinstance(forward, types.MethodType) and forward.__self__ is module:
            own["forward"] = types.MethodType(forward.__func__, shadow)
        return shadow

    def _held(self, value: Any) -> Any:
        """Modules as their shadows; lists and dicts as copies, as code may fill them while it runs."""
        if isinstance(value, nn.Module):
            known = self._first.get(id(unwrapped(value)))
            return self._tree(value, {}) if known is None else known[1]
        if type(value) not in _CONTAINERS:
            return value
        copied = copy.copy(value)
        if not isinstance(value, set):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(item, nn.Module):
                    copied[key] = self._held(item)
        return copied

    def _tensor(self, value: Tensor) -> Tensor:
        if type(value) not in (Tensor, nn.Parameter, nn.Buffer) or value.device.type == "meta" or not value.numel():
            return value
        if value.layout is not torch.strided or value.is_quantized:
            return value
        key = (value.data_ptr(), type(value), value.dtype, value.shape, value.stride(), value.device)
        if key not in self._tensors:
            self._tensors[key] = _tracked(value) if value.is_inference() else value
        return self._tensors[key]


def _tracked(value: Tensor) -> Tensor:
    """A tensor made under ``torch.inference_mode``, which torch.export refuses, as one that was not, over the same memory."""
    with torch.inference_mode(False):
        plain = (
            torch.from_numpy(value.detach().resolve_conj().resolve_neg().numpy())
            if value.device.type == "cpu"
            else value.clone()
        )
        return nn.Parameter(plain, requires_grad=False) if isinstance(value, nn.Parameter) else plain


@contextlib.contextmanager
def holding(module: nn.Module, values: Mapping[int, Tensor]) -> Iterator[None]:
    """Within it a shadow holds ``values[id(x)]`` in place of each parameter or buffer ``x`` named there.

    ``torch.func.functional_call`` goes by names, and leaves a module that has two of them changed.
    """
    changed: list[tuple[dict[str, Any], str, Tensor | None]] = []
    try:
        for child in module.modules():
            tables: tuple[dict[str, Any], ...] = (child._parameters, child._buffers)
            for held in tables:
                for name, value in held.items():
                    if id(value) in values:
                        changed.append((held, name, value))
                        held[name] = values[id(value)]
        yield
    finally:
        for held, name, value in changed:
            held[name] = value


@contextlib.contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Put back what a shadow's code sets on itself while it runs, tables it keeps for the next call for instance.

    torch.export refuses a module that does, and what it kept would be tensors without values.
    """
    children = list(module.modules())
    before = [
        {name: copy.copy(value) if type(value) in _CONTAINERS and name not in _TREE else value for name, value in own.items()}
        for own in (child.__dict__ for child in children)
    ]
    try:
        yield
    finally:
        for child, kept in zip(children, before, strict=True):
            child.__dict__.clear()
            child.__dict__.update(kept)
