"""A request for an export, resolved and checked once, before anything heavy is imported; imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sam3x.artifact.manifest import SEGMENTER, Manifest
from sam3x.errors import SpecError, TargetUnavailableError, did_you_mean
from sam3x.sources.names import COMPONENTS, DETECTOR, FUSION_ENCODER, MAX_PROMPTS
from sam3x.spec import ExportSpec, checked, make_spec
from sam3x.targets.base import Numerics, Target, TargetOptions
from sam3x.targets.registry import get_target

PARTS = ("prompt_encoder", "fusion_encoder", "decoder", "mask_head")
"""Joined as ``SEGMENTER`` of ``sam3x.runtime.manifest``. A picture is encoded once, a text encoder often served elsewhere."""

PROMPTS = {"dac": False, "pre_norm": "module", "batch": (1, MAX_PROMPTS)}
"""Of a whole model: its fusion encoder runs as in the source, and batch counts prompts."""

ENCODER_ALONE = ("interface", "inputs", "dac_dim", "tokens", "prompt_length", "feature_sizes", "mask_dtype")
"""Fields of ``ExportSpec`` that a whole model settles itself."""

WHOLE_ALONE = ("image_size",)
"""Fields of ``ExportSpec`` that a fusion encoder has no use for."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be exported, to what, and how; made by ``resolve`` or ``resolve_pipeline``.

    Attributes:
        target, options: the back end and its own options. spec: of the fusion encoder, of verification and seeds.
        components: those to export. fuse: whether ``PARTS`` become one file.
        disable_pass: passes to leave out. dump_graphs: folder for the graph after each pass.
    """

    target: Target
    options: TargetOptions
    spec: ExportSpec
    components: tuple[str, ...] = (FUSION_ENCODER,)
    fuse: bool = False
    disable_pass: tuple[str, ...] = ()
    dump_graphs: Path | None = None

    @functools.cached_property
    def numerics(self) -> Numerics:
        """What the files store and compute in. May ask a runtime."""
        return self.target.numerics(self.options)

    @functools.cached_property
    def unverified(self) -> str | None:
        """Why the files are not run here; None where they are. May ask a runtime."""
        if self.spec.verify == "off":
            return "verification was switched off (--verify off)"
        return self.target.unverifiable(self.options)

    @classmethod
    def of(cls, manifest: Manifest, *, full: bool = False) -> Request:
        """That of an export, to verify it again.

        Args:
            full: at more and larger sizes.
        """
        target, spec = get_target(manifest.target), make_spec(**manifest.spec)
        verify = "full" if full else "final" if spec.verify == "off" else spec.verify
        names = [item.name for item in manifest.components]
        return cls(
            target=target,
            options=checked(target.options_type, manifest.target_options),
            spec=spec.model_copy(update={"verify": verify}),
            components=tuple(name for name in COMPONENTS if name in names or (SEGMENTER in names and name in PARTS)),
            fuse=SEGMENTER in names,
        )

    @property
    def calibrated(self) -> bool:
        """Whether scales of activations are taken from pictures."""
        return bool(getattr(self.options, "calibrate", ""))

    def file(self, component: str) -> str:
        """Name of a component's main file."""
        return self.target.file_name(component, self.options)


def resolve(
    target: str | Target,
    options: Mapping[str, Any],
    *,
    disable_pass: Sequence[str] = (),
    dump_graphs: str | Path | None = None,
) -> Request:
    """The request for a fusion encoder out of ``sam3x.export``'s keywords, the target's defaults filled in.

    Args:
        options: fields of ``ExportSpec``, and of the target's own options.

    Raises:
        SpecError: a value is wrong, or a name is known to neither, with the nearest that is.
        UnknownTargetError: no target of that name.
    """
    whole = [f"--{name.replace('_', '-')}" for name in WHOLE_ALONE if options.get(name) is not None]
    if whole:
        fact = f"{', '.join(whole)} belongs to a whole model, whose vision encoder sees the picture"
        raise SpecError(fact, remedy="Add --pipeline, or leave it out; a fusion encoder's sizes are --tokens.")
    return _resolved(target, options, disable_pass=disable_pass, dump_graphs=dump_graphs)


