"""Commands on whole pipelines end in what was asked for or in one sentence, as on a fusion encoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from sam3x.errors import ArtifactError, SpecError
from sam3x.pipeline import export_pipeline, module_image_source, random_image_source, verify_pipeline
from sam3x.pipeline.compatibility import SMALL
from sam3x.pipeline.job import ComponentJob
from sam3x.runtime import Segmenter
from sam3x.runtime.components import run_component
from sam3x.runtime.manifest import load_manifest
from sam3x.runtime.result import Result
from sam3x.sources import image as sources
from support.command_line import run
from support.folders import contents, edit_manifest
from support.image_model import photograph, taken_from

MODULE = """
from sam3x.pipeline.compatibility import SMALL
from sam3x.sources.image import build_image_model, draw_image_weights

def made(seed=0):
    model = build_image_model(SMALL)
    draw_image_weights(model, seed)
    return model

def other():
    return made(1)
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tiny_source.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [
        ["--components", "fusion_encoder", "--batch", "1"],
        ["--components", "fusion_encoder", "--batch", "2"],
        ["--components", "fusion_encoder,text_encoder,mask_head", "--batch", "3"],
        ["--components", "fusion_encoder", "--batch", "2", "--dac", "runtime"],
        ["--components", "text_encoder", "--batch", "2:4"],
    ],
    ids=" ".join,
)
def test_a_pipeline_for_a_fixed_number_of_prompts_is_verified(options: list[str], workplace: Path) -> None:
    done = run("export", "--pipeline", "--module", "tiny_source:made", *options, "-o", "out", "--json", "-q")
    assert done.exit_code == 0, done.output
    manifest = json.loads(done.stdout)
    assert manifest["verified"] and all(item["verification"] for item in manifest["components"])
    batch = options[options.index("--batch") + 1].split(":")
    for item in manifest["components"]:
        assert item["ranges"]["prompts"] == [int(batch[0]), int(batch[-1])]


@pytest.mark.parametrize("batch", [[], ["--batch", "2"], ["--batch", "3"]], ids=str)
@pytest.mark.parametrize("components", [[], ["--components", "fusion_encoder"]], ids=str)
def test_dac_over_the_prompts_of_a_pipeline_is_told_at_once(batch: list[str], components: list[str], tmp_path: Path) -> None:
    done = run("export", "--pipeline", "--dac", "on", *batch, *components, "-o", tmp_path / "out")
    assert done.exit_code == 2 and not (tmp_path / "out").exists()
    words = " ".join(done.stderr.split())
    assert ("counts prompts in a pipeline" in words) or ("odd size 3" in words)
    with pytest.raises(SpecError, match="counts prompts"):
        export_pipeline(random_image_source(SMALL), output=tmp_path / "out", dac=True)


