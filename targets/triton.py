"""``--layout triton``: the output folder as a model repository of Triton Inference Server.

Names and rules: Triton's ``model_config.proto`` and docs/user_guide/model_configuration.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sam3x.capture.program import CapturedProgram

Layout = Literal["flat", "triton"]
DESCRIPTION = "flat, or triton: the folder is a model repository for Triton Inference Server."

_TYPES = {
    "bool": "TYPE_BOOL",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
}
_VERSION = "1"


def model_path(stem: str, suffix: str) -> str:
    """``fusion_encoder/1/model.onnx``: the model's folder, a version's folder, the name its backend looks for."""
    return f"{stem}/{_VERSION}/model{suffix}"


def write_config(captured: CapturedProgram, path: Path, backend: str) -> dict[str, Any]:
    """Write ``config.pbtxt`` above the version's folder; returns metadata for the manifest.

    Args:
        path: the artifact, as ``model_path`` names it. backend: ``onnxruntime`` or ``tensorrt``.
    """
    model = path.parent.parent
    batch = dynamic_batch(captured)
    (model / "config.pbtxt").write_text(config_text(captured, model.name, backend, batch))
    batching = f"dynamic batching up to {batch}" if batch else "the batch is a dimension of each request"
    return {"triton": f"{backend}, {batching}"}


def dynamic_batch(captured: CapturedProgram) -> int:
    """The largest batch Triton may put together out of requests; 0 where it must not.

    It adds a first dimension to every input and output. Runtime flags have none, seq-first prompts have it second, features of
    one picture are not a row a prompt, and dac treats the first half of a batch differently, so that requests would change each
    other's answers.
    """
    nodes = {node.name: node for node in captured.program.graph.nodes if node.op == "placeholder"}
    results = captured.program.graph.output_node().args[0]
    values = [*(nodes[name].meta["val"] for name in captured.input_names), *(node.meta["val"] for node in results)]
    first = {captured.dim_names.get(str(value.shape[0])) if value.shape else None for value in values}
    low, high = captured.ranges.get(str(next(iter(first))), (0, 0)) if len(first) == 1 else (0, 0)
    return high if captured.halved is None and low == 1 < high else 0


def config_text(captured: CapturedProgram, name: str, backend: str, batch: int) -> str:
    """``config.pbtxt`` in protobuf's text format."""
    nodes = {node.name: node for node in captured.program.graph.nodes}
    results = captured.program.graph.output_node().args[0]
    inputs = [_tensor(item, nodes[item].meta["val"], batch) for item in captured.input_names]
    outputs = [_tensor(item, node.meta["val"], batch) for item, node in zip(captured.output_names, results, strict=True)]
    batching = "dynamic_batching { }\n" if batch else ""
    if name == "text_encoder":  # the same words come again; used where the server is started with --cache-config
        batching += "response_cache { enable: true }\n"
    return (
        f'name: "{name}"\nbackend: "{backend}"\nmax_batch_size: {batch}\n'
        f"input [\n{_joined(inputs)}\n]\noutput [\n{_joined(outputs)}\n]\n"
        f"version_policy {{ latest {{ num_versions: 1 }} }}\n{batching}"
    )


def _joined(tensors: list[str]) -> str:
    return ",\n".join(tensors)


def _tensor(name: str, value: Any, batch: int) -> str:
    sizes = [size if isinstance(size, int) else -1 for size in value.shape[1 if batch else 0 :]]
    kind = _TYPES[str(value.dtype).removeprefix("torch.")]
    if not sizes:  # a scalar: Triton's requests have at least one dimension
        return f'  {{ name: "{name}", data_type: {kind}, dims: [ 1 ], reshape {{ shape: [ ] }} }}'
    return f'  {{ name: "{name}", data_type: {kind}, dims: [ {", ".join(map(str, sizes))} ] }}'
