"""The table of docs/tensorrt.md: the default encoder in every precision for each GPU, and what the manifests say.

.venv/bin/python docs/tensorrt_figures.py                 # all of it: eighteen exports
.venv/bin/python docs/tensorrt_figures.py --precision fp16 --flags runtime --gpu sm89
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

FLAGS = {
    "fixed": "--dac off --pre-norm on --prompt-length 32",
    "runtime": "--branches select",
    "conditionals": "--branches cond",
}
PRECISIONS, GPUS = ("fp32", "fp16", "bf16"), ("sm89", "sm80")


def metadata_of(precision: str, flags: str, gpu: str) -> dict[str, Any]:
    """The metadata of the file of one export, and the seconds that the command took in all."""
    with tempfile.TemporaryDirectory() as folder:
        command = f"export --target trt --batch 1 --verify off --compute-capability {gpu} --precision {precision} -q"
        words = [sys.executable, "-m", "sam3x", *command.split(), *FLAGS[flags].split(), "-o", folder]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
    return {**manifest["components"][0]["metadata"], "seconds": manifest["metrics"]["total_seconds"]}


def attention(metadata: dict[str, Any]) -> str:
    """How many attentions there are of each kind."""
    layers, loops = metadata["attention_layers"], metadata["tiled_attention_loops"]
    rest = metadata["attentions"] - layers - loops
    kinds = {"layers": layers, "loops over tiles": loops, "products and softmax": rest}
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)


def row(precision: str, flags: str, gpus: list[str]) -> str:
    found = [metadata_of(precision, flags, gpu) for gpu in gpus]

    def each(name: str, form: str, scale: float = 1.0) -> str:
        values = [format(metadata[name] / scale, form) for metadata in found]
        return values[0] if len(set(values)) == 1 else " / ".join(values)

    kinds = " / ".join(dict.fromkeys(attention(metadata) for metadata in found))
    cells = (each("engine_bytes", ".1f", 1e6), each("activation_bytes", ".0f", 1e6), kinds)
    times = (each("build_seconds", ".0f"), each("seconds", ".0f"))
    return f"| {precision} | {flags} | {' | '.join((*cells, *times))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=PRECISIONS, action="append")
    parser.add_argument("--flags", choices=FLAGS, action="append")
    parser.add_argument("--gpu", action="append", help="default: sm89 and sm80")
    options = parser.parse_args()
    gpus = options.gpu or list(GPUS)
    print(f"| precision | flags | engine, MB | activations, MB | attention | build, s ({' / '.join(gpus)}) | export, s |")
    print("|---|---|---|---|---|---|---|")
    for flags in options.flags or FLAGS:
        for precision in options.precision or PRECISIONS:
            print(row(precision, flags, gpus), flush=True)


if __name__ == "__main__":
    main()
