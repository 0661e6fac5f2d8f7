"""The export of one component: capture, passes, lowering, verification."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import Tensor

from sam3x.artifact.manifest import PassRecordModel, VerificationRecord
from sam3x.capture.component import capture_component
from sam3x.capture.program import Sample
from sam3x.errors import Step, VerificationError
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.precision.component import reduced, rounded
from sam3x.runtime.manifest import ComponentSpec
from sam3x.sources.contract import Component
from sam3x.spec import ExportSpec
from sam3x.targets.base import Target, TargetOptions, arithmetic_precision, file_name, weight_precision
from sam3x.verify.compare import require
from sam3x.verify.component import Case, described, verify_component

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ComponentJob:
    """What the export of every component shares: any target, by ``Target``'s contract alone."""

    target: Target
    options: TargetOptions
    spec: ExportSpec
    folder: Path
    tell: Progress
    notes: list[str] = field(default_factory=list)

    @property
    def precision(self) -> str | None:
        """That of the weights; None: float32, or the target's own affair."""
        return weight_precision(self.target, self.options)

    @property
    def below(self) -> str | None:
        """What is not float32: the precision of the weights, or of the arithmetic."""
        return self.precision or arithmetic_precision(self.target, self.options)

    @property
    def unverified(self) -> str | None:
        """Why the files are not run here; None where they are."""
        if self.spec.verify == "off":
            return "verification was switched off (--verify off)"
        return self.target.unverifiable(self.options)

    def export(self, component: Component, cases: list[Case]) -> ComponentSpec:
        """Capture, rewrite, lower and verify one component; its file is then in ``folder``.

        Raises:
            Sam3xError: typed by step.
        """
        with rounded(component, self.precision, cases) as expected:
            return self._export(component, expected, None if self.precision is None else [outputs for _, _, outputs in cases])

    def _export(
        self, component: Component, cases: list[Case], unrounded: Sequence[Mapping[str, Tensor]] | None
    ) -> ComponentSpec:
        self.tell(f"{component.name}: capture")
        started = time.perf_counter()
        case, example, outputs = cases[0]
        branch = " ".join(f"{name}={value.tolist()}" for name, value in component.constants.items()) or "fixed"
        captured = capture_component(component, example, [Sample(branch=branch, case=case, inputs=dict(example))])
        self.tell(f"{component.name}: passes")
        before = default_pipeline(str(self.spec.branches))
        captured, records = before.then(*self.target.legalization_passes(self.options)).run(captured)
        self.tell(f"{component.name}: lower to {self.target.name}")
        path = self.folder / file_name(self.target, component.name, self.options)
        facts = self.target.lower(captured, path, self.options) or {}
        self.notes.extend(f"{component.name}: {note}" for note in facts.pop("notes", ()))
        del captured
        remedy = "Leave the component out (--components), or take another target."
        verification = self.verified(component, path, cases, remedy, unrounded)
        return ComponentSpec(
            name=component.name,
            file=path.name,
            inputs=tuple(described(port.name, example[port.name], port.dims) for port in component.inputs),
            outputs=tuple(described(name, outputs[name], ()) for name in component.outputs),
            reads={port.name: port.tensor for port in component.inputs if port.name not in component.constants},
            writes={name: component.renamed.get(name, name) for name in component.outputs},
            constants={name: value.tolist() for name, value in component.constants.items()},
            ranges=dict(component.ranges),
            passes=tuple(PassRecordModel.of(record) for record in records),
            verification=verification,
            facts=facts,
            figures={"seconds": round(time.perf_counter() - started, 3)},
        )

    def verified(
        self,
        component: Component,
        path: Path,
        cases: list[Case],
        remedy: str,
        unrounded: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> tuple[VerificationRecord, ...]:
        """Run the file on ``cases``; none where it is not to be run here.

        Args:
            remedy: what to do when it does not run. unrounded: see ``verify_component``.

        Raises:
            VerificationError: it does not run, or gives something else than eager.
        """
        if self.unverified is not None:
            return ()
        self.tell(f"{component.name}: verify")
        try:
            rounding = reduced(component, self.target, self.options)
            records = verify_component(component, partial(self.target.load_runner, path), cases, unrounded, rounding)
        except RuntimeError as error:  # a runtime's own
            raise VerificationError(
                f"the file was written and does not run: {error}", subject=f"{self.target.name} {component.name}", remedy=remedy
            ) from error
        require(records, Step.VERIFY, f"{self.target.name} {component.name}")
        return records
