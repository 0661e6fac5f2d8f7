"""What several test files share: a small encoder and a small image model of Meta's own classes, and their artifacts."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import pytest

if TYPE_CHECKING:
    from torch import nn

    from support.folders import MadeOnce

# torch's threads, here and in what tests start: at these sizes, beside other workers, two threads take 30 times the CPU of one
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.set_threshold(50_000, 20, 20)  # traces make millions of objects that live: a tenth of the time went into counting them

SMALL = {"d_model": 32, "num_layers": 1, "num_heads": 4, "dim_feedforward": 64}
"""``FusionConfig`` fields of the encoder that is quick to export."""
OF_THE_CAPTURE = {"capture", "fusion", "test_fuzz.py", "test_threads.py"}
"""Where every encoder is traced anew."""


def pytest_collection_finish() -> None:
    """Leave what was imported out of every later collection: each export ends with one."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Share the traces of Meta's layers, but for tests of the capture itself."""
    if "torch" in sys.modules:  # else nothing is captured in this process
        from support.traces import share

        share(item.path.relative_to(Path(__file__).parent).parts[0] not in OF_THE_CAPTURE)


@pytest.fixture(scope="session")
def small_encoder() -> nn.Module:
    """One layer, width 32, weights drawn with seed 3."""
    from sam3x.fusion.config import FusionConfig
    from sam3x.sources.encoder import build_encoder, draw_weights

    encoder = build_encoder(FusionConfig(**SMALL)).eval()
    draw_weights(encoder, seed=3)
    return encoder


@pytest.fixture(scope="module")
def onnxruntime_web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """onnxruntime-web from npm's registry, where Node finds it."""
    from sam3x.web.packages import ORT

    folder = tmp_path_factory.mktemp("web")
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", str(ORT)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NODE_PATH", str(folder / "node_modules"))
        yield


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Give a name and what writes an exported folder; the first worker of a run that asks has it written. Read only."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # a worker's folder is inside the run's

    def folder(name: str, write: Callable[[Path], object]) -> Path:
        with FileLock(str(root / f"{name}.lock")):
            if not (root / name / "manifest.json").exists():
                write(root / name)
        return root / name

    return folder


@pytest.fixture(scope="session")
def default_artifact(small_encoder: nn.Module, made_once: MadeOnce) -> Path:
    """Folder of ``small_encoder`` exported with the default options. Read only: copy it before changing it."""
    import sam3x

    return made_once("default_artifact", lambda folder: sam3x.export(small_encoder, target="onnx", output=folder))


@pytest.fixture(scope="session")
def tiny_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The vocabulary of ``tiny_model``."""
    from support.image_model import write_vocabulary

    return write_vocabulary(tmp_path_factory.mktemp("bpe") / "bpe.txt.gz")


@pytest.fixture(scope="session")
def tiny_model(tiny_vocabulary: Path) -> Iterator[nn.Module]:
    """A small ``Sam3Image`` with upstream's tokenizer. Shared, so not to be changed: it is compared with itself at the end."""
    from support.image_model import state_of, tiny_image_model

    model = tiny_image_model(tiny_vocabulary)
    before = state_of(model)
    yield model
    assert state_of(model) == before, "a test changed tiny_model"


@pytest.fixture(scope="session")
def tiny_pipeline(request: pytest.FixtureRequest, made_once: MadeOnce) -> Path:
    """Folder of ``tiny_model`` exported whole. Read only."""

    def write(folder: Path) -> None:
        from sam3x.pipeline import export_pipeline, module_image_source

        # asked for here: a worker that finds the folder builds no model
        model, vocabulary = request.getfixturevalue("tiny_model"), request.getfixturevalue("tiny_vocabulary")
        export_pipeline(module_image_source(model), output=folder, tokenizer=vocabulary)

    return made_once("tiny_pipeline", write)


@pytest.fixture(scope="session")
def demo_pipeline(made_once: MadeOnce) -> Path:
    """Folder of the small trained model exported whole. Read only."""

    def write(folder: Path) -> None:
        from sam3x.demo import WEIGHTS
        from sam3x.pipeline import export_pipeline, transformers_image_source

        export_pipeline(transformers_image_source(WEIGHTS), output=folder)

    return made_once("demo_pipeline", write)


@pytest.fixture(scope="session")
def triton_pipeline(made_once: MadeOnce) -> Path:
    """Folder of the small trained model exported whole as a model repository of Triton. Read only."""

    def write(folder: Path) -> None:
        from sam3x.demo import WEIGHTS
        from sam3x.pipeline import export_pipeline, transformers_image_source

        export_pipeline(transformers_image_source(WEIGHTS), output=folder, layout="triton")

    return made_once("triton_pipeline", write)


@pytest.fixture(scope="session")
def fused_pipeline(request: pytest.FixtureRequest, tiny_pipeline: Path, made_once: MadeOnce) -> Path:
    """Folder of ``tiny_model`` exported whole as three files, dac left in the file as a conditional. Read only."""

    def write(folder: Path) -> None:
        from sam3x.pipeline import export_pipeline, module_image_source
        from sam3x.pipeline.export import ComponentJob
        from support.image_model import taken_from

        model, vocabulary = request.getfixturevalue("tiny_model"), request.getfixturevalue("tiny_vocabulary")
        with mock.patch.object(ComponentJob, "export", taken_from(tiny_pipeline, "fusion_encoder")):
            export_pipeline(module_image_source(model), output=folder, tokenizer=vocabulary, fuse=True, dac="runtime")

    return made_once("fused_pipeline", write)