def test_a_pipeline_for_two_prompts_finds_for_one_what_the_other_finds(
    tiny_pipeline: Path, tiny_model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that take exactly two prompts get the last one twice; the slowest to export take any number."""
    monkeypatch.setattr(ComponentJob, "export", taken_from(tiny_pipeline, "text_encoder", "fusion_encoder", "mask_head"))
    whole = Segmenter(tiny_pipeline)
    picture = whole.encode(photograph())
    export_pipeline(module_image_source(tiny_model), output=tmp_path / "out", batch=2, verify="off")
    fixed = Segmenter(tmp_path / "out")
    for prompts in ([(3, 4)], [(3, 4), (5, 6), (7, 8)]):
        want, got = (item.segment(picture, prompts, threshold=0.1) for item in (whole, fixed))
        assert len(want) == len(got) > 0
        np.testing.assert_array_equal(want.prompt, got.prompt)
        np.testing.assert_allclose(want.scores, got.scores, atol=1e-5)


def test_what_a_joined_file_finds_for_a_repeated_prompt_is_left_out(tiny_pipeline: Path) -> None:
    spec = load_manifest(tiny_pipeline).component("decoder")
    writes = {"found_prompts": "found_prompts", "found_scores": "found_scores"}
    spec = spec.model_copy(update={"ranges": {**spec.ranges, "prompts": (3, 3)}, "writes": writes})

    class Found:
        def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert {name: len(value) for name, value in inputs.items()} == {name: 3 for name in inputs} | {"image_pos": 1}
            return {"found_prompts": np.array([0, 1, 1, 2]), "found_scores": np.array([0.1, 0.2, 0.3, 0.3])}

    tensors = {name: np.zeros((2, 4, 4), np.float32) for name in spec.reads.values()}
    tensors["image_pos"] = tensors["image_pos"][:1]
    assert run_component(spec, Found(), tensors)["found_scores"].tolist() == [0.1, 0.2, 0.3]


@pytest.mark.usefixtures("workplace")
def test_bench_measures_a_pipeline(tiny_pipeline: Path) -> None:
    done = run("bench", tiny_pipeline, "--repeat", "1", "--threads", "1", "--threshold", "0.1", "-q", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert list(report["contenders"]) == ["pipeline"] and report["contenders"]["pipeline"]["detections"] > 0


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (["--tokens", "64"], "--tokens: of a fusion encoder alone"),
        (["--branch", "dac=on"], "--branch: of a fusion encoder alone"),
        (["--baseline", "inductor"], "beside its source"),
        (["--baseline", "eager"], "Name that source"),
    ],
    ids=str,
)
def test_bench_of_a_pipeline_refuses_what_is_of_an_encoder(options: list[str], fact: str, tiny_pipeline: Path) -> None:
    done = run("bench", tiny_pipeline, *options)
    assert done.exit_code == 2 and fact in " ".join(done.stderr.split())


def test_bench_of_an_encoder_refuses_what_is_of_a_pipeline(default_artifact: Path, tiny_pipeline: Path) -> None:
    assert "--picture: of a pipeline alone" in run("bench", default_artifact, "--picture", "a.png").stderr
    assert run("bench", default_artifact, tiny_pipeline).exit_code == 2


def test_another_source_is_refused_before_it_is_cut(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    """Neither are random weights drawn for a pipeline of others, nor does anything run before weights are compared."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("worked")

    monkeypatch.setattr(sources, "build_image_model", never)
    done = run("verify", tiny_pipeline)
    assert done.exit_code == 2 and "other weights" in done.stderr and "--checkpoint or --module" in done.stderr
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sam3x.sources.meta.source.shapes_of", never)
    assert "other weights" in run("verify", tiny_pipeline, "--module", "tiny_source:other").stderr


@pytest.mark.parametrize("damage", ["changed", "old"])
def test_hints_for_a_pipeline_name_the_option(damage: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(tiny_pipeline, folder)
    edit_manifest(folder, seal=False, **{"origin" if damage == "changed" else "schema_version": lambda _: 1})
    for command in ("inspect", "verify", "run"):
        done = run(command, folder, *(["a.png", "--text", "x"] if command == "run" else []))
        assert done.exit_code == 2 and f"sam3x export --pipeline -o {folder}" in "".join(done.stderr.split("\n")), command
    with pytest.raises(ArtifactError, match="export --pipeline"):
        verify_pipeline(folder, random_image_source(SMALL))


@pytest.mark.parametrize(("given", "expected"), [([], None), (["--threshold", "0.2"], 0.2)])
def test_run_filters_at_the_manifests_own_threshold(
    given: list[str], expected: float | None, monkeypatch: pytest.MonkeyPatch, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """0.3 for transformers' models, as ``Segmenter.segment`` has it."""
    seen: list[float | None] = []

    def segment(self: Segmenter, image: object, *, threshold: float | None = None, **_: object) -> Result:
        seen.append(threshold)
        none = np.zeros((0, 4, 4), np.float32)
        return Result(
            boxes=none[:, 0],
            scores=none[:, 0, 0],
            prompt=np.zeros(0, np.int64),
            prompts=("x",),
            picture=photograph(),
            small_masks=none,
            border=0.0,
        )

    monkeypatch.setattr(Segmenter, "segment", segment)
    photograph().save(tmp_path / "a.png")
    assert run("run", tiny_pipeline, tmp_path / "a.png", "--text", "x", *given).exit_code == 0
    assert seen == [expected]


@pytest.mark.parametrize("name", ["manifest.json", "fusion_encoder.onnx", "mask_head.onnx"])
def test_a_file_of_the_users_is_kept_and_the_export_refused(name: str, workplace: Path) -> None:
    out = workplace / "out"
    out.mkdir()
    (out / name).write_text('{"name": "mine", "files": {}, "version": 1}')
    before = contents(out)
    pipeline = ["--pipeline", "--components", "mask_head", "--module", "tiny_source:made"]
    done = run("export", "-o", out, *(pipeline if name == "mask_head.onnx" else []), "--verify", "off")
    assert done.exit_code == 2 and "no export of sam3x wrote it" in " ".join(done.stderr.split())
    assert contents(out) == before


@pytest.mark.parametrize("option", ["-o", "--dump-graphs"])
@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_folder_name_is_not_the_current_folder(option: str, name: str, workplace: Path) -> None:
    before = contents(workplace)
    assert run("export", option, name).exit_code == 2
    assert contents(workplace) == before
