"""Which operations lose what in a lower precision, and the fewest that must stay in float32 to hold a bound.

Every operation's precision is emulated in torch: its inputs and its result are rounded, as a strongly typed engine does between
its layers; in int8 the operands of linears are, and of convolutions if asked, activations with one scale for the tensor. The
numbers are compared with eager float32, in every branch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from sam3x.artifact.artifact import load
from sam3x.capture.capture import capture_encoder
from sam3x.capture.program import CapturedProgram, Sample
from sam3x.capture.samples import Sizes, samples_for
from sam3x.errors import ArtifactError, SpecError, Step, VerificationError
from sam3x.fusion.encoder import FusionEncoder
from sam3x.passes.attention.simplify_attention_masks import SimplifyAttentionMasksPass
from sam3x.passes.default_pipeline import default_pipeline
from sam3x.passes.graph.aten_nodes import SDPA, aten
from sam3x.passes.graph.op_paths import float_ops, op_name
from sam3x.passes.precision.autocast import worth_int8
from sam3x.passes.precision.convert_precision import MOVES, positions
from sam3x.precision.attention import emulated_attention
from sam3x.precision.doctor_report import BOUNDS, AttentionForm, DoctorReport, OperationReport, Precision
from sam3x.sources.encoder import Source, source_for
from sam3x.spec import ExportSpec
from sam3x.targets.tensorrt.check import distance
from sam3x.verify.emulate import activations_int8, columns_int8, convolution_int8, convolves_int8

Tell = Callable[[str], None]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


def doctor(
    folder: str | Path,
    source: Source | Any | None = None,
    *,
    precision: Precision = "fp16",
    bound: float | None = None,
    attention: AttentionForm = "layer",
    tokens: int = 256,
    tell: Tell | None = None,
) -> DoctorReport:
    """Examine the encoder of an exported folder.

    Args:
        source: what it was exported from; None rebuilds the seeded default.
        precision: the one to examine.
        bound: largest absolute error against eager float32 that is allowed; None: ``BOUNDS``.
        attention: how attention is computed in the low precision, as ``--attention`` of the TensorRT target.
        tokens: image tokens of the runs, where they are free; errors of an operation hardly depend on them.

    Raises:
        ArtifactError: the source's weights are not those of the artifact.
        VerificationError: float32 itself is beyond the bound.
    """
    say = tell or (lambda _: None)
    manifest = load(folder).manifest
    allowed = allowed_error(precision, bound, attention)
    say("source")
    spec = _examined(ExportSpec(**manifest.spec), tokens)
    given = source_for(source, spec.seed)
    if given.weights_sha256 != manifest.weights_sha256:
        raise ArtifactError(
            f"{folder} was exported from other weights ({manifest.origin})",
            remedy="Name the source it came from: --checkpoint or --module.",
            step=Step.DOCTOR,
        )
    encoder = FusionEncoder(given.module, spec)
    say("capture")
    program = rewritten(capture_encoder(encoder))
    say(f"emulate {precision}")
    probe = Probe(program, _samples(encoder, tokens), DTYPES[precision], attention)
    return examine(probe, precision=precision, bound=allowed, origin=manifest.origin, tell=say)


def rewritten(captured: CapturedProgram) -> CapturedProgram:
    """The graph that a target lowers the precision of; an operation has the same name there."""
    return default_pipeline("select").then(SimplifyAttentionMasksPass()).run(captured)[0]


def allowed_error(precision: Precision, bound: float | None, attention: AttentionForm = "layer") -> float:
    """``bound``, or that of the precision.

    Raises:
        SpecError: nothing can hold it, or the precision has no attention of its own.
    """
    if precision == "int8" and attention != "layer":
        fact = "int8 is of linears; attention stays float32"
        raise SpecError(fact, subject="--attention", remedy="Leave it out, or take --precision fp16.", step=Step.DOCTOR)
    allowed = BOUNDS[precision] if bound is None else bound
    if not allowed > 0:
        raise SpecError(f"--bound {allowed} is no error anything can hold", remedy="Give a number above 0.", step=Step.DOCTOR)
    return allowed


def examine(
    probe: Probe,
    *,
    precision: Precision,
    bound: float,
    origin: str,
    tell: Tell = lambda _: None,
    component: str | None = None,
) -> DoctorReport:
    """Everything low, each operation low alone, then the fewest that must stay in float32."""
    everything = frozenset(probe.paths)
    _require_float32(probe, bound, component)
    whole = probe.error(everything)
    alone = {path: probe.error(frozenset({path})) for path in probe.paths}
    ranked = _ranked(probe)
    tell("float32 operations")
    fp32_ops = fewest_fp32_ops(ranked, lambda kept: probe.error(everything - frozenset(kept))["max_abs"] <= bound)
    after = probe.error(everything - frozenset(fp32_ops))
    limit = torch.finfo(probe.dtype).max if probe.dtype.is_floating_point else math.inf
    rows = tuple(
        OperationReport(
            path=path,
            kind=probe.kinds[path],
            max_abs=alone[path]["max_abs"],
            cosine=alone[path]["cosine"],
            peak=probe.peaks[path],
            overflows=probe.peaks[path] > limit,
            in_float32=path in fp32_ops,
        )
        for path in ranked
    )
    return DoctorReport(
        component=component,
        scaled=probe.program.scaled,
        precision=precision,
        attention=probe.attention,
        bound=bound,
        origin=origin,
        branches=tuple(dict.fromkeys(sample.branch for sample in probe.samples)),
        cases=tuple(dict.fromkeys(sample.case for sample in probe.samples)),
        max_abs=whole["max_abs"],
        cosine=whole["cosine"],
        fp32_ops=tuple(fp32_ops),
        max_abs_with_fp32_ops=after["max_abs"],
        cosine_with_fp32_ops=after["cosine"],
        operations=rows,
    )


def needed_fp32_ops(probe: Probe, bound: float) -> list[str]:
    """The fewest operations that must stay in float32; where everything low holds, no operation is run alone.

    Raises:
        VerificationError: float32 itself is beyond the bound.
    """
    _require_float32(probe, bound, None)
    everything = frozenset(probe.paths)

    def holds(kept: Sequence[str]) -> bool:
        return probe.error(everything - frozenset(kept))["max_abs"] <= bound

    return [] if holds(()) else fewest_fp32_ops(_ranked(probe), holds)


def _require_float32(probe: Probe, bound: float, component: str | None) -> None:
    plain = probe.error(frozenset())
    if plain["max_abs"] > bound:
        raise VerificationError(
            f"float32 itself is {plain['max_abs']:.1e} from eager, more than the bound, {bound:g}",
            subject=component or "",
            remedy="Choose a larger bound.",
            step=Step.DOCTOR,
        )


def _ranked(probe: Probe) -> list[str]:
    """Operations by what each loses alone in the low precision, the worst first."""
    return sorted(probe.paths, key=lambda path: (-probe.error(frozenset({path}))["max_abs"], -probe.peaks[path]))


def fewest_fp32_ops(ranked: Sequence[str], holds: Callable[[Sequence[str]], bool]) -> list[str]:
    """The fewest of ``ranked`` (worst first) that must stay in float32: none of them can be spared.

    The shortest beginning that holds is found by bisection, then whatever is not needed leaves it, the least suspect first.
    """
    if holds([]):
        return []
    low, high = 0, len(ranked)  # the beginning of length ``low`` does not hold, that of length ``high`` does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(ranked[:middle]) else (middle, high)
    kept = list(ranked[:high])
    for path in reversed(kept.copy()):
        fewer = [item for item in kept if item != path]
        if holds(fewer):
            kept = fewer
    return kept


class Probe:
    """A program, the samples it is examined on, and what eager float32 says of them.

    Attributes:
        convolutions: of int8: they are in it, too.
        paths: operations that round, in graph order. kinds: path → operation. peaks: path → largest magnitude seen in float32.
    """

    def __init__(
        self,
        program: CapturedProgram,
        samples: Sequence[Sample],
        dtype: torch.dtype,
        attention: AttentionForm = "layer",
        *,
        convolutions: bool = False,
    ) -> None:
        self.program, self.samples, self.dtype, self.attention = program, tuple(samples), dtype, attention
        self.convolutions = convolutions
        exact = positions(program.program)
        self.nodes = {node: path for node, path in float_ops(program.program) if node not in exact and self._rounds(node)}
        self.paths = tuple(dict.fromkeys(path for node, path in self.nodes.items() if not _is_constant(node)))
        self.kinds = {path: op_name(node) for node, path in reversed(self.nodes.items())}
        self.expected = [program.eager(sample.inputs) for sample in self.samples]
        self.peaks = dict.fromkeys(self.paths, 0.0)
        for sample in self.samples:
            self._run(sample, frozenset(), self.peaks)
        self._known: dict[frozenset[str], dict[str, float]] = {}

    def _rounds(self, node: Node) -> bool:
        if self.dtype is not torch.int8:
            return node.target not in MOVES
        if node.target is aten.linear.default:
            return worth_int8(node.args[1].meta["val"].shape)  # type: ignore[union-attr]
        if not self.convolutions or node.target is not aten.convolution.default:
            return False
        arguments: Any = torch.fx.node.map_arg(node.args, lambda item: item.meta["val"])
        return convolves_int8(*arguments)

    def error(self, low: frozenset[str]) -> dict[str, float]:
        """The worst of all branches and outputs, with the operations of ``low`` in the low precision."""
        if low not in self._known:
            self._known[low] = _worst(self._errors(low))
        return self._known[low]

    def _errors(self, low: frozenset[str]) -> Iterable[dict[str, float]]:
        for sample, expected in zip(self.samples, self.expected, strict=True):
            got = self._run(sample, low)
            for name, value in expected.items():
                yield _distance(got[name], value, scaled=self.program.scaled)

    def _run(self, sample: Sample, low: frozenset[str], peaks: dict[str, float] | None = None) -> dict[str, Tensor]:
        nodes = {node for node, path in self.nodes.items() if path in low}
        state: dict[str, Any] = {**self.program.program.state_dict, **self.program.program.constants}
        arguments = [
            state[item.target] if item.target in state else sample.inputs[item.arg.name]
            for item in self.program.program.graph_signature.input_specs
        ]
        with torch.no_grad():
            emulated = _Emulated(self, nodes, peaks)
            outputs = emulated.run(*arguments)
        return dict(zip(self.program.output_names, outputs[-len(self.program.output_names) :], strict=True))


class _Emulated(Interpreter):
    """Runs a float32 graph with some of its operations in a lower precision."""

    def __init__(self, probe: Probe, low: set[Node], peaks: dict[str, float] | None) -> None:
        super().__init__(probe.program.program.graph_module)
        self.low, self.dtype, self.paths, self.peaks, self.attention = low, probe.dtype, probe.nodes, peaks, probe.attention

    def run_node(self, n: Node) -> Any:
        if n not in self.low:
            result = super().run_node(n)
            if self.peaks is not None and self.paths.get(n) in self.peaks:
                path = self.paths[n]
                self.peaks[path] = max(self.peaks[path], float(result.detach().abs().nan_to_num(0.0, 0.0).max()))
            return result
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if self.dtype is torch.int8:
            if n.target is aten.convolution.default:
                return convolution_int8(*args)
            x, weight, *bias = args
            return n.target(activations_int8(x, False), columns_int8(weight.t()).t(), *bias)  # type: ignore[operator]
        if n.target is SDPA:
            query, key, value, *others = args
            mask = others[0] if others else kwargs.get("attn_mask")
            return emulated_attention(self.attention, self.dtype, query, key, value, mask, kwargs.get("scale"))
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, self._rounded, (args, kwargs))
        return n.target(*args, **kwargs).float()  # type: ignore[operator]

    def _rounded(self, value: Tensor) -> Tensor:
        return value.to(self.dtype) if value.is_floating_point() else value


def _is_constant(node: Node) -> bool:
    return not node.all_input_nodes


def _distance(got: Tensor, expected: Tensor, *, scaled: bool) -> dict[str, float]:
    """``distance``, of the largest value where ``scaled``; what only picks or hides is right or infinitely far."""
    if torch.equal(got, expected) or not expected.is_floating_point():
        same = torch.equal(got, expected)
        return {"max_abs": 0.0 if same else math.inf, "cosine": 1.0 if same else 0.0}
    if not bool((got.isfinite() == expected.isfinite()).all()):
        return {"max_abs": math.inf, "cosine": 0.0}
    finite = expected.isfinite()  # a mask of numbers has −∞
    found = distance(got[finite], expected[finite])
    largest = float(expected[finite].abs().max()) if scaled else 1.0
    return {**found, "max_abs": found["max_abs"] / (largest or 1.0)}


def _worst(errors: Iterable[dict[str, float]]) -> dict[str, float]:
    """Whatever is not finite counts as infinitely far."""
    largest, cosine = 0.0, 1.0
    for item in errors:
        bad = not math.isfinite(item["max_abs"])
        largest = max(largest, math.inf if bad else item["max_abs"])
        cosine = min(cosine, 0.0 if bad or math.isnan(item["cosine"]) else item["cosine"])
    return {"max_abs": largest, "cosine": cosine}


def _examined(spec: ExportSpec, tokens: int) -> ExportSpec:
    """The same request at sizes that are quick to run many times."""
    changes: dict[str, Any] = {"branches": "select", "verify": "off", "batch": (1, max(2, spec.batch[1]))}
    if spec.interface == "tokens":
        changes["tokens"] = (2, max(4, tokens))
    return spec.model_copy(update=changes)


def _samples(encoder: FusionEncoder, tokens: int) -> list[Sample]:
    spec = encoder.spec
    count = tokens if spec.interface == "tokens" else spec.halved_range[0]
    prompt = min(max(32, spec.prompt_length[0]), spec.prompt_length[1])
    sizes = [Sizes(batch=2, tokens=count, prompt_length=prompt)]
    return samples_for(encoder.input_names, encoder.flag_names, spec, encoder.d_model, len(encoder.layers), sizes)
