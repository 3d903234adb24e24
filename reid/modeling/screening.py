"""Checks of what a checkpoint asks for, before it is read and before its tensors are used.

`torch.load(weights_only=True)` runs no code of a file, but a small file may still ask it for any
amount of memory or time: through compressed records, through the few functions that it does call,
through tensors that repeat the same few numbers, or through millions of empty ones.
"""

from __future__ import annotations

import encodings
import os
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from encodings.aliases import aliases
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from reid.file_kinds import read_head
from reid.files import open_regular

MOST_TENSORS = 50_000
"""The most tensors that a checkpoint may have; the largest networks have a few thousand."""
_MOST_STEPS = 2_000_000  # of a pickle; a tensor takes about 25
_MOST_HEADER = 2**22  # bytes of the header of a safetensors file
_MOST_DIRECTORY = 2**23  # bytes of a zip archive's list of records
_LEGACY_PICKLES = 5  # magic number, version, system, content, keys; raw numbers follow
_BYTE_CODECS = ("base64_codec", "bz2_codec", "hex_codec", "quopri_codec", "uu_codec", "zlib_codec")
_GROWING = frozenset(_BYTE_CODECS) | {
    key for key, codec in aliases.items() if codec in _BYTE_CODECS
}


class RefusedError(ValueError):
    """A file asks for more than a checkpoint needs."""


def is_safetensors(head: bytes) -> bool:
    """Whether a file that starts with `head` looks like safetensors: a length, then JSON."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 2**32


def check_safetensors_file(path: Path) -> None:
    """Refuses a header that would take long to read.

    Raises:
        RefusedError: It has more than 4 MiB, which is some 50,000 tensors.
    """
    size = int.from_bytes(read_head(path)[:8], "little")
    if size > _MOST_HEADER:
        raise RefusedError(
            f"its header of {size:,} bytes is too long: {_MOST_HEADER:,} are read, which is some "
            f"{MOST_TENSORS:,} tensors"
        )


def check_directory(path: Path) -> None:
    """Refuses a zip archive whose list of records would take long to read.

    Raises:
        RefusedError: The list has more than 8 MiB, which is some 100,000 records.
    """
    with open_regular(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 2**16 - 22))
        tail = file.read()
        place = tail.rfind(b"PK\5\6")
        if place < 20 or len(tail) < place + 22:
            return  # reading it will raise an error
        length = int(struct.unpack_from("<L", tail, place + 12)[0])
        if tail[place - 20 : place - 16] == b"PK\6\7":  # zip64, beyond the old form's limits
            file.seek(min(int(struct.unpack_from("<Q", tail, place - 12)[0]), size))
            record = file.read(56)
            if len(record) == 56 and record[:4] == b"PK\6\6":
                length = int(struct.unpack_from("<Q", record, 40)[0])
    if length > _MOST_DIRECTORY:
        raise RefusedError(
            f"its list of records has {length:,} bytes; {_MOST_DIRECTORY:,} are read, which is "
            f"more than {MOST_TENSORS:,} tensors"
        )


def check_pickle_file(path: Path) -> None:
    """Refuses content that `torch.save` never writes, or that takes unbounded time or memory.

    Raises:
        RefusedError: Records are compressed, too many or overlap, or the pickle is too long, builds
            byte arrays, or encodes bytes again and again. Or the file is broken.
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
        check_directory(path)
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            packed = [r.filename for r in records if r.compress_type != zipfile.ZIP_STORED]
            if packed or sum(record.file_size for record in records) > size:
                raise RefusedError(
                    f"its records unpack to {sum(r.file_size for r in records):,} bytes, the file "
                    f"has {size:,}; torch.save neither compresses nor overlaps them"
                )
            for record in records:
                if record.filename.endswith(".pkl"):
                    with archive.open(record) as stream:
                        _check_pickle(stream)


def _check_pickle(stream: IO[bytes]) -> None:
    encodes, words = False, set()
    for steps, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if steps > _MOST_STEPS:
            raise RefusedError(
                f"its pickle has more than {_MOST_STEPS:,} steps, which is more than "
                f"{MOST_TENSORS:,} tensors"
            )
        if opcode.name == "GLOBAL":
            if argument in ("builtins bytearray", "__builtin__ bytearray"):
                raise RefusedError("it builds a bytearray, which may be of any size")
            encodes = encodes or argument == "_codecs encode"
        elif isinstance(argument, str) and len(argument) < 32:
            words.add(encodings.normalize_encoding(argument).lower())
    if encodes and words & _GROWING:
        raise RefusedError(f"it encodes bytes as {', '.join(sorted(words & _GROWING))}")


def check_tensors(content: object, size: int) -> None:
    """Refuses tensors that are not made of numbers in the file.

    Args:
        content: What was read: tensors in dicts, lists and tuples.
        size: Size of the file in bytes.

    Raises:
        RefusedError: A tensor has more bytes than the file, is sparse or quantized, or is without
            data; or there are more than `MOST_TENSORS`.
    """
    for count, (name, tensor) in enumerate(_tensors(content), 1):
        if count > MOST_TENSORS:
            raise RefusedError(f"it has more than {MOST_TENSORS:,} tensors")
        plain = tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.device.type != "cpu":
            raise RefusedError(f"{name} is no plain tensor ({tensor.layout}, {tensor.device})")
        if tensor.numel() * tensor.element_size() > size:
            raise RefusedError(
                f"{name} {tuple(tensor.shape)} has {tensor.numel() * tensor.element_size():,} "
                f"bytes, the file {size:,}"
            )


def _tensors(content: object) -> Iterator[tuple[str, Tensor]]:
    """Tensors with their names; each container is visited once, at any depth."""
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
