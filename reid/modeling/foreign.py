"""Recognises files that are not checkpoints, and says what they are and what to do."""

from __future__ import annotations

import itertools
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from reid.file_kinds import find_kind, read_head
from reid.modeling.screening import check_directory, is_safetensors
from reid.shipped import tool

# What zipfile and tarfile raise on broken files.
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, struct.error, ValueError, OSError, EOFError, LookupError,
    RuntimeError, ArithmeticError,
)  # fmt: skip
_WEIGHTS = (".pth", ".pt", ".safetensors", ".bin", ".ckpt", ".tar", ".pth.tar")
_TAKE_IT = "use the checkpoint that it was made from (.pth, .pt, .safetensors)"
# `torch.save` wrote this before everything else until torch 1.6.
_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)[2:-1]
_SHORTEST = 2 + len(_MAGIC)
_PLAIN_PICKLE = (
    "a plain pickle (pickle.dump), not a file of torch.save. Reading it could run code: if you "
    "trust it, load it yourself and save its tensors with torch.save"
)
# For files whose content proves nothing.
_BY_NAME = (
    (r"\.(pb|pbtxt|meta|index|data-\d+-of-\d+)$", "a TensorFlow model by its name"),
    (r"\.(caffemodel|prototxt)$", "a Caffe model by its name"),
    (r"\.onnx$", "an ONNX model by its name"),
    (r"\.mlmodel$", "a Core ML model by its name"),
    (r"\.(engine|plan|trt)$", "a TensorRT model by its name"),
    (r"\.(pdmodel|pdiparams)$", "a PaddlePaddle model by its name"),
    (r"\.(params|mnn|rknn|om|blob|nb|tmfile)$", "a model for another library by its name"),
)


def name_foreign_file(path: Path) -> str:
    """What a file is, if not a checkpoint, and what to do; empty if it may be a checkpoint.

    Raises:
        InputError: The file is not a regular file, or cannot be read.
    """
    if path.is_dir():
        return _name_folder(path)
    head = read_head(path)
    if is_safetensors(head):
        return ""
    if head[:1] == b"\x80":  # a pickle
        return "" if _MAGIC in head[:64] or len(head) < _SHORTEST else _PLAIN_PICKLE
    if head[:2] == b"PK":
        return _name_archive(path)
    if head[257:262] == b"ustar" and _tar_names(path) & {"storages", "tensors"}:
        return ""  # how torch saved long ago
    kind = find_kind(head)
    if kind is not None:
        if kind.group == "picture" or kind.group == "video" or not kind.advice:
            return f"{kind.phrase}, not a checkpoint"
        return f"{kind.phrase}; {kind.advice}"
    name = path.name.lower()
    for pattern, phrase in _BY_NAME:
        if re.search(pattern, name):
            return f"{phrase}; {_TAKE_IT}"
    if path.suffix == ".bin" and path.with_suffix(".xml").is_file():
        return f"the weights of an OpenVINO model, without names; {_TAKE_IT}"
    text = head.decode("utf-8", "replace")
    if "\ufffd" not in text[:-1] and "".join(text.split()).isprintable():
        return f"text that starts with {text[:60]!r}, not a checkpoint; download it again"
    return ""


def _name_folder(path: Path) -> str:
    names = sorted(entry.name for entry in path.iterdir())
    if "saved_model.pb" in names:
        return f"the folder of a TensorFlow model; {_TAKE_IT}"
    if "data.pkl" in names or any((path / name / "data.pkl").is_file() for name in names):
        return (
            "the folder of a checkpoint that a browser unpacked; download the file again with "
            "another browser, or pack it: zip -0 -r NAME.pth FOLDER"
        )
    return f"a folder, expected a checkpoint file{_weights_among(names, 'name the file in it')}"


def _name_archive(path: Path) -> str:
    try:
        check_directory(path)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except _BROKEN:
        return ""  # reading it will raise an error
    ends = {name.rpartition("/")[2] for name in names}
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        return (
            "a TorchScript model (torch.jit.save), which holds code; if you trust it, save "
            "torch.jit.load(FILE).state_dict() with torch.save"
        )
    if ends & {"serialized_exported_program.json", "archive_format"} or "model.json" in ends:
        return (
            "a program of torch.export (.pt2), which holds code; if you trust it, save "
            "torch.export.load(FILE).state_dict with torch.save"
        )
    if any(name.endswith(".data/extern_modules") for name in names):
        return f"a torch.package, which holds code; {_TAKE_IT}"
    if "data.pkl" in ends:
        return ""
    if "MANIFEST.json" in ends:
        return (
            f"an archive of TorchServe{_weights_among(names, 'unpack it and name the file in it')}"
        )
    if ends & {"model.weights.h5", "keras_metadata.pb", "saved_model.pb"}:
        return f"a Keras or TensorFlow model; {_TAKE_IT}"
    if names and all(name.endswith(".npy") for name in names):
        return f"an archive of NumPy (.npz), not a checkpoint; {tool('evaluate')} reads features"
    return f"a zip archive{_weights_among(names, 'unpack it and name the file in it')}"


def _weights_among(names: Sequence[str], advice: str) -> str:
    """What to do about an archive or a folder that holds these names."""
    found = [name for name in names if name.endswith(_WEIGHTS) and not name.startswith("__MACOSX")]
    if not found:
        return f" without weights in it: {', '.join(names[:4]) or 'nothing'}"
    return f"; {advice}: {', '.join(found[:4])}{', ...' if found[4:] else ''}"


def _tar_names(path: Path) -> set[str]:
    try:
        with tarfile.open(path) as archive:
            return {member.name for member in itertools.islice(archive, 9)}
    except _BROKEN:
        return set()
