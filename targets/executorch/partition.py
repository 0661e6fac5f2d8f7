"""Which nodes a delegate runs together: few programs, none of which waits for itself."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph, Node


def partitions(graph: Graph, groups: Sequence[Sequence[Node]]) -> list[list[Node]]:
    """Nodes that a delegate takes, joined over the whole graph.

    Programs are numbered: a node is in the first that has all it reads there, and what others compute of a program's results is
    there for the next. So no way leads out of a program and back into it. ExecuTorch's own search joins pairs of groups, is
    slow, and fails where groups lie around each other.

    Args:
        groups: nodes that must stay together, each in one group. One that waits for itself is left to others.

    Returns:
        Programs in the order in which they run, nodes in graph order.
    """
    whole = [set(group) for group in groups]
    while (numbers := _numbered(graph, whole)) is None:
        whole.remove(next((group for group in whole if _numbered(graph, [group]) is None), whole[-1]))
    found: dict[int, list[Node]] = {}
    taken = set().union(*whole)
    for node in graph.nodes:
        if node in taken:
            found.setdefault(numbers[node], []).append(node)
    return [found[number] for number in sorted(found)]


def _numbered(graph: Graph, groups: Sequence[set[Node]]) -> dict[Node, int] | None:
    """The program of every node, of others' nodes the one that may read them; None where a group waits for itself."""
    group_of = {node: index for index, group in enumerate(groups) for node in group}
    first = [0] * len(groups)
    for _ in range(len(groups) + 2):  # each round one more of them may have to wait for another
        number: dict[Node, int] = {}
        for node in graph.nodes:
            own = group_of.get(node)
            number[node] = max((number[item] + (own is None and item in group_of) for item in node.all_input_nodes), default=0)
            if own is not None:
                number[node] = first[own] = max(number[node], first[own])
        if all(number[node] == first[index] for node, index in group_of.items()):
            return number
    return None
