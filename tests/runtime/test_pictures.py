"""What is taken as a picture, as what, and what is refused in one sentence."""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torchvision.transforms import v2

from sam3x.errors import SpecError
from sam3x.runtime.pictures import open_picture, picture_files

GRAY = np.arange(0, 256, 8, dtype=np.uint8).reshape(4, 8)
RGB = np.stack([GRAY, GRAY[::-1], 255 - GRAY], axis=2)


def pixels(source: Any, **options: Any) -> np.ndarray:
    picture = open_picture(source, **options)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def saved(picture: Image.Image | np.ndarray, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(file, kind, **options)
    return file.getvalue()


def gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_a_16_bit_gray_file_is_not_white(kind: str) -> None:
    np.testing.assert_array_equal(pixels(saved(GRAY.astype(np.uint16) * 257, kind)), gray(GRAY))


def test_a_float_tiff_is_not_black() -> None:
    np.testing.assert_array_equal(pixels(saved(GRAY.astype(np.float32) / 255, "TIFF")), gray(GRAY))
    with pytest.raises(SpecError, match="read as 0 to 1, found 0 to 248"):
        open_picture(saved(GRAY.astype(np.float32), "TIFF"))


MODES = ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LA", "PA", "RGBX", "RGBa", "La", "I;16", "I;16L", "I;16B", "F"]


@pytest.mark.parametrize("mode", MODES)
def test_a_pillow_image_of_every_mode(mode: str) -> None:
    high = {"I;16": 65535, "I;16L": 65535, "I;16B": 65535, "F": 1.0, "1": 1}.get(mode)
    if high is None:
        white = Image.new("RGB", (8, 4), "white")
        made = white.convert("LA").convert("La") if mode == "La" else white.convert("L").convert(mode) if mode == "PA" else None
        made = made or (white.convert("RGBA").convert(mode) if mode in ("RGBa", "RGBX", "LA") else white.convert(mode))
    else:
        made = Image.new(mode, (8, 4), high)
    assert (pixels(made) == 255).all()
    assert (pixels(Image.new(mode, (8, 4))) == (255 if mode == "CMYK" else pixels(Image.new(mode, (8, 4)))[0, 0])).all()


def test_whole_numbers_of_32_bits_have_no_white() -> None:
    with pytest.raises(SpecError, match="32 bits"):
        open_picture(saved(np.arange(12, dtype=np.int32).reshape(3, 4), "TIFF"))


def test_bytes_files_and_arrays_are_the_same_picture(tmp_path: Path) -> None:
    data = saved(RGB, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    with (tmp_path / "a.png").open("rb") as file:
        file.seek(9)  # as Pillow, from the start
        for source in (
            data,
            bytearray(data),
            memoryview(data),
            io.BytesIO(data),
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
            file,
        ):
            np.testing.assert_array_equal(pixels(source), RGB)
        assert not file.closed
    tensor = torch.from_numpy(RGB).permute(2, 0, 1)
    for source in (RGB, RGB.tolist(), RGB.astype(np.int64), RGB[::-1][::-1], np.dstack([RGB, GRAY]), tensor, tensor.long()):
        np.testing.assert_array_equal(pixels(source), RGB)
    for source in (GRAY, GRAY[..., None], GRAY.tolist(), torch.from_numpy(GRAY), torch.from_numpy(GRAY)[None]):
        np.testing.assert_array_equal(pixels(source), gray(GRAY))
    np.testing.assert_array_equal(pixels(GRAY > 100), gray(np.where(GRAY > 100, 255, 0)))


def test_a_pipe_is_read_whole() -> None:
    class Pipe(io.RawIOBase):
        data = io.BytesIO(saved(RGB, "PNG"))

        def readinto(self, buffer: Any) -> int:
            return self.data.readinto(buffer)

        def readable(self) -> bool:
            return True

    np.testing.assert_array_equal(pixels(io.BufferedReader(Pipe())), RGB)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_16_bits_and_floats_become_8_bits_as_upstreams_processor_has_them(dtype: torch.dtype) -> None:
    if dtype is torch.uint16:
        tensor = (torch.arange(3 * 64).reshape(3, 8, 8) * 341).to(dtype)
        wanted = v2.functional.to_dtype(tensor, torch.uint8, scale=True)
    else:
        tensor = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        wide = tensor.detach() if dtype.itemsize >= 4 else tensor.detach().float()  # in half, torchvision's 1.0 wraps to 0
        wanted = v2.functional.to_dtype(wide, torch.uint8, scale=True)
    np.testing.assert_array_equal(pixels(tensor), wanted.permute(1, 2, 0).numpy())


def test_exif_turns_a_path_bytes_and_a_pillow_image_alike(tmp_path: Path) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = saved(RGB, "PNG", exif=exif)
        (tmp_path / "a.png").write_bytes(data)
        opened = Image.open(io.BytesIO(data))
        found = [pixels(source) for source in (tmp_path / "a.png", data, opened)]
        assert all(np.array_equal(item, found[0]) for item in found)
        assert found[0].shape == ((4, 8, 3) if orientation < 5 else (8, 4, 3)) and opened.size == (8, 4)
        assert np.array_equal(found[0], RGB) == (orientation == 1)


def test_a_damaged_exif_block_is_no_reason_to_refuse() -> None:
    np.testing.assert_array_equal(pixels(saved(RGB, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")), RGB)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_picture(kind: str) -> None:
    frames = [Image.new("RGB", (8, 4), colour) for colour in ("white", "red", "blue")]
    extra: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **extra)
    assert (pixels(data) == 255).all()
    opened = Image.open(io.BytesIO(data))
    opened.seek(1)
    assert (pixels(opened) == (255, 0, 0)).all() and opened.tell() == 1  # of an image that stands elsewhere, where it stands


def test_a_palette_with_transparency_warns_nobody() -> None:
    picture = Image.new("P", (8, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    data = saved(picture, "PNG", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (pixels(data) == (10, 20, 30)).all()


def test_pillows_limit_is_told_and_lifted_by_max_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # 32 pixels are more than twice that
    data = saved(GRAY, "PNG")
    with pytest.raises(SpecError, match=r"more pixels than Pillow decodes.*max_pixels=N"):
        open_picture(data)
    with pytest.raises(SpecError, match="holds 32 pixels, and max_pixels allows 31"):
        open_picture(data, max_pixels=31)
    failures: list[Exception] = []

    def many() -> None:
        try:
            for _ in range(50):
                open_picture(data, max_pixels=32)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and Image.MAX_IMAGE_PIXELS == 10


BAD: dict[str, Any] = {
    "no pixels": np.zeros((0, 4, 3), dtype=np.uint8),
    "has no pixels": np.zeros((4, 0), dtype=np.uint8),
    "by 5 pixels has none": Image.new("RGB", (0, 5)),
    "found NaN": np.array([[0.5, np.nan]]),
    "found -1 to 255": [[-1, 255]],
    "found 0 to 256": np.array([[0, 256]]),
    "found 0 to inf": np.array([[0, np.inf]], dtype=np.float32),
    "Channels come last": np.zeros((3, 8, 5), dtype=np.uint8),
    r"got \[2, 4, 8, 3\]": np.zeros((2, 4, 8, 3), dtype=np.uint8),
    r"got \[4, 8, 2\]": np.zeros((4, 8, 2), dtype=np.uint8),
    r"got \[\]": np.uint8(3),
    "channels first": torch.zeros(8, 5, 3, dtype=torch.uint8),
    "the tensor cannot be read": torch.zeros(3, 4, 4).to_sparse(),
    "read as an array": [[1, 2], [3]],
    "made of numbers": np.array([["a", "b"]]),
    "array of complex128": np.ones((2, 2), dtype=complex),
    "array of object": np.full((2, 2), None),
    "from NoneType": None,
    "from int": 3,
    "from dict": {},
    "from generator": (row for row in [[1]]),
    "as text": io.StringIO("x"),
    "no format that Pillow knows": b"no picture",
    "(no format that Pillow knows)": b"",
    "the file object cannot be read": io.BytesIO(b"GIF89a"),
    "No such file": "https://example.org/dog.jpg",
    "null": "a\0b",
    "Is a directory": ".",
}


@pytest.mark.parametrize("fact", BAD)
def test_what_is_no_picture_is_told(fact: str) -> None:
    with pytest.raises(SpecError, match=fact.replace("(", r"\(").replace(")", r"\)")):
        open_picture(BAD[fact])


def test_a_closed_file_and_a_truncated_one_are_told(tmp_path: Path) -> None:
    data = saved(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8), "JPEG")
    file = io.BytesIO(data)
    file.close()
    with pytest.raises(SpecError, match="closed file"):
        open_picture(file)
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    for source in (data[: len(data) // 2], tmp_path / "half.jpg", Image.open(tmp_path / "half.jpg")):
        with pytest.raises(SpecError, match="truncated"):
            open_picture(source)


FILES = [saved(RGB, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "TGA", "PPM", "ICO")]


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(FILES), st.data())
def test_a_damaged_file_is_a_picture_or_a_spec_error(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data)
    for _ in range(draw.draw(st.integers(1, 4))):
        damaged[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    end = draw.draw(st.integers(0, len(data)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(SpecError):
            open_picture(bytes(damaged[:end]), max_pixels=10**6)


@settings(deadline=None, max_examples=150)
@given(
    hnp.arrays(
        st.one_of(hnp.scalar_dtypes(), hnp.unicode_string_dtypes()), hnp.array_shapes(min_dims=0, max_dims=4, max_side=5)
    )
)
def test_any_array_is_a_picture_or_a_spec_error(array: np.ndarray) -> None:
    try:
        picture = open_picture(array)
    except SpecError:
        return
    assert picture.mode == "RGB" and picture.size == (array.shape[1], array.shape[0])


def test_a_folders_pictures_are_those_that_pillow_reads(tmp_path: Path) -> None:
    for name in ("b.png", "A.JPG", ".hidden.png", "notes.txt", "paper.pdf", "c.webp"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in picture_files(tmp_path)] == ["A.JPG", "b.png", "c.webp"]
    with pytest.raises(SpecError, match="cannot be read as a folder"):
        picture_files(tmp_path / "b.png")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpecError, match="holds no picture"):
        picture_files(tmp_path / "empty")
