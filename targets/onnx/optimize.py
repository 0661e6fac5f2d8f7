"""Tidy a converted ONNX graph: onnxscript's optimizer with the rewrites that fire on what torch's converter writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir


def _activation_first() -> Any:
    """Relu right after its Gemm, not behind the Reshape: ONNX Runtime fuses the two, which saves a copy of the hidden layer."""
    from onnxscript.rewriter import RewriteRule

    return RewriteRule(
        lambda op, x, shape: op.Relu(op.Reshape(x, shape)),
        lambda op, x, shape: op.Reshape(op.Relu(x), shape),
        name="activation_first",
    )


def _one_size_more() -> Any:
    """Expand to ones adds dimensions and nothing else: OpenVINO drops it, dimensions and all."""
    from onnxscript import ir
    from onnxscript.rewriter import RewriteRule

    def check(context: Any, x: ir.Value, shape: ir.Value) -> bool:
        sizes = ir.convenience.get_const_tensor(shape)
        return x.shape is not None and sizes is not None and bool((sizes.numpy() == 1).all())

    def added(op: Any, x: ir.Value, shape: ir.Value) -> Any:
        more = int(ir.convenience.get_const_tensor(shape).size) - len(x.shape)  # type: ignore[union-attr, arg-type]
        return op.Unsqueeze(x, op.Constant(value_ints=list(range(more)))) if more > 0 else op.Identity(x)

    return RewriteRule(lambda op, x, shape: op.Expand(x, shape), added, check, name="one_size_more")


def _fresh(rule: Any) -> Any:
    """Make the rule anew from its class: one that was used keeps its last graph, weights and all, and cannot be copied."""
    return type(rule._condition_function.__self__).rule()


def optimize(model: ir.Model, *, fold_norms: bool = True) -> None:
    """Fold constants, drop what is dead or there twice, lift constants to initializers; in place.

    ``onnxscript.optimizer.optimize`` with a few of its rewrite rules: trying all forty on every node twice took two thirds of
    the lowering (of a ViT's more: a rule with two results tries every pair of nodes), and the graph passes leave nothing to the
    others. A graph with convolutions also gets those that fold batch norms and padding.

    Args:
        fold_norms: False leaves batch norms where they are: folded into rounded weights, they would make other numbers of them.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants_ir
    from onnxscript.rewriter import rewrite
    from onnxscript.rewriter.rules import common as rules

    chosen = [rules.squeeze_reshape_1d_rule, rules.transpose_transpose_rule, rules.reshape_reshape_rule, rules.cast_cast_rule]
    if any(node.op_type == "Conv" for node in ir.traversal.RecursiveGraphIterator(model.graph)):
        if fold_norms:
            chosen += [rules.fuse_batchnorm_into_conv_rule, rules.fuse_batchnorm_into_conv_transpose_rule]
        chosen += [rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule]
    common.InlinePass()(model)
    fold_constants_ir(model, onnx_shape_inference=True)
    rewrite(model, [_activation_first(), _one_size_more(), *map(_fresh, chosen)])
    fold_constants_ir(model)  # the rewrites leave an Identity each
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)
