"""The ONNX graphs between the components of a fused image model: which queries are detections, and what is known of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

_HEAD = '<ir_version: 10, opset_import: ["" : 18]>'

_REPEAT = f"""{_HEAD}
repeat (float[1, T, C] of_one, float[prompts, L, C] prompt) => (float[prompts, T, C] of_each) {{
    ones = Constant <value = int64[2] {{1, 1}}> ()
    count = Shape <start: int = 0, end: int = 1> (prompt)
    size = Concat <axis: int = 0> (count, ones)
    of_each = Expand (of_one, size)
}}"""

# a detection gets its rank as a whole number, so that TopK has no ties, which providers break differently
_SELECT = f"""{_HEAD}
select (float[prompts, Q] pred_logits, float[prompts, 1] presence, float[prompts, Q, C] queries,
        float[prompts, Q, 4] pred_boxes, float[1] threshold)
    => (float[prompts, kept, C] kept, int64[found, 2] places,
        int64[found] prompts_of, float[found] scores_of, float[found, 4] boxes_of) {{
    first = Constant <value = int64[1] {{0}}> ()
    second = Constant <value = int64[1] {{1}}> ()
    last = Constant <value = int64[1] {{-1}}> ()
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    nothing = Constant <value_float: float = 0.0> ()
    likely = Sigmoid (pred_logits)
    present = Sigmoid (presence)
    scores = Mul (likely, present)
    above = Greater (scores, threshold)
    counted = Cast <to: int = 7> (above)
    counts = ReduceSum <keepdims: int = 0> (counted, second)
    most = ReduceMax <keepdims: int = 1> (counts)
    some = Max (most, second)
    length = Shape <start: int = 1, end: int = 2> (scores)
    every = Squeeze (length, first)
    ids = Range (zero, every, one)
    bonus = Mul (counted, length)
    ranks = Sub (bonus, ids)
    keys = CastLike (ranks, nothing)
    best, slots = TopK <axis: int = 1> (keys, some)
    index = Unsqueeze (slots, last)
    kept = GatherND <batch_dims: int = 1> (queries, index)
    real = Greater (best, nothing)
    filled = NonZero (real)
    places = Transpose <perm: ints = [1, 0]> (filled)
    where = NonZero (above)
    found = Transpose <perm: ints = [1, 0]> (where)
    prompts_of = Gather <axis: int = 0> (where, zero)
    scores_of = GatherND (scores, found)
    boxes_of = GatherND (pred_boxes, found)
}}"""

_COLLECT = f"""{_HEAD}
collect (float[prompts, kept, H, W] pred_masks, int64[found, 2] places) => (float[found, H, W] masks_of) {{
    masks_of = GatherND (pred_masks, places)
}}"""


def repeat() -> ir.Model:
    """``of_one`` (1, T, C) once for each row of ``prompt`` (prompts, L, C) → ``of_each`` (prompts, T, C)."""
    return _read(_REPEAT)


def select() -> ir.Model:
    """Scores, and the queries above ``threshold`` (1,), moved to the front of each prompt's row in their order.

    In, float32: ``pred_logits`` (prompts, Q), ``presence`` (prompts, 1), ``queries`` (prompts, Q, C), ``pred_boxes``
    (prompts, Q, 4).
    Out: ``kept`` (prompts, kept, C), as long as the prompt that found most, at least 1, rows filled up with queries below;
    ``places`` (found, 2) int64, row and column in ``kept`` of what was found; ``prompts_of`` (found,) int64, ``scores_of``
    (found,) and ``boxes_of`` (found, 4), by prompt and then by query.
    """
    return _read(_SELECT)


def collect() -> ir.Model:
    """``pred_masks`` (prompts, kept, H, W) at ``places`` (found, 2) → ``masks_of`` (found, H, W)."""
    return _read(_COLLECT)


def _read(text: str) -> ir.Model:
    import onnx_ir as ir

    return ir.from_onnx_text(text)
