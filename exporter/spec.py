"""What the user asked for, validated where it is made. Imports neither torch nor any back end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from sam3x.errors import SpecError

Flag = Literal["runtime"] | bool
PreNormFlag = Literal["runtime", "per-layer", "module"] | bool
Interface = Literal["tokens", "feature_maps"]
Branches = Literal["cond", "select"]
VerifyPolicy = Literal["off", "final", "each", "full"]

TOKENS_INPUTS = (
    "tgt",
    "memory",
    "tgt_mask",
    "memory_mask",
    "tgt_key_padding_mask",
    "memory_key_padding_mask",
    "pos",
    "query_pos",
)
"""Tensor inputs of the ``tokens`` interface, in graph order (upstream ``TransformerEncoderLayer.forward``)."""

DEFAULT_TOKENS_INPUTS = ("tgt", "memory", "memory_key_padding_mask", "query_pos")
"""What SAM3's own fusion encoder is called with."""

FEATURE_MAP_INPUTS = ("src", "src_key_padding_mask", "src_pos", "prompt", "prompt_key_padding_mask")
"""Inputs of the ``feature_maps`` interface; the ``src*`` ones stand once a level, as ``src_0``, ``src_1``, …"""

DEFAULT_FEATURE_MAP_INPUTS = ("src", "src_pos", "prompt", "prompt_key_padding_mask")


def _range(value: Any) -> Any:
    """Accept ``5``, ``(1, 8)``, ``[1, 8]``, ``"5"`` and ``"1:8"``; anything else is left for pydantic to refuse."""
    if isinstance(value, bool):
        raise ValueError("expected an integer or (min, max), not a bool")
    if isinstance(value, str):
        parts = value.split(":")
        if len(parts) > 2 or not all(part.strip().isascii() and part.strip().isdecimal() for part in parts):
            raise ValueError(f"expected N or MIN:MAX, got {value!r}")
        numbers = [int(part) for part in parts]
        return (numbers[0], numbers[-1])
    if isinstance(value, int):
        return (value, value)
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _check_range(value: tuple[int, int]) -> tuple[int, int]:
    low, high = value
    if low < 1:
        raise ValueError(f"a dimension is at least 1, got {low}")
    if low > high:
        raise ValueError(f"minimum {low} is above maximum {high}")
    return value


def _checked(value: Any) -> Any:
    value = _range(value)
    if isinstance(value, tuple) and len(value) == 2 and all(type(v) is int for v in value):
        return _check_range(value)
    raise ValueError(f"expected an integer or (min, max), got {value!r}")


Range = Annotated[tuple[int, int], BeforeValidator(_checked), Field(json_schema_extra={"metavar": "N|MIN:MAX"})]
"""Inclusive (min, max) of one dimension; equal ends make it static."""


def _sizes(value: Any) -> Any:
    """Accept ``"72x72,36x36"``; anything but text is left for pydantic."""
    if not isinstance(value, str):
        return value
    pairs = [part.strip().lower().split("x") for part in value.split(",")]
    if not all(len(pair) == 2 and all(size.isascii() and size.isdecimal() and int(size) for size in pair) for pair in pairs):
        raise ValueError(f"expected HxW for each level, as in 72x72,36x36, got {value!r}")
    return tuple((int(height), int(width)) for height, width in pairs)


FeatureSizes = Annotated[tuple[tuple[int, int], ...], BeforeValidator(_sizes), Field(json_schema_extra={"metavar": "HxW,HxW"})]
"""(height, width) of each level."""


