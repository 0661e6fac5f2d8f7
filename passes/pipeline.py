"""The ordered pipeline of passes: checks each pass's contract and keeps one record a pass."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from sam3x.capture.program import CapturedProgram, sync_outputs
from sam3x.errors import PassError, PostconditionError, PreconditionError, SpecError, Step
from sam3x.passes.base import MatchFailure, Pass, count_ops, graph_modules


@dataclass(frozen=True, slots=True, kw_only=True)
class PassRecord:
    """What one pass did: rewrites, refusals, node counts before and after (branches included) and seconds.

    ``max_change`` is the largest absolute change of any output over the branch samples, where it was measured.
    """

    name: str
    modified: bool
    rewrites: int
    nodes_before: int
    nodes_after: int
    seconds: float
    match_failures: tuple[MatchFailure, ...] = ()
    max_change: float | None = None


def leave_out(name: str) -> str:
    """The remedy where the pass ``name`` itself is at fault."""
    return f"Leave the pass out: --disable-pass {name}."


Check = Callable[[CapturedProgram, CapturedProgram, Pass, tuple[str, ...]], float | None]
"""Compares a program after a pass with the one before: (before, after, pass, names of earlier passes) → largest change."""


@dataclass(frozen=True, slots=True)
class PassPipeline:
    """An immutable, ordered list of passes, in which one may stand twice.

    Raises:
        SpecError: when the order breaks a pass's ``run_after``; every breach is listed.
    """

    passes: tuple[Pass, ...] = ()

    def __post_init__(self) -> None:
        names = self.names
        breaches = [
            f"'{item.name}' must run after '{earlier}'"
            for index, item in enumerate(self.passes)
            for earlier in item.run_after
            if earlier in names and earlier not in names[:index]
        ]
        if breaches:
            raise SpecError(
                f"the pipeline {list(names)} is out of order: {'; '.join(breaches)}", remedy="Reorder it.", step=Step.PASSES
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Pass ids in order."""
        return tuple(item.name for item in self.passes)

    def without(self, *names: str) -> PassPipeline:
        """The pipeline less the named passes.

        Raises:
            SpecError: there is no pass of such a name.
        """
        for name in names:
            if name not in self.names:
                raise SpecError(f"no pass '{name}' in the pipeline; it has {', '.join(self.names) or 'none'}", step=Step.PASSES)
        return PassPipeline(tuple(item for item in self.passes if item.name not in names))

    def then(self, *passes: Pass) -> PassPipeline:
        """The pipeline with more passes at the end."""
        return PassPipeline((*self.passes, *passes))

    def run(
        self,
        captured: CapturedProgram,
        *,
        check: Check | None = None,
        dump_graphs: Path | None = None,
    ) -> tuple[CapturedProgram, tuple[PassRecord, ...]]:
        """Run every pass on a private copy of the graph.

        Args:
            captured: left as it is; the result shares its weights but no graph.
            check: called after each pass that modified the program (``--verify each``).
            dump_graphs: folder for one readable text file a stage.

        Raises:
            PassError: naming the pass and the passes before it.
        """
        current = captured.with_program(_private_copy(captured.program))
        records: list[PassRecord] = []
        _dump(dump_graphs, 0, "captured", current)
        for position, item in enumerate(self.passes, start=1):
            before = captured.with_program(_private_copy(current.program)) if check is not None else current
            records.append(_run_one(item, current, before, self.names[: position - 1], check))
            _dump(dump_graphs, position, item.name, current)
        return current, tuple(records)


def _run_one(
    item: Pass, current: CapturedProgram, before: CapturedProgram, earlier: tuple[str, ...], check: Check | None
) -> PassRecord:
    program = current.program
    nodes_before = sum(count_ops(program).values())
    started = time.perf_counter()
    subject = f"'{item.name}' after {list(earlier)}"
    try:
        item.requires(program)
        dynamic = _dynamic_sizes(program)
        result = item.call(program)
        for _, module in graph_modules(program):
            module.graph.lint()
        if result.modified:
            program.graph_module.recompile()  # its branches too
        sync_outputs(program)
        try:
            program.validate()
        except Exception as error:
            raise PostconditionError(f"the graph does not validate: {error}") from error
        fixed = dynamic - _dynamic_sizes(program)
        if fixed:
            raise PostconditionError(f"it fixed a size of an input that was dynamic: {min(fixed)}")
    except PreconditionError as error:
        raise PreconditionError(error.fact, subject=subject, remedy=error.remedy) from error
    except PassError as error:
        kind = PostconditionError if isinstance(error, PostconditionError) else PassError
        raise kind(error.fact, subject=subject, remedy=error.remedy or leave_out(item.name)) from error
    except Exception as error:
        fact = f"{type(error).__name__}: {error}"
        raise PassError(fact, subject=f"'{item.name}' failed after {list(earlier)}", remedy=leave_out(item.name)) from error
    seconds = time.perf_counter() - started
    change = check(before, current, item, earlier) if check is not None and result.modified else None
    return PassRecord(
        name=item.name,
        modified=result.modified,
        rewrites=result.rewrites,
        nodes_before=nodes_before,
        nodes_after=sum(count_ops(program).values()),
        seconds=seconds,
        match_failures=result.match_failures,
        max_change=change,
    )


def _dynamic_sizes(program: torch.export.ExportedProgram) -> set[tuple[str, int]]:
    """(input, dimension) of each size that is still a symbol: asking torch for its value fixes it, without a word."""
    inputs = set(program.graph_signature.user_inputs)  # a buffer may be given up for another
    values = [(node.name, node.meta.get("val")) for node in program.graph.nodes if node.name in inputs]
    return {
        (name, dim)
        for name, value in values
        if isinstance(value, torch.Tensor)
        for dim, size in enumerate(value.shape)
        if isinstance(size, torch.SymInt) and not size.node.expr.is_number
    }


def _private_copy(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Copy the graphs, share the weights."""
    tensors = {id(value): value for value in [*program.state_dict.values(), *program.constants.values()]}
    module = copy.deepcopy(program.graph_module, tensors)  # deepcopy's memo keeps every weight the same object
    return torch.export.ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=copy.deepcopy(program.graph_signature),
        state_dict=program.state_dict,
        range_constraints=copy.copy(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def _dump(folder: Path | None, position: int, name: str, captured: CapturedProgram) -> None:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        text = captured.program.graph_module.print_readable(print_output=False)
        (folder / f"{position:02d}_{name}.txt").write_text(text)
