"""Whole encoders, exports and inputs for hypothesis; simple values stand first, so a failure shrinks to the plain encoder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from sam3x.sources.encoder import draw_weights
from sam3x.spec import TOKENS_INPUTS
from support.attention_styles import BELOW_FLOAT32, STYLES


@dataclass(frozen=True, kw_only=True)
class EncoderCase:
    """A fusion encoder: upstream's names; ``styles`` are those of self- and cross-attention, ``pre_norm`` one value a layer."""

    num_heads: int = 1
    head_dim: int = 4
    dim_feedforward: int = 8
    activation: str = "relu"
    pre_norm: tuple[bool, ...] = (True,)
    positions: tuple[bool, bool, bool] = (True, False, False)
    styles: tuple[str, str] = ("meta", "meta")
    peaked: float = 1.0
    levels: int = 0
    seed: int = 0
    shared: str = "none"
    sequence_first: bool = False

    @property
    def d_model(self) -> int:
        return self.num_heads * self.head_dim

    def build(self) -> nn.Module:
        """Meta's layers with weights that differ; a ``TransformerEncoderFusion`` around them where there are ``levels``."""
        from sam3.model.encoder import TransformerEncoderFusion

        layers = nn.ModuleList(self._layer(index) for index in range(len(self.pre_norm)))
        if not self.levels:
            built: nn.Module = layers
        else:
            built = TransformerEncoderFusion(
                layer=layers[0], num_layers=1, d_model=self.d_model, num_feature_levels=self.levels, frozen=False,
                use_act_checkpoint=True, add_pooled_text_to_img_feat=False,
            )  # fmt: skip
            built.layers, built.num_layers = layers, len(layers)
        draw_weights(built, self.seed)
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                if name.endswith(("in_proj_weight", "q_proj.weight")):
                    parameter[: self.d_model] *= self.peaked
        self._share(layers)
        for module in built.modules():
            if self.sequence_first and isinstance(module, nn.MultiheadAttention):
                module.batch_first = False
        return built.eval()

    def _share(self, layers: nn.ModuleList) -> None:
        if self.shared == "linear":
            for layer in layers:
                layer.linear1.weight = layers[0].linear1.weight
        if self.shared == "attention" and self.styles[0] == self.styles[1]:
            for layer in layers:
                layer.cross_attn_image = layer.self_attn

    def _layer(self, index: int) -> nn.Module:
        from sam3.model.encoder import TransformerEncoderLayer

        attention = [STYLES[style](self.d_model, self.num_heads) for style in self.styles]
        layer = TransformerEncoderLayer(
            activation=self.activation, d_model=self.d_model, dim_feedforward=self.dim_feedforward, dropout=0.1,
            pos_enc_at_attn=self.positions[0], pos_enc_at_cross_attn_queries=self.positions[1],
            pos_enc_at_cross_attn_keys=self.positions[2], pre_norm=self.pre_norm[index],
            self_attention=attention[0], cross_attention=attention[1],
        )  # fmt: skip
        if self.activation == "glu":  # halves its input, which upstream's own linear2 does not expect
            layer.linear2 = nn.Linear(self.dim_feedforward // 2, self.d_model)
        layer.layer_idx = index
        return layer


@dataclass(frozen=True, kw_only=True)
class InputsCase:
    """One set of sizes and masks to run at. ``hidden``: how much each mask hides, ``none``, ``some`` or ``all`` of a row."""

    batch: int = 2
    tokens: int = 20
    prompt_length: int = 3
    hidden: str = "some"
    seed: int = 0

    def make(
        self, names: tuple[str, ...], d_model: int, mask_dtype: str, maps: tuple[tuple[int, int], ...]
    ) -> dict[str, Tensor]:
        """Tensors by the names of the graph inputs, without the flags."""
        random = torch.Generator().manual_seed(self.seed)
        b, n, s = self.batch, self.tokens, self.prompt_length

        def hidden(*shape: int) -> Tensor:
            mask = torch.rand(shape, generator=random) < {"none": 0.0, "some": 0.4, "all": 0.4}[self.hidden]
            mask[..., 0] &= self.hidden == "all"
            if self.hidden == "all":
                mask[-1] = True
            return mask

        def attention_mask(*shape: int) -> Tensor:
            if mask_dtype == "bool":
                return hidden(*shape)
            hides = torch.finfo(torch.float32).min if self.seed % 3 == 2 else -math.inf
            return torch.randn(shape, generator=random).masked_fill(hidden(*shape), hides)

        made: dict[str, Tensor] = {}
        shapes = {"tgt": (b, n, d_model), "query_pos": (b, n, d_model), "memory": (b, s, d_model), "pos": (b, s, d_model)}
        shapes["prompt"] = (s, b, d_model)
        for name in names:
            if name in shapes:
                made[name] = torch.randn(shapes[name], generator=random)
            elif name in ("tgt_mask", "memory_mask"):
                made[name] = attention_mask(n, n if name == "tgt_mask" else s)
            elif name == "tgt_key_padding_mask":
                made[name] = hidden(b, n)
            elif name in ("memory_key_padding_mask", "prompt_key_padding_mask"):
                made[name] = hidden(b, s)
            elif name.startswith("src"):
                height, width = maps[int(name.rpartition("_")[2])]
                padding = "mask" in name
                made[name] = hidden(b, height, width) if padding else torch.randn(b, d_model, height, width, generator=random)
        return made


@dataclass(frozen=True, kw_only=True)
class Case:
    """An encoder, what its export is asked, the ways to lower what was captured, and what to run each of them on.

    ``spec`` holds fields of ``ExportSpec``; each of ``lowerings`` the target's own options, and ``branches``; ``ambient``
    is what the caller has set of torch while it exports, ``none`` or ``autocast``.
    """

    encoder: EncoderCase = EncoderCase()
    target: str = "onnx"
    spec: dict[str, Any] = field(default_factory=dict)
    lowerings: tuple[dict[str, Any], ...] = ({},)
    runs: tuple[InputsCase, ...] = (InputsCase(),)
    relation: str = "none"
    ambient: str = "none"

    def script(self) -> str:
        """A few lines that run this case again, to be pasted into a shell in the repository's root."""
        return (
            "PYTHONPATH=tests .venv/bin/python - <<EOF\n"
            "from support.differential import check\n"
            "from support.strategies import Case, EncoderCase, InputsCase\n"
            "check(Case(\n"
            f"    encoder={_short(self.encoder)},\n"
            f"    target={self.target!r}, relation={self.relation!r}, ambient={self.ambient!r}, lowerings={self.lowerings!r},\n"
            f"    spec={self.spec!r},\n"
            f"    runs=({' '.join(f'{_short(run)},' for run in self.runs)}),\n"
            "))\nEOF"
        )


def _short(value: Any) -> str:
    """The call that makes a dataclass, without what is a default."""
    kind = type(value)
    plain = kind()
    named = [f.name for f in fields(kind) if getattr(value, f.name) != getattr(plain, f.name)]
    return f"{kind.__name__}({', '.join(f'{name}={getattr(value, name)!r}' for name in named)})"


RELATIONS = ("none", "none", "none", "none", "fixed", "no_masks")
"""Other exports that must give the same: flags fixed, masks left out where they hide nothing. Each takes a second capture."""

AMBIENT = ("none", "none", "none", "none", "autocast")


@st.composite
def encoders(draw: st.DrawFn, maps: bool) -> EncoderCase:
    """Encoders small enough to be exported in a second."""
    activation = draw(st.sampled_from(["relu", "gelu", "glu"]))
    heads = draw(st.sampled_from([1, 2, 4]))
    style = st.sampled_from([style for style in STYLES if style not in BELOW_FLOAT32])
    both = draw(st.booleans())
    first = draw(style)
    return EncoderCase(
        num_heads=heads,
        head_dim=draw(st.sampled_from([4, 8, 1, 5])),
        dim_feedforward=draw(st.sampled_from([8, 2, 32])),
        activation=activation,
        pre_norm=tuple(not draw(st.booleans()) for _ in range(draw(st.sampled_from([1, 1, 1, 2, 2, 3, 4])))),
        positions=(not draw(st.booleans()), draw(st.booleans()), draw(st.booleans())),
        styles=(first, draw(style) if both else first),
        peaked=draw(st.sampled_from([1.0, 4.0])),
        levels=draw(st.sampled_from([1, 2])) if maps else 0,
        seed=draw(st.integers(0, 99)),
    )


def _sizes(low: int, high: int, even: bool) -> st.SearchStrategy[Any]:
    """A range inside (low, high), or one fixed size."""
    step = 2 if even else 1
    fixed = st.integers(low, high).map(lambda value: value - value % step or step)
    return st.sampled_from([(low, high)]) | st.tuples(st.integers(low, (low + high) // 2), st.just(high)) | fixed


@st.composite
def cases(draw: st.DrawFn, target: str = "onnx") -> Case:
    """Everything an export can be asked, and runs at sizes that were not traced."""
    maps = draw(st.integers(0, 7)) == 7
    encoder = draw(encoders(maps))
    options: dict[str, Any] = {}
    pre_norm = draw(st.sampled_from(["runtime", "module", "per-layer", True, False]))
    dac = draw(st.sampled_from(["runtime", False, True] if pre_norm is not False else ["runtime", False]))
    dac_dim = draw(st.sampled_from([0, 0, 1])) if not maps else 0
    options |= {"pre_norm": pre_norm, "dac": dac, "dac_dim": dac_dim}
    halves = dac is not False
    # batch 1 with dac as a runtime input is allowed: dac can then only be off
    options["batch"] = draw(_sizes(2 if dac is True else 1, 8, even=halves and dac_dim == 0))
    options["prompt_length"] = draw(_sizes(1, 12, even=False))
    if maps:
        height = draw(st.sampled_from([2, 4, 5]))
        options |= {"interface": "feature_maps", "feature_sizes": ((height, 6), (2, 3))[: encoder.levels]}
        padded = draw(st.booleans())
        options["inputs"] = (
            "src",
            *(["src_key_padding_mask"] if padded else []),
            "src_pos",
            "prompt",
            "prompt_key_padding_mask",
        )
    else:
        options["tokens"] = draw(_sizes(2 if halves and dac_dim == 1 else 1, 40, even=halves and dac_dim == 1))
        options["inputs"] = ("tgt", "memory", *(name for name in TOKENS_INPUTS[2:] if draw(st.booleans())))
        options["mask_dtype"] = draw(st.sampled_from(["bool", "float32"]))
    runs = draw(st.lists(_runs(options), min_size=1, max_size=3))
    lowerings = draw(st.lists(LOWERINGS.get(target, st.just({})), min_size=1, max_size=7, unique_by=str))
    if target == "onnx":  # one for all: weights are rounded before what the lowerings share, the capture
        precision = draw(st.sampled_from(["fp32", "fp32", "fp16", "int8"]))
        lowerings = [{**item, "weights": precision} for item in lowerings]
    relation = draw(st.sampled_from(RELATIONS))
    # by the seed and not drawn, so that the draws above stay what they are
    turned = encoder.styles == ("meta", "meta") and not maps and (dac is False or dac_dim == 1) and encoder.seed % 3 != 2
    encoder = replace(encoder, shared=("none", "linear", "none", "attention")[encoder.seed % 4], sequence_first=turned)
    if draw(st.integers(0, 29)) == 29:
        encoder = replace(encoder, styles=(encoder.styles[0], draw(st.sampled_from(BELOW_FLOAT32))))
    ambient = draw(st.sampled_from(AMBIENT))
    return Case(
        encoder=encoder,
        target=target,
        spec=options,
        lowerings=tuple(lowerings),
        runs=tuple(runs),
        relation=relation,
        ambient=ambient,
    )


LOWERINGS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "onnx": st.fixed_dictionaries(
        {
            "branches": st.sampled_from(["cond", "select"]),
            "attention": st.sampled_from(["portable", "ort", "decomposed"]),
            "attention_memory": st.sampled_from(["256MB", "1B", "2KB"]),
            "external_data": st.booleans(),
        }
    ),
    "pte": st.fixed_dictionaries({"delegate": st.sampled_from(["xnnpack", "none"])}),
    "trt": st.fixed_dictionaries(
        {
            "format": st.sampled_from(["plan-onnx", "engine"]),
            "compute_capability": st.just("sm89"),
            "branches": st.sampled_from(["cond", "select"]),
            "attention_memory": st.sampled_from(["256MB", "2KB"]),
        }
    ),
}
"""Every target's own options; one that is not here is exported with its defaults."""


@st.composite
def _runs(draw: st.DrawFn, options: dict[str, Any]) -> InputsCase:
    def inside(name: str) -> int:
        bounds = options.get(name, (1, 1))
        low, high = (bounds, bounds) if isinstance(bounds, int) else bounds
        return draw(st.integers(low, high))

    return InputsCase(
        batch=inside("batch"),
        tokens=inside("tokens"),
        prompt_length=inside("prompt_length"),
        hidden=draw(st.sampled_from(["some", "none", "all"])),
        seed=draw(st.integers(0, 99)),
    )
