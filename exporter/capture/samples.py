"""Seeded inputs for tracing and verification: every branch, sizes other than the traced ones, padded, all padded."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from sam3x.capture.program import Sample
from sam3x.spec import ExportSpec

LARGE = 2048
"""Tokens above which one eager run in float64 takes longer than the rest of an export."""

LOWEST = torch.finfo(torch.float32).min

PEAKED = 2.0
"""Self-attention scores grow with its square, those of the cross-attention with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """One set of dynamic sizes.

    ``padding`` is ``"none"``, ``"some"`` or ``"all"`` of the prompt, or ``"mixed"``: some of the first image's, all of others'.
    ``peaked`` attention: positions and prompt, which queries and keys are made of, are twice as large.
    """

    batch: int
    tokens: int
    prompt_length: int
    padding: str = "some"
    peaked: bool = False

    def __str__(self) -> str:
        peaked = ", peaked" if self.peaked else ""
        return f"batch {self.batch}, tokens {self.tokens}, prompt {self.prompt_length}, padded {self.padding}{peaked}"


def clamped(value: int, bounds: tuple[int, int]) -> int:
    """The size in ``bounds`` that is nearest to ``value``."""
    return min(max(value, bounds[0]), bounds[1])


def trace_sizes(spec: ExportSpec) -> Sizes:
    """Sizes to trace at: dynamic dimensions above 1 in halves too, else torch.export specializes on them."""

    def pick(bounds: tuple[int, int], wanted: int) -> int:
        return bounds[0] if bounds[0] == bounds[1] else wanted

    return Sizes(batch=pick(spec.batch, 6), tokens=pick(spec.halved_range, 22), prompt_length=pick(spec.prompt_length, 5))


