"""One fusion encoder's hyper-parameters, under upstream's names. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sam3x.errors import SourceError


class FusionConfig(BaseModel):
    """What ``TransformerEncoderFusion`` and its layers are built from.

    The defaults are SAM3's own (``sam3.model_builder._create_transformer_encoder``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    d_model: int = Field(default=256, ge=1)
    num_layers: int = Field(default=6, ge=1)
    num_heads: int = Field(default=8, ge=1)
    dim_feedforward: int = Field(default=2048, ge=1)
    activation: Literal["relu", "gelu"] = "relu"
    dropout: float = Field(default=0.1, ge=0.0, le=1.0)
    pre_norm: bool = True
    pos_enc_at_attn: bool = True
    pos_enc_at_cross_attn_queries: bool = False
    pos_enc_at_cross_attn_keys: bool = False
    num_feature_levels: int = Field(default=1, ge=1)
    add_pooled_text_to_img_feat: bool = False
    pool_text_with_mask: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> FusionConfig:
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is not divisible by num_heads {self.num_heads}; give num_heads")
        return self


def make_config(subject: str = "hyper-parameters", **options: Any) -> FusionConfig:
    """Build a ``FusionConfig``, turning pydantic's errors into one ``SourceError`` about ``subject``."""
    try:
        return FusionConfig(**options)
    except ValidationError as error:
        facts = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"])
            given = f" (got {item['input']!r})" if where else ""
            facts.append(f"{where}: {item['msg']}{given}" if where else item["msg"].removeprefix("Value error, "))
        known = ", ".join(FusionConfig.model_fields)
        raise SourceError("; ".join(facts), subject=subject, remedy=f"Correct the value; the names are {known}.") from None
