"""The encoder as one function of named tensors: the module that is captured, and the eager definition it is compared with."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sam3x.errors import SourceError, SpecError
from sam3x.fusion.ambient import settled
from sam3x.fusion.dimensions import DYNAMIC_DIMS, dims_of
from sam3x.fusion.layer import OPTIONAL_INPUTS, fusion_layer, is_stock, made_batch_first, opaque_layer
from sam3x.fusion.layer_op import LAYER_OP
from sam3x.fusion.layer_template import weights_of
from sam3x.fusion.shadow import Shadows, attributes_kept, check_module, shadow_of, shallow_copy, unwrapped
from sam3x.fusion.wide import wide_floats
from sam3x.spec import ExportSpec, make_spec

FUSION_OUTPUTS = ("memory", "padding_mask", "pos_embed", "memory_text", "level_start_index", "spatial_shapes", "valid_ratios")


class LayerCalls(dict[int, "LayerInputs"]):
    """Layer index → its call. A class of its own, as torch.export puts plain dicts back after tracing."""


LayerRun = Callable[[int, dict[str, Any], Any, Any], Tensor]
"""(layer index, its inputs by name, dac, pre_norm) → (B, N, C)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInputs:
    """What a layer was called with: names of its tensors in the operator's order, and the flags that are no tensors."""

    names: tuple[str, ...]
    fixed: dict[str, Any]


def layers_of(module: nn.Module | Sequence[nn.Module]) -> list[nn.Module]:
    """The fusion layers of an encoder, a list of layers, or a single layer.

    Raises:
        SourceError: when nothing in it takes ``tgt`` and ``memory``.
    """
    module = unwrapped(module) if isinstance(module, nn.Module) else module
    if isinstance(module, (list, tuple, nn.ModuleList)):
        layers = list(module)
    elif isinstance(getattr(module, "layers", None), (nn.ModuleList, list, tuple)):
        layers = list(module.layers)  # type: ignore[arg-type, union-attr]
    else:
        layers = [module]  # type: ignore[list-item]
    if not layers:
        raise SourceError("the encoder has no layers", remedy="Give at least one TransformerEncoderLayer.")
    layers = [unwrapped(layer) if isinstance(layer, nn.Module) else layer for layer in layers]
    for index, layer in enumerate(layers):
        names = inspect.signature(layer.forward).parameters if isinstance(layer, nn.Module) else {}
        if not {"tgt", "memory"} <= set(names):
            raise SourceError(
                (
                    f"{type(module).__name__} is no fusion encoder: layer {index} ({type(layer).__name__}) does not take "
                    "'tgt' and 'memory'"
                ),
                remedy="Pass a TransformerEncoderFusion, TransformerEncoder, TransformerEncoderLayer, or a list of layers.",
            )
    return layers


def d_model_of(layers: Sequence[nn.Module]) -> int:
    """Width of ``tgt``: the layer's ``d_model``, or its first LayerNorm's."""
    for layer in layers:
        if isinstance(getattr(layer, "d_model", None), int):
            return layer.d_model  # type: ignore[return-value]
        for child in layer.modules():
            if isinstance(child, nn.LayerNorm):
                return child.normalized_shape[-1]
    raise SourceError("the layers tell no d_model", remedy="Set an int attribute 'd_model' on the layer.")


