"""What a checkpoint claims against what it holds: compressed or overlapping records, checksums, oversized tensors."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

_LARGEST_RATIO = 64
"""Weights may be tied between layers or stored as float16; none needs more than this many times the file as float32."""


def archive_fault(path: Path) -> tuple[str, str] | None:
    """Why a zip archive is not what ``torch.save`` writes, and a remedy, or None.

    torch stores its records plain, one after another. A compressed record can be a thousand times the file, and records that
    overlap any number of times: both are zip bombs to whoever loads them.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        return f"is damaged or cut short ({error})", "Download or save it again."
    if any("/code/" in record.filename for record in records):
        return None  # TorchScript, which torch.load refuses before it unpacks anything
    if any(record.compress_type != zipfile.ZIP_STORED for record in records):
        return "holds compressed records, which torch.save never writes: refused", "Save it again with torch.save."
    if sum(record.file_size for record in records) > path.stat().st_size:
        return "holds records that overlap, a zip bomb: refused", "Download or save it again."
    return None


def weights_fault(path: Path, weights: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Why the weights read from ``path`` are not those that were saved, and a remedy, or None:
    they are too large for the file, or bits flipped.

    torch.load compares no checksums. A record without one (``torch.serialization.set_crc32_options(False)``) cannot be checked,
    nor can safetensors, which have none.
    """
    size = path.stat().st_size
    for name, value in weights.items():
        if value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized:
            stored = value.untyped_storage().nbytes()
            if value.numel() * value.element_size() > stored:
                return f"says {name} has {value.numel()} values and stores {stored} bytes for them", "Save it again contiguous."
    total = sum(4 * value.numel() for value in weights.values())
    if total > _LARGEST_RATIO * size:
        return f"describes weights of {total} bytes in a file of {size}", "Download or save it again."
    checksums = _checksums(path)
    seen: set[int] = set()
    for name, value in weights.items():
        plain = value.layout == torch.strided and value.device.type == "cpu" and value.numel()
        if checksums and plain and value.untyped_storage().data_ptr() not in seen:
            seen.add(value.untyped_storage().data_ptr())
            data = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
            known = checksums.get(data.numel())
            if known and 0 not in known and zlib.crc32(data.numpy().data) not in known:
                return f"is damaged: the bytes of {name} do not give the checksum they were saved with", "Download it again."
    return None


def _checksums(path: Path) -> dict[int, set[int]]:
    """Size of a record → CRC-32 of every record of that size; empty for what is no zip archive."""
    if not zipfile.is_zipfile(path):
        return {}
    found: dict[int, set[int]] = {}
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            found.setdefault(record.file_size, set()).add(record.CRC)
    return found
