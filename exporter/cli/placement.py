"""``sam3x inspect --provider``: which nodes of each file a provider leaves to the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sam3x.cli.options import parsed_providers

if TYPE_CHECKING:
    from sam3x.artifact.manifest import Manifest


def show_placement(manifest: Manifest, folder: Path, provider: str, *, as_json: bool) -> None:
    """A row for each file: its nodes, and those that fall back, by operator; or the same as JSON.

    Raises:
        SpecError: no such provider, or a target without. TargetUnavailableError: one that is not installed.
    """
    from sam3x.targets.registry import get_target

    target, wanted = get_target(manifest.target), parsed_providers([provider])
    found = {item.name: target.fallbacks(folder / item.file, wanted) for item in manifest.components}
    if as_json:
        document = {name: {"nodes": nodes, "on_cpu": dict(left)} for name, (nodes, left) in found.items()}
        typer.echo(json.dumps({"folder": str(folder), "provider": provider, "components": document}, indent=2))
        return
    from sam3x.cli import views as cli_views

    table = cli_views.plain_table(f"nodes in {provider}", "component", "nodes", "left to the CPU", "which")
    for name, (nodes, left) in found.items():
        which = ", ".join(f"{operator} {count}" for operator, count in sorted(left.items(), key=lambda item: -item[1]))
        table.add_row(name, str(nodes), str(sum(left.values())), which)
    cli_views.show([table])
