"""The oracle: an export run in its own runtime against Meta's layers, and against other exports that must give the same."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sam3x
from sam3x.capture import component
from sam3x.errors import BuilderError, CaptureError, LoweringError
from sam3x.fusion.encoder import FusionEncoder
from sam3x.pipeline.request import resolve
from sam3x.spec import make_spec
from sam3x.targets.registry import get_target
from sam3x.verify.compare import ABSOLUTE, EAGER_FACTOR, eager_distances
from support.attention_styles import BELOW_FLOAT32, ORDERED, REFUSED
from support.counts import BUILDER_FAILED, COUNTS
from support.strategies import Case, InputsCase
from support.upstream import double, rounded_encoder, run_layers


class Difference(AssertionError):
    """Two things that must be equal are not."""


@contextlib.contextmanager
def shared_captures() -> Iterator[None]:
    """One capture for exports of one encoder that differ after it: captures are left as they are by the pipeline."""
    original = component.capture_encoder
    known: dict[Any, Any] = {}

    def capture(encoder: FusionEncoder) -> Any:
        held = tuple(encoder.parameters())  # the user's own, or those that are rounded
        key = (tuple(map(id, held)), encoder.spec.model_copy(update={"branches": None, "verify": "off"}))
        if key not in known:
            known[key] = (held, original(encoder))
        return known[key][1]

    component.capture_encoder = capture
    try:
        yield
    finally:
        component.capture_encoder = original


def check(case: Case) -> None:
    """Export, run every branch at every size, compare.

    Raises:
        Difference: which branch, at which sizes, how far off.
        Sam3xError: an export that must succeed does not.
    """
    folder = Path(tempfile.mkdtemp(prefix="sam3x-fuzz-"))
    try:
        with shared_captures():
            module = case.encoder.build()
            for position, lowering in enumerate(case.lowerings):
                try:
                    artifact = export(case, module, {**case.spec, **lowering}, folder / str(position))
                except BuilderError:
                    COUNTS[f"{case.target} {BUILDER_FAILED}"] += 1
                    return
                except LoweringError as error:
                    if not _known_limit(case, error):
                        raise
                    COUNTS[f"{case.target} refusals"] += 1
                    return
                except CaptureError as error:
                    if not _below_float32(case) or "torch.autocast on line" not in str(error):
                        raise
                    COUNTS[f"{case.target} refusals"] += 1
                    return
                if _below_float32(case):
                    raise Difference("autocast inside an attention was exported")
                if _runs_here(artifact):
                    for run in case.runs:
                        _against_upstream(case, with_its_weights(module, artifact), artifact, run)
            if _runs_here(artifact):
                _relations(case, module, artifact, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def export(case: Case, module: nn.Module, options: Mapping[str, Any], folder: Path) -> sam3x.Artifact:
    COUNTS[f"{case.target} configurations"] += 1
    target = get_target(case.target)
    own = resolve(target, options).options
    # every sixth also goes through the exporter's own verification, which must let it pass; what cannot run here always
    verify = "final" if case.encoder.seed % 6 == 5 or target.unverifiable(own) else "off"
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.ambient == "autocast"):
        return sam3x.export(module, target=case.target, output=folder, verify=verify, **options)


def _below_float32(case: Case) -> bool:
    return bool(set(case.encoder.styles) & set(BELOW_FLOAT32))


def _known_limit(case: Case, error: LoweringError) -> bool:
    """TensorRT follows some sizes into no conditional and no loop; ExecuTorch and Core ML take no size that a flag decides."""
    by_flag = case.spec["dac"] == "runtime" or (case.spec["dac"] is True and case.spec["pre_norm"] in ("runtime", "per-layer"))
    if case.target in ("pte", "coreml"):
        halved = case.spec["dac"] is not False and case.spec["dac_dim"] == 1
        return halved and "a size that dac decides is left" in str(error)
    dynamic = not isinstance(case.spec.get("tokens", 1), int) and case.spec["dac"] == "runtime"
    halved_tokens = case.spec["dac"] == "runtime" and case.spec["dac_dim"] == 1 and case.encoder.styles[0] in REFUSED
    halves = dynamic or (by_flag and case.spec["dac"] is True) or halved_tokens
    return case.target == "trt" and halves and "Data-dependent shapes" in str(error)


def _runs_here(artifact: sam3x.Artifact) -> bool:
    """An engine for another GPU does not; its target compares the graph it is built from (``verify="final"``)."""
    target = get_target(artifact.manifest.target)
    return target.unverifiable(target.options_type(**artifact.manifest.target_options)) is None


# ---- against Meta's layers


def with_its_weights(module: nn.Module, artifact: sam3x.Artifact) -> nn.Module:
    """The encoder with the weights that the artifact holds: its own, or those rounded."""
    target = get_target(artifact.manifest.target)
    precision = target.numerics(target.options_type(**artifact.manifest.target_options)).weights
    return module if precision is None else rounded_encoder(module, make_spec(**artifact.manifest.spec), precision)


def flags_of(case: Case, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every branch: values of the flags that are inputs."""
    choices = []
    if options["dac"] == "runtime":
        choices.append([("dac", value) for value in (False, True)])
    if options["pre_norm"] == "runtime":
        choices.append([("pre_norm", value) for value in (False, True)])
    if options["pre_norm"] == "per-layer":
        layers = len(case.encoder.pre_norm)
        patterns = {tuple(i % 2 == shift for i in range(layers)) for shift in (0, 1)} | {(True,) * layers}
        choices.append([("pre_norm", np.array(value)) for value in sorted(patterns)])
    return [dict(combination) for combination in itertools.product(*choices)]