class ExportSpec(BaseModel):
    """One export request. Ranges are inclusive; equal ends make a dimension static.

    Raises:
        SpecError: through ``make_spec``, for contradictory or unknown values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    interface: Interface = "tokens"
    """Signature of the graph: tokens, as the layer of upstream, or feature maps, as TransformerEncoderFusion."""

    inputs: tuple[str, ...] = Field(default=(), json_schema_extra={"metavar": "A,B,C"})
    """Tensor inputs of the graph; others are None in the eager call. Left out: those SAM3 uses with this interface."""

    dac: Flag = "runtime"
    """runtime makes it a graph input, a bool scalar; on and off fix it. With an odd fixed size, as one picture, it is off."""

    pre_norm: PreNormFlag = "runtime"
    """runtime makes it a graph input, a bool scalar; per-layer a bool vector, one flag a layer; module keeps what each layer
    has; on and off fix it."""

    dac_dim: Literal[0, 1] = 0
    """Dimension of tgt that dac halves: 0, the batch, as upstream's code, or 1, the tokens."""

    branches: Branches | None = None
    """What a runtime flag becomes: a conditional, or data flow that computes what differs in both ways and picks by the flag.
    Left out: what the target runs best."""

    batch: Range = (1, 8)
    """Batch size."""

    tokens: Range = (16, 9216)
    """Image tokens, dimension 1 of tgt."""

    prompt_length: Range = (1, 77)
    """Prompt tokens, dimension 1 of memory."""

    feature_sizes: FeatureSizes = ((72, 72),)
    """Height and width of each level of the feature-maps interface; static."""

    mask_dtype: Literal["bool", "float32"] = "bool"
    """dtype of tgt_mask and memory_mask: bool (True: may not attend) or float32 (added to the scores). Key padding masks are
    always bool, True for padding."""

    verify: VerifyPolicy = "final"
    """What is compared with eager: nothing (off), the artifact (final), the graph after every pass too (each), or the artifact
    also at 72x72 tokens (full)."""

    image_size: int | None = Field(default=None, ge=1, json_schema_extra={"metavar": "PIXELS"})
    """With --pipeline: side of the square picture that the model sees, as 672; left out: what its source was made for."""

    seed: int = 0
    """Seed of random default weights and of the verification inputs."""

    _notes: tuple[str, ...] = PrivateAttr(())

    @property
    def notes(self) -> tuple[str, ...]:
        """What the request became that it did not say, for the manifest."""
        return self._notes

    @model_validator(mode="before")
    @classmethod
    def _fill_inputs(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        inputs = data.get("inputs") or ()
        if isinstance(inputs, str):
            inputs = tuple(name.strip() for name in inputs.split(",") if name.strip())
        if not inputs:
            maps = data.get("interface", "tokens") == "feature_maps"
            inputs = DEFAULT_FEATURE_MAP_INPUTS if maps else DEFAULT_TOKENS_INPUTS
        if not isinstance(inputs, (tuple, list)):
            raise ValueError(f"inputs: expected names, got {inputs!r}")
        data["inputs"] = tuple(inputs)
        return data

    @model_validator(mode="after")
    def _consistent(self) -> ExportSpec:
        known = FEATURE_MAP_INPUTS if self.interface == "feature_maps" else TOKENS_INPUTS
        required = ("src", "src_pos", "prompt") if self.interface == "feature_maps" else ("tgt", "memory")
        if not self.feature_sizes or any(min(size) < 1 for size in self.feature_sizes):
            raise ValueError("feature_sizes: give one HxW of at least 1x1 a level")
        unused = ("feature_sizes",) if self.interface == "tokens" else ("tokens", "mask_dtype")
        for name in unused:
            if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}: the {self.interface} interface has no use for it; leave it out or choose the other interface"
                )
        for name in self.inputs:
            if name not in known:
                raise ValueError(f"inputs: '{name}' is not an input of the {self.interface} interface ({', '.join(known)})")
        if len(set(self.inputs)) != len(self.inputs):
            raise ValueError("inputs: a name is given twice")
        for name in required:
            if name not in self.inputs:
                raise ValueError(f"inputs: '{name}' is required by the {self.interface} interface")
        # graph order, whatever order the user typed
        object.__setattr__(self, "inputs", tuple(name for name in known if name in self.inputs))
        if self.dac is not False:
            axis, (low, high) = ("batch", self.batch) if self.dac_dim == 0 else ("tokens", self.halved_range)
            if low == high and low % 2:
                odd = f"halves the {axis}, and the {axis} is fixed at the odd size {low}"
                if self.dac is True:
                    raise ValueError(f"dac {odd}; give an even size or dac=False")
                object.__setattr__(self, "dac", False)
                self._notes = (f"dac is fixed off: it {odd}",)
            elif self.dac is True and high < 2:
                raise ValueError(f"dac halves the {axis}, and the {axis} is at most {high}")
        if self.dac is True and self.pre_norm is False:
            raise ValueError("dac=True with pre_norm=False: upstream's post-norm layer ignores dac; leave one of them out")
        return self

    @property
    def ranges(self) -> dict[str, tuple[int, int]]:
        """Meaning of a dimension → its inclusive sizes; ``tokens`` are those of ``tgt``."""
        return {"batch": self.batch, "tokens": self.halved_range, "prompt_length": self.prompt_length}

    @property
    def halved(self) -> str:
        """Meaning of the dimension that dac halves where it is on."""
        return ("batch", "tokens")[self.dac_dim]

    @property
    def halved_range(self) -> tuple[int, int]:
        """Range of ``tgt``'s dimension 1 in the chosen interface."""
        if self.interface == "feature_maps":
            total = sum(height * width for height, width in self.feature_sizes)
            return (total, total)
        return self.tokens


def make_spec(**options: Any) -> ExportSpec:
    """Build an ``ExportSpec``, turning pydantic's errors into one ``SpecError``."""
    return checked(ExportSpec, options)


Model = TypeVar("Model", bound=BaseModel)


def checked(model: type[Model], options: Mapping[str, Any]) -> Model:
    """Validate options from outside.

    Raises:
        SpecError: every breach in one sentence.
    """
    try:
        return model(**options)
    except ValidationError as error:
        facts, remedy = [], ""
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"] if not str(part).startswith("literal"))
            if item["type"] != "value_error":  # pydantic's own, which tells no remedy
                remedy = "See sam3x export --help."
            message = item["msg"].removeprefix("Value error, ")
            given = f" (got {item['input']!r})" if where and item["type"] != "value_error" else ""
            facts.append(f"{where}: {message}{given}" if where else message)
        raise SpecError("; ".join(dict.fromkeys(facts)), remedy=remedy) from None
