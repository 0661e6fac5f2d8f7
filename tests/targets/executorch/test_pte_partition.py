"""Programs of a delegate over graphs of any shape: none waits for itself, groups stay together, few where few are enough."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph, Node

from sam3x.targets.executorch.partition import partitions


def graph_of(reads: list[list[int]]) -> tuple[Graph, list[Node]]:
    """A node for each list, which reads those nodes."""
    graph = Graph()
    nodes: list[Node] = []
    for sources in reads:
        nodes.append(graph.call_function(len, tuple(nodes[index] for index in sources)))
    graph.output(tuple(nodes))
    return graph, nodes


def waits_for_itself(nodes: list[Node], program: list[Node]) -> bool:
    """Whether a way leads out of ``program`` and back."""
    inside, after = set(program), set()
    for node in nodes:
        if node in inside:
            if not after.isdisjoint(node.all_input_nodes):
                return True
        elif not (inside | after).isdisjoint(node.all_input_nodes):
            after.add(node)
    return False


def test_what_others_compute_in_between_parts_two_programs() -> None:
    graph, (a, b, c, d) = graph_of([[], [0], [1], []])
    assert partitions(graph, [[a], [c], [d]]) == [[a], [c, d]]
    assert partitions(graph, [[a], [b], [c], [d]]) == [[a, b, c, d]]


def test_what_can_wait_waits_so_that_little_crosses_from_program_to_program() -> None:
    """0 is a view of a mask, 1 the mask, 2 to 4 an attention: its scores, masked, and the answer."""
    graph, (view, _, scores, masked, answer) = graph_of([[], [0], [], [1, 2], [3]])
    assert partitions(graph, [[view], [scores], [masked], [answer]]) == [[view], [scores, masked, answer]]


def test_little_work_is_no_program_of_its_own() -> None:
    graph, (view, _, scores, masked, _) = graph_of([[], [0], [], [1, 2], [3]])
    found = partitions(graph, [[view], [scores], [masked]], lambda program: len(program) == 1)
    assert found == [[scores, masked]]
    assert partitions(graph, [[view]], lambda program: True) == [[view]]  # all there is


def test_a_group_waits_as_a_whole() -> None:
    graph, (a, _, c, d) = graph_of([[], [0], [1], []])
    assert partitions(graph, [[a], [c, d]]) == [[a], [c, d]]


def test_a_group_that_waits_for_itself_is_left_to_others() -> None:
    graph, (a, _, c, d) = graph_of([[], [0], [1], []])
    assert partitions(graph, [[a, c], [d]]) == [[d]]
    assert partitions(graph, [[a, c]]) == [] == partitions(graph, [])


def test_of_groups_around_each_other_one_is_left() -> None:
    """Each alone is sound; together the first must run before and after the second."""
    graph, (a, b, _, _, c, d) = graph_of([[], [], [0], [1], [3], [2]])
    found = partitions(graph, [[a, c], [b, d]])
    assert found in ([[a, c]], [[b, d]])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_graph(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 14))
    graph, nodes = graph_of(
        [data.draw(st.lists(st.integers(0, index - 1), max_size=3, unique=True)) if index else [] for index in range(count)]
    )
    owners = [data.draw(st.integers(-2, 4)) for _ in nodes]  # below 0: others'
    groups = [[n for n, owner in zip(nodes, owners, strict=True) if owner == wanted] for wanted in set(owners) if wanted >= 0]
    found = partitions(graph, groups)
    taken = list(itertools.chain(*found))
    assert len(set(taken)) == len(taken)
    for group in groups:
        assert sum(not set(group).isdisjoint(program) for program in found) <= 1
        assert set(group) <= set(taken) or set(group).isdisjoint(taken)
        if not waits_for_itself(nodes, group) and len(groups) == 1:
            assert found == [group]
    ran: set[Node] = set()
    for program in found:
        assert not waits_for_itself(nodes, program)
        for node in program:  # what is delegated and read is of an earlier program, or of this one
            assert {item for item in node.all_input_nodes if item in taken} <= ran | set(program)
        ran |= set(program)
    for earlier, later in itertools.pairwise(found):  # none could wait for the next
        assert any(user not in later and user.op != "output" for node in earlier for user in node.users)
