"""The export of one component: capture, passes, lowering, verification."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from sam3x.artifact.manifest import ComponentSpec, PassRecordModel
from sam3x.capture.component import capture_component
from sam3x.capture.program import CapturedProgram, Sample
from sam3x.errors import PreconditionError, Step
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.passes.graph.op_paths import IDLE
from sam3x.passes.pipeline import PassPipeline, PassRecord
from sam3x.pipeline.float32 import measured
from sam3x.pipeline.request import Request
from sam3x.precision.component import reduced, rounded
from sam3x.sources.contract import Component
from sam3x.verify.compare import FIND_PASS, check_pass, require
from sam3x.verify.component import verify_component
from sam3x.verify.record import Runner, TensorSpec, VerificationRecord

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class ComponentJob:
    """What the export of every component shares: any target, by ``Target``'s contract alone."""

    request: Request
    folder: Path
    tell: Progress
    idle: list[set[str]] = field(default_factory=list)
    """Of each component so far, the names in ``--fp32-ops`` that it has no operation for."""

    def __post_init__(self) -> None:
        """Raises ``SpecError`` where there is no pass of a name to leave out."""
        self.passes_of(self.options_of(self.request.components[0]))

    def options_of(self, component: str) -> Any:
        """Return the target's options that are of ``component``."""
        several = len(self.request.components) > 1 or ":" in getattr(self.request.options, "fp32_ops", "")
        return self.request.options.of_component(component) if several else self.request.options

    def passes_of(self, options: Any) -> PassPipeline:
        """Return the passes that rewrite the graph of a component whose options these are."""
        own = self.request.target.legalization_passes(options)
        return default_pipeline(str(self.request.spec.branches)).then(*own).without(*self.request.disable_pass)

    @property
    def runs(self) -> bool:
        """Whether files are run here, and so verified."""
        return self.request.unverified is None

    def open(self, file: str) -> Runner:
        """Open one of the files in ``folder``."""
        return self.request.target.load_runner(self.folder / file)

    def say(self, component: str, step: str) -> None:
        """Tell a step, with the component's name where there are several."""
        self.tell(step if len(self.request.components) == 1 else f"{component}: {step}")

    def export(
        self, component: Component, samples: Sequence[Sample], calibration: Sequence[Mapping[str, Tensor]] = ()
    ) -> ComponentSpec:
        """Capture, rewrite, lower and verify one component; its file is then in ``folder``.

        Args:
            calibration: inputs from which, and from ``samples``, scales of activations are taken, where the request wants that.

        Raises:
            Sam3xError: typed by step.
        """
        request, metrics = self.request, Stopwatch()
        dump = request.dump_graphs
        if dump is not None and len(request.components) > 1:
            dump = dump / component.name
        with rounded(component, request.numerics, samples) as expected:
            self.say(component.name, "capture")
            with metrics.timing("capture_seconds"):
                captured = capture_component(component, expected[0])
            options, found = self.options_of(component.name), {}
            if getattr(options, "fp32_measured", False):
                self.say(component.name, f"measure {options.precision}")
                with metrics.timing("measure_seconds"):
                    options = measured(options, captured, expected[:1])
                found = {"fp32_ops": list(options.fp32_names)}
            self.say(component.name, "passes")
            with metrics.timing("passes_seconds"):
                check = check_pass if request.spec.verify == "each" else None
                captured, records = self.passes_of(options).run(captured, check=check, dump_graphs=dump)
            self._note_idle(component.name, records)
            self.say(component.name, f"lower to {request.target.name}")
            path = self.folder / request.file(component.name)
            with metrics.timing("lower_seconds"):
                metadata = {} if request.spec.verify == "off" else request.target.prove(captured, options)
                if request.calibrated:
                    given = (*(sample.inputs for sample in expected), *calibration)
                    captured = replace(captured, calibration=given)
                metadata |= found | (request.target.lower(captured, path, options) or {})
            inputs, outputs = described(component, captured)
            notes = (*captured.notes, *metadata.pop("notes", ()))
            del captured
            with metrics.timing("verify_seconds"):
                verification = self.verified(component, path, expected, "Take another target (--target).") if self.runs else ()
        return ComponentSpec(
            name=component.name,
            file=path.relative_to(self.folder).as_posix(),
            inputs=inputs,
            outputs=outputs,
            reads={port.name: port.tensor for port in component.inputs if port.name not in component.constants},
            writes={name: component.renamed.get(name, name) for name in component.outputs},
            constants={name: value.tolist() for name, value in component.constants.items()},
            ranges=dict(component.ranges),
            passes=tuple(PassRecordModel.of(record) for record in records),
            verification=verification,
            metadata=metadata,
            metrics=metrics.seconds(),
            notes=(*notes, *reference_notes(verification)),
        )

    def _note_idle(self, component: str, records: Sequence[PassRecord]) -> None:
        """Keep the names that ``component`` has no operation for.

        Raises:
            PreconditionError: one that is of this component alone.
        """
        idle = {item.node for record in records for item in record.match_failures if item.reason == IDLE}
        own = [name for name in getattr(self.request.options, "fp32_names", ()) if name.partition(":")[2] in idle]
        own = [name for name in own if name.startswith(f"{component}:")]
        if own:
            remedy = f"See sam3x doctor FOLDER --components {component}, which names its operations."
            raise PreconditionError(f"'{own[0]}' {IDLE}", subject="--fp32-ops", remedy=remedy)
        self.idle.append(idle)

    def refuse_idle(self) -> None:
        """Refuse a name that none of the components had an operation for.

        Raises:
            PreconditionError: the first of them.
        """
        nowhere = sorted(set.intersection(*self.idle)) if self.idle else []
        if nowhere:
            fact = f"'{nowhere[0]}' names no operation of any component"
            raise PreconditionError(fact, subject="--fp32-ops", remedy="See sam3x doctor FOLDER, which names them.")

    def verified(
        self, component: Component, path: Path, samples: Sequence[Sample], remedy: str
    ) -> tuple[VerificationRecord, ...]:
        """Run the file on ``samples``.

        Args:
            remedy: what to do when it does not run.

        Raises:
            VerificationError: it does not run, or gives something else than eager.
        """
        request = self.request
        self.say(component.name, "verify")
        subject = f"{request.target.name} {component.name}"
        open_runner = partial(request.target.load_runner, path)
        records = verify_component(
            component, open_runner, samples, reduced(component, request.numerics), subject=subject, remedy=remedy
        )
        require(records, Step.VERIFY, subject, "" if request.spec.verify == "each" else FIND_PASS)
        return records


