"""``sam3x run``: pictures and prompts or clicks in, masks out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sam3x.cli.console import reporting
from sam3x.cli.options import parsed_providers
from sam3x.errors import SpecError, Step

if TYPE_CHECKING:
    from sam3x.runtime import Segmenter
    from sam3x.runtime.many import Answer, Drawings, Picture, Question

STDIN = "-"
_NAMED = 10  # pictures without an answer that are named at the end; each was told when it was its turn
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
    processes: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Processes that share the pictures, each with the whole pipeline in memory."),
    ] = 1,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="With --json FILE: of several pictures, answer those alone that an earlier run of this command did not.",
        ),
    ] = True,
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
        from sam3x.runtime.many import Drawings, Question, answers, resume_key
        from sam3x.runtime.prompts import fraction

        with Segmenter(
            folder, check=check, threads=threads, providers=parsed_providers(provider) or None, max_pixels=max_pixels
        ) as segmenter:
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
                question = Question(how="everything", arguments=chosen)
            elif points or away or (boxes and not texts and not others and segmenter.clickable):
                fact = "it belongs to a search by words or examples, and this is a click on an object"
                advice = "Leave it out; everything like a box is found with --text visual --box."
                _refuse({**words, "--threshold": threshold}, fact, advice)
                question = _clicks(segmenter, points, away, boxes, max_detections)
            else:
                asked: dict[str, Any] = {
                    "text": texts or None,
                    "boxes": [*boxes, *others] or None,
                    "labels": [True] * len(boxes) + [False] * len(others) or None,
                    "threshold": threshold[0] if threshold and len(threshold) == 1 else threshold or None,
                }
                segmenter.prompts(**asked)  # what is wrong with them is told once
                question = Question(how="segment", arguments={**asked, "max_detections": max_detections})
            drawings = Drawings(drawn=output, masks=masks, several=several)
            keys = {
                picture.name: resume_key(segmenter.manifest, question, drawings, picture) if several and resume else None
                for picture in found
            }
            with _Told(drawings, keys, json_file=json_file, coco=coco, quiet=quiet) as told:
                done = {picture.name for picture in found if told.already(picture)}
                left = [picture for picture in found if picture.name not in done]
                shared = max(1, min(processes, len(left)))
                with contextlib.closing(answers(segmenter, question, left, drawings, processes=shared)) as following:
                    for picture in found:
                        told.add(picture, None if picture.name in done else next(following)[1])
        told.summary()
        if told.failed:
            raise typer.Exit(SpecError.exit_code)


def _clicks(segmenter: Segmenter, points: list[Any], away: list[Any], boxes: list[Any], most: int | None) -> Question:
    """Return the question: the best mask of each object, or the best ``most`` of all.

    All points and a box mean one object; without points each box is an object. As upstream advises, one point has three
    masks to choose from, more of a prompt has one.
    """
    from sam3x.runtime.many import Question

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
    return Question(how="click", arguments=asked, best=most or 1)


def _refuse(given: dict[str, Any], fact: str, remedy: str) -> None:
    """Refuse the options that were given."""
    for option, value in given.items():
        if value not in (None, [], ()):
            raise SpecError(fact, subject=option, remedy=remedy, step=Step.RUN)


def _pictures(given: list[str]) -> Iterator[Picture]:
    """Every file that is named, once, and those of a folder that Pillow reads, by name.

    Raises:
        SpecError: a folder without a picture, or standard input twice.
    """
    from sam3x.runtime.many import Picture
    from sam3x.runtime.pictures import picture_files

    if given.count(STDIN) > 1:
        raise SpecError("standard input is given twice", step=Step.RUN)
    names: set[str] = set()
    stems: set[str] = set()
    for argument in given:
        if argument == STDIN:
            yield Picture(name="stdin", stem=_unused("stdin", stems), source=typer.get_binary_stream("stdin").read())
            continue
        path = Path(argument)
        for file in picture_files(path) if path.is_dir() else [path]:
            name = file.name if len(given) == 1 and file != path else str(file)
            if name not in names:
                names.add(name)
                yield Picture(name=name, stem=_unused(file.stem, stems), source=file)


def _unused(stem: str, taken: set[str]) -> str:
    """``stem``, or with a number where two pictures of different folders or endings share it."""
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    taken.add(name)
    return name


class _Told:
    """What is told of each answer, in the order of the pictures: a table, a line of JSON, a part of COCO's document."""

    def __init__(
        self, drawings: Drawings, keys: Mapping[str, str | None], *, json_file: Path | None, coco: Path | None, quiet: bool
    ) -> None:
        from sam3x.runtime.coco import CocoFile
        from sam3x.runtime.lines import AnswerLines
        from sam3x.runtime.output import made_folder

        self.drawings, self.coco_path, self.count = drawings, coco, len(keys)
        self.coco = CocoFile() if coco is not None else None
        if drawings.drawn is not None and drawings.several:
            made_folder(drawings.drawn)
        self.printed = json_file is not None and str(json_file) == STDIN
        self.lines = AnswerLines(json_file, keys) if json_file is not None and not self.printed else None
        self.shown = not quiet and not self.printed
        self.failed: list[str] = []
        self.earlier = 0

    def __enter__(self) -> _Told:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: Any) -> None:
        if self.lines is not None:
            self.lines.__exit__(kind, value, trace)
        if kind is None and self.coco is not None and self.coco_path is not None:
            self.coco.write(self.coco_path)

    def already(self, picture: Picture) -> bool:
        """Whether an earlier run answered it, and its files are still there."""
        found = None if self.lines is None else self.lines.found(picture.name)
        return found is not None and self.drawings.stand(picture, len(found["detections"]))

    def add(self, picture: Picture, answer: Answer | None) -> None:
        """Tell an answer; None: what an earlier run found."""
        if isinstance(answer, SpecError):
            if not self.drawings.several:
                raise answer
            message = str(answer)  # of a picture that cannot be read the name is in it
            where = "" if picture.name in message else f"{picture.name}: "
            typer.secho(f"sam3x: {where}{message}", err=True, fg="red")
            self.failed.append(picture.name)
            return
        if answer is None:
            self.earlier += 1
        elif self.printed:
            typer.echo(json.dumps({"picture": picture.name, **answer}))
        elif self.lines is not None:
            self.lines.add(picture.name, answer)
        if self.coco is not None:
            found = answer if answer is not None or self.lines is None else self.lines.found(picture.name)
            self.coco.add_dict(picture.name, found or {})
        if self.shown and answer is not None:
            from sam3x.cli import pipeline_views
            from sam3x.cli import views as cli_views

            cli_views.show([pipeline_views.detections_view(answer, picture.name if self.drawings.several else None)])

    def summary(self) -> None:
        """What an earlier run had done; which pictures have no answer."""
        if self.earlier and self.shown:
            typer.echo(f"answered by an earlier run: {self.earlier} of {self.count} (--no-resume: answer them again)")
        if self.failed:
            names = ", ".join(self.failed[:_NAMED]) + (", …" if len(self.failed) > _NAMED else "")
            typer.secho(f"sam3x: {len(self.failed)} of {self.count} pictures have no answer: {names}", err=True, fg="red")


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