def branch_of(case: Case, options: Mapping[str, Any], flags: Mapping[str, Any]) -> tuple[bool, list[bool]]:
    """(dac, pre_norm of each layer) that an artifact works with."""
    dac = bool(flags.get("dac", options["dac"]))
    own = case.encoder.pre_norm
    pre = flags.get("pre_norm", own if options["pre_norm"] == "module" else options["pre_norm"])
    return dac, [bool(value) for value in (pre if isinstance(pre, (tuple, np.ndarray)) else [pre] * len(own))]


def runnable(options: Mapping[str, Any], run: InputsCase, dac: bool) -> bool:
    """dac halves an even dimension."""
    return not dac or (run.batch if options["dac_dim"] == 0 else run.tokens) % 2 == 0


def inputs_of(case: Case, artifact: sam3x.Artifact, options: Mapping[str, Any], run: InputsCase) -> dict[str, Tensor]:
    names = tuple(name for name in artifact.manifest.input_names if name not in ("dac", "pre_norm"))
    return run.make(names, case.encoder.d_model, options.get("mask_dtype", "bool"), options.get("feature_sizes", ()))


def _against_upstream(case: Case, module: nn.Module, artifact: sam3x.Artifact, run: InputsCase) -> None:
    inputs = inputs_of(case, artifact, case.spec, run)
    for flags in flags_of(case, case.spec):
        dac, pre = branch_of(case, case.spec, flags)
        if runnable(case.spec, run, dac):
            got = artifact.run({**inputs, **flags})
            eager = partial(expected, case, module, dac, pre)
            single, exact = eager(inputs), eager(double(inputs))
            probed = cache(partial(eager_distances, eager, inputs, exact))
            for name, value in single.items():
                where = f"{name}, dac={dac} pre_norm={pre} at {run}"
                _near(case, where, torch.as_tensor(got[name]), value, exact[name], partial(_of, probed, name))


