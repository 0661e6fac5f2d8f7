"""``sam3x doctor``: which operations a lower precision ruins, and the fewest to keep in float32."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from sam3x.errors import SpecError


class Low(str, Enum):
    """Values of ``sam3x doctor --precision``; ``doctor_report.BOUNDS`` has the error that each may make."""

    FP16 = "fp16"
    BF16 = "bf16"


Bound = Annotated[
    float | None, typer.Option(help="Largest absolute error against eager float32; default 0.02 for fp16, 0.15 for bf16.")
]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the report as one page.")]
Tokens = Annotated[int, typer.Option(min=4, max=9216, help="Image tokens of the runs, where the export left them free.")]


def run_doctor(
    folder: Path, source: Any, low: Low, bound: float | None, tokens: int, html: Path | None, tell: Callable[[str], None]
) -> Any:
    """Examine, and write the page; returns the report."""
    from sam3x.doctor import doctor
    from sam3x.doctor_views import doctor_page

    report = doctor(folder, source, precision=low.value, bound=bound, tokens=tokens, tell=tell)
    if html is not None:
        html.write_text(doctor_page(report), encoding="utf-8")
    return report


def check_page(html: Path | None) -> None:
    """Refuse a page that cannot be written before the work is done."""
    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        raise SpecError(f"doctor: --html: {html} cannot be written. Name a file in a folder that exists.")
