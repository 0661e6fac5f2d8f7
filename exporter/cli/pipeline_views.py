"""What the command line shows of a pipeline and of what it found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sam3x.artifact.manifest import PipelineManifest
from sam3x.cli.views import export_summary, manifest_view, pairs, passes_table, plain_table, tensors_table, verification_table

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sam3x.artifact.manifest import Manifest, Quality
    from sam3x.sources.report import LintReport


def manifest_parts(manifest: Manifest, folder: Path, *, verbose: bool, everything: bool) -> list[RenderableType]:
    """What an export made, or ``everything`` of it."""
    if isinstance(manifest, PipelineManifest):
        return pipeline_view(manifest, folder, verbose=verbose)
    if everything:
        return manifest_view(manifest, folder, verbose=verbose)
    return export_summary(manifest, folder, verbose=verbose)


def pipeline_view(manifest: PipelineManifest, folder: Path, *, verbose: bool) -> list[RenderableType]:
    """Components, how they connect, and how far each is from eager."""
    state = "verified" if manifest.verified else f"NOT verified: {manifest.verified_reason}"
    words = manifest.tokenizer or "none: words cannot be read, give token ids or export with --tokenizer"
    texts = f", up to {manifest.context_length} tokens, tokenizer {words}" if manifest.context_length else ", clicks alone"
    lines: list[RenderableType] = [
        f"{folder}: {manifest.source} image model for {manifest.target}, {state}",
        f"from {manifest.origin}",
        f"picture {manifest.image_size}x{manifest.image_size}{texts}",
        _components(manifest, folder),
        *(_quality(manifest.quality) if manifest.quality is not None else []),
        *(f"{item.name}, form: {item.metadata['form']}" for item in manifest.components if "form" in item.metadata),
        *manifest.notes,
        ", ".join(f"{name} {value:,.1f}" for name, value in manifest.metrics.items()),
    ]
    if verbose:
        for item in manifest.components:
            lines += [
                tensors_table(f"{item.name} inputs", item.inputs),
                tensors_table(f"{item.name} outputs", item.outputs),
                passes_table(item.passes),
                verification_table(item.verification, verbose=True),
            ]
    return lines


def _components(manifest: PipelineManifest, folder: Path) -> Table:
    coarse = {item.name: [r.rms_rel for r in item.verification if r.rms_rel is not None] for item in manifest.components}
    rounding = ["rounding costs, rms"] if any(coarse.values()) else []
    table = plain_table("components", "file", "size", "takes", "gives", "furthest from eager", *rounding)
    for item in manifest.components:
        names = [name for name in manifest.files if name.startswith(f"{item.name}.")]
        size = sum((folder / name).stat().st_size for name in names if (folder / name).is_file())
        worst = max((record.max_rel for record in item.verification), default=None)
        table.add_row(
            item.file,
            f"{size / 1e6:,.1f} MB",
            ", ".join([*item.reads.values(), *item.constants]),
            ", ".join(item.writes.values()),
            "not compared" if worst is None else f"{worst:.1e} of the largest value",
            *([f"{max(coarse[item.name], default=0.0):.2%}"] if rounding else []),
        )
    return table


def _quality(quality: Quality) -> list[RenderableType]:
    """One sentence, and a row a prompt."""
    table = plain_table("masks", "prompt", ">masks", ">mean IoU", ">min IoU", ">box differs by", ">score differs by")
    for item in quality.prompts:
        metrics = (f"{item.mean_iou:.4f}", f"{item.min_iou:.4f}")
        differences = (f"{item.largest_box_difference:.1e}", f"{item.largest_score_difference:.1e}")
        table.add_row(item.prompt, str(item.queries), *metrics, *differences)
    where = f"on {quality.picture}, at the queries that eager scores highest"
    worst = f"{quality.mean_iou:.4f} on average, {quality.min_iou:.4f} at worst"
    return [f"{quality.precision} against fp32: mask IoU {worst}, {where}", table]


def detections_view(found: Mapping[str, Any], picture: str | None = None) -> RenderableType:
    """One row a detection of ``Masks.to_dict``, best first, or that nothing was found; ``picture``: its name among several."""
    where = "" if picture is None else f" in {picture}"
    detections, prompts = found["detections"], found["prompts"]
    if not detections:
        return f"nothing found{where}{f' for {_listed(prompts)}' if prompts else ''}"
    table = plain_table(f"{len(detections)} found{where}", "label", "score", "box", "pixels")
    for item in sorted(detections, key=lambda item: -item["score"]):
        box = ", ".join(f"{value:.0f}" for value in item["box"])
        table.add_row(item["label"], f"{item['score']:.3f}", box, f"{sum(item['mask']['counts'][1::2]):,}")
    return table


def lint_view(report: LintReport, *, verbose: bool) -> list[RenderableType]:
    """What the checkpoint is, then what is wrong with it."""
    models = {"unknown": "no image model that sam3x knows", "fusion encoder": "a fusion encoder"}
    what = models.get(report.kind, f"{report.kind} image model")
    rows = [(name, value) for name, value in report.metadata.items()]
    rows += [("parameters", f"{report.parameters:,}, {', '.join(report.dtypes)}")]
    rows += [("", note) for note in report.notes]
    rows += [("can be exported", " and ".join(f"the {part}" for part in report.exports) or "nothing")]
    lines: list[RenderableType] = [f"{report.path}: {what}", pairs(rows)]
    findings = {
        "missing": report.missing,
        "unexpected": report.unexpected,
        "mis-shaped": report.misshaped,
        "of another type": report.mistyped,
        "NaN or infinite": report.not_finite,
        "trap": report.traps,
    }
    for name, found in findings.items():
        if found:
            shown = found if verbose else found[:5]
            more = f" and {len(found) - len(shown)} more (-v lists them)" if len(found) > len(shown) else ""
            lines.append(f"{name}: {', '.join(shown)}{more}")
    return [*lines, *(["nothing wrong"] if report.clean else [report.remedy, "not fit for an export as it is"])]


def _listed(prompts: Sequence[str]) -> str:
    return ", ".join(f"'{prompt}'" for prompt in prompts)
