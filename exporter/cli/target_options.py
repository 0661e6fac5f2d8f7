"""Options of ``sam3x export`` that belong to one back end, made from the fields of its ``TargetOptions``."""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand
from typer.main import get_command

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_KEY = "sam3x.target_options"


def target_options_of(context: typer.Context) -> dict[str, Any]:
    """What the user gave of them: field name → value, ``Literal`` choices as plain strings. Not yet validated."""
    return dict(context.meta.get(_KEY, {}))


class TargetOptionsCommand(TyperCommand):
    """A command that also takes every field of every built-in target's options, and of the one that ``--target`` names.

    They are made when this command is parsed or its help is shown, so that other commands import no target. A field's
    description is its help; ``json_schema_extra={"metavar": …}`` its placeholder. Fields of one name share an option.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["sam3x.target"] = _named(args)
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        *params, help_option = super().get_params(ctx)
        made = ctx.meta.get("sam3x.target_params")
        if made is None:
            made = ctx.meta["sam3x.target_params"] = _params(ctx.meta.get("sam3x.target"))
        return [*params, *made, help_option]


def _named(args: Sequence[str]) -> str | None:
    for index, item in enumerate(args):
        if item in ("-t", "--target"):
            return args[index + 1] if index + 1 < len(args) else None
        if item.startswith(("--target=", "-t")):
            return item.removeprefix("--target=").removeprefix("-t")
    return None


def _params(named: str | None) -> list[Any]:
    """Options in the order of the fields, as Typer makes them."""
    from sam3x.targets.registry import built_in_names, get_target, target_names

    names = [*built_in_names()]
    if named in target_names() and named not in names:
        names.append(str(named))
    fields: dict[str, list[tuple[str, FieldInfo]]] = {}
    for name in names:
        for field, info in get_target(name).options_type.model_fields.items():
            fields.setdefault(field, []).append((name, info))
    parameters = [
        inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(field, owners))
        for field, owners in fields.items()
    ]

    def command(**_: Any) -> None:
        """Never called: Typer only reads its signature."""

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {item.name: item.annotation for item in parameters}
    app = typer.Typer(add_completion=False)
    app.command()(command)
    return [param for param in get_command(app).params if param.name in fields]  # type: ignore[attr-defined]


def _annotation(field: str, owners: Sequence[tuple[str, FieldInfo]]) -> Any:
    kinds = [_kind(info.annotation) for _, info in owners]
    texts: dict[str, list[str]] = {}
    for target, info in owners:
        texts.setdefault(info.description or "", []).append(target)
    text = " ".join(f"{', '.join(targets)}: {what}" for what, targets in texts.items())
    extra = owners[0][1].json_schema_extra
    metavar = str(extra["metavar"]) if isinstance(extra, dict) and "metavar" in extra else None
    name = f"--{field.replace('_', '-')}"
    kind: Any = kinds[0]
    if all(isinstance(item, tuple) for item in kinds):
        choices = list(dict.fromkeys(choice for item in kinds for choice in item))  # type: ignore[union-attr]
        kind = enum.Enum(field, [(choice.upper(), choice) for choice in choices], type=str)  # type: ignore[no-redef, misc]
    elif kind is bool:
        # a flag says the opposite of the default
        name = f"--no-{field.replace('_', '-')}" if owners[0][1].default else name
    option = typer.Option(name, help=text, metavar=metavar, expose_value=False, callback=_collect, show_default=False)
    return Annotated[kind | None, option]


def _kind(annotation: Any) -> type | tuple[str, ...]:
    """The choices of a ``Literal``, else bool, int, float or str; anything else is text that the field's validator reads."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return _kind(parts[0]) if len(parts) == 1 else str
    if get_origin(annotation) is Literal:
        return tuple(str(choice) for choice in get_args(annotation))
    return annotation if annotation in (bool, int, float) else str


def _collect(context: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
    """Keep what was given; an option left out stays the target's default."""
    if value is not None:
        value = value.value if isinstance(value, enum.Enum) else value
        if value is True and param.opts[0].startswith("--no-"):
            value = False
        context.meta.setdefault(_KEY, {})[param.name] = value
    return value
