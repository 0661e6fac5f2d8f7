"""Pictures of every kind to 8-bit RGB, and to the tensor that upstream's ``Sam3Processor`` makes of them, without torch."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sam3x.errors import SpecError, Step, TargetUnavailableError
from sam3x.runtime.resize import resize_picture

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

INSTALL = 'Install it: pip install "sam3x[runtime]"'

_ORIENTATION = 0x0112  # EXIF's tag
_SIXTEEN_BITS = ("PNG", "PPM")  # files whose whole numbers Pillow may give as 32-bit ones (mode I)
_BOMB_LIMIT = threading.Lock()


def open_picture(source: Any, max_pixels: int | None = None) -> Image.Image:
    """An RGB picture of 8 bits a channel.

    Args:
        source: one of

            - a file that Pillow reads: its path, its bytes, or a binary file object. Of an animation, the first picture.
            - a ``PIL.Image.Image`` of any mode.
            - an array or nested list, (H, W) gray, (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA.
            - a torch tensor, (H, W), (1, H, W), (3, H, W) or (4, H, W): channels first, as torchvision has them.

            Values are 0 to 255 in uint8 and other whole numbers, 0 to 65535 in uint16, 0 to 1 in floats. 16 bits and floats
            become 8 bits as in torchvision's ``ToDtype(uint8, scale=True)``, which upstream's processor begins with.
            Transparency is dropped. Whatever carries an EXIF orientation, a file or a Pillow image, is turned as it says, so
            that masks fit the picture as viewers show it.
        max_pixels: most pixels a file may hold, width times height; None: as many as Pillow decodes (178,956,970).

    Raises:
        SpecError: it cannot be read as a picture, or holds too many pixels.
        TargetUnavailableError: Pillow is not installed.
    """
    Image = _pillow()
    if isinstance(source, Image.Image):
        with _told("the Pillow image"):
            return _rgb(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _read(io.BytesIO(bytes(source)), "the bytes", max_pixels)
    if isinstance(source, (str, os.PathLike)):
        return _read(source, os.fsdecode(source), max_pixels)
    if hasattr(source, "read"):
        return _read_object(source, max_pixels)
    return Image.fromarray(_channels_of_eight_bits(_array(source)))


def stored_picture(path: str | Path) -> Image.Image:
    """The picture in a file as ``open_picture`` gives it, but not turned by its EXIF orientation.

    Raises:
        SpecError, TargetUnavailableError: as ``open_picture``.
    """
    _pillow()
    return _read(path, os.fsdecode(path), None, turned=False)


def picture_files(folder: Path) -> list[Path]:
    """The files in ``folder``, those in its folders not, whose endings are of formats that Pillow reads, by name.

    Raises:
        SpecError: there is none, or the folder cannot be read.
        TargetUnavailableError: Pillow is not installed.
    """
    Image = _pillow()
    Image.init()
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    with _told(str(folder), "as a folder"):
        files = sorted(file for file in folder.iterdir() if file.suffix.lower() in endings and file.name[0] != ".")
    if not files:
        raise SpecError(f"{folder} holds no picture", step=Step.RUN)
    return files


def to_tensor(picture: Image.Image | np.ndarray, size: int, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """(1, 3, size, size) float32: squeezed to a square, bilinear with antialiasing on 8-bit values, normalized."""
    values: np.ndarray = resize_picture(np.asarray(picture), size, size).astype(np.float32) / np.float32(255)
    values = (values - np.asarray(mean, dtype=np.float32)) / np.asarray(std, dtype=np.float32)
    return np.ascontiguousarray(values.transpose(2, 0, 1)[None])


def sigmoid(values: np.ndarray) -> np.ndarray:
    """The logistic function, without overflow."""
    return np.where(values >= 0, 1 / (1 + np.exp(-np.abs(values))), 1 - 1 / (1 + np.exp(-np.abs(values)))).astype(np.float32)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise TargetUnavailableError("reading pictures needs Pillow", remedy=INSTALL, step=Step.RUN) from None
    return Image


def _read_object(file: Any, max_pixels: int | None) -> Image.Image:
    """The picture in a binary file object, whole, wherever it stands; Pillow wants one that can go back to its start."""
    if isinstance(file, io.TextIOBase):
        raise SpecError("a picture was opened as text", remedy='Open it with mode "rb".', step=Step.RUN)
    name = str(getattr(file, "name", "the file object"))
    with _told(name):
        if not file.seekable():
            file = io.BytesIO(file.read())
    return _read(file, name, max_pixels)


def _read(file: Any, name: str, max_pixels: int | None, turned: bool = True) -> Image.Image:
    from PIL import Image

    with _told(name), _bomb_limit(max_pixels), Image.open(file) as opened:
        pixels = opened.width * opened.height
        if max_pixels is not None and pixels > max_pixels:
            raise SpecError(
                f"{name} holds {pixels:,} pixels, and max_pixels allows {max_pixels:,}",
                remedy="Raise it where you trust the file.",
                step=Step.RUN,
            )
        return _rgb(opened, turned)


@contextlib.contextmanager
def _bomb_limit(max_pixels: int | None) -> Iterator[None]:
    """Have Pillow decode as many, where that is more than its own limit, which stands in a global of its module."""
    from PIL import Image

    if max_pixels is None:
        yield
        return
    with _BOMB_LIMIT:
        own = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None if own is None else max(own, max_pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = own


@contextlib.contextmanager
def _told(name: str, what: str = "as a picture") -> Iterator[None]:
    """What Pillow's decoders raise as a ``SpecError``: each format has exceptions of its own (struct, zlib, index, EOF)."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except SpecError:
        raise
    except UnidentifiedImageError as error:
        raise SpecError(
            f"{name} cannot be read as a picture (no format that Pillow knows)",
            remedy="Give a JPEG, PNG, WebP or TIFF file.",
            step=Step.RUN,
        ) from error
    except Image.DecompressionBombError as error:
        raise SpecError(
            f"{name} holds more pixels than Pillow decodes by default ({error})",
            remedy="Where you trust the file, allow them: Segmenter(…, max_pixels=N), sam3x run --max-pixels N.",
            step=Step.RUN,
        ) from error
    except Exception as error:
        fact = getattr(error, "strerror", None) or str(error).replace(name, "the file").rstrip(".") or type(error).__name__
        raise SpecError(f"{name} cannot be read {what} ({fact})", step=Step.RUN) from error


def _rgb(picture: Image.Image, turned: bool = True) -> Image.Image:
    """A Pillow image of any mode as one of its own in RGB; ``turned`` as its EXIF orientation says."""
    from PIL import Image, ImageOps

    if not picture.width or not picture.height:
        raise SpecError(f"a picture of {picture.width} by {picture.height} pixels has none", step=Step.RUN)
    if turned and _orientation(picture) != 1:
        picture = ImageOps.exif_transpose(picture)
    if picture.mode == "I" and getattr(picture, "format", None) in _SIXTEEN_BITS:
        return Image.fromarray(_channels_of_eight_bits(np.asarray(picture).astype(np.uint16)))
    if picture.mode == "I":
        raise SpecError(
            "the picture has whole numbers of 32 bits, of which nothing says how many are white",
            remedy="Give it as an array: uint8 is 0 to 255, uint16 is 0 to 65535.",
            step=Step.RUN,
        )
    if picture.mode == "F" or picture.mode.startswith("I;16"):
        return Image.fromarray(_channels_of_eight_bits(np.asarray(picture)))
    if picture.mode == "La":
        return picture.convert("LA").convert("RGB")
    if picture.mode == "P" and isinstance(picture.info.get("transparency"), bytes):
        return picture.convert("RGBA").convert("RGB")  # else Pillow warns that transparency is lost
    return picture.convert("RGB")


def _orientation(picture: Image.Image) -> int:
    """1 to 8, as EXIF counts; 1, upright, where there is none or it cannot be read."""
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block, of which viewers show the picture all the same
        return 1


def _array(source: Any) -> np.ndarray:
    """(H, W) or (H, W, channels) of a numpy array, a torch tensor, nested lists, or whatever numpy reads."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(source, torch.Tensor):
        try:
            tensor = source.detach().cpu()
            values = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        except Exception as error:  # sparse, quantized, without storage
            fact = str(error).partition("\n")[0].rstrip(".")
            raise SpecError(f"the tensor cannot be read as a picture ({fact})", step=Step.RUN) from error
        if values.ndim == 3:
            if values.shape[0] not in (1, 3, 4):
                raise SpecError(
                    f"expected a tensor (3, H, W), channels first, got {list(values.shape)}",
                    remedy="Arrays and lists have channels last: tensor.numpy().",
                    step=Step.RUN,
                )
            values = np.moveaxis(values, 0, -1)
        return values
    if not (isinstance(source, (list, tuple, np.ndarray)) or hasattr(source, "__array__")):
        raise SpecError(
            f"cannot read a picture from {type(source).__name__}",
            remedy="Give a path, the bytes of a file, a Pillow image, an array (H, W, 3) or a torch tensor (3, H, W).",
            step=Step.RUN,
        )
    try:
        return np.asarray(source)
    except Exception as error:  # lists of different lengths, or another library's own refusal
        fact = str(error).partition("\n")[0].rstrip(".")
        raise SpecError(f"the {type(source).__name__} cannot be read as an array ({fact})", step=Step.RUN) from error


def _channels_of_eight_bits(values: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, channels) of any dtype → (H, W, 3) uint8."""
    shape = list(values.shape)
    if values.ndim not in (2, 3) or (values.ndim == 3 and shape[2] not in (1, 3, 4)):
        remedy = "Channels come last in an array." if values.ndim == 3 and shape[0] in (1, 3, 4) else ""
        raise SpecError(f"expected an array (H, W), (H, W, 3) or (H, W, 4), got {shape}", remedy=remedy, step=Step.RUN)
    if not values.size:
        raise SpecError(f"a picture of shape {shape} has no pixels", step=Step.RUN)
    channels = (values[..., None] if values.ndim == 2 else values)[..., :3]
    return np.ascontiguousarray(np.broadcast_to(_eight_bits(channels), (*shape[:2], 3)))


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Values of any dtype as uint8, as torchvision's ``ToDtype(uint8, scale=True)`` has 16 bits and floats."""
    kind = values.dtype.kind
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * np.uint8(255)
    if kind == "u" and values.dtype.itemsize == 2:
        return (values >> 8).astype(np.uint8)
    if kind not in "iuf":
        raise SpecError(f"a picture is made of numbers, got an array of {values.dtype}", step=Step.RUN)
    low, high = values.min(), values.max()  # NaN where there is one
    most = 1 if kind == "f" else 255
    if not (low >= 0 and high <= most):
        found = "NaN" if np.isnan(low) else f"{low:g} to {high:g}"
        raise SpecError(
            f"{values.dtype} values of a picture are read as 0 to {most}, found {found}",
            remedy="Scale them, or give uint8 (0 to 255) or uint16 (0 to 65535).",
            step=Step.RUN,
        )
    if kind != "f":
        return values.astype(np.uint8)
    wide = values.astype(np.float32) if values.dtype.itemsize < 4 else values
    return (wide * wide.dtype.type(255.999)).astype(np.uint8)
