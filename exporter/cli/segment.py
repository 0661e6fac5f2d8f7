"""``sam3x run``: pictures and prompts or clicks in, masks out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam3x.cli.console import reporting
from sam3x.cli.options import parsed_providers
from sam3x.errors import SpecError, Step

if TYPE_CHECKING:
    from sam3x.runtime import Segmenter
    from sam3x.runtime.result import Masks

STDIN = "-"
_FORMS = {
    "box": ("X0,Y0,X1,Y1 in pixels, as in 10,20,200,180", float, 4),
    "point": ("X,Y in pixels, as in 120,200", float, 2),
    "ids": ("token ids, as in 598,17,599", int, None),
}


def run(
    folder: Annotated[Path, typer.Argument(help="What `sam3x export --pipeline` wrote.", metavar="FOLDER")],
    pictures: Annotated[
        list[str],
        typer.Argument(help="Files that Pillow reads, folders of them, - for stdin.", metavar="PICTURE..."),
    ],
    text: Annotated[list[str] | None, typer.Option("--text", metavar="WORDS", help="What to look for; repeatable.")] = None,
    ids: Annotated[
        list[str] | None, typer.Option("--ids", metavar="N,N", help="The same in token ids; repeatable, after the texts.")
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            "--box",
            metavar="X0,Y0,X1,Y1",
            help="In pixels; repeatable. With words an example for every prompt, without words the object itself.",
        ),
    ] = None,
    not_box: Annotated[
        list[str] | None, typer.Option("--not-box", metavar="X0,Y0,X1,Y1", help="An example of what is not wanted; repeatable.")
    ] = None,
    point: Annotated[
        list[str] | None, typer.Option("--point", metavar="X,Y", help="A point of one object, in pixels; repeatable.")
    ] = None,
    not_point: Annotated[
        list[str] | None, typer.Option("--not-point", metavar="X,Y", help="A point outside that object; repeatable.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--everything", help="Find everything: a grid of points, filtered and de-duplicated as by SAM.")
    ] = False,
    points_per_side: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --everything: points of a side of the grid. Default: 32.")
    ] = None,
    stability_score_thresh: Annotated[
        float | None,
        typer.Option(metavar="NUMBER", help="With --everything: masks are more stable than this, 0 to 1. Default: 0.95."),
    ] = None,
    threshold: Annotated[
        list[float] | None,
        typer.Option(
            metavar="NUMBER",
            help="Detections score above it, 0 to 1; repeat it for one a prompt. Default: the model's own, 0.88 of everything.",
        ),
    ] = None,
    max_detections: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Keep the N best of each prompt, or of everything. Default: all.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the picture with masks and boxes; of several, into this folder."),
    ] = None,
    masks: Annotated[
        Path | None, typer.Option("--masks", metavar="DIR", help="Write each mask as PICTURE_INDEX.png, white on black.")
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write a line of JSON for each picture; - is standard output."),
    ] = None,
    coco: Annotated[
        Path | None, typer.Option("--coco", metavar="FILE", help="Write COCO annotations, masks as compressed RLE.")
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Most pixels of a file. Default: 178,956,970, as in Pillow."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Threads of ONNX Runtime. Default: one for each core.")
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:KEY=VALUE,…]",
            help="What runs it: an execution provider of ONNX Runtime, with options, as in cuda:device_id=1; repeatable.",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare every file with its sha256 first.")] = True,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print the traceback of an error.")] = False,
) -> None:
    """Find what words describe in pictures, the object that points and a box mean, or everything. Needs no torch."""
    with reporting(verbose):
        boxes, others = _parsed("box", "--box", box), _parsed("box", "--not-box", not_box)
        points, away = _parsed("point", "--point", point), _parsed("point", "--not-point", not_point)
        texts = [*(text or ()), *_parsed("ids", "--ids", ids)]
        clicked = {"--box": boxes, "--point": points, "--not-point": away}
        words = {"--text and --ids": texts, "--not-box": others}
        of_everything = {"--points-per-side": points_per_side, "--stability-score-thresh": stability_score_thresh}
        if not (everything or any(clicked.values()) or any(words.values())):
            raise SpecError("nothing to look for", remedy="Give --text, --ids, --box, --point or --everything.", step=Step.RUN)
        if everything:
            _refuse({**clicked, **words}, "it says what to look for, and --everything looks for everything", "Leave one out.")
            _refuse({"--threshold": (threshold or ())[1:]}, "--everything has one threshold", "Give it once.")
        else:
            _refuse(of_everything, "it belongs to --everything", "Leave it out.")
        several = len(pictures) > 1 or any(Path(name).is_dir() for name in pictures)
        _check_outputs([] if several else [output], [None if str(json_file) == STDIN else json_file, coco])
        found = list(_pictures(pictures))
        from sam3x.runtime import Segmenter
        from sam3x.runtime.prompts import fraction

        with Segmenter(
            folder, check=check, threads=threads, providers=parsed_providers(provider) or None, max_pixels=max_pixels
        ) as segmenter:
            ask: Callable[[Any], Masks]
            if everything:
                given: dict[str, Any] = {
                    "points_per_side": points_per_side,
                    "stability_score_thresh": stability_score_thresh,
                    "pred_iou_thresh": threshold[0] if threshold else None,
                    "max_detections": max_detections,
                }
                chosen = {name: value for name, value in given.items() if value is not None}
                for name, option in (
                    ("pred_iou_thresh", "--threshold"),
                    ("stability_score_thresh", "--stability-score-thresh"),
                ):
                    fraction(chosen.get(name, 0), option)  # what is wrong with them is told once
                ask = partial(segmenter.everything, **chosen)
            elif points or away or (boxes and not texts and not others and segmenter.clickable):
                fact = "it belongs to a search by words or examples, and this is a click on an object"
                advice = "Leave it out; everything like a box is found with --text visual --box."
                _refuse({**words, "--threshold": threshold}, fact, advice)
                ask = _clicks(segmenter, points, away, boxes, max_detections)
            else:
                asked: dict[str, Any] = {
                    "text": texts or None,
                    "boxes": [*boxes, *others] or None,
                    "labels": [True] * len(boxes) + [False] * len(others) or None,
                    "threshold": threshold[0] if threshold and len(threshold) == 1 else threshold or None,
                }
                segmenter.prompts(**asked)  # what is wrong with them is told once
                ask = partial(segmenter.segment, **asked, max_detections=max_detections)
            with _Written(output=output, masks=masks, json_file=json_file, coco=coco, several=several, quiet=quiet) as written:
                failed = sum(not _answered(ask, picture, written) for picture in found)
        if failed:
            raise typer.Exit(SpecError.exit_code)


def _clicks(
    segmenter: Segmenter, points: list[Any], away: list[Any], boxes: list[Any], most: int | None
) -> Callable[[Any], Masks]:
    """Return what maps an encoded picture to masks: the best one of each object, or the best ``most`` of all.

    All points and a box mean one object; without points each box is an object. As upstream advises, one point has three
    masks to choose from, more of a prompt has one.
    """
    own = [*points, *away]
    if own and len(boxes) > 1:
        raise SpecError("points and several boxes", remedy="Give one --box with --point: they mean one object.", step=Step.RUN)
    asked: dict[str, Any] = {
        "points": own or None,
        "labels": [1] * len(points) + [0] * len(away) if own else None,
        "box": (boxes[0] if own else boxes) if boxes else None,
        "multimask": len(own) == 1 and not boxes,
    }
    segmenter.clicks(*(asked[name] for name in ("points", "labels", "box")))  # what is wrong with them is told once
    return lambda picture: segmenter.click(picture, **asked).top(most or 1)


def _refuse(given: dict[str, Any], fact: str, remedy: str) -> None:
    """Refuse the options that were given."""
    for option, value in given.items():
        if value not in (None, [], ()):
            raise SpecError(fact, subject=option, remedy=remedy, step=Step.RUN)


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """``name`` as it is told; ``stem`` of the files that are written for it, no two the same; ``source`` for ``Segmenter``."""

    name: str
    stem: str
    source: Any


def _pictures(given: list[str]) -> Iterator[_Picture]:
    """Every file that is named, and those of a folder that Pillow reads, by name.

    Raises:
        SpecError: a folder without a picture, or standard input twice.
    """
    from sam3x.runtime.pictures import picture_files

    if given.count(STDIN) > 1:
        raise SpecError("standard input is given twice", step=Step.RUN)
    taken: set[str] = set()
    for argument in given:
        if argument == STDIN:
            yield _Picture(name="stdin", stem=_unused("stdin", taken), source=typer.get_binary_stream("stdin"))
            continue
        path = Path(argument)
        files = picture_files(path) if path.is_dir() else [path]
        for file in files:
            name = file.name if len(given) == 1 and file != path else str(file)
            yield _Picture(name=name, stem=_unused(file.stem, taken), source=file)


def _unused(stem: str, taken: set[str]) -> str:
    """``stem``, or with a number where two pictures of different folders or endings share it."""
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return name


def _answered(ask: Callable[[Any], Masks], picture: _Picture, written: _Written) -> bool:
    """Whether a picture could be read; of one among several, what is wrong goes to stderr and the others follow."""
    try:
        result = ask(picture.source)
    except SpecError as error:
        if not written.several:
            raise
        message = str(error)  # of a picture that cannot be read the name is in it
        where = "" if picture.name in message else f"{picture.name}: "
        typer.secho(f"sam3x: {where}{message}", err=True, fg="red")
        return False
    written.add(picture, result)
    return True


class _Written:
    """What is made of each result, as soon as it is there; COCO's one document at the end."""

    def __init__(
        self, *, output: Path | None, masks: Path | None, json_file: Path | None, coco: Path | None, several: bool, quiet: bool
    ) -> None:
        from sam3x.runtime.coco import CocoFile
        from sam3x.runtime.output import written

        self.output, self.masks, self.several, self.json_file, self.coco_path = output, masks, several, json_file, coco
        self.coco = CocoFile() if coco is not None else None
        self.printed = json_file is not None and str(json_file) == STDIN
        if json_file is not None and not self.printed:
            written(json_file, lambda path: path.write_text("", encoding="utf-8"))
        if output is not None and several:
            written(output, lambda path: path.mkdir(parents=True, exist_ok=True))
        self.shown = not quiet and not self.printed

    def __enter__(self) -> _Written:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.coco is not None and self.coco_path is not None:
            self.coco.write(self.coco_path)

    def add(self, picture: _Picture, result: Masks) -> None:
        from sam3x.runtime.output import written

        if self.output is not None:
            result.draw(self.output / f"{picture.stem}.png" if self.several else self.output)
        if self.masks is not None:
            result.write_masks(self.masks, picture.stem)
        if self.json_file is not None:
            line = json.dumps({"picture": picture.name, **result.to_dict()})
            if self.printed:
                typer.echo(line)
            else:
                written(self.json_file, lambda path: _append(path, line))
        if self.coco is not None:
            self.coco.add(picture.name, result)
        if self.shown:
            from sam3x.cli import pipeline_views
            from sam3x.cli import views as cli_views

            cli_views.show([pipeline_views.detections_view(result, picture.name if self.several else None)])


def _append(path: Path, line: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _check_outputs(pictures: list[Path | None], files: list[Path | None]) -> None:
    for path in (*pictures, *files):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise SpecError(f"{path} cannot be written", remedy="Name a file in a folder that exists.", step=Step.RUN)


def _parsed(form: str, option: str, given: list[str] | None) -> list[list[Any]]:
    """``10,20,200,180`` → a list of numbers. A minus is a number's sign.

    Raises:
        SpecError: something else.
    """
    words, kind, length = _FORMS[form]
    found = []
    for text in given or ():
        try:
            numbers = [kind(part) for part in text.split(",")]
        except ValueError:
            numbers = []
        if not numbers or (length is not None and len(numbers) != length):
            raise SpecError(f"expected {words}, got {text!r}", subject=option, step=Step.RUN)
        found.append(numbers)
    return found