def make_inputs(names: tuple[str, ...], spec: ExportSpec, d_model: int, sizes: Sizes, seed: int) -> dict[str, Tensor]:
    """Named tensors of the given sizes, without the flags; masks never hide everything unless ``padding`` is ``all``."""
    generator = torch.Generator().manual_seed(seed)
    b, n, s = sizes.batch, sizes.tokens, sizes.prompt_length

    def mask(*shape: int) -> Tensor:
        hidden = torch.rand(shape, generator=generator) < 0.3
        hidden[..., 0] = False
        return hidden

    def attention_mask(*shape: int) -> Tensor:
        hidden = mask(*shape)
        if spec.mask_dtype == "bool":
            return hidden
        # both ways to hide that people have: the lowest float32 is a number, which a lower precision has not
        ways = torch.where(torch.arange(shape[-1]) % 2 == 0, LOWEST, float("-inf"))
        return torch.where(hidden, ways, 0.0)

    def padding(length: int, kind: str) -> Tensor:
        valid = torch.randint(1, length + 1, (b, 1), generator=generator)
        hidden = torch.arange(length)[None] >= valid
        first = (torch.arange(b) == 0)[:, None]
        every = torch.ones_like(hidden)
        return {"none": ~every, "some": hidden, "all": every, "mixed": hidden | ~first}[kind]

    shapes = {"tgt": (b, n, d_model), "memory": (b, s, d_model), "pos": (b, s, d_model), "query_pos": (b, n, d_model)}
    inputs: dict[str, Tensor] = {}
    for name in names:
        base, _, level = name.rpartition("_")
        if name in shapes:
            scale = PEAKED if sizes.peaked and name != "tgt" else 1.0
            inputs[name] = torch.randn(shapes[name], generator=generator) * scale
        elif name == "tgt_mask":
            inputs[name] = attention_mask(n, n)
        elif name == "memory_mask":
            inputs[name] = attention_mask(n, s)
        elif name == "tgt_key_padding_mask":
            inputs[name] = padding(n, "none" if sizes.padding == "none" else "some")
        elif name in ("memory_key_padding_mask", "prompt_key_padding_mask"):
            inputs[name] = padding(s, sizes.padding)
        elif name == "prompt":
            inputs[name] = torch.randn(s, b, d_model, generator=generator)
        elif level.isdigit():
            height, width = spec.feature_sizes[int(level)]
            if base == "src_key_padding_mask":
                hidden = torch.zeros(b, height, width, dtype=torch.bool)
                if sizes.padding != "none":
                    hidden[:, height - height // 4 :, :] = True
                inputs[name] = hidden
            else:
                inputs[name] = torch.randn(b, d_model, height, width, generator=generator)
    return inputs


def branch_values(flag_names: tuple[str, ...], spec: ExportSpec, num_layers: int) -> list[tuple[str, dict[str, Tensor]]]:
    """Every combination of the runtime flags with a readable name; for per-layer flags all, none and both alternations."""
    choices: list[list[tuple[str, Tensor]]] = []
    for name in flag_names:
        if name == "pre_norm" and spec.pre_norm == "per-layer":
            patterns = [[True] * num_layers, [False] * num_layers]
            if num_layers > 1:
                patterns += [[i % 2 == 0 for i in range(num_layers)], [i % 2 == 1 for i in range(num_layers)]]
            choices.append([("pre_norm=" + "".join("TF"[not v] for v in p), torch.tensor(p)) for p in patterns])
        else:
            choices.append([(f"{name}={value}", torch.tensor(value)) for value in (False, True)])
    return [
        (
            " ".join(label for label, _ in combination) or "fixed",
            dict(zip(flag_names, (t for _, t in combination), strict=True)),
        )
        for combination in itertools.product(*choices)
    ]


def verification_sizes(spec: ExportSpec, *, peaked: bool = False) -> list[Sizes]:
    """Sizes other than the traced ones, inside the ranges; ``verify="full"`` adds 72×72 tokens.

    ``peaked`` adds one with peaked attention, where a precision below float32 shows what it costs.
    """
    wanted = [(1, 37, 7, "some"), (2, 64, 32, "some"), (2, 37, 1, "none"), (4, 30, 77, "some"), (2, 20, 7, "all")]
    if spec.halved_range[0] > LARGE and spec.verify != "full":
        # a fixed large image: every branch at the upper ends, where memory is planned for, and one image with a short prompt
        wanted = [(1, 0, 7, "some"), (2, 0, 77, "mixed" if spec.batch[1] > 1 else "all")]
    if spec.verify == "full":
        wanted += [(2, 5184, 32, "some"), (6, 300, 7, "some")]
    sizes = [
        Sizes(
            batch=_near(b, spec.batch, halved=spec.dac_dim == 0 and spec.dac is not False),
            tokens=_near(n, spec.halved_range, halved=spec.dac_dim == 1 and spec.dac is not False),
            prompt_length=clamped(s, spec.prompt_length),
            padding=p,
        )
        for b, n, s, p in wanted
    ]
    if peaked:
        able = next((size for size in sizes if can_run(spec, size, {})), sizes[0])
        sizes.append(dataclasses.replace(able, prompt_length=clamped(32, spec.prompt_length), peaked=True))
    unique = list(dict.fromkeys(sizes))
    padded = any(name.endswith("key_padding_mask") for name in spec.inputs)
    return unique if padded else list(dict.fromkeys(dataclasses.replace(size, padding="none") for size in unique))


def _near(value: int, bounds: tuple[int, int], *, halved: bool) -> int:
    """``clamped``; for an even ``value`` of a dimension that dac may halve the nearest even size."""
    found = clamped(value, bounds)
    if halved and value % 2 == 0 and found % 2:
        return next((size for size in (found + 1, found - 1) if bounds[0] <= size <= bounds[1]), found)
    return found


def can_run(spec: ExportSpec, sizes: Sizes, flags: dict[str, Tensor]) -> bool:
    """dac needs an even dimension."""
    dac = bool(flags["dac"]) if "dac" in flags else spec.dac is True
    return not dac or (sizes.batch if spec.dac_dim == 0 else sizes.tokens) % 2 == 0


def samples_for(
    names: tuple[str, ...], flag_names: tuple[str, ...], spec: ExportSpec, d_model: int, num_layers: int, sizes: list[Sizes]
) -> list[Sample]:
    """One sample for every branch and size that can run together."""
    plain = tuple(name for name in names if name not in flag_names)
    result = []
    for position, size in enumerate(sizes):
        inputs = make_inputs(plain, spec, d_model, size, spec.seed + position)
        for label, flags in branch_values(flag_names, spec, num_layers):
            if can_run(spec, size, flags):
                result.append(
                    Sample(
                        branch=label,
                        case=str(size),
                        inputs={**inputs, **flags},
                        all_padded=size.padding in ("all", "mixed"),
                        large=size.tokens > LARGE,
                    )
                )
    return result


def thinned(samples: list[Sample]) -> list[Sample]:
    """Of the large ones each branch once, at the first size it can run at, and each size once: they take seconds apiece."""
    kept: dict[str, Sample] = {}
    for sample in samples:
        kept.setdefault(sample.branch, sample)
    for sample in samples:
        if all(sample.case != other.case for other in kept.values()):
            kept[sample.case] = sample
    return [sample for sample in samples if not sample.large or any(sample is other for other in kept.values())]
