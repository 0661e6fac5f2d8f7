"""Folders of transformers': the detector of a video model, and what is missing, left over or not finite in one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sam3x.errors import SourceError
from sam3x.sources.encoder import weights_hash
from sam3x.sources.image import module_image_source, transformers_image_source
from sam3x.sources.lint import lint
from sam3x.sources.names import COMPONENTS
from sam3x.sources.report import LintReport
from sam3x.spec import ExportSpec
from support.transformers_model import SIZE, tiny, tiny_video

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("Sam3Model")


@pytest.fixture
def folder(model: nn.Module, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "saved")  # type: ignore[operator]
    return tmp_path / "saved"


def rewritten(folder: Path, change: Callable[[State], State]) -> Path:
    path = folder / "model.safetensors"
    state = {name: value.clone() for name, value in load_file(path).items()}  # the file is mapped
    save_file(change(state), path, metadata={"format": "pt"})
    return folder


def refused(folder: Path) -> LintReport:
    """The report; export names the same faults."""
    report = lint(folder)
    with pytest.raises(SourceError) as caught:
        transformers_image_source(folder)(ExportSpec())
    assert report.faults and all(fault in str(caught.value) for fault in report.faults)
    return report


def test_reading_a_folder_draws_no_bar_and_leaves_others_theirs(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    transformers_image_source(folder)(ExportSpec())
    assert "Loading weights" not in capfd.readouterr().err and logging.is_progress_bar_enabled()


def test_a_video_models_folder_gives_its_detector_and_says_what_was_left_out(folder: Path, model: nn.Module) -> None:
    """The layout of the official release: ``model_type: sam3_video``, ``detector_model.*`` beside ``tracker_model.*``."""
    import transformers

    transformers.Sam3VideoConfig(detector_config=model.config.to_dict()).save_pretrained(folder)  # type: ignore[union-attr,operator]
    assert json.loads((folder / "config.json").read_text())["model_type"] == "sam3_video"
    tracker = {"tracker_model.mask_decoder.iou_token.weight": torch.zeros(1, 4), "tracker_neck.fpn.weight": torch.zeros(2)}
    rewritten(folder, lambda state: {**{f"detector_model.{name}": value for name, value in state.items()}, **tracker})
    cut = transformers_image_source(folder)(ExportSpec())
    assert cut.weights_sha256 == weights_hash(model) and "Sam3Model" in cut.origin
    said = "left out, not part of the image model: 'tracker_model.' (1), 'tracker_neck.' (1)"
    assert "the detector of a video model (sam3_video)" in cut.notes and said in cut.notes
    report = lint(folder)
    assert report.clean and report.exports == ("image model",) and said in report.notes
    rewritten(folder, lambda state: {name: value for name, value in state.items() if "geometry_encoder." not in name})
    assert any("geometry_encoder." in name for name in refused(folder).missing)


BROKEN: dict[str, tuple[Callable[[State], State], str, str]] = {
    "geometry": (lambda s: {n: v for n, v in s.items() if "geometry_encoder." not in n}, "missing", "geometry_encoder."),
    "one bias": (lambda s: {n: v for n, v in s.items() if n != "text_projection.bias"}, "missing", "text_projection.bias"),
    "unexpected": (lambda s: {**s, "mask_decoder.more.weight": torch.ones(2)}, "unexpected", "mask_decoder.more.weight"),
    "nan": (lambda s: {**s, "text_projection.bias": torch.full((32,), float("nan"))}, "not_finite", "text_projection.bias"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_with_missing_unexpected_or_infinite_weights_is_refused(name: str, folder: Path) -> None:
    change, field, fact = BROKEN[name]
    assert fact in str(getattr(refused(rewritten(folder, change)), field))


def test_a_folder_with_a_weight_of_another_shape_is_refused(folder: Path) -> None:
    rewritten(folder, lambda s: {**s, "text_projection.bias": torch.ones(5)})
    for read in (lint, lambda path: transformers_image_source(path)(ExportSpec())):
        with pytest.raises(SourceError, match=r"text_projection\.bias|size mismatch|ignore_mismatched_sizes"):
            read(folder)


def test_shards_of_a_folder_are_judged_together(model: nn.Module, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    model.save_pretrained(folder, max_shard_size="200KB")  # type: ignore[operator]
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert transformers_image_source(folder)(ExportSpec()).weights_sha256 == weights_hash(model)
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())
    shard = folder / listed["weight_map"]["text_projection.bias"]
    state = {name: value.clone() for name, value in load_file(shard).items() if name != "text_projection.bias"}
    save_file(state, shard, metadata={"format": "pt"})
    assert "text_projection.bias" in refused(folder).missing
    shard.unlink()
    with pytest.raises(SourceError):
        lint(folder)


def test_the_precision_of_a_folder_is_said(folder: Path) -> None:
    rewritten(folder, lambda state: {name: value.to(torch.bfloat16) for name, value in state.items()})
    report = lint(folder)
    assert report.clean and report.dtypes == ("bfloat16",) and "bfloat16 weights, exported as float32" in report.notes


@pytest.mark.parametrize(("said", "threshold"), [(None, 0.3), (0.6, 0.6), (1, 1.0)])
def test_a_folder_may_say_what_detections_score_above(said: float | None, threshold: float, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **({} if said is None else {"detection_threshold": said})}))
    assert transformers_image_source(folder)(ExportSpec()).threshold == threshold


@pytest.mark.parametrize("said", [True, "0.5", -0.1, 1.5, [0.5]])
def test_a_threshold_that_is_none_is_a_typed_error(said: object, folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "detection_threshold": said}))
    with pytest.raises(SourceError, match=r"detection_threshold is .*a number from 0 to 1"):
        transformers_image_source(folder)(ExportSpec())


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "sam3_video"}', '{"model_type": "bert"}', '{"model_type": 3}'])
def test_a_config_that_is_none_is_a_typed_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SourceError):
        lint(tmp_path)


@pytest.fixture(scope="module")
def video() -> Any:
    return tiny_video()


def video_folder(video: Any, folder: Path, *, twice: bool) -> Path:
    """As the release has it, or as ``save_pretrained`` of transformers 5.24 writes it, the tracker's prefix twice."""
    video.save_pretrained(folder)
    once = lambda state: {name.replace("tracker_model.tracker_model.", "tracker_model."): item for name, item in state.items()}  # noqa: E731
    return folder if twice else rewritten(folder, once)


