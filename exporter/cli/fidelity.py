"""``sam3x fidelity``."""

from __future__ import annotations

import functools
import json
import shlex
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam3x.cli.console import reporting, shown_steps, suppressed_output
from sam3x.cli.options import Json, Quiet, Verbose, check_page, named_path
from sam3x.errors import SpecError, Step, VerificationError

if TYPE_CHECKING:
    from sam3x.cli.views import Steps
    from sam3x.fidelity.cases import Case
    from sam3x.runtime.segmenter import Segmenter

    Opened = tuple[str, Segmenter, float | None]

EXPORTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("onnx", {}),
    ("onnx", {"precision": "fp16"}),
    ("onnx", {"precision": "int8"}),
    ("onnx", {"weights": "fp16"}),
    ("onnx", {"weights": "int8"}),
    ("pte", {}),
    ("pte", {"precision": "fp16"}),
    ("pte", {"precision": "int8"}),
)
"""What the demo model is exported to: targets and their options."""

TARGETS = ("onnx", "pte", "trt")

EMULATED = ("tf32", "fp16", "bf16")
"""What TensorRT computes in; no machine without its GPU runs an engine."""


def fidelity(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            help="What `sam3x export --pipeline` wrote; the first is what the others are compared with.", metavar="FOLDER..."
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option("--target", metavar="NAME", help="Without FOLDER: onnx, pte or trt alone (emulated); repeatable."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            parser=named_path,
            metavar="DIR",
            help="Without FOLDER: keep what is exported there, and take what an earlier run exported of the same weights.",
        ),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(metavar="FILE", help="COCO annotations. Default: the demo's held-out pictures.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the pictures of --annotations lie. Default: beside the file.")
    ] = None,
    absent: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", help="With --annotations: names asked of each picture that are not in it. Default: 3."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help="Only as many pictures.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="Threads of ONNX Runtime.")] = None,
    page: Annotated[Path | None, typer.Option("--markdown", metavar="FILE", help="Also write the figures as a page.")] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Measure what a precision costs: answers against annotations, and against those of the first folder.

    Without FOLDER the small trained model that sam3x brings is exported in every precision and measured.
    """
    with reporting(verbose):
        wanted = _targets(folders, targets, output)
        for option, value in (("--pictures", pictures), ("--absent", absent)):
            if value is not None and annotations is None:
                raise SpecError(f"{option} belongs to --annotations", remedy="Give the file of annotations.", step=Step.RUN)
        check_page(page, "--markdown", Step.RUN)
        from sam3x.fidelity import report
        from sam3x.runtime.output import written

        with shown_steps(quiet) as steps:
            opened = _pipelines(folders, threads) if folders else []
            cases = _cases(annotations, pictures, limit, absent, steps)
            left_out: list[str] = []
            made = opened or _exported(wanted, output, threads, steps, verbose, left_out)
            contenders = list(_measured(made, cases, steps))
            steps.end()
        words = ["sam3x", "fidelity", *map(str, folders or ())]
        words += [word for name in targets or () for word in ("--target", name)]
        given = (
            ("annotations", annotations),
            ("pictures", pictures),
            ("absent", absent),
            ("limit", limit),
            ("markdown", page),
        )
        words += [word for name, value in given if value is not None for word in (f"--{name}", str(value))]
        if page is not None:
            of = "the demo's held-out set" if annotations is None else annotations.name
            text = report.markdown(contenders, shlex.join(words), of, left_out)
            written(page, lambda file: file.write_text(text, encoding="utf-8"))
        if as_json:
            typer.echo(json.dumps(report.document(contenders), indent=2))
        elif not quiet:
            from sam3x.cli import views as cli_views

            table = cli_views.plain_table("", *report.COLUMNS)
            for row in report.rows(contenders):
                table.add_row(*row)
            cli_views.show([table])


def _targets(folders: list[Path] | None, targets: list[str] | None, output: Path | None) -> list[str]:
    """Return the targets that the demo model is exported to; none where there are folders.

    Raises:
        SpecError: there is no such target, or options that belong to the demo model.
        TargetUnavailableError: a package is missing.
    """
    unknown = [name for name in targets or () if name not in TARGETS]
    if unknown:
        remedy = f"Give folders, or --target {', '.join(TARGETS)}."
        raise SpecError(f"no target {', '.join(unknown)} here", remedy=remedy, step=Step.RUN)
    if folders:
        for option, value in (("--target", targets), ("--output", output)):
            if value:
                fact = f"{option} belongs to the model that sam3x brings"
                raise SpecError(fact, remedy="Leave it out, or the folders.", step=Step.RUN)
        return []
    from sam3x.pipeline.request import check_available
    from sam3x.targets.registry import get_target

    wanted = [name for name in TARGETS if name in (targets or TARGETS)]
    for name in dict.fromkeys(("onnx", *wanted)):  # the first is the reference of all
        if name != "trt":  # emulated
            check_available(get_target(name))
    return wanted


def _cases(annotations: Path | None, pictures: Path | None, limit: int | None, absent: int | None, steps: Steps) -> list[Case]:
    if annotations is not None:
        from sam3x.fidelity.cases import coco_cases

        steps.begin("pictures")
        more = {} if absent is None else {"absent": absent}
        say = functools.partial(steps.say, warn=True)
        return coco_cases(annotations, pictures or annotations.parent, limit=limit, tell=say, **more)
    from sam3x.demo.held_out import cases

    return cases(limit)


def _measured(opened: Iterable[Opened], cases: list[Case], steps: Steps) -> Iterator[Any]:
    from sam3x.fidelity.measure import against, answers_of, figures_of
    from sam3x.fidelity.report import Contender

    first = weights = None
    for name, segmenter, size in opened:
        steps.begin(f"{name}: {len(cases)} pictures")
        with segmenter:
            answers = answers_of(segmenter, cases, steps.at)
            manifest = segmenter.manifest
        weights = weights or manifest.weights_sha256
        if manifest.weights_sha256 != weights:
            steps.say(f"{name} was exported from other weights than the first", warn=True)
        yield Contender(
            name=name,
            megabytes=size,
            figures=figures_of(cases, answers, manifest.threshold),
            against=None if first is None else against(first, answers, manifest.threshold),
            same_weights=manifest.weights_sha256 == weights,
        )
        first = first or answers


def _pipelines(folders: list[Path], threads: int | None) -> list[Opened]:
    """Name, pipeline and megabytes of every folder, all opened before the first is measured.

    Raises:
        ArtifactError: a folder is no pipeline, or one that cannot be asked in words.
    """
    names = [folder.resolve().name for folder in folders]
    opened: list[Opened] = []
    for folder, name in zip(folders, names, strict=True):
        segmenter = _segmenter(folder, threads)
        segmenter.prompts("word")
        shown = name if names.count(name) == 1 else str(folder)
        opened.append((f"{shown} ({_named(segmenter)})", segmenter, _megabytes(segmenter)))
    return opened


def _exported(
    targets: list[str], output: Path | None, threads: int | None, steps: Steps, verbose: bool, left_out: list[str]
) -> Iterator[Opened]:
    """The same of the demo's model, each exported when it is its turn; ``left_out`` is given those that fail verification."""
    with suppressed_output(verbose), tempfile.TemporaryDirectory() as scratch:
        from sam3x.demo import WEIGHTS
        from sam3x.fidelity.emulated import EmulatedSegmenter
        from sam3x.pipeline.export import export_pipeline
        from sam3x.pipeline.request import resolve_pipeline
        from sam3x.sources.image import transformers_image_source

        source = transformers_image_source(WEIGHTS)
        steps.begin("source")
        model = source(resolve_pipeline("onnx", {}).spec)
        exports = [item for item in EXPORTS if item[0] in targets or item == EXPORTS[0]]
        for target, options in exports:
            folder = (output or Path(scratch)) / "-".join((target, *(f"{key}-{value}" for key, value in options.items())))
            if not _is_of(folder, model.weights_sha256):
                try:
                    export_pipeline(source, target=target, output=folder, progress=steps.begin, **options)
                except VerificationError as error:  # the other rows are worth having without it
                    left_out.append(f"{target} {' '.join(options.values())}: {error}")
                    steps.say(left_out[-1], warn=True)
                    continue
            segmenter = _segmenter(folder, threads)
            yield _named(segmenter), segmenter, _megabytes(segmenter)
        reference = (output or Path(scratch)) / "onnx"
        for precision in EMULATED if "trt" in targets else ():
            yield f"trt {precision}, emulated", EmulatedSegmenter(reference, model, precision), None


def _is_of(folder: Path, weights_sha256: str) -> bool:
    """Whether an earlier run exported these weights there."""
    from sam3x.artifact.manifest import MANIFEST
    from sam3x.runtime.manifest import load_manifest

    return (folder / MANIFEST).exists() and load_manifest(folder).weights_sha256 == weights_sha256


def _segmenter(folder: Path, threads: int | None) -> Segmenter:
    """``threads`` are ONNX Runtime's; other runtimes have their own."""
    from sam3x.runtime.manifest import load_manifest
    from sam3x.runtime.segmenter import Segmenter

    of_onnx = threads is not None and load_manifest(folder, check=False).target == "onnx"
    return Segmenter(folder, threads=threads if of_onnx else None)


def _megabytes(segmenter: Segmenter) -> float:
    return sum((segmenter.folder / name).stat().st_size for name in segmenter.manifest.files) / 1e6


def _named(segmenter: Segmenter) -> str:
    """Target and precision: ``onnx fp32``, ``onnx int8 weights``."""
    options = segmenter.manifest.target_options
    weights = options.get("weights", "fp32")
    return f"{segmenter.manifest.target} " + (options.get("precision", "fp32") if weights == "fp32" else f"{weights} weights")
