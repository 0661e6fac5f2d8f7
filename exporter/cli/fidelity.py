"""``sam3x fidelity``."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam3x.cli.console import reporting, shown_steps, suppressed_output
from sam3x.cli.options import Json, Quiet, Verbose
from sam3x.errors import SpecError, Step

if TYPE_CHECKING:
    from sam3x.cli.views import Steps
    from sam3x.fidelity.cases import Case
    from sam3x.runtime.segmenter import Segmenter

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
    annotations: Annotated[
        Path | None, typer.Option(metavar="FILE", help="COCO annotations. Default: the demo's held-out pictures.")
    ] = None,
    pictures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where the pictures of --annotations lie. Default: beside the file.")
    ] = None,
    absent: Annotated[
        int, typer.Option(min=0, metavar="N", help="With --annotations: names asked of each picture that are not in it.")
    ] = 3,
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
        if pictures is not None and annotations is None:
            raise SpecError("--pictures belongs to --annotations", remedy="Give the file of annotations.", step=Step.RUN)
        wanted = [name for name in TARGETS if name in (targets or TARGETS)]
        unknown = [name for name in targets or () if name not in TARGETS]
        if unknown or (folders and targets):
            fact = f"no target {', '.join(unknown)} here" if unknown else "--target belongs to the model that sam3x brings"
            raise SpecError(fact, remedy=f"Give folders, or --target {', '.join(TARGETS)}.", step=Step.RUN)
        from sam3x.fidelity import report

        with shown_steps(quiet) as steps:
            cases = _cases(annotations, pictures, limit, absent)
            contenders = list(_measured(_opened(folders or [], wanted, threads, steps, verbose), cases, steps))
            steps.end()
        words = ["sam3x", "fidelity", *map(str, folders or ())]
        words += [word for name in targets or () for word in ("--target", name)]
        given = (("annotations", annotations), ("pictures", pictures), ("limit", limit), ("markdown", page))
        words += [word for name, value in given if value is not None for word in (f"--{name}", str(value))]
        if page is not None:
            of = "the demo's held-out set" if annotations is None else annotations.name
            page.write_text(report.markdown(contenders, shlex.join(words), of), encoding="utf-8")
        if as_json:
            typer.echo(json.dumps(report.document(contenders), indent=2))
        elif not quiet:
            from sam3x.cli import views as cli_views

            table = cli_views.plain_table("", *report.COLUMNS)
            for row in report.rows(contenders):
                table.add_row(*row)
            cli_views.show([table])


def _cases(annotations: Path | None, pictures: Path | None, limit: int | None, absent: int) -> list[Case]:
    if annotations is not None:
        from sam3x.fidelity.cases import coco_cases

        return coco_cases(annotations, pictures or annotations.parent, limit=limit, absent=absent)
    from sam3x.demo.held_out import cases

    return cases(limit)


def _measured(opened: Iterator[tuple[str, Segmenter, float | None]], cases: list[Case], steps: Steps) -> Iterator[Any]:
    from sam3x.fidelity.measure import against, answers_of, figures_of
    from sam3x.fidelity.report import Contender

    first = None
    for name, segmenter, size in opened:
        steps.begin(f"{name}: {len(cases)} pictures")
        with segmenter:
            answers = answers_of(segmenter, cases)
            threshold = segmenter.manifest.threshold
        yield Contender(
            name=name,
            megabytes=size,
            figures=figures_of(cases, answers, threshold),
            against=None if first is None else against(first, answers, threshold),
        )
        first = first or answers


def _opened(
    folders: list[Path], targets: list[str], threads: int | None, steps: Steps, verbose: bool
) -> Iterator[tuple[str, Segmenter, float | None]]:
    """Name, pipeline and megabytes of every contender, each made when it is its turn."""
    from sam3x.runtime.segmenter import Segmenter

    for folder in folders:
        segmenter = Segmenter(folder, threads=threads)
        yield f"{folder.name} ({_named(segmenter)})", segmenter, _megabytes(segmenter)
    if folders:
        return
    with suppressed_output(verbose), tempfile.TemporaryDirectory() as made:
        from sam3x.demo import WEIGHTS
        from sam3x.fidelity.emulated import EmulatedSegmenter
        from sam3x.pipeline.export import export_pipeline
        from sam3x.pipeline.request import resolve_pipeline
        from sam3x.sources.image import transformers_image_source

        source = transformers_image_source(WEIGHTS)
        exports = [item for item in EXPORTS if item[0] in targets or item == EXPORTS[0]]  # the first is the reference of all
        for index, (target, options) in enumerate(exports):
            export_pipeline(source, target=target, output=Path(made) / str(index), progress=steps.begin, **options)
            segmenter = Segmenter(Path(made) / str(index), threads=threads if target == "onnx" else None)
            yield _named(segmenter), segmenter, _megabytes(segmenter)
        model = source(resolve_pipeline("onnx", {}).spec)
        for precision in EMULATED if "trt" in targets else ():
            yield f"trt {precision}, emulated", EmulatedSegmenter(Path(made) / "0", model, precision), None


def _megabytes(segmenter: Segmenter) -> float:
    return sum((segmenter.folder / name).stat().st_size for name in segmenter.manifest.files) / 1e6


def _named(segmenter: Segmenter) -> str:
    """Target and precision: ``onnx fp32``, ``onnx int8 weights``."""
    options = segmenter.manifest.target_options
    weights = options.get("weights", "fp32")
    return f"{segmenter.manifest.target} " + (options.get("precision", "fp32") if weights == "fp32" else f"{weights} weights")
