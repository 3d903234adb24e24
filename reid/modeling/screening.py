"""What a checkpoint asks for, looked at before it is read and before its tensors are used.

`torch.load(weights_only=True)` runs no code of a file, but a small file may still ask it for any
amount of memory: through compressed records, through the few functions that it does call, or
through tensors that repeat the same few numbers.
"""

from __future__ import annotations

import encodings
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from encodings.aliases import aliases
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

_LEGACY_PICKLES = 5  # magic number, version, system, content, keys; raw numbers follow
_BYTE_CODECS = ("base64_codec", "bz2_codec", "hex_codec", "quopri_codec", "uu_codec", "zlib_codec")
_GROWING = frozenset(_BYTE_CODECS) | {
    key for key, codec in aliases.items() if codec in _BYTE_CODECS
}


def check_pickle_file(path: Path) -> None:
    """Refuses what `torch.save` does not write and what would take memory without bound.

    Raises:
        ValueError: Records are compressed or overlap, or the pickle builds byte arrays, or encodes
            bytes again and again. Or the file is broken.
        EOFError: The file is cut off.
        zipfile.BadZipFile: The file starts like a zip archive, but is none.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            file.seek(0)
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(file)
            return
        size = path.stat().st_size
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            packed = [r.filename for r in records if r.compress_type != zipfile.ZIP_STORED]
            if packed or sum(record.file_size for record in records) > size:
                raise ValueError(
                    f"its records unpack to {sum(r.file_size for r in records):,} bytes, the file "
                    f"has {size:,}; torch.save neither compresses nor overlaps them"
                )
            for record in records:
                if record.filename.endswith(".pkl"):
                    with archive.open(record) as stream:
                        _check_pickle(stream)


def _check_pickle(stream: IO[bytes]) -> None:
    encodes, words = False, set()
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL":
            if argument in ("builtins bytearray", "__builtin__ bytearray"):
                raise ValueError("it builds a bytearray, which may be of any size")
            encodes = encodes or argument == "_codecs encode"
        elif isinstance(argument, str) and len(argument) < 32:
            words.add(encodings.normalize_encoding(argument).lower())
    if encodes and words & _GROWING:
        raise ValueError(f"it encodes bytes as {', '.join(sorted(words & _GROWING))}")


def check_tensors(content: object, size: int) -> None:
    """Refuses tensors that are not made of numbers in the file.

    Args:
        content: What was read: tensors in dicts, lists and tuples.
        size: Of the file in bytes.

    Raises:
        ValueError: A tensor has more numbers than the file, is sparse or quantized, or has none.
    """
    for name, tensor in _tensors(content):
        plain = tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.device.type != "cpu":
            raise ValueError(f"{name} is no plain tensor ({tensor.layout}, {tensor.device})")
        if tensor.numel() * tensor.element_size() > size:
            raise ValueError(
                f"{name} {tuple(tensor.shape)} has {tensor.numel() * tensor.element_size():,} "
                f"bytes, the file {size:,}"
            )


def _tensors(content: object) -> Iterator[tuple[str, Tensor]]:
    """Tensors with their names; each container is looked into once, however deep it lies."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any]] = [("", content)]
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            inner = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += [(f"{name}.{key}" if name else str(key), item) for key, item in inner]
