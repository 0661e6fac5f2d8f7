"""Picture and words or clicks in, masks out, from an exported pipeline: numpy, Pillow, tokenizers and ONNX Runtime, no torch.

>>> segmenter = sam3x.runtime.Segmenter("out/")
>>> image = segmenter.encode("photo.jpg")  # once a picture
>>> result = segmenter.segment(image, text=["dog", "red car"])
>>> result.masks, result.boxes, result.scores, result.draw("dog.png")
>>> segmenter.click(image, points=[[120, 200]]).best.draw("cut.png")
"""

from sam3x.runtime.client import Client
from sam3x.runtime.coco import CocoFile
from sam3x.runtime.result import Clicked, Result
from sam3x.runtime.segmenter import EncodedImage, Segmenter

__all__ = ["Clicked", "Client", "CocoFile", "EncodedImage", "Result", "Segmenter"]
