"""``sam3x compatibility --tools``: small exports in every form, and who else than ONNX Runtime reads them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sam3x import api
from sam3x.bench.tools import PORTABLE, TOOLS, Tool, missing, package_version, try_tool, write_case
from sam3x.capture.samples import Sizes, make_inputs
from sam3x.fusion.config import FusionConfig
from sam3x.pipeline.compatibility import WITH_CLICKS
from sam3x.pipeline.fuse import export_fused, fused
from sam3x.pipeline.job import ComponentJob
from sam3x.pipeline.request import PARTS, resolve_pipeline
from sam3x.pipeline.samples import samples_of
from sam3x.sources.encoder import build_encoder, draw_weights
from sam3x.sources.image import random_image_source
from sam3x.spec import make_spec

CONFIG = FusionConfig(d_model=64, num_heads=4, dim_feedforward=128, num_layers=2)
FORMS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "select": {"branches": "select"},
    "ort": {"attention": "ort"},
    "decomposed": {"attention": "decomposed"},
}
"""Name → options of ``sam3x.export``; the encoder is small, and its attention may take little, so that it is in loops."""

UNTRIED = "not tried"
"""How the reason begins where a tool is not installed."""

Found = Mapping[str, Mapping[str, float | str | None]]
"""Tool → file → what ``tools.attempt`` gives, or why there is nothing."""


def portability(tell: Callable[[str], None] = lambda _: None, forms: Sequence[str] = (), tools: Sequence[str] = ()) -> Found:
    """Export the encoder in ``FORMS``, each component and the fused file, and try ``TOOLS`` on each of them.

    Args:
        forms: of the encoder alone, and no components. tools: only these.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = encoder_files(folder, forms or tuple(FORMS), tell)
        if not forms:
            files |= component_files(folder, tell)
        found: dict[str, dict[str, float | str | None]] = {}
        for tool in tools or tuple(TOOLS):
            tell(tool)
            absent = missing(TOOLS[tool])
            tried = {} if absent else try_tool(tool, list(files.values()))
            found[tool] = {file: f"{UNTRIED}: {absent}" if absent else tried[path] for file, path in files.items()}
        return found


def encoder_files(folder: Path, forms: Sequence[str], tell: Callable[[str], None] = lambda _: None) -> dict[str, Path]:
    """Form → a folder that ``tools.attempt`` takes."""
    encoder = build_encoder(CONFIG).eval()
    draw_weights(encoder, seed=3)
    files = {}
    for form in forms:
        tell(f"fusion encoder, {form}")
        output = folder / "exports" / form
        options = {"tokens": (16, 256), "attention_memory": "100KB", "verify": "off", **FORMS[form]}
        artifact = api.export(encoder, output=output, **options)
        spec = make_spec(**artifact.manifest.spec)
        names = tuple(name for name in artifact.manifest.input_names if name not in ("dac", "pre_norm"))
        given = make_inputs(names, spec, CONFIG.d_model, Sizes(batch=4, tokens=61, prompt_length=9), 1)
        flags = ({"dac": dac, "pre_norm": pre_norm} for dac, pre_norm in ((True, True), (False, True), (False, False)))
        files[form] = folder / form
        write_case(files[form], artifact.path, [{**_arrays(given), **_arrays(each)} for each in flags])
    return files


def component_files(folder: Path, tell: Callable[[str], None] = lambda _: None) -> dict[str, Path]:
    """Each component of a small SAM3 and those of ``--fuse`` as one → a folder that ``tools.attempt`` takes."""
    request = resolve_pipeline("onnx", {"verify": "off", "attention_memory": "20KB"}, fuse=True)
    model = random_image_source(WITH_CLICKS)(request.spec)
    samples, made, files = samples_of(model, request), {}, {}
    work = folder / "components"
    work.mkdir()
    job = ComponentJob(request, work, tell)
    for component in model.components:
        made[component.name] = job.export(component, samples[component.name])
        files[component.name] = folder / component.name
        given = [_arrays(sample.inputs) for sample in samples[component.name]]
        write_case(files[component.name], work / made[component.name].file, given)
    joined = fused(model.components)
    joined_samples = joined.samples(samples)
    segmenter = export_fused(job, joined, {name: made[name] for name in PARTS}, joined_samples)
    files["fused"] = folder / "fused"
    write_case(files["fused"], work / segmenter.file, [_arrays(sample.inputs) for sample in joined_samples])
    return files


