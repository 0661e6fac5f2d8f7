"""The table of options in ``docs/options.md``, made from the command's own help: ``python docs/options_table.py`` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from typer.main import get_command

from sam3x.cli.app import app

PAGE = Path(__file__).with_name("options.md")
BEGIN, END = "<!-- made by docs/options_table.py -->\n", "<!-- end of what it made -->\n"


def table() -> str:
    """A row for each option of ``sam3x export``."""
    command: Any = get_command(app).commands["export"]  # type: ignore[attr-defined]
    context = command.make_context("export", [], resilient_parsing=True)
    rows = ["| option | values | meaning |", "|---|---|---|"]
    for param in command.get_params(context):
        left, meaning = param.get_help_record(context)
        names = [name.strip(",") for name in left.split() if name.startswith("-")]
        given = left.split()[len(names) :]
        values = [f"`{value}`" for value in " ".join(given).strip("<>").split("|") if value]
        joined = (", " if " ".join(given).startswith("<") else " or ").join(values)
        rows.append(f"| {', '.join(f'`{name}`' for name in names)} | {joined} | {' '.join(meaning.split())} |")
    return "\n".join(rows).replace("|  |", "| |") + "\n"


def page() -> str:
    """``options.md`` with the table as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
