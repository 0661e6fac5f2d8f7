"""Runtimes that read an ONNX file and tools that rewrite one, each tried on a file in a process of its own.

``python -m sam3x.bench.tools NAME FOLDER …`` prints a line of JSON for each folder, which holds what ``write_case`` wrote.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

Tensors = dict[str, np.ndarray]

PORTABLE = 1e-5
"""Of an output's largest value: how near a runtime comes to ONNX Runtime."""

_MODEL, _SECONDS = "model.onnx", 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """Something that people use on an ONNX file.

    Attributes:
        package: whose version the page names, on PyPI or npm. call: how it is called, in words.
        run: file and inputs → outputs of each, None where it reads the graph and runs nothing.
        rewrites: file → what it makes of the file, run in ONNX Runtime then; instead of ``run``.
    """

    package: str
    call: str
    run: Callable[[Path, list[Tensors]], list[Tensors] | None] | None = None
    rewrites: Callable[[Path, Path], onnx.ModelProto | Path] | None = None


def _onnxruntime(model: onnx.ModelProto | Path, inputs: list[Tensors]) -> list[Tensors]:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(given, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    return [dict(zip(names, session.run(names, each), strict=True)) for each in inputs]


def _reference_evaluator(path: Path, inputs: list[Tensors]) -> list[Tensors]:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(str(path))
    found = [[np.asarray(value) for value in evaluator.run(None, each)] for each in inputs]
    return [dict(zip(evaluator.output_names, values, strict=True)) for values in found]


def _openvino(path: Path, inputs: list[Tensors]) -> list[Tensors]:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [output.any_name for output in compiled.outputs]
    return [dict(zip(names, (found.copy() for found in compiled(each).values()), strict=True)) for each in inputs]


_NODE = """
const fs = require("fs"), path = require("path"), ort = require("onnxruntime-web");
const types = {float32: Float32Array, int64: BigInt64Array, int32: Int32Array, bool: Uint8Array};
(async () => {
  const folder = process.argv[1], cases = JSON.parse(fs.readFileSync(path.join(folder, "given.json")));
  const session = await ort.InferenceSession.create(fs.readFileSync(cases.model), {executionProviders: ["wasm"]});
  const results = [], seconds = [];
  for (const [index, given] of cases.inputs.entries()) {
    const feeds = {};
    for (const item of given) {
      const bytes = fs.readFileSync(path.join(folder, item.file));
      const copy = bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length);
      feeds[item.name] = new ort.Tensor(item.dtype, new types[item.dtype](copy), item.dims);
    }
    const started = performance.now();
    const found = await session.run(feeds);
    seconds.push((performance.now() - started) / 1000);
    results.push(Object.entries(found).map(([name, tensor], at) => {
      const file = `out-${index}-${at}`;
      const {buffer, byteOffset, byteLength} = tensor.data;
      fs.writeFileSync(path.join(folder, file), Buffer.from(buffer, byteOffset, byteLength));
      return {name, dtype: tensor.type, dims: tensor.dims, file};
    }));
  }
  fs.writeFileSync(path.join(folder, "found.json"), JSON.stringify(results));
  const peak = process.resourceUsage().maxRSS * 1024;
  fs.writeFileSync(path.join(folder, "measured.json"), JSON.stringify({seconds, peak}));
})().catch((error) => { console.error(error.message); process.exit(1); });
"""


def in_node(path: Path, inputs: list[Tensors]) -> tuple[list[Tensors], dict[str, Any]]:
    """Outputs of each of ``inputs`` in onnxruntime-web; ``seconds`` of each run, the process's ``peak`` of memory in bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = []
        for index, each in enumerate(inputs):
            row = []
            for at, (tensor, value) in enumerate(each.items()):
                (folder / f"in-{index}-{at}").write_bytes(np.ascontiguousarray(value).tobytes())
                row.append({"name": tensor, "dtype": str(value.dtype), "dims": value.shape, "file": f"in-{index}-{at}"})
            given.append(row)
        (folder / "given.json").write_text(json.dumps({"model": str(path), "inputs": given}))
        done = subprocess.run(["node", "-e", _NODE, name], capture_output=True, text=True, timeout=_SECONDS)
        if done.returncode:
            raise RuntimeError(done.stderr.strip() or f"node ended with {done.returncode}")
        measured = json.loads((folder / "measured.json").read_text())
        outputs = [
            {
                item["name"]: np.frombuffer((folder / item["file"]).read_bytes(), item["dtype"]).reshape(item["dims"])
                for item in row
            }
            for row in json.loads((folder / "found.json").read_text())
        ]
        return outputs, measured


def _tensorrt_rtx(path: Path, inputs: list[Tensors]) -> None:
    import tensorrt_rtx

    builder = tensorrt_rtx.Builder(tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR))
    network = builder.create_network(0)
    parser = tensorrt_rtx.OnnxParser(network, builder.logger)
    if not parser.parse_from_file(str(path)):
        raise RuntimeError("; ".join(parser.get_error(index).desc() for index in range(parser.num_errors)))


def _shape_inference(path: Path, folder: Path) -> onnx.ModelProto:
    import onnx

    return onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)


def _version_converter(path: Path, folder: Path) -> onnx.ModelProto:
    import onnx
    from onnx import version_converter

    return version_converter.convert_version(onnx.load(path), 21)


def _onnxslim(path: Path, folder: Path) -> onnx.ModelProto:
    import onnxslim

    return onnxslim.slim(str(path))


def _float16(path: Path, folder: Path) -> onnx.ModelProto:
    import onnx
    from onnxconverter_common import float16

    return float16.convert_float_to_float16(onnx.load(path), keep_io_types=True)


def _quant_pre_process(path: Path, folder: Path, **options: Any) -> Path:
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(str(path), str(folder / "out.onnx"), **options)
    return folder / "out.onnx"


def _quantize_dynamic(path: Path, folder: Path) -> Path:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(str(path), str(folder / "out.onnx"))
    return folder / "out.onnx"


def _transformers_optimizer(path: Path, folder: Path) -> Path:
    from onnxruntime.transformers.optimizer import optimize_model

    optimize_model(str(path), model_type="bert").save_model_to_file(str(folder / "out.onnx"))
    return folder / "out.onnx"


TOOLS: Mapping[str, Tool] = {
    "onnx evaluator": Tool(package="onnx", call="`onnx.reference.ReferenceEvaluator`", run=_reference_evaluator),
    "OpenVINO": Tool(package="openvino", call="`Core().compile_model`, CPU, float32", run=_openvino),
    "onnxruntime-web": Tool(
        package="onnxruntime-web", call="`InferenceSession`, WebAssembly, in Node", run=lambda *case: in_node(*case)[0]
    ),
    "TensorRT-RTX parser": Tool(package="tensorrt_rtx", call="`OnnxParser.parse_from_file`; nothing is run", run=_tensorrt_rtx),
    "shape inference": Tool(
        package="onnx", call="`onnx.shape_inference.infer_shapes(strict_mode=True, data_prop=True)`", rewrites=_shape_inference
    ),
    "version converter": Tool(package="onnx", call="`onnx.version_converter`, to opset 21", rewrites=_version_converter),
    "onnxslim": Tool(package="onnxslim", call="`onnxslim.slim`", rewrites=_onnxslim),
    "float16": Tool(
        package="onnxconverter-common", call="`float16.convert_float_to_float16(keep_io_types=True)`", rewrites=_float16
    ),
    "quant_pre_process": Tool(
        package="onnxruntime", call="`onnxruntime.quantization.quant_pre_process`", rewrites=_quant_pre_process
    ),
    "quant_pre_process, shapes by onnx": Tool(
        package="onnxruntime",
        call="the same with `skip_symbolic_shape=True`",
        rewrites=lambda path, folder: _quant_pre_process(path, folder, skip_symbolic_shape=True),
    ),
    "quantize_dynamic": Tool(
        package="onnxruntime", call="`onnxruntime.quantization.quantize_dynamic`, int8", rewrites=_quantize_dynamic
    ),
    "transformers optimizer": Tool(
        package="onnxruntime",
        call='`onnxruntime.transformers.optimizer.optimize_model(model_type="bert")`',
        rewrites=_transformers_optimizer,
    ),
}


def missing(tool: Tool) -> str | None:
    """How to install what ``tool`` needs; None where it is here."""
    if tool.package == "onnxruntime-web":
        found = shutil.which("node") and not subprocess.run(
            ["node", "-e", "require.resolve('onnxruntime-web')"], capture_output=True
        ).returncode  # fmt: skip
        return None if found else "npm install onnxruntime-web"
    return None if package_version(tool) else f"pip install {tool.package}"


def package_version(tool: Tool) -> str | None:
    """Of what ``tool`` comes with; None where it is not installed."""
    if tool.package == "onnxruntime-web":
        script = "console.log(JSON.parse(require('fs').readFileSync(require('path').join(require.resolve('onnxruntime-web'),"
        script += " '..', '..', 'package.json'))).version)"
        done = subprocess.run(["node", "-e", script], capture_output=True, text=True) if shutil.which("node") else None
        return done.stdout.strip() if done is not None and not done.returncode else None
    try:
        return version(tool.package)
    except PackageNotFoundError:
        return None


def write_case(folder: Path, model: Path, inputs: Sequence[Tensors]) -> None:
    """Copy ``model`` into ``folder``, without weights beside it, and what ONNX Runtime gives for ``inputs``."""
    folder.mkdir(parents=True)
    shutil.copyfile(model, folder / _MODEL)
    inputs = _known(folder / _MODEL, inputs)
    found = _onnxruntime(folder / _MODEL, inputs)
    for index, (given, outputs) in enumerate(zip(inputs, found, strict=True)):
        np.savez(folder / f"inputs-{index}.npz", **given)  # type: ignore[arg-type]
        np.savez(folder / f"outputs-{index}.npz", **outputs)  # type: ignore[arg-type]


def _known(model: Path, inputs: Sequence[Tensors]) -> list[Tensors]:
    """``inputs`` without what the graph does not read."""
    import onnxruntime

    names = {item.name for item in onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"]).get_inputs()}
    return [{name: value for name, value in each.items() if name in names} for each in inputs]


def attempt(name: str, folder: Path) -> float | None:
    """The furthest that an output is from ONNX Runtime's, of its largest value; None where nothing is run.

    Raises:
        Exception: whatever the tool, or ONNX Runtime with what the tool wrote, raises.
    """
    tool = TOOLS[name]
    count = len(list(folder.glob("inputs-*.npz")))
    inputs, expected = ([dict(np.load(folder / f"{kind}-{i}.npz")) for i in range(count)] for kind in ("inputs", "outputs"))
    if tool.run is not None:
        found = tool.run(folder / _MODEL, inputs)
    else:
        assert tool.rewrites is not None
        with tempfile.TemporaryDirectory() as scratch:
            found = _onnxruntime(tool.rewrites(folder / _MODEL, Path(scratch)), inputs)
    if found is None:
        return None
    return max(distance(got[key], want) for got, wants in zip(found, expected, strict=True) for key, want in wants.items())


def distance(got: np.ndarray, want: np.ndarray) -> float:
    if got.shape != want.shape:
        return float("inf")
    if want.size == 0:
        return 0.0
    off = np.abs(got.astype(np.float64) - want.astype(np.float64)).max()
    return float(off / max(np.abs(want.astype(np.float64)).max(), 1e-30))


def try_tool(name: str, folders: Sequence[Path]) -> dict[Path, float | str | None]:
    """Folder → what ``attempt`` gives, or a reason; a crash costs the folder it happened in."""
    found: dict[Path, float | str | None] = {}
    while waiting := [folder for folder in folders if folder not in found]:
        command = [sys.executable, "-m", "sam3x.bench.tools", name, *map(str, waiting)]
        with tempfile.TemporaryDirectory() as scratch:  # tools leave files where they run
            environment = node_environment()
            try:
                done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=environment, timeout=_SECONDS)
                output, ending = done.stdout, f"its process ended with {done.returncode}"
            except subprocess.TimeoutExpired as error:
                output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
                ending = f"it took more than {_SECONDS} s"
        lines = [json.loads(line.removeprefix(_MARK)) for line in output.splitlines() if line.startswith(_MARK)]
        found.update(zip(waiting, (line["off"] if "off" in line else line["error"] for line in lines), strict=False))
        if len(lines) < len(waiting):
            found[waiting[len(lines)]] = ending
    return found


def node_environment() -> dict[str, str]:
    """That of a process that may start Node: modules of this folder, unless ``NODE_PATH`` says otherwise."""
    return {**os.environ, "NODE_PATH": os.environ.get("NODE_PATH", str(Path("node_modules").absolute()))}


_MARK = "sam3x "


def _main(name: str, folders: Sequence[str]) -> None:
    for folder in folders:
        try:
            line: dict[str, Any] = {"off": attempt(name, Path(folder))}
        except Exception as error:
            text = " ".join(str(error).split())
            line = {"error": f"{type(error).__name__}: {text}" if text else type(error).__name__}
        print(f"\n{_MARK}{json.dumps(line)}", flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2:])