def _arrays(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {name: value.numpy() if isinstance(value, Tensor) else np.array(value) for name, value in tensors.items()}


def markdown(found: Found) -> str:
    """The page ``docs/onnx-tools.md``."""
    files = list(next(iter(found.values())))
    lines = [
        "# Who reads the ONNX files",
        "",
        "Made by `sam3x compatibility --tools -o docs/onnx-tools.md`, out of a small fusion encoder exported in four forms,",
        "and the components of a small SAM3 with what `--fuse` makes of them, all of random weights. A number is the",
        "furthest that any output is from ONNX Runtime's with the file as it was exported, of the output's largest value;",
        "tools that write another file are judged by that file in ONNX Runtime. Other sizes: of a fused file, whose",
        "scores, once weights are rounded, are above the threshold another number of times.",
        "",
        "**Which form:** the default (`--attention portable`) has standard operators alone, for any runtime that takes them;",
        f"{_unread(found)} `--attention ort` is for ONNX Runtime.",
        "How many detections a fused file lists follows from a float threshold, and NonZero finds them; TensorRT-RTX's",
        "parser has a form for neither: give it the components, or let `--target trt` build their engines. ONNX Runtime's",
        "transformers optimizer looks one sub-graph deep: it drops what an `If` gives to another alone, and what a loop",
        "in a loop alone reads. Give it an encoder of `--branches select`; a text encoder keeps its mask where attention",
        "is in no loop, as it is unless `--attention-memory` is tiny (here 20 KB). It takes norms over channels, which a head",
        "for clicks has, for norms over the last dimension, and the file's numbers are wrong: set `enable_layer_norm` of its",
        "`FusionOptions` to False, and they are right. `quant_pre_process` needs",
        "`skip_symbolic_shape=True`: its own inference takes groups of heads, whose number is worked out at run time, for",
        "sizes that do not fit, and fails on products and on sizes of loops; onnx's infers every file.",
        "",
        "| | how it is called |",
        "|---|---|",
        *(f"| {name} {package_version(TOOLS[name]) or ''} | {TOOLS[name].call} |" for name in found),
    ]
    notes: list[str] = []
    for title, columns in (
        ("Fusion encoder", [name for name in files if name in FORMS]),
        ("Components", [name for name in files if name not in FORMS]),
    ):
        if not columns:
            continue
        lines += ["", f"## {title}", "", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for tool, row in found.items():
            lines.append(f"| {tool} | " + " | ".join(_cell(TOOLS[tool], row[name]) for name in columns) + " |")
            reasons: dict[str, list[str]] = {}
            for name in columns:
                result = row[name]
                if isinstance(result, str):
                    reasons.setdefault(_short(result), []).append(name)
            notes += [f"- {tool}, {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    return "\n".join([*lines, *(["", "## Why not", "", *notes] if notes else []), ""])


def _unread(found: Found) -> str:
    """Which files of the default form a runtime was tried on and failed, in a sentence."""
    failed = []
    for tool, row in found.items():
        names = [
            name
            for name, result in row.items()
            if (name == "default" or name not in FORMS) and _cell(TOOLS[tool], result).startswith(("no", "other", "**"))
        ]
        if TOOLS[tool].run is not None and names:
            failed.append(f"{tool} fails on {', '.join(names)}")
    return f"{'; '.join(failed)}." if failed else "those that were tried read every file of it."


def _cell(tool: Tool, result: float | str | None) -> str:
    if isinstance(result, str):
        return "untried" if result.startswith(UNTRIED) else "no"
    if result is None:
        return "reads it"
    if result == float("inf"):
        return "other sizes"
    return f"{result:.0e}" if tool.run is None or result <= PORTABLE else f"**{result:.0e}**"


def _short(reason: str) -> str:
    """One line of a reason, without paths of this machine."""
    text = re.sub(r"(?:/[\w.+-]+)+/", "", " ".join(reason.split()))
    return (text[:237] + " …" if len(text) > 240 else text).replace("|", "\\|").replace("<", "\\<")