class FusionEncoder(nn.Module):
    """``forward(*tensors)`` in the order of ``input_names``; flags that are runtime inputs come last.

    Bool tensors as flags make ``torch.cond``; ``eager`` runs the same definition with Python bools.
    """

    def __init__(self, source: nn.Module | Sequence[nn.Module], spec: ExportSpec) -> None:
        super().__init__()
        self.spec = spec
        layers = layers_of(source)
        whole = source if isinstance(source, nn.Module) else nn.ModuleList(layers)
        check_module(whole)
        self.encoder = shadow_of(whole)
        self.layers = layers_of(self.encoder)
        registered = set(map(id, self.encoder.modules()))
        self.loose = nn.ModuleList(layer for layer in self.layers if id(layer) not in registered)  # in a list of Python's own
        self.d_model = d_model_of(layers)
        with settled():
            turned = {made_batch_first(layer, self.d_model) for layer in self.layers}
            self.sequence_first = turned == {True}
            self.stock = [is_stock(layer, self.d_model) for layer in self.layers]
        self.calls = LayerCalls()
        self._check_layout(len(turned) > 1)
        if spec.dac_dim == 1 and spec.dac is not False and not all(self.stock):
            odd = type(self.layers[self.stock.index(False)]).__name__
            raise SpecError(
                f"dac_dim=1 is not defined for {odd}, which has its own forward", remedy="Use --dac-dim 0 or --dac off."
            )
        if spec.interface == "feature_maps":
            self._check_maps()

    def _check_layout(self, mixed: bool) -> None:
        if mixed:
            raise SourceError(
                "attention has batch_first=False in some layers and True in others",
                remedy="Build every attention with batch_first=True; the weights are the same.",
            )
        if self.sequence_first and self.spec.interface == "feature_maps":
            raise SourceError(
                f"{type(self.encoder).__name__} hands its layers (batch, tokens, C), and their attention has batch_first=False",
                remedy="Build it with batch_first=True; the weights are the same.",
            )
        if self.sequence_first and self.spec.dac is not False and self.spec.dac_dim == 0:
            raise SpecError(
                "attention has batch_first=False: dimension 0 of its tgt, which dac halves, are the tokens",
                remedy="Use --dac-dim 1, or --dac off.",
            )

    def _check_maps(self) -> None:
        names = inspect.signature(self.encoder.forward).parameters
        if not {"src", "prompt"} <= set(names):
            raise SpecError(
                f"{type(self.encoder).__name__} takes no feature maps",
                remedy="Use --interface tokens, or a TransformerEncoderFusion.",
            )
        levels = int(getattr(self.encoder, "num_feature_levels", 1))
        if levels != len(self.spec.feature_sizes):
            raise SpecError(
                f"the encoder has {levels} feature levels, feature_sizes names {len(self.spec.feature_sizes)}",
                remedy="Give one HxW a level.",
            )

    @property
    def flag_names(self) -> tuple[str, ...]:
        """Runtime flags that are graph inputs."""
        names = ("dac",) if self.spec.dac == "runtime" else ()
        return (*names, "pre_norm") if self.spec.pre_norm in ("runtime", "per-layer") else names

    def dims(self, name: str) -> tuple[str | None, ...]:
        """What the dimensions of an input mean where they are dynamic; None for those of one size."""
        rank = int(name == "pre_norm" and self.spec.pre_norm == "per-layer")
        if name not in self.flag_names:
            rank = len(DYNAMIC_DIMS.get(name, ())) or (3 if "mask" in name else 4)  # src maps and their masks
        free = {dim for dim, (low, high) in self.spec.ranges.items() if low != high}
        return tuple(dim if dim in free else None for dim in dims_of(name, rank))

    @property
    def input_names(self) -> tuple[str, ...]:
        """Graph inputs in order."""
        if self.spec.interface == "tokens":
            return (*self.spec.inputs, *self.flag_names)
        levels = range(len(self.spec.feature_sizes))
        names: list[str] = []
        for name in self.spec.inputs:
            names += [f"{name}_{level}" for level in levels] if name.startswith("src") else [name]
        return (*names, *self.flag_names)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Graph outputs in order; for feature maps upstream's dict keys, less those that are None."""
        if self.spec.interface == "tokens":
            return ("output",)
        skipped = set() if "src_key_padding_mask" in self.spec.inputs else {"padding_mask"}
        if not self._is_fusion:
            skipped.add("memory_text")
        return tuple(name for name in FUSION_OUTPUTS if name not in skipped)

    @property
    def _is_fusion(self) -> bool:
        return "feat_sizes" in inspect.signature(self.encoder.forward).parameters

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Named tensors in, tuple of outputs out, with one ``sam3x::fusion_layer`` a layer (see ``layer_op``)."""
        given: dict[str, Any] = dict(zip(self.input_names, tensors, strict=True))
        _check_sizes(given)
        dac = given.pop("dac", self.spec.dac)
        fixed = None if self.spec.pre_norm == "module" else self.spec.pre_norm
        with attributes_kept(self.encoder):
            return self._run(given, dac, given.pop("pre_norm", fixed), self._stand_in)

    def _stand_in(self, index: int, values: dict[str, Tensor | None], dac: Any, pre_norm: Any) -> Tensor:
        """Record what layer ``index`` is called with and put the operator in its place."""
        given = {**values, "dac": dac, "pre_norm": pre_norm}
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        self.calls[index] = LayerInputs(
            names=tuple(tensors), fixed={name: given[name] for name in ("dac", "pre_norm") if name not in tensors}
        )
        return LAYER_OP(list(tensors.values()), list(weights_of(self.layers[index]).values()), index)

    def layer_calls(self, index: int) -> list[Callable[..., Tensor]]:
        """Ways to run layer ``index`` on the operands of its operator, the preferred one first."""
        call = self.calls[index]

        def by_values(*tensors: Tensor) -> Tensor:
            given = {**call.fixed, **dict(zip(call.names, tensors, strict=True))}
            return self.run_layer(index, given, given.pop("dac"), given.pop("pre_norm"))

        def whole(*tensors: Tensor) -> Tensor:
            given = {**call.fixed, **dict(zip(call.names, tensors, strict=True))}
            return opaque_layer(self.layers[index], **given)

        return [by_values, whole] if self.stock[index] and self.spec.dac_dim == 0 else [by_values]

    def eager(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The definition: flags as Python bools, weights in the dtype of the first input."""
        given: dict[str, Any] = dict(inputs)
        dac = bool(given.pop("dac")) if "dac" in given else self.spec.dac
        pre_norm: Any = given.pop("pre_norm", None if self.spec.pre_norm == "module" else self.spec.pre_norm)
        if isinstance(pre_norm, Tensor):
            pre_norm = pre_norm.tolist()
        dtype = next(iter(given.values())).dtype
        with settled():
            own = self._in(dtype)  # before: a tensor seen widened is another one each time, in memory that is used again
            with wide_floats() if dtype is torch.float64 else contextlib.nullcontext():
                outputs = own._run(given, dac, pre_norm, own.run_layer)
        return dict(zip(self.output_names, outputs, strict=True))

    def _in(self, dtype: torch.dtype) -> FusionEncoder:
        """This encoder with weights of a dtype, complex ones as wide; a tensor that is held in two places still is."""
        if dtype is torch.float32:
            return self
        shadows, made = Shadows(), dict[int, Tensor]()
        other = shadows.of(self)

        def converted(value: Any) -> Any:
            if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
                return value
            if id(value) not in made:
                made[id(value)] = value.detach().to(dtype.to_complex() if value.is_complex() else dtype)
            return made[id(value)]

        for module in shadows.made:
            for held in (module._parameters, module._buffers, module.__dict__):
                held.update({name: converted(value) for name, value in held.items() if isinstance(value, Tensor)})
        return other  # type: ignore[return-value]

    def _run(self, given: dict[str, Any], dac: Any, pre_norm: Any, layer: LayerRun) -> tuple[Tensor, ...]:
        def run(index: int, *, tgt: Tensor, memory: Tensor, dac: Any = dac, **optional: Tensor | None) -> Tensor:
            each = isinstance(pre_norm, (list, tuple)) or (isinstance(pre_norm, Tensor) and pre_norm.dim())
            values = {"tgt": tgt, "memory": memory, **{name: optional.get(name) for name in OPTIONAL_INPUTS}}
            return layer(index, values, flag, pre_norm[index] if each else pre_norm)

        flag = dac
        if self.spec.interface == "feature_maps":
            return self._run_maps(given, run)
        tgt, memory = given["tgt"], given["memory"]
        optional = {name: given.get(name) for name in OPTIONAL_INPUTS}
        for index in range(len(self.layers)):
            tgt = run(index, tgt=tgt, memory=memory, **optional)
        return (tgt,)

    def run_layer(self, index: int, values: dict[str, Any], dac: Any, pre_norm: Any) -> Tensor:
        """Layer ``index`` itself: flags as Python bools or, in its template, bool tensors."""
        if self.stock[index]:
            return fusion_layer(self.layers[index], dac=dac, pre_norm=pre_norm, dac_dim=self.spec.dac_dim, **values)
        return opaque_layer(self.layers[index], dac=dac, pre_norm=pre_norm, **values)

    def _run_maps(self, given: dict[str, Any], run: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        levels = range(len(self.spec.feature_sizes))

        def maps(name: str) -> list[Tensor] | None:
            # cloned: upstream adds pooled text to the maps in place and writes into the lists
            return [given[f"{name}_{i}"].clone() for i in levels] if name in self.spec.inputs else None

        src, pos, masks = maps("src"), maps("src_pos"), maps("src_key_padding_mask")
        prompt: Tensor = given["prompt"]
        prompt_mask = given.get("prompt_key_padding_mask")
        encoder = shallow_copy(self.encoder)
        encoder.__dict__["_modules"] = dict(encoder.__dict__["_modules"])
        stand_ins = []
        for index, layer in enumerate(self.layers):
            stand_in = shallow_copy(layer)  # still an instance of upstream's class, which its encoder asserts
            stand_in.__dict__["forward"] = functools.partial(run, index)
            stand_ins.append(stand_in)
        encoder.__dict__["_modules"]["layers"] = nn.ModuleList(stand_ins)
        if self._is_fusion:
            result = encoder(
                src=[x.flatten(2).permute(2, 0, 1) for x in src or ()],
                prompt=prompt,
                src_key_padding_mask=None if masks is None else [m.flatten(1).transpose(0, 1) for m in masks],
                src_pos=[x.flatten(2).permute(2, 0, 1) for x in pos or ()],
                prompt_key_padding_mask=prompt_mask,
                feat_sizes=list(self.spec.feature_sizes),
            )
            named = dict(result)
        else:
            values = encoder(
                src, src_key_padding_masks=masks, pos=pos, prompt=prompt.transpose(0, 1), prompt_key_padding_mask=prompt_mask
            )
            keys = ("memory", "padding_mask", "pos_embed", "level_start_index", "spatial_shapes", "valid_ratios")
            named = dict(zip(keys, values, strict=True))
        if named.get("memory_text") is prompt:
            named["memory_text"] = prompt.clone()
        return tuple(named[name] for name in self.output_names)


def _check_sizes(given: Mapping[str, Tensor]) -> None:
    """Dimensions of one meaning have one size: the contract of the artifact, so that a trace has one symbol for them."""
    sizes: dict[str, Any] = {}
    for name, value in given.items():
        for size, meaning in zip(value.shape, dims_of(name, value.dim()), strict=True):
            if meaning is not None:
                torch._check(size == sizes.setdefault(meaning, size))


def fitted_spec(source: nn.Module, spec: ExportSpec) -> ExportSpec:
    """``spec`` with ``dac_dim`` 1 where nobody chose it and the encoder's attention is built for (N, B, C).

    Upstream's dac halves dimension 0, which is then the tokens; an artifact takes (B, N, C) whatever the module does.
    """
    asks = spec.dac is not False and spec.interface == "tokens" and "dac_dim" not in spec.model_fields_set
    built_so = any(
        isinstance(item, nn.MultiheadAttention) and not item.batch_first
        for layer in layers_of(source)
        for item in layer.modules()
    )
    if asks and built_so and FusionEncoder(source, spec.model_copy(update={"dac": False})).sequence_first:
        given = {name: getattr(spec, name) for name in spec.model_fields_set}
        return make_spec(**given, dac_dim=1)
    return spec