def _resolved(
    target: str | Target,
    options: Mapping[str, Any],
    *,
    disable_pass: Sequence[str] = (),
    dump_graphs: str | Path | None = None,
    **others: Any,
) -> Request:
    """Fill in the target's defaults and check every field; ``others`` are further fields of ``Request``."""
    back_end = get_target(target) if isinstance(target, str) else target
    own = back_end.options_type.model_fields
    unknown = [name for name in options if name not in own and name not in ExportSpec.model_fields]
    if unknown:
        near = did_you_mean(unknown[0], [*ExportSpec.model_fields, *own])
        known = f"Options of {back_end.name} alone: {', '.join(sorted(own)) or 'none'}. See sam3x export --help."
        raise SpecError(
            f"no option of an export to {back_end.name}", subject=", ".join(unknown), remedy=f"{near} {known}".lstrip()
        )
    defaults = dict(back_end.default_options)
    if options.get("interface") == "feature_maps":
        defaults.pop("tokens", None)  # the maps' sizes say how many
    given = {**defaults, **{name: value for name, value in options.items() if name not in own}}
    own_options = checked(back_end.options_type, {name: value for name, value in options.items() if name in own})
    if given.get("branches") is None:
        given["branches"] = back_end.branches_of(own_options)
    spec = make_spec(**given)
    back_end.check(spec.ranges, own_options)
    _check_places(own_options, others.get("components", (FUSION_ENCODER,)))
    if getattr(own_options, "calibrate", ""):
        _check_pictures(own_options.calibrate, whole="components" in others)  # type: ignore[attr-defined]
    passes = {"disable_pass": tuple(disable_pass), "dump_graphs": None if dump_graphs is None else Path(dump_graphs)}
    return Request(target=back_end, options=own_options, spec=spec, **passes, **others)  # type: ignore[arg-type]


def _check_places(options: TargetOptions, components: Sequence[str]) -> None:
    """Refuse operations of a component that is not exported."""
    for word in getattr(options, "fp32_names", ()):
        place, colon, _ = word.partition(":")
        if colon and place not in components:
            near = did_you_mean(place, components)
            fact = f"'{word}' is of no component of this export ({', '.join(components)})"
            raise SpecError(fact, subject="--fp32-ops", remedy=near)


def resolve_pipeline(
    target: str | Target,
    options: Mapping[str, Any],
    *,
    components: Sequence[str] | None = None,
    fuse: bool = False,
    **passes: Any,
) -> Request:
    """The request for a whole model, or for some components of it.

    Args:
        options: as for ``resolve``. passes: ``disable_pass`` and ``dump_graphs``.
        components: None: all that the source has.

    Raises:
        SpecError: as ``resolve``; an option without a meaning for a whole model, what cannot be joined, no such component.
    """
    back_end = get_target(target) if isinstance(target, str) else target
    chosen = COMPONENTS if components is None else tuple(components)
    unknown = [name for name in chosen if name not in COMPONENTS]
    if unknown or not chosen:
        raise SpecError(f"no component {', '.join(unknown) or 'named'}; there are {', '.join(COMPONENTS)}")
    if fuse and back_end.name != "onnx":
        fact = f"--fuse joins ONNX files, the target is {back_end.name}"
        raise SpecError(fact, remedy="Leave --fuse out, or take --target onnx.")
    if fuse and not set(chosen) >= set(DETECTOR):
        raise SpecError("--fuse joins the components of a whole model", remedy="Leave --components out, or --fuse.")
    if fuse and options.get("layout") == "triton":
        fact = "the model that --layout triton writes asks the components one by one, and --fuse joins them"
        raise SpecError(fact, remedy="Leave --fuse out, or --layout.")
    alone = [f"--{name.replace('_', '-')}" for name in ENCODER_ALONE if name in options]
    if alone:
        fact = f"{', '.join(alone)} belong to a fusion encoder alone"
        raise SpecError(fact, remedy="Leave them out with --pipeline.")
    if options.get("dac") is True:
        raise SpecError(
            "dac halves the batch, which counts prompts in a pipeline: self-attention would skip the second half of them",
            remedy="Take --dac runtime to keep the branch in the file, or export the fusion encoder without --pipeline.",
        )
    given = {**PROMPTS, **back_end.default_options, **options}
    return _resolved(back_end, given, components=chosen, fuse=fuse, **passes)


def _check_pictures(folder: str, *, whole: bool) -> None:
    """Refuse pictures to calibrate with that nothing looks at, or that are not there."""
    if not whole:
        fact = "a fusion encoder by itself looks at no picture"
        raise SpecError(fact, subject="--calibrate", remedy="Leave --calibrate out, or take --pipeline.")
    from sam3x.runtime.pictures import picture_files

    picture_files(Path(folder))


def check_available(target: Target) -> None:
    """Refuse a back end that is not installed.

    Raises:
        TargetUnavailableError: with the command that installs it.
    """
    status = target.availability()
    if not status.available:
        fact = f"target '{target.name}' cannot export here: {status.detail}"
        raise TargetUnavailableError(fact, remedy=f"Install it: {status.install}", step=SpecError.step)
