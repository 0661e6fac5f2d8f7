"""Contenders of ``sam3x bench-pipeline``: an exported pipeline in the runtime, and its source's own eager code."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

TOKENS = (3, 4, 5, 6)
"""A prompt in token ids, which every vocabulary has; a pipeline may have been exported without one."""


def noise_picture() -> np.ndarray:
    """(1008, 1008, 3) uint8."""
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (1008, 1008, 3), dtype=np.uint8)


class PipelineContender:
    """What ``sam3x run`` does for one picture and one prompt, less writing files: masks at the picture's size, no torch."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job

    def imports(self) -> None:
        import sam3x.runtime.segmenter  # noqa: F401
        from sam3x.bench.limits import limit_onnxruntime

        limit_onnxruntime(self.job["threads"])

    def load(self) -> Any:
        from sam3x.runtime import Segmenter

        self.segmenter = Segmenter(self.job["path"])
        return self._run

    def _run(self, arrays: dict[str, Any]) -> np.ndarray:
        found = self.segmenter.segment(arrays["picture"], [TOKENS], threshold=self.job["threshold"])
        assert found.masks.shape[0] == len(found)  # masks are stretched when they are asked for
        return found.scores

    def inputs(self) -> dict[str, Any]:
        return {"picture": self.job["picture"] or noise_picture()}

    def metadata(self) -> dict[str, Any]:
        return {"weights_sha256": self.segmenter.manifest.weights_sha256}


class EagerPipelineContender:
    """The same through upstream's own modules in torch: masks of the detections above the threshold alone, not stretched."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job

    def imports(self) -> None:
        import torch

        import sam3x.sources.image  # noqa: F401

        torch.set_num_threads(self.job["threads"])
        torch.set_num_interop_threads(1)

    def load(self) -> Any:
        from sam3x.runtime.manifest import load_manifest
        from sam3x.sources.contract import Expected
        from sam3x.sources.named import image_source
        from sam3x.spec import ExportSpec

        manifest = load_manifest(self.job["path"], check=False)
        checkpoint = self.job["checkpoint"]
        expected = Expected(folder=self.job["path"], origin=manifest.origin, weights_sha256=manifest.weights_sha256)
        make = image_source(None, checkpoint and Path(checkpoint), self.job["module"])
        self.model = make(ExportSpec(**manifest.spec), expected)
        return self._run

    def inputs(self) -> dict[str, Any]:
        import torch

        from sam3x.runtime.pictures import open_picture, to_tensor

        model = self.model
        picture = open_picture(self.job["picture"] or noise_picture())
        length = model.context_length if model.fixed_length else len(TOKENS)
        ids = torch.full((1, length), model.pad_id)
        ids[0, : len(TOKENS)] = torch.tensor(TOKENS)
        return {
            "image": torch.from_numpy(to_tensor(picture, model.image_size, model.mean, model.std)),
            "input_ids": ids,
            "attention_mask": torch.arange(length)[None] < len(TOKENS),
            "boxes": torch.full((1, 1, 4), 0.5),
            "box_labels": torch.ones((1, 1), dtype=torch.long),
            "box_mask": torch.ones((1, 1), dtype=torch.bool),
        }

    def _run(self, arrays: dict[str, Any]) -> np.ndarray:
        import torch

        from sam3x.sources.contract import walk
        from sam3x.sources.names import DETECTOR

        with torch.inference_mode():
            *before, mask_head = (item for item in self.model.components if item.name in DETECTOR)
            trace = walk(before, arrays)
            found = trace["decoder"][1]
            scores = (found["pred_logits"].sigmoid() * found["presence_logit_dec"].sigmoid())[0]
            keep = scores > (self.model.threshold if self.job["threshold"] is None else self.job["threshold"])
            if bool(keep.any()):
                tensors = {**arrays}
                for component in before:
                    outputs = trace[component.name][1]
                    tensors.update({component.renamed.get(name, name): value for name, value in outputs.items()})
                tensors["queries"] = tensors["queries"][:, keep]
                mask_head.eager(mask_head.feed(tensors))
        return scores[keep].numpy()

    def metadata(self) -> dict[str, Any]:
        return {"weights_sha256": self.model.weights_sha256}


def noise_features(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Features of a picture that no vision encoder of this process made: its freed memory would hide what a click takes."""
    import numpy as np

    draw = np.random.default_rng(0)
    return {name: draw.standard_normal(shape, dtype=np.float32) for name, shape in sorted(shapes.items())}


class ClickContender(PipelineContender):
    """A click on the middle of a picture whose features are there, by the runtime: three masks, the best one stretched."""

    def inputs(self) -> dict[str, Any]:
        from sam3x.runtime import EncodedImage
        from sam3x.runtime.pictures import open_picture
        from sam3x.sources.names import INTERACTIVE_HEAD

        self.segmenter._components.open(INTERACTIVE_HEAD)  # as eager has loaded its own
        manifest = self.segmenter.manifest
        shapes = {item.name: (1, *map(int, item.shape[1:])) for item in manifest.component("vision_encoder").outputs}
        picture, tensors = open_picture(super().inputs()["picture"]), noise_features(shapes)
        self.image = EncodedImage(picture=picture, tensors=tensors, weights_sha256=manifest.weights_sha256)
        return {}

    def _run(self, arrays: dict[str, Any]) -> np.ndarray:
        width, height = self.image.picture.size
        found = self.segmenter.click(self.image, [[width / 2, height / 2]])
        assert len(found.best.masks) == 1  # masks are stretched when they are asked for
        return found.scores


class EagerClickContender(EagerPipelineContender):
    """The same through upstream's own prompt encoder and mask decoder in torch: masks of the low resolution, not stretched."""

    def inputs(self) -> dict[str, Any]:
        import torch

        from sam3x.runtime.manifest import load_manifest
        from sam3x.sources.names import INTERACTIVE_HEAD

        model = self.model
        self.head: Any = next(item.module for item in model.components if item.name == INTERACTIVE_HEAD)
        outputs = load_manifest(self.job["path"], check=False).component("vision_encoder").outputs
        tensors = noise_features({item.name: (1, *map(int, item.shape[1:])) for item in outputs})
        middle = model.image_size / 2
        return {
            **{name: torch.from_numpy(tensors[name]) for name in ("image_embed", "high_res_feats_0", "high_res_feats_1")},
            "point_coords": torch.tensor([[[middle, middle]]]),
            "point_labels": torch.tensor([[1]]),
        }

    def _run(self, arrays: dict[str, Any]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            _, scores = self.head.of_points(**arrays)
        return scores.ravel().numpy()
