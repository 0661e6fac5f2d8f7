"""Options of ``sam3x export`` are the fields of ``ExportSpec`` and of the targets, with their choices, defaults and help."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sam3x.cli.field_options import shown
from sam3x.pipeline import export as exporter
from sam3x.pipeline.request import Request
from sam3x.spec import ExportSpec
from sam3x.targets.registry import built_in_names, get_target
from support.command_line import run

FIELDS = {name: info for model in (ExportSpec, *(get_target(name).options_type for name in built_in_names()))
          for name, info in model.model_fields.items()}  # fmt: skip


def test_every_field_is_an_option_with_its_help() -> None:
    text = " ".join(run("export", "--help").stdout.split()).replace("- ", "-")
    for name, info in FIELDS.items():
        option = (info.json_schema_extra or {}).get("option", name)
        assert f"--{option.replace('_', '-')}" in text, name
        assert info.description, name
        assert " ".join(info.description.split()).replace("- ", "-") in text, name


@pytest.mark.parametrize("name", [name for name, info in ExportSpec.model_fields.items() if info.default not in (None, ())])
def test_a_default_as_it_is_shown_is_the_default(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What --help calls the default, given as an option, is the field's own value."""
    asked: list[Request] = []
    monkeypatch.setattr(exporter, "export_model", lambda request, *_, **__: asked.append(request) or SimpleNamespace())
    default = ExportSpec.model_fields[name].default
    interface = ["--interface", "feature-maps"] if name == "feature_sizes" else []
    result = run("export", "-q", *interface, f"--{name.replace('_', '-')}", shown(default))
    assert result.exit_code == 0, result.stderr
    assert getattr(asked[0].spec, name) == default