@pytest.mark.parametrize("twice", [False, True])
def test_a_video_models_folder_is_a_detector_and_a_head_for_clicks(video: Any, twice: bool, tmp_path: Path) -> None:
    folder = video_folder(video, tmp_path / "saved", twice=twice)
    report = lint(folder)
    assert report.clean and report.exports == ("image model", "interactive head")
    assert "the detector and the tracker's interactive head of a video model (sam3_video)" in report.notes
    assert any(note.startswith("left out, not part of the image model: 'tracker_model.'") for note in report.notes)
    cut, live = transformers_image_source(folder)(ExportSpec()), module_image_source(video)(ExportSpec())
    assert [item.name for item in cut.components] == list(COMPONENTS) and cut.clicks is not None
    assert cut.weights_sha256 == live.weights_sha256 == weights_hash(video)


def test_one_pass_over_a_picture_is_what_upstreams_detector_and_tracker_make_of_it(video: Any, tmp_path: Path) -> None:
    """Against ``Sam3Model``, and ``Sam3TrackerModel``, which reads the same folder.

    The latter adds ``no_memory_embedding`` to the level of the neck that it drops, the video model to the last that it keeps.
    """
    import transformers

    split, alone = module_image_source(video)(ExportSpec()), module_image_source(video.detector_model)(ExportSpec())
    image = {"image": torch.randn((2, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1))}
    found, detector = split.components[0].eager(image), alone.components[0].eager(image)
    tracker = transformers.Sam3TrackerModel.from_pretrained(video_folder(video, tmp_path / "saved", twice=False)).eval()
    *maps, last = tracker.get_image_embeddings(image["image"])
    features = (*maps, last + video.tracker_model.no_memory_embedding.reshape(1, -1, 1, 1))
    names = ("high_res_feats_0", "high_res_feats_1", "image_embed")
    assert found.keys() == {*detector, *names}
    for name, wanted in {**detector, **dict(zip(names, features, strict=True))}.items():
        torch.testing.assert_close(found[name], wanted, atol=1e-5, rtol=1e-5)
    points = torch.tensor([[[30.0, 40.0], [80.0, 20.0], [0.0, 0.0]]])
    prompt = {"point_coords": points, "point_labels": torch.tensor([[1, 0, -1]]), "has_mask_input": torch.tensor([False])}
    picture = {name: found[name][:1] for name in names}
    head = split.components[-1].eager({**prompt, **picture, "mask_input": torch.zeros(1, 1, 32, 32)})
    first = [item[:1] for item in features]
    with torch.no_grad():
        wanted = tracker(image_embeddings=first, input_points=points[None, :, :2], input_labels=torch.tensor([[[1, 0]]]))
    torch.testing.assert_close(head["low_res_masks"][:, 1:], wanted.pred_masks[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(head["iou_predictions"][:, 1:], wanted.iou_scores[0], atol=1e-5, rtol=1e-5)
