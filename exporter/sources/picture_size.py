"""Check another size for the square picture of a ViT; imports no torch."""

from __future__ import annotations

from sam3x.errors import SourceError


def check_picture_size(size: int, patch: int, window: int) -> None:
    """Refuse a picture that patches do not fill, or that is smaller than a window of the trunk.

    Args:
        size: side of the picture. patch: side of a patch, in pixels. window: side of a window, in patches; 0: there are none.

    Raises:
        SourceError: with the nearest sizes.
    """
    least = patch * max(window, 1)
    if size < least:
        fact = f"a picture of {size} pixels is smaller than a window of its trunk, {window} patches of {patch} pixels"
        raise SourceError(fact, remedy=f"Give --image-size {least} or more, a multiple of {patch}.")
    if size % patch:
        below = size // patch * patch
        fact = f"a picture of {size} pixels is not made of patches of {patch}"
        raise SourceError(fact, remedy=f"Give --image-size {below} or {below + patch}.")


def size_note(size: int, own: int) -> str:
    """What the manifest says of it."""
    return f"made for pictures of {size} pixels in place of its own {own}: rotary tables are computed for them"
