"""The pipeline keeps every pass to its contract, and its records say what happened."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sam3x.capture.capture import capture
from sam3x.capture.program import CapturedProgram, run_program
from sam3x.errors import PostconditionError, PreconditionError, SpecError
from sam3x.passes.base import Pass, PassResult, count_ops, graph_modules
from sam3x.passes.cleanup.canonicalize_reductions import CanonicalizeReductionsPass
from sam3x.passes.cleanup.insert_type_promotion import InsertTypePromotionPass
from sam3x.passes.cleanup.legalize_operators import LegalizeOperatorsPass
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.passes.pipeline import PassPipeline
from sam3x.spec import make_spec
from support.upstream import encoder_of

aten = torch.ops.aten


class Nothing(Pass):
    def __init__(self, name: str, run_after: tuple[str, ...] = ()) -> None:
        self.name, self.run_after = name, run_after

    def call(self, program: ExportedProgram) -> PassResult:
        return PassResult()


@pytest.fixture(scope="module")
def captured() -> CapturedProgram:
    return capture(encoder_of(2), make_spec())


def test_every_breach_of_the_order_is_listed() -> None:
    with pytest.raises(SpecError, match=r"'a' must run after 'b'.*'c' must run after 'b'"):
        PassPipeline((Nothing("a", ("b",)), Nothing("c", ("b",)), Nothing("b")))
    with pytest.raises(SpecError, match=r"out of order: 'a' must run after 'b'\. "):
        PassPipeline((Nothing("a", ("b",)), Nothing("b"), Nothing("a", ("b",))))


def test_a_pass_may_stand_twice() -> None:
    pipeline = PassPipeline((Nothing("a"), Nothing("b", ("a",)), Nothing("a"), Nothing("c", ("a", "b"))))
    assert pipeline.names == ("a", "b", "a", "c")
    assert pipeline.without("a").names == ("b", "c")


def test_pipelines_are_values() -> None:
    pipeline = PassPipeline((Nothing("a"), Nothing("b")))
    assert pipeline.without("a").names == ("b",)
    assert pipeline.then(Nothing("d")).names == ("a", "b", "d")
    assert pipeline.names == ("a", "b")
    with pytest.raises(SpecError, match="no pass 'x'"):
        pipeline.without("x")


class Asks(Pass):
    """Asks torch for the value of a size, which then is that of the trace."""

    name = "asks"

    def call(self, program: ExportedProgram) -> PassResult:
        tgt = next(node for node in program.graph.nodes if node.name == "tgt")
        return PassResult(tidied=int(tgt.meta["val"].shape[0]) < 0)


def test_a_pass_that_fixes_a_dynamic_size_is_told() -> None:
    own = capture(encoder_of(1), make_spec(dac=False, pre_norm=True))  # torch keeps what it was asked
    with pytest.raises(PostconditionError, match=r"'asks'.*fixed a size of an input that was dynamic: \('memory', 0\)"):
        PassPipeline((Asks(),)).run(own)


def test_the_captured_program_is_left_as_it_is(captured: CapturedProgram) -> None:
    before = captured.program.graph_module.print_readable(print_output=False)
    result, records = default_pipeline().run(captured)
    assert captured.program.graph_module.print_readable(print_output=False) == before
    assert tuple(record.name for record in records) == default_pipeline().names
    weights = {id(value) for value in captured.program.state_dict.values()}
    assert {id(value) for value in result.program.state_dict.values()} == weights


def test_a_second_run_of_the_pipeline_changes_nothing(captured: CapturedProgram) -> None:
    once, _ = default_pipeline().run(captured)
    _, records = default_pipeline().run(once)
    assert not any(record.modified for record in records)


def test_the_result_is_bit_equal_in_every_branch(captured: CapturedProgram) -> None:
    result, _ = default_pipeline().run(captured)
    for sample in captured.samples:
        before = run_program(captured.program, sample.inputs, captured.output_names)
        after = run_program(result.program, sample.inputs, captured.output_names)
        assert torch.equal(before["output"], after["output"]), sample.branch


def test_every_node_has_a_value_in_the_encoders_own_symbols(captured: CapturedProgram) -> None:
    for prefix, module in graph_modules(captured.program):
        for node in module.graph.nodes:
            if node.op in ("call_function", "placeholder"):
                assert "val" in node.meta, f"{prefix}.{node.name}"
    sizes = {node.name: node.meta["val"].shape for node in captured.program.graph.nodes if node.op == "placeholder"}
    output = captured.program.graph.output_node().args[0][0].meta["val"]
    assert tuple(map(str, output.shape)) == tuple(map(str, sizes["tgt"]))


def test_graphs_are_dumped_after_each_pass(captured: CapturedProgram, tmp_path: Path) -> None:
    default_pipeline().run(captured, dump_graphs=tmp_path / "graphs")
    names = sorted(path.name for path in (tmp_path / "graphs").iterdir())
    assert names == ["00_captured.txt", *(f"{i:02d}_{name}.txt" for i, name in enumerate(default_pipeline().names, start=1))]


class Refuses(Nothing):
    def requires(self, program: ExportedProgram) -> None:
        raise PreconditionError("it has conditionals")


class BreaksTheGraph(Nothing):
    def call(self, program: ExportedProgram) -> PassResult:
        node = next(n for n in program.graph.nodes if n.op == "call_function" and n.users)
        program.graph.output_node().append(program.graph.node_copy(node))
        user = next(iter(node.users))
        node.append(user)  # a user before what it uses
        user.append(node)
        return PassResult(rewrites=1)


def test_preconditions_are_checked(captured: CapturedProgram) -> None:
    with pytest.raises(PreconditionError, match=r"'x' after \['a'\]: it has conditionals"):
        PassPipeline((Nothing("a"), Refuses("x"))).run(captured)


def test_an_unsound_graph_is_caught(captured: CapturedProgram) -> None:
    with pytest.raises(Exception, match="'x'"):
        PassPipeline((BreaksTheGraph("x"),)).run(captured)


class CountsPadding(nn.Module):
    def forward(self, mask: Tensor) -> Tensor:
        return torch.sum(~mask, 1) + mask.sum()


def test_sums_of_bools_are_spelt_out() -> None:
    mask = torch.tensor([[True, False, True], [False, False, False]])
    program = torch.export.export(CountsPadding(), (mask,), strict=False).run_decompositions()
    result = CanonicalizeReductionsPass().call(program)
    assert (result.modified, result.rewrites) == (True, 2)
    program.graph.lint()
    assert torch.equal(program.module()(mask), CountsPadding()(mask))
    assert not CanonicalizeReductionsPass().call(program).modified


class Squeezes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.squeeze.dims(x, [1, 2]) * 2


def test_operators_without_a_word_are_expanded() -> None:
    x = torch.randn(3, 1, 1, 4)
    program = torch.export.export(Squeezes(), (x,), strict=False)
    table = {aten.squeeze.dims: lambda x, dims: aten.squeeze.dim(aten.squeeze.dim(x, dims[1]), dims[0])}
    step = LegalizeOperatorsPass(lambda op: op is not aten.squeeze.dims, table)
    result = step.call(program)
    assert (result.modified, result.rewrites) == (True, 1)
    assert "aten.squeeze.dims" not in count_ops(program)
    assert torch.equal(program.module()(x), Squeezes()(x))
    assert not step.call(program).modified


class SeveralTypes(nn.Module):
    def forward(self, x: Tensor, where: Tensor) -> Tensor:
        places = torch.arange(x.shape[0])
        bias = places * 0.1 - 2.0**-places + (where + 1) * torch.where(where, places, 0.5)
        return torch.cat((x + bias, places)) * (places > 0.5).repeat(2) + (places == x).repeat(2) + places.repeat(2) / 3


def test_casts_that_operators_make_silently_are_spelt_out() -> None:
    inputs = (torch.arange(4) * 1.0, torch.tensor([True, False, True, False]))
    program = torch.export.export(SeveralTypes(), inputs, strict=False).run_decompositions({})
    before = SeveralTypes()(*inputs)
    step = InsertTypePromotionPass()
    assert step.call(program).rewrites >= 9
    assert torch.equal(program.module()(*inputs), before)
    for node in program.graph.nodes:
        if node.target in (aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.where.self, aten.cat.default):
            assert {n.meta["val"].dtype for n in node.all_input_nodes[node.target is aten.where.self :]} == {
                node.meta["val"].dtype
            }
    assert not step.call(program).modified


def test_operators_without_a_decomposition_are_named() -> None:
    program = torch.export.export(Squeezes(), (torch.randn(3, 1, 1, 4),), strict=False)
    step = LegalizeOperatorsPass(lambda op: op is not aten.mul.Tensor, {})
    result = step.call(program)
    assert not result.modified
    assert [item.reason for item in result.match_failures] == ["aten.mul.Tensor has no decomposition"]