def expected(case: Case, module: nn.Module, dac: bool, pre: list[bool], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Meta's own layers on tokens; for maps the eager definition, which other tests compare with Meta's whole encoder."""
    if not case.encoder.levels:
        branch = {"dac": dac, "pre_norm": pre, "dac_dim": case.spec["dac_dim"]}
        return {"output": run_layers(list(module), inputs, **branch)}
    spec = make_spec(**{**case.spec, "dac": "runtime" if dac else False, "pre_norm": "per-layer"})
    flags = {"dac": torch.tensor(True)} if dac else {}
    return FusionEncoder(module, spec).eager({**inputs, **flags, "pre_norm": torch.tensor(pre)})


def _of(probed: Callable[[], Mapping[str, float]], name: str) -> float:
    return probed()[name]


def _near(
    case: Case, where: str, got: Tensor, single: Tensor, exact: Tensor, probed: Callable[[], float] = lambda: 0.0
) -> None:
    """docs/decisions/0004; where eager float64 itself is not a number nothing is promised (0003)."""
    COUNTS[f"{case.target} comparisons"] += 1
    if got.shape != single.shape or got.dtype != single.dtype:
        raise Difference(f"{where}: {got.dtype} {tuple(got.shape)}, expected {single.dtype} {tuple(single.shape)}")
    if not got.is_floating_point():
        if not torch.equal(got, single):
            raise Difference(f"{where}: values differ")
        return
    defined = ~(exact.isnan() | single.isnan())
    got, single, exact = (value[defined].double() for value in (got, single, exact))
    if not got.numel():
        return
    off, far, own = ((a - b).abs().max().item() for a, b in ((got, single), (got, exact), (single, exact)))
    if off > ABSOLUTE and far > EAGER_FACTOR * own:
        own = max(own, probed())
    if not (off <= ABSOLUTE or far <= EAGER_FACTOR * own):
        raise Difference(f"{where}: {off:.1e} from eager, {far:.1e} from float64 where eager is {own:.1e}")


# ---- relations that need no oracle


def _relations(case: Case, module: nn.Module, artifact: sam3x.Artifact, folder: Path) -> None:
    for run in case.runs:
        _one_by_one(case, artifact, run)
        _permuted_prompt(case, artifact, run)
    if case.relation == "fixed":
        _fixed(case, module, artifact, folder)
    if case.relation == "no_masks" and case.spec.get("mask_dtype", "bool") == "bool":
        left = tuple(name for name in case.spec["inputs"] if not name.endswith("mask"))
        if left != case.spec["inputs"]:
            other = export(case, module, {**case.spec, **case.lowerings[-1], "inputs": left}, folder / "no masks")
            for run in case.runs:
                _without_masks(case, artifact, other, replace(run, hidden="none"))


def _fixed(case: Case, module: nn.Module, artifact: sam3x.Artifact, folder: Path) -> None:
    """An artifact with its flags fixed against the one with runtime inputs, in one branch."""
    wanted = [flags for flags in flags_of(case, case.spec) if flags and not isinstance(flags.get("pre_norm"), np.ndarray)]
    run = case.runs[0]
    wanted = [flags for flags in wanted if runnable(case.spec, run, branch_of(case, case.spec, flags)[0])]
    wanted = [flags for flags in wanted if branch_of(case, case.spec, flags) != (True, [False] * len(case.encoder.pre_norm))]
    if not wanted:
        return
    flags = wanted[case.encoder.seed % len(wanted)]
    other = {**case.spec, **case.lowerings[-1], **flags}
    if other["dac"] is True and other["pre_norm"] is False:
        return  # refused, as upstream's post-norm layer ignores dac
    if other["dac"] is True:
        dim = "batch" if other["dac_dim"] == 0 else "tokens"
        bounds = other.get(dim, (2, 2))
        if (bounds if isinstance(bounds, int) else bounds[1]) < 2 or case.encoder.levels:
            return
    fixed = export(case, module, other, folder / "fixed")
    inputs = inputs_of(case, artifact, case.spec, run)
    _equal(case, f"flags {flags} fixed at {run}", artifact.run({**inputs, **flags}), fixed.run(inputs))


def _without_masks(case: Case, masked: sam3x.Artifact, plain: sam3x.Artifact, run: InputsCase) -> None:
    """Masks that hide nothing against no masks."""
    inputs = inputs_of(case, masked, case.spec, run)
    fewer = {name: value for name, value in inputs.items() if name in plain.manifest.input_names}
    for flags in flags_of(case, case.spec):
        if runnable(case.spec, run, branch_of(case, case.spec, flags)[0]):
            got, same = masked.run({**inputs, **flags}), plain.run({**fewer, **flags})
            _equal(case, f"no masks, {flags} at {run}", {name: got[name] for name in same}, same)


def _one_by_one(case: Case, artifact: sam3x.Artifact, run: InputsCase) -> None:
    """A batch of several gives what its items give alone, where dac does not halve the batch."""
    low, _ = artifact.manifest.ranges["batch"]
    if run.batch < 2 or low > 1 or case.encoder.levels:
        return
    inputs = inputs_of(case, artifact, case.spec, run)
    for flags in flags_of(case, case.spec):
        dac, _ = branch_of(case, case.spec, flags)
        if (dac and case.spec["dac_dim"] == 0) or not runnable(case.spec, run, dac):
            continue
        whole = artifact.run({**inputs, **flags})["output"]
        for index in (0, run.batch - 1):
            shared = ("tgt_mask", "memory_mask")
            one = {name: value if name in shared else value[index : index + 1] for name, value in inputs.items()}
            got = artifact.run({**one, **flags})["output"]
            _equal(case, f"item {index} alone, {flags} at {run}", {"output": whole[index : index + 1]}, {"output": got})


def _permuted_prompt(case: Case, artifact: sam3x.Artifact, run: InputsCase) -> None:
    """The order of the prompt's tokens means nothing once their positions and masks are permuted with them."""
    if run.prompt_length < 2 or case.encoder.levels or case.encoder.styles[1] in ORDERED:
        return
    order = torch.randperm(run.prompt_length, generator=torch.Generator().manual_seed(run.seed))
    inputs = inputs_of(case, artifact, case.spec, run)
    moved = {
        name: value[:, order] if name in ("memory", "pos", "memory_mask", "memory_key_padding_mask") else value
        for name, value in inputs.items()
    }
    for flags in flags_of(case, case.spec):
        if runnable(case.spec, run, branch_of(case, case.spec, flags)[0]):
            where = f"permuted prompt, {flags} at {run}"
            _equal(case, where, artifact.run({**inputs, **flags}), artifact.run({**moved, **flags}))


def _equal(case: Case, where: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """Within twice the tolerance: each side may be that far from eager; peaked scores widen float32 itself."""
    allowed = 2 * ABSOLUTE * (1 if case.encoder.peaked == 1 else 200)
    for name in left:
        COUNTS[f"{case.target} comparisons"] += 1
        a, b = np.asarray(left[name], np.float64), np.asarray(right[name], np.float64)
        both = ~(np.isnan(a) & np.isnan(b))
        gap = np.abs(a - b)[both].max(initial=0.0)
        if not gap <= allowed * max(1.0, np.abs(a[both]).max(initial=0.0)):
            raise Difference(f"{where}: '{name}' differs by {gap:.1e}")
