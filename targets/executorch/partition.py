"""Which nodes a delegate runs together: few programs, none of which waits for itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.fx import Graph, Node


def partitions(
    graph: Graph, groups: Sequence[Sequence[Node]], light: Callable[[Sequence[Node]], bool] = lambda program: False
) -> list[list[Node]]:
    """Nodes that a delegate takes, joined over the whole graph.

    Programs are numbered: what others compute of a program's results is there for the next, and a node is in the last that has
    what reads it. So no way leads out of a program and back into it, and what leaves a program is what others read, not
    everything that could be computed early: the scores of eight heads, where the first view of a mask is a program.
    ExecuTorch's own search joins pairs of groups, is slow, and fails where groups lie around each other.

    Args:
        groups: nodes that must stay together, each in one group. One that waits for itself is left to others.
        light: whether a program is so little work that it is left to others, where there is more than one.

    Returns:
        Programs in the order in which they run, nodes in graph order.
    """
    whole = [set(group) for group in groups]
    while (numbers := _numbered(graph, whole)) is None:
        whole.remove(next((group for group in whole if _numbered(graph, [group]) is None), whole[-1]))
    numbers = _latest(graph, whole, numbers)
    found: dict[int, list[Node]] = {}
    taken = set().union(*whole)
    for node in graph.nodes:
        if node in taken:
            found.setdefault(numbers[node], []).append(node)
    programs = [found[number] for number in sorted(found)]
    left = {node for program in programs if light(program) for node in program}
    if len(programs) == 1 or not left or left == taken:
        return programs
    return partitions(graph, [group for group in groups if left.isdisjoint(group)], light)


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


def _latest(graph: Graph, groups: Sequence[set[Node]], numbers: dict[Node, int]) -> dict[Node, int]:
    """The last program that every node can be in, groups whole, with as many programs as ``numbers`` has."""
    group_of = {node: index for index, group in enumerate(groups) for node in group}
    end = max((numbers[node] for node in group_of), default=0)
    last = [end] * len(groups)
    number: dict[Node, int] = {}
    while True:
        before = list(last)
        for node in reversed(graph.nodes):
            own = group_of.get(node)
            read = [number[user] - (own is not None and user not in group_of) for user in node.users if user.op != "output"]
            number[node] = min((*read, end + (own is None)))
            if own is not None:
                number[node] = last[own] = min(number[node], last[own])
        if last == before:
            return number
