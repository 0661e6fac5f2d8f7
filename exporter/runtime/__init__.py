"""Picture and words in, masks out, from an exported pipeline: numpy, Pillow, tokenizers and ONNX Runtime, no torch.

>>> segmenter = sam3x.runtime.Segmenter("out/")
>>> image = segmenter.encode("photo.jpg")  # once a picture
>>> result = segmenter.segment(image, text=["dog", "red car"])
>>> result.masks, result.boxes, result.scores, result.draw("dog.png")
"""

from sam3x.runtime.coco import CocoFile
from sam3x.runtime.result import Result
from sam3x.runtime.segmenter import EncodedImage, Segmenter

__all__ = ["CocoFile", "EncodedImage", "Result", "Segmenter"]
