"""``--fuse``: what runs for every prompt as one ONNX file, from the boxes and text features to the masks of what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sam3x.artifact.manifest import SEGMENTER, ComponentSpec
from sam3x.capture.program import Sample
from sam3x.errors import SourceError
from sam3x.pipeline.job import ComponentJob, tensor_spec
from sam3x.pipeline.request import PARTS
from sam3x.pipeline.samples import branch_of
from sam3x.precision.component import rounded
from sam3x.sources.contract import Component, Port
from sam3x.targets.base import Numerics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sam3x.targets.onnx.join import Part

FOUND = ("found_prompts", "found_scores", "found_boxes", "found_masks")
"""Outputs: a row for each detection, by prompt and then by query."""

_OF_ONE_PICTURE = ("image_tokens", "image_pos")
_NOTHING = 2.0  # no score is above it
_FEW = 12  # most masks that a case of the verification computes, where the scores allow
_CLEAR, _CLEAR_BELOW = 1e-4, 1e-2
"""Scores this far apart are on the same side of a threshold between them, in the artifact and in eager; below float32."""

_Call = Callable[[Component, Mapping[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedComponent(Component):
    """``PARTS`` as one. In eager they run one after another, and the mask head once for each prompt that found something."""

    parts: tuple[Component, ...]

    def eager(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._run(inputs, lambda part, fed: part.eager(fed))

    def eager_double(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._run(inputs, lambda part, fed: part.eager_double(fed))

    def _run(self, inputs: Mapping[str, Tensor], call: _Call) -> dict[str, Tensor]:
        tensors = dict(inputs)
        for part in self.parts[:-1]:
            outputs = call(part, part.feed(tensors))
            tensors.update({part.renamed.get(name, name): value for name, value in outputs.items()})
        return self.detections(tensors, call)

    def detections(self, tensors: Mapping[str, Tensor], call: _Call = lambda part, fed: part.eager(fed)) -> dict[str, Tensor]:
        """``FOUND`` out of what the decoder gave and ``threshold``, as ``sam3x.runtime.Segmenter`` finds them."""
        head = self.parts[-1]
        scores = _scores(tensors)
        above = scores > tensors["threshold"]
        rows, columns = above.nonzero(as_tuple=True)
        each = [port.tensor for port in head.inputs if port.dims[:1] == ("prompts",)]
        masks = []
        for row in rows.unique().tolist() or [0]:  # without detections, for the sizes of a mask
            own = {name: tensors[name][row : row + 1] for name in each}
            own["queries"] = own["queries"][:, above[row] if len(rows) else slice(1)]
            masks.append(next(iter(call(head, head.feed({**tensors, **own})).values()))[0])
        found = torch.cat(masks)[: len(rows)]
        return dict(zip(FOUND, (rows, scores[above], tensors["pred_boxes"][rows, columns], found), strict=True))

    def samples(self, traced: Mapping[str, Sequence[Sample]], numerics: Numerics = Numerics()) -> list[Sample]:  # noqa: B008
        """The components' samples as those of the joined file: one threshold that few are above, one that nothing is.

        Args:
            numerics: of the file, which may move scores.
        """
        gap = _CLEAR if numerics.arithmetic is None else _CLEAR_BELOW
        found: list[Sample] = []
        for position, prompt in enumerate(traced[PARTS[0]]):
            tensors: dict[str, Tensor] = {}
            for part in self.parts:
                sample = traced[part.name][position]
                for port in part.inputs:
                    tensors.setdefault(port.tensor, sample.inputs[port.name])
                tensors.update({part.renamed.get(name, name): value for name, value in (sample.expected or {}).items()})
            scores = _scores(tensors)
            for threshold in (_between(scores, gap), *((_NOTHING,) if position == 0 else ())):
                given = {**tensors, "threshold": torch.tensor([threshold])}
                words = f"{prompt.case.rpartition(', ')[0]}, {int((scores > threshold).sum())} found"
                inputs = {port.name: given[port.name] for port in self.inputs}
                expected = self.detections(given)
                found.append(Sample(branch=branch_of(self), case=words, inputs=inputs, expected=expected, large=True))
        return found


def fused(components: Sequence[Component]) -> FusedComponent:
    """The joined component's ports: whatever its parts read from outside of it, and the threshold.

    Raises:
        SourceError: the source answers clicks alone.
    """
    parts = tuple(item for item in components if item.name in PARTS)
    if len(parts) != len(PARTS):
        raise SourceError("it has nothing to join: it answers clicks alone", remedy="Leave --fuse out.")
    inside = {part.renamed.get(name, name) for part in parts for name in part.outputs}
    ports: dict[str, Port] = {}
    for part in parts:
        for port in part.inputs:
            if port.tensor not in inside:
                ports.setdefault(port.tensor, Port(name=port.tensor, dims=port.dims))
    ports["threshold"] = Port(name="threshold", dims=(None,))
    used = {dim for port in ports.values() for dim in port.dims if dim}
    limits = {dim: limit for part in parts for dim, limit in part.ranges.items()}
    return FusedComponent(
        name=SEGMENTER,
        module=nn.ModuleList(part.module for part in parts),
        inputs=tuple(ports.values()),
        outputs=FOUND,
        ranges={
            **{dim: limit for dim, limit in limits.items() if dim in used},
            "found": (0, limits["prompts"][1] * limits["queries"][1]),
        },
        constants={name: value for part in parts for name, value in part.constants.items()},
        parts=parts,
    )


def export_fused(
    job: ComponentJob, component: FusedComponent, made: Mapping[str, ComponentSpec], samples: list[Sample]
) -> ComponentSpec:
    """Join the parts' files, which are in the job's folder and go away, and verify what came of it.

    Raises:
        LoweringError: the files do not fit together. VerificationError: the joined file gives something else than eager.
    """
    from sam3x.targets.onnx import file as onnx_file
    from sam3x.targets.onnx import join as onnx_join

    job.say(component.name, "join")
    started = time.perf_counter()
    specs = [made[name] for name in PARTS]
    model = onnx_join.join(
        _parts(job.folder, specs),
        inputs=[port.name for port in component.inputs],
        outputs=FOUND,
        name=component.name,
        sizes=("found", "kept"),
    )
    path = job.folder / f"{component.name}.onnx"
    onnx_file.write(model, path, external_data=bool(getattr(job.request.options, "external_data", False)))
    del model
    for spec in specs:
        for file in (job.folder / spec.file, job.folder / f"{spec.file}.data"):
            file.unlink(missing_ok=True)
    with rounded(component, job.request.numerics, samples) as expected:
        verification = job.verified(component, path, expected, "Leave --fuse out.") if job.runs else ()
    inputs, outputs = samples[0].inputs, samples[0].expected or {}
    return ComponentSpec(
        name=component.name,
        file=path.name,
        inputs=tuple(
            tensor_spec(port.name, value, [dim or size for dim, size in zip(port.dims, value.shape, strict=True)])
            for port, value in zip(component.inputs, inputs.values(), strict=True)
        ),
        outputs=tuple(tensor_spec(name, outputs[name], ["found", *outputs[name].shape[1:]]) for name in FOUND),
        reads={port.name: port.tensor for port in component.inputs if port.name not in component.constants},
        writes={name: name for name in FOUND},
        constants={name: value.tolist() for name, value in component.constants.items()},
        ranges=dict(component.ranges),
        passes=tuple(record for spec in specs for record in spec.passes),
        verification=verification,
        metadata={"joined": list(PARTS), **{spec.name: spec.metadata for spec in specs if spec.metadata}},
        metrics={"seconds": round(time.perf_counter() - started, 3)},
    )


def _parts(folder: Path, specs: Sequence[ComponentSpec]) -> list[Part]:
    """The files and what stands between them: one picture's tensors repeated, detections selected, masks collected."""
    import onnx_ir as ir

    from sam3x.targets.onnx import detect as onnx_detect
    from sam3x.targets.onnx.join import Part

    parts: list[Part] = []
    for spec in specs:
        if spec.name == PARTS[-1]:
            reads = {"presence": "presence_logit_dec"}
            writes = dict(zip(("prompts_of", "scores_of", "boxes_of"), FOUND, strict=False))
            parts.append(Part(name="select", model=onnx_detect.select(), reads=reads, writes=writes))
        reads = dict(spec.reads)
        for item in spec.inputs:
            tensor = spec.reads.get(item.name)
            if tensor in _OF_ONE_PICTURE and item.shape[:1] == ("prompts",):
                reads[item.name] = f"{tensor}_of_each"
                parts.append(
                    Part(
                        name=f"repeat_{tensor}",
                        model=onnx_detect.repeat(),
                        reads={"of_one": str(tensor)},
                        writes={"of_each": f"{tensor}_of_each"},
                    )
                )
        reads.update({name: "kept" for name, tensor in reads.items() if spec.name == PARTS[-1] and tensor == "queries"})
        parts.append(Part(name=spec.name, model=ir.load(folder / spec.file), reads=reads, writes=spec.writes))
    parts.append(Part(name="collect", model=onnx_detect.collect(), writes={"masks_of": FOUND[-1]}))
    return parts


def _scores(tensors: Mapping[str, Tensor]) -> Tensor:
    """(prompts, queries), of the decoder's outputs."""
    return tensors["pred_logits"].sigmoid() * tensors["presence_logit_dec"].sigmoid()


def _between(scores: Tensor, gap: float) -> float:
    """A threshold that some scores are above, a few if they allow, and none is near; where they leave no gap, all are above."""
    ordered = scores.flatten().sort(descending=True).values
    clear = (ordered[:-1] - ordered[1:] > gap).nonzero().flatten().tolist()
    at = max((index for index in clear if index < _FEW), default=clear[0] if clear else None)
    return -1.0 if at is None else float(ordered[at] + ordered[at + 1]) / 2
