"""Names of targets to where they live, imported only when named."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points

from sam3x.errors import UnknownTargetError, did_you_mean
from sam3x.targets.base import Target, TargetStatus

_TARGETS = {
    "onnx": "sam3x.targets.onnx.target:OnnxTarget",
    "pte": "sam3x.targets.executorch.target:PteTarget",
    "trt": "sam3x.targets.tensorrt.target:TrtTarget",
    "openvino": "sam3x.targets.openvino.target:OpenVinoTarget",
    "coreml": "sam3x.targets.coreml.target:CoreMlTarget",
}
GROUP = "sam3x.targets"


def built_in_names() -> tuple[str, ...]:
    """The targets of this package."""
    return tuple(_TARGETS)


def target_names() -> tuple[str, ...]:
    """Built-in targets, then those of other packages (entry-point group ``sam3x.targets``)."""
    return (*_TARGETS, *(item.name for item in entry_points(group=GROUP) if item.name not in _TARGETS))


def get_target(name: str) -> Target:
    """The target of that name.

    Raises:
        UnknownTargetError: with a suggestion and the listing command.
    """
    if name in _TARGETS:
        module, _, attribute = _TARGETS[name].partition(":")
        return getattr(importlib.import_module(module), attribute)()
    for item in entry_points(group=GROUP):
        if item.name == name:
            made = item.load()()
            # one that states no base class has the defaults all the same
            return made if isinstance(made, Target) else type(item.name, (type(made), Target), {})()
    remedy = f"{did_you_mean(name, target_names())} List them with: sam3x targets".lstrip()
    raise UnknownTargetError(f"no target '{name}'; there are {', '.join(target_names())}", remedy=remedy)


def describe_targets() -> list[TargetStatus]:
    """Status of every target; one that cannot be loaded says so."""
    return [_status(name) for name in target_names()]


def _status(name: str) -> TargetStatus:
    try:
        return get_target(name).availability()
    except Exception as error:  # another package's code must not take the list down
        detail = f"cannot be loaded: {type(error).__name__}: {error}"
        return TargetStatus(name=name, available=False, detail=detail, install="update or remove the package that provides it")
