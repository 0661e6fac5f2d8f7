"""``sam3x.export`` and ``sam3x.api.verify``: source → capture → passes → target → verified artifact."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sam3x
from sam3x.artifact.artifact import STEM, Artifact, load
from sam3x.artifact.files import names_in, sha256_of
from sam3x.artifact.manifest import (
    MANIFEST,
    ExportManifest,
    PassRecordModel,
    TensorSpec,
    VerificationRecord,
    sealed,
)
from sam3x.artifact.memory import peak_memory
from sam3x.artifact.publish import publishing, replace_manifest
from sam3x.capture.capture import capture
from sam3x.capture.program import CapturedProgram
from sam3x.capture.samples import Sizes, samples_for, thinned, verification_sizes
from sam3x.errors import ArtifactError, Step, TargetUnavailableError
from sam3x.fusion.ambient import settled
from sam3x.fusion.dimensions import dims_of
from sam3x.fusion.encoder import FusionEncoder, fitted_spec
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.precision.emulate import eager_in
from sam3x.precision.weights import rounded_encoder
from sam3x.sources.encoder import Source, source_for
from sam3x.spec import ExportSpec, make_spec
from sam3x.targets.base import Runner, Target, TargetOptions, file_name, half_sums, resolve, weight_precision
from sam3x.targets.registry import get_target
from sam3x.verify.compare import FIND_PASS, check_pass, compare, require

Progress = Callable[[str], None]


@settled()
def export(
    encoder: nn.Module | Sequence[nn.Module] | Source | None = None,
    *,
    target: str = "onnx",
    output: str | Path,
    progress: Progress | None = None,
    disable_pass: Sequence[str] = (),
    dump_graphs: str | Path | None = None,
    **options: Any,
) -> Artifact:
    """Export a fusion encoder and verify what was written.

    Args:
        encoder: a ``TransformerEncoderFusion``, ``TransformerEncoder``, ``TransformerEncoderLayer``, list of layers, a
            ``Source``, or None for SAM3's own hyper-parameters with seeded random weights. Used as it is, never changed.
        target: see ``sam3x targets``.
        output: folder; an earlier export in it is replaced as a whole once everything is verified (``sam3x.artifact.publish``).
        progress: told the name of each step as it begins.
        disable_pass: passes to leave out. dump_graphs: folder for the graph after each pass.
        options: the fields of ``ExportSpec``, and of the target's own options (``targets/<name>_target.py``).

    Returns:
        The artifact, loaded from ``output``.

    Raises:
        Sam3xError: typed by step; nothing is left in ``output`` that was not there before.
    """
    tell = progress or (lambda _: None)
    started = time.perf_counter()
    figures: dict[str, float] = {}
    back_end = get_target(target)
    spec, target_options = resolve(back_end, options)
    status = back_end.availability()
    if not status.available:
        raise TargetUnavailableError(
            f"target '{target}' cannot export here: {status.detail}", remedy=f"Install it: {status.install}"
        )
    pipeline = default_pipeline(str(spec.branches)).then(*back_end.legalization_passes(target_options)).without(*disable_pass)
    with publishing(output) as publication:
        staging = publication.path
        tell("source")
        source = source_for(encoder, spec.seed)
        spec = fitted_spec(source.module, spec)
        rounded = _rounded(source, spec, back_end, target_options)
        tell("capture")
        module = source.module if rounded is None else rounded
        captured = _timed(figures, "capture_seconds", lambda: capture(module, spec))
        tell("passes")
        check = check_pass if spec.verify == "each" else None
        dump = None if dump_graphs is None else Path(dump_graphs)
        captured, records = _timed(figures, "passes_seconds", lambda: pipeline.run(captured, check=check, dump_graphs=dump))
        tell(f"lower to {target}")
        path = staging / file_name(back_end, STEM, target_options)
        facts = _timed(figures, "lower_seconds", lambda: back_end.lower(captured, path, target_options)) or {}
        told = facts.pop("notes", ())
        unverified = back_end.unverifiable(target_options)
        runner = back_end.load_runner(path) if unverified is None else None
        if spec.verify == "off":
            unverified = "verification was switched off (--verify off)"
        verification: tuple[VerificationRecord, ...] = ()
        if runner is not None and unverified is None:
            tell("verify")
            verification = _timed(
                figures, "verify_seconds", lambda: _verify(source, rounded, spec, back_end, runner, target_options)
            )
            require(verification, Step.VERIFY, target, "" if spec.verify == "each" else FIND_PASS)
        figures["total_seconds"] = time.perf_counter() - started
        figures["peak_rss_mb"] = peak_memory() / 2**20
        inputs, outputs = _tensor_specs(captured)
        manifest = ExportManifest(
            target=target,
            opset=back_end.opset,
            interface=spec.interface,
            input_names=captured.input_names,
            output_names=captured.output_names,
            inputs=inputs,
            outputs=outputs,
            spec=spec.model_dump(mode="json"),
            target_options=target_options.model_dump(mode="json"),
            ranges={name: getattr(spec, name) for name in ("batch", "tokens", "prompt_length")},
            origin=source.origin,
            weights_sha256=source.weights_sha256,
            versions={"sam3x": sam3x.__version__, **back_end.versions()},
            passes=tuple(PassRecordModel.of(record) for record in records),
            verification=verification,
            verified=unverified is None,
            verified_reason=unverified,
            facts=facts,
            files={name: sha256_of(staging / name) for name in names_in(staging)},
            figures={name: round(value, 3) for name, value in figures.items()},
            notes=(*captured.notes, *told),
        )
        (staging / MANIFEST).write_text(sealed(manifest))
        publication.commit()
    return load(output)


@settled()
def verify(folder: str | Path, source: nn.Module | Source | None = None, *, full: bool = False) -> list[VerificationRecord]:
    """Run an artifact against the eager encoder again; one that was never verified is from then on.

    Args:
        source: what it was exported from; None rebuilds the seeded default.
        full: also at 72×72 tokens.

    Raises:
        ArtifactError: the source's weights are not those of the artifact.
        VerificationError: an output is further off than allowed.
    """
    artifact = load(folder)
    spec = make_spec(**artifact.manifest.spec)
    spec = spec.model_copy(update={"verify": "full"}) if full else spec
    given = source_for(source, spec.seed)
    if given.weights_sha256 != artifact.manifest.weights_sha256:
        raise ArtifactError(
            f"{folder} was exported from other weights ({artifact.manifest.origin})",
            remedy="Name the source it came from: --checkpoint or --module.",
            step=Step.REVERIFY,
        )
    target = get_target(artifact.manifest.target)
    options = target.options_type(**artifact.manifest.target_options)
    records = _verify(given, _rounded(given, spec, target, options), spec, target, artifact._runner, options)
    require(records, Step.REVERIFY, artifact.manifest.target)
    if not artifact.manifest.verified:
        known = {"verified": True, "verified_reason": None, "verification": records}
        replace_manifest(artifact.folder, artifact.manifest.model_copy(update=known))
    return list(records)


def _timed(figures: dict[str, float], name: str, work: Callable[[], Any]) -> Any:
    started = time.perf_counter()
    result = work()
    figures[name] = time.perf_counter() - started
    return result


def _rounded(source: Source, spec: ExportSpec, target: Target, options: TargetOptions) -> nn.Module | None:
    """The encoder with rounded weights, for a target that stores them so."""
    precision = weight_precision(target, options)
    return None if precision is None else rounded_encoder(source.module, spec, precision)


def _verify(
    source: Source, rounded_module: nn.Module | None, spec: ExportSpec, target: Target, runner: Runner, options: TargetOptions
) -> tuple[VerificationRecord, ...]:
    """Against eager float32; with ``rounded_module`` against that, and how far it is from the source."""
    precision = str(getattr(options, "precision", "fp32"))
    encoder = FusionEncoder(source.module, spec)
    sizes: list[Sizes] = verification_sizes(spec, peaked=precision != "fp32")
    samples = samples_for(encoder.input_names, encoder.flag_names, spec, encoder.d_model, len(encoder.layers), sizes)
    samples = samples if spec.verify == "full" else thinned(samples)

    def run(inputs: Any) -> dict[str, Tensor]:
        return {
            name: torch.from_numpy(np.array(value))
            for name, value in runner.run({k: v.numpy() for k, v in inputs.items()}).items()
        }

    def rounded(inputs: Any) -> dict[str, Tensor]:
        with eager_in(precision, half_sums=half_sums(target, options)):
            return encoder.eager(inputs)

    if rounded_module is not None:
        return compare(samples, run, FusionEncoder(rounded_module, spec).eager, unrounded=encoder.eager)
    return compare(samples, run, encoder.eager, None if precision == "fp32" else rounded)


def _tensor_specs(captured: CapturedProgram) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    def describe(name: str, value: Tensor, dims: tuple[str | None, ...]) -> TensorSpec:
        shape = [
            size if isinstance(size, int) else dims[i] or captured.dim_names.get(str(size), str(size))
            for i, size in enumerate(value.shape)
        ]
        return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=tuple(shape))  # type: ignore[arg-type]

    by_name = {node.name: node for node in captured.program.graph.nodes}
    inputs = tuple(
        describe(name, by_name[name].meta["val"], dims_of(name, by_name[name].meta["val"].dim()))
        for name in captured.input_names
    )
    results = [node.meta["val"] for node in captured.program.graph.output_node().args[0]]
    outputs = tuple(describe(n, v, (None,) * v.dim()) for n, v in zip(captured.output_names, results, strict=True))
    return inputs, outputs