def reference_notes(records: Sequence[VerificationRecord]) -> tuple[str, ...]:
    """What a verification was judged by, where that is less than float32 and float64."""
    reason = next((record.float32_alone for record in records if record.float32_alone), None)
    return () if reason is None else (f"verified against eager float32 alone: in float64 it is no reference ({reason})",)


class Stopwatch:
    """Seconds of named steps and of all since it was made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._found: dict[str, float] = {}

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Within it time goes by for ``name``."""
        started = time.perf_counter()
        yield
        self._found[name] = time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        """Each step's, and ``seconds``, those of all."""
        found = {**self._found, "seconds": time.perf_counter() - self._started}
        return {name: round(value, 3) for name, value in found.items()}


def described(component: Component, captured: CapturedProgram) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs for the manifest: a dynamic size has the name that its input's port gives it."""
    nodes = {node.name: node.meta["val"] for node in captured.program.graph.nodes if node.op == "placeholder"}
    names = {
        str(size): dim
        for port in component.inputs
        for dim, size in zip(port.dims, nodes[port.name].shape, strict=True)
        if dim is not None
    }

    def word(size: object) -> int | str:
        return size if isinstance(size, int) else re.sub(r"\b[su]\d+\b", lambda found: names.get(found[0], found[0]), str(size))

    results = [node.meta["val"] for node in captured.program.graph.output_node().args[0]]
    inputs = tuple(
        tensor_spec(port.name, value, [dim or word(size) for dim, size in zip(port.dims, value.shape, strict=True)])
        for port, value in ((port, nodes[port.name]) for port in component.inputs)
    )
    outputs = tuple(
        tensor_spec(name, value, [word(size) for size in value.shape])
        for name, value in zip(captured.output_names, results, strict=True)
    )
    return inputs, outputs


def tensor_spec(name: str, value: Tensor, shape: Sequence[int | str]) -> TensorSpec:
    """What the manifest says of an input or output."""
    return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=tuple(shape))
