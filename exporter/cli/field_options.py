"""Options of ``sam3x export`` made from pydantic fields: those of ``ExportSpec``, and of each back end's ``TargetOptions``."""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand
from typer.main import get_command

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

_KEY = "sam3x.field_options"


def given_options(context: typer.Context) -> dict[str, Any]:
    """What the user gave of them: field name → value, choices as the fields have them. Not yet validated."""
    return dict(context.meta.get(_KEY, {}))


class FieldOptionsCommand(TyperCommand):
    """A command that also takes the fields of ``ExportSpec``, of every built-in target, and of the one that ``--target`` names.

    They are made when this command is parsed or its help is shown, so that other commands import no target. A field's type
    gives the choices, its description the help, ``json_schema_extra={"metavar": …, "option": …}`` the placeholder and another
    name. Fields of one name share
    an option.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta["sam3x.target"] = _named(args)
        return super().parse_args(ctx, args)

    def get_params(self, ctx: Any) -> list[Any]:
        *params, help_option = super().get_params(ctx)
        made = ctx.meta.get("sam3x.field_params")
        if made is None:
            made = ctx.meta["sam3x.field_params"] = _params(ctx.meta.get("sam3x.target"))
        return [*params, *made, help_option]


def _named(args: Sequence[str]) -> str | None:
    for index, item in enumerate(args):
        if item in ("-t", "--target"):
            return args[index + 1] if index + 1 < len(args) else None
        if item.startswith(("--target=", "-t")):
            return item.removeprefix("--target=").removeprefix("-t")
    return None


@dataclass(frozen=True, slots=True)
class _Field:
    """A field as one of its owners has it: ``owner`` is a target's name, empty for ``ExportSpec``."""

    owner: str
    info: FieldInfo
    defaults: Mapping[str, Any]
    """Owner → default: that of ``ExportSpec`` and of the targets that have another."""


def _params(named: str | None) -> list[Any]:
    """Options in the order of the fields, as Typer makes them."""
    from sam3x.spec import ExportSpec
    from sam3x.targets.registry import built_in_names, get_target, target_names

    names = [*built_in_names()]
    if named in target_names() and named not in names:
        names.append(str(named))
    targets = {name: get_target(name) for name in names}
    fields: dict[str, list[_Field]] = {}
    for field, info in ExportSpec.model_fields.items():
        others = {name: target.default_options[field] for name, target in targets.items() if field in target.default_options}
        fields[field] = [_Field("", info, {"": info.default, **others})]
    for name, target in targets.items():
        for field, info in target.options_type.model_fields.items():
            fields.setdefault(field, []).append(_Field(name, info, {name: info.default}))
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


def _annotation(field: str, owners: Sequence[_Field]) -> Any:
    extra = owners[0].info.json_schema_extra
    more = extra if isinstance(extra, dict) else {}
    option = str(more.get("option", field.replace("_", "-")))
    choices: dict[str, Any] = {}
    for item in owners:
        choices |= _choices(item.info.annotation)
    kind: Any = _kind(owners[0].info.annotation)
    if choices:
        kind = enum.Enum(field, [(choice.upper(), choice) for choice in choices], type=str)  # type: ignore[no-redef, misc]
    elif kind is bool and owners[0].info.default:
        option = f"no-{option}"  # a flag says the opposite of the default
        choices = {"True": False}
    metavar = str(more["metavar"]) if "metavar" in more else None
    return Annotated[
        kind | None,
        typer.Option(
            f"--{option}",
            help=_help(owners, flag=kind is bool),
            metavar=metavar,
            expose_value=False,
            callback=_collector(choices),
            show_default=False,
        ),
    ]


def _help(owners: Sequence[_Field], *, flag: bool) -> str:
    """What the field means to each owner, then the defaults."""
    texts: dict[str, list[str]] = {}
    for item in owners:
        texts.setdefault(" ".join((item.info.description or "").split()), []).append(item.owner)
    said = [f"{', '.join(names)}: {text}" if all(names) else text for text, names in texts.items()]
    defaults = {owner: shown(value) for item in owners for owner, value in item.defaults.items() if value is not None}
    if not flag and len(set(defaults.values())) == 1:
        said.append(f"[default: {next(iter(defaults.values()))}]")
    elif not flag and any(defaults.values()):
        said.append(f"[default: {'; '.join(f'{owner} {text}'.strip() for owner, text in defaults.items())}]")
    return " ".join(part for part in said if part).replace(" [default: ]", "")


def shown(value: Any) -> str:
    """A field's value as the command line has it: ``(1, 8)`` is ``1:8``, ``((72, 72),)`` is ``72x72``, True is ``on``."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        if value and all(isinstance(item, tuple) for item in value):
            return ",".join("x".join(map(str, item)) for item in value)
        return (":" if all(isinstance(item, int) for item in value) else ",").join(map(str, value))
    return str(value).replace("_", "-")


def _choices(annotation: Any) -> dict[str, Any]:
    """Text on the command line → value, for a ``Literal``, one of several, or a ``Literal`` beside ``bool``; else empty."""
    if get_origin(annotation) is Literal:
        return {shown(choice): choice for choice in get_args(annotation)}
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        found = [{"on": True, "off": False} if part is bool and len(parts) > 1 else _choices(part) for part in parts]
        return {text: value for part in found for text, value in part.items()} if all(found) else {}
    return {}


def _kind(annotation: Any) -> type:
    """bool, int or float; anything else is text that the field's validator reads."""
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return _kind(parts[0]) if len(parts) == 1 else str
    return annotation if annotation in (bool, int, float) else str


def _collector(choices: Mapping[str, Any]) -> Callable[..., Any]:
    def collect(context: typer.Context, param: typer.CallbackParam, value: Any) -> Any:
        """Keep what was given; an option left out stays the field's default."""
        if value is not None:
            text = value.value if isinstance(value, enum.Enum) else value
            context.meta.setdefault(_KEY, {})[param.name] = choices.get(str(text), text)
        return value

    return collect
