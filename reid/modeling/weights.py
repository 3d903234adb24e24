"""Checkpoints in, checkpoints out; loading never runs code from a file.

Longer than other files, since reading, fitting and writing share their checks and messages.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

import reid.modeling.clip_formats  # noqa: F401  (registers the formats)
from reid.file_kinds import read_head
from reid.files import InputError, open_regular, replacing
from reid.modeling.batchnorm import wrong_statistic
from reid.modeling.foreign import name_foreign_file
from reid.modeling.formats import NamedTensors, use_our_names
from reid.modeling.screening import (
    RefusedError,
    check_pickle_file,
    check_safetensors_file,
    check_tensors,
    is_safetensors,
)

_WRAPPERS = ("model", "state_dict", "teacher")
# Floats of 8 bits are left out: they mean nothing without scales, which are stored elsewhere.
_NUMBERS = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
# What published checkpoints hold beside tensors: best scores, the command line.
_PASSED_OVER = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
)
# What torch, zipfile and safetensors raise on broken files.
_BROKEN = (
    SafetensorError, zipfile.BadZipFile, zlib.error, struct.error, tarfile.TarError, RuntimeError,
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError,
    ArithmeticError, MemoryError,
)  # fmt: skip


class _Nothing:
    """A stand-in for an object of a file that is ignored; it drops all arguments."""

    def __new__(cls, *_: object) -> _Nothing:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class WeightsError(ValueError):
    """A checkpoint is missing, broken, or does not fit the model."""


@dataclass(frozen=True)
class LoadReport:
    """Which tensors of a checkpoint were loaded, and which were not.

    Attributes:
        loaded: Names that were loaded as they are.
        resized: Names that were resized, with both shapes.
        missing: Names in the model that the file does not have; they keep their values.
        unexpected: Names in the file that the model does not have.
        skipped: Names in the file that belong to its own data set, such as camera embeddings.
        left_out: Names in the file that its format leaves out, and why.
        metadata: Metadata of the file.
    """

    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        titles = ("resized", "missing", "unexpected", "skipped")
        lines = [f"  loaded      {len(self.loaded)} tensors"]
        lines += [_listed(title, getattr(self, title)) for title in titles]
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        lines += [f"{_listed('left out', names)} ({reason})" for reason, names in reasons.items()]
        return "\n".join(lines)


def _listed(title: str, names: Sequence[str]) -> str:
    shown = ", ".join(names[:6]) + (f", ... ({len(names) - 6} more)" if names[6:] else "")
    return f"  {title:<11} {len(names)}{': ' + shown if names else ''}"


def read_checkpoint(path: Path) -> tuple[NamedTensors, dict[str, str]]:
    """Tensors under our names, if the file's format is known, and its metadata.

    See `read_tensors` and `reid.modeling.formats`.

    Raises:
        WeightsError: The file is missing, broken, or would run code when read.
    """
    state, metadata = read_tensors(path)
    try:
        return use_our_names(state), metadata
    except ValueError as error:
        raise WeightsError(f"{path}: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, whatever its name; empty for other files.

    Raises:
        WeightsError: The file is missing or broken.
    """

    def read(name: str) -> dict[str, str]:
        if not is_safetensors(read_head(name)):
            return {}
        check_safetensors_file(Path(name))
        with safe_open(name, "pt") as file:
            return dict(file.metadata() or {})

    metadata: dict[str, str] = _read(path, read)
    return metadata


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name as they are, and the metadata of a safetensors file.

    Tensors may lie at the top or under `model`, `state_dict` or `teacher`; a `module.` before the
    names is dropped. All other values are ignored; NumPy numbers and command-line arguments,
    which published files hold, are not even built. The content decides whether a file is
    safetensors or from `torch.save`, not its name.

    Raises:
        WeightsError: The file is missing, broken, not a checkpoint (the message says what it is),
            or would run code when read; it has more than 50,000 tensors; or a tensor has numbers of
            a type that no network here has, such as complex numbers or floats of 8 bits.
    """
    metadata: dict[str, str] = {}
    content: Mapping[str, Any]
    try:
        head = read_head(path) if path.is_file() else b""
    except InputError as error:
        raise WeightsError(f"{error}; expected a checkpoint") from error
    if is_safetensors(head):
        content, metadata = _read(path, _read_safetensors)
    else:
        content = _load_pickle(path, passed_over=_PASSED_OVER)
        for wrapper in _WRAPPERS:
            if isinstance(content.get(wrapper), Mapping):
                content = content[wrapper]
                break
    state = {
        str(name).removeprefix("module."): value
        for name, value in content.items()
        if isinstance(value, Tensor)
    }
    if not state:
        raise WeightsError(
            f"{path}: no tensors found, at the top or under {', '.join(_WRAPPERS)}; "
            f"the file has {', '.join(map(str, list(content)[:8])) or 'nothing'}"
        )
    odd = [f"{name} {value.dtype}" for name, value in state.items() if value.dtype not in _NUMBERS]
    if odd:
        raise WeightsError(
            f"{path}: expected whole numbers, or floats of 16 bits or more, got "
            f"{', '.join(odd[:4])}{', ...' if odd[4:] else ''}"
        )
    return state, metadata


def load_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str = "checkpoint",
    allow_missing: Sequence[str] = (),
    skip: Sequence[str] = (),
    left_out: Mapping[str, str] | None = None,
) -> LoadReport:
    """Loads tensors by name, all or none of them.

    A module may define `resize_tensor(name, tensor)`, which fits a tensor of another shape,
    returns None, or raises a ValueError that says why it cannot.

    Args:
        module: The module to fill.
        state: Tensors by name.
        source: Name of the file, for messages.
        allow_missing: Patterns of names that the file need not have.
        skip: Patterns of names that are not loaded, whether the file has them or not.
        left_out: Names that the file's format leaves out, and why, for the report; None: those
            of `state`, if it comes from `read_checkpoint`.

    Raises:
        WeightsError: A shape does not fit, a tensor is missing, is not finite in the module's
            precision, or has integers where the module has floats, or no name fits. The module is
            as it was.
    """
    target = module.state_dict()
    resize: Callable[[str, Tensor], Tensor | None] = getattr(
        module, "resize_tensor", lambda name, tensor: None
    )
    if left_out is None:
        left_out = state.left_out if isinstance(state, NamedTensors) else {}
    skipped = [name for name in state if fits_any(name, skip)]
    wanted = [name for name in state if not fits_any(name, skip)]
    unexpected = [name for name in wanted if name not in target and name not in left_out]
    fitting = {name: state[name] for name in wanted if name in target}
    taken = _fit_all(fitting, target, resize, source)
    changed = [name for name in taken if taken[name].shape != state[name].shape]
    loaded = [name for name in taken if name not in changed]
    shapes = {name: (tuple(state[name].shape), tuple(taken[name].shape)) for name in changed}
    resized = [f"{name} {before} to {after}" for name, (before, after) in shapes.items()]
    if not taken:
        raise WeightsError(
            f"{source}: no name fits the model, nothing was loaded; the file has "
            f"{', '.join(unexpected[:4])}, ...; the model has {', '.join(list(target)[:4])}, ..."
        )
    _check_finite(source, taken)
    # old checkpoints lack this counter, and nothing here depends on it
    expected = [name for name in target if not name.endswith("num_batches_tracked")]
    missing = [name for name in expected if name not in taken]
    needed = [name for name in missing if not fits_any(name, (*allow_missing, *skip))]
    if needed:
        raise _too_few(source, needed, len(target), unexpected)
    module.load_state_dict(taken, strict=False)
    reasons = {name: why for name, why in left_out.items() if name in state and name not in taken}
    return LoadReport(
        tuple(loaded), tuple(resized), tuple(missing), tuple(unexpected), tuple(skipped), reasons
    )


def fits_any(name: str, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns (`*`, `?`) matches the name."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def _check_finite(source: str, tensors: Mapping[str, Tensor]) -> None:
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise WeightsError(f"{source}: values are not finite, nothing was loaded: {broken}")
    for name, tensor in tensors.items():
        if problem := wrong_statistic(name, tensor):
            raise WeightsError(f"{source}: {name}: {problem}, nothing was loaded")


def _too_few(
    source: str, needed: Sequence[str], wanted: int, unexpected: Sequence[str]
) -> WeightsError:
    return WeightsError(
        f"{source}: {len(needed)} of the model's {wanted} tensors are not in the file, "
        f"nothing was loaded: {', '.join(needed[:8])}{', ...' if needed[8:] else ''}"
        + (f"; the file's own: {', '.join(unexpected[:4])}, ..." if unexpected else "")
    )


def _fit_all(
    state: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    resize: Callable[[str, Tensor], Tensor | None],
    source: str,
) -> dict[str, Tensor]:
    """Tensors of the shapes of `target`.

    Raises:
        WeightsError: Some do not fit; names all of them.
    """
    fitted, wrong = {}, []
    for name, tensor in state.items():
        try:
            fitted[name] = _fit(name, tensor, target[name], resize)
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        raise WeightsError(
            f"{source}: tensors do not fit, nothing was loaded:\n  " + "\n  ".join(wrong)
        )
    return fitted


def _fit(
    name: str, tensor: Tensor, ours: Tensor, resize: Callable[[str, Tensor], Tensor | None]
) -> Tensor:
    """A tensor of a file in the shape of the model's tensor; a float also in its precision."""
    if ours.is_floating_point() and not tensor.is_floating_point():
        raise ValueError(f"file {tensor.dtype}, model {ours.dtype}")
    fitted = tensor if tensor.shape == ours.shape else resize(name, tensor)
    if fitted is None or fitted.shape != ours.shape:
        raise ValueError(f"file {tuple(tensor.shape)}, model {tuple(ours.shape)}")
    return fitted.to(ours.dtype) if ours.is_floating_point() else fitted


def load_backbone_weights(backbone: nn.Module, path: Path) -> LoadReport:
    """Loads pre-trained weights into a backbone.

    The file may hold a backbone alone or a whole model (`backbone.` before the names), in any of
    the known formats or under timm's names. Names that a backbone lists in `dataset_specific`,
    such as camera embeddings, are not loaded; the file need not have those in `may_be_new`.

    Raises:
        WeightsError: The file is missing or broken, or does not fit (see `load_weights`).
    """
    state, metadata = read_checkpoint(path)
    ours = backbone.state_dict().keys()
    inner: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain = name.removeprefix("backbone.")
        # a name of no known format may be a name of timm
        inner[f"net.{plain}" if plain not in ours and f"net.{plain}" in ours else plain] = tensor
    tell_trained_size(backbone, metadata)
    try:
        report = load_weights(
            backbone,
            inner,
            source=str(path),
            allow_missing=getattr(backbone, "may_be_new", ()),
            skip=getattr(backbone, "dataset_specific", ()),
            left_out=state.left_out,
        )
    except WeightsError as error:
        if any(name.startswith("head.") for name in state):
            hint = "This is a whole model: model.weights takes it"
        elif is_cut_backbone(metadata):
            hint = (
                "The missing layers are in the head of the model that this backbone was taken "
                f"from: model.weights takes that model, {metadata.get('source', 'the whole file')}"
            )
        else:
            raise
        raise WeightsError(f"{error}\n{hint}") from error
    return replace(report, metadata=metadata)


def is_cut_backbone(metadata: Mapping[str, str]) -> bool:
    """Whether a file is the backbone alone of a model that was trained here."""
    return metadata.get("part") == "backbone" and "head" in metadata


def tell_trained_size(backbone: nn.Module, metadata: Mapping[str, str]) -> None:
    """Tells a backbone that resizes tensors the image size that its weights were trained with."""
    if not hasattr(backbone, "trained_size"):
        return
    size = None
    with contextlib.suppress(ValueError, RecursionError):
        size = json.loads(metadata.get("image_size", "null"))
    fits = isinstance(size, list) and [type(side) for side in size] == [int, int] and min(size) > 0
    trained: Any = tuple(size) if size is not None and fits else None
    backbone.trained_size = trained


def save_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors as safetensors, whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(tensors, dict(metadata)))


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes tensors, numbers, strings, lists and dicts, whole or not at all.

    Raises:
        OutputError: The file cannot be written.
    """
    with replacing(path) as temporary, _ErrorKeepingFile(temporary, "w") as file:
        try:
            with io.BufferedWriter(file) as buffer:
                torch.save(dict(state), buffer)
        except RuntimeError as error:
            if file.error is not None:  # torch's error gives a position only
                raise file.error from error
            raise


class _ErrorKeepingFile(io.FileIO):
    """A file that keeps the system's first error: torch raises another one in its place."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def load_checkpoint(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """Reads a file of `save_checkpoint` or `torch.save`, data only.

    Args:
        path: The file.
        verify: Compare every record with its checksum first, which torch does not do. Only for
            files of `save_checkpoint`: older formats of torch have no checksums.

    Raises:
        WeightsError: The file is missing, broken, or would run code when read.
    """
    if verify:
        _read(path, _verify)
    return _load_pickle(path)


def _load_pickle(path: Path, passed_over: Sequence[str] = ()) -> dict[str, Any]:
    stand_ins: list[Any] = [(_Nothing, name) for name in passed_over]

    def load(name: str) -> Any:
        check_pickle_file(Path(name))
        # given a path, torch would judge a file by its suffix .safetensors
        with open_regular(name) as file, torch.serialization.safe_globals(stand_ins):
            source: Any = file if name.endswith(".safetensors") else name
            content = torch.load(source, map_location="cpu", weights_only=True)
        check_tensors(content, Path(name).stat().st_size)
        return content

    content = _read(path, load)
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    return content


def _verify(name: str) -> None:
    with zipfile.ZipFile(name) as archive:
        record = archive.testzip()
    if record is not None:
        raise ValueError(f"the checksum of {record} is wrong")


def _read(path: Path, reader: Callable[[str], Any]) -> Any:
    if not path.exists():
        raise WeightsError(f"{path}: there is no such checkpoint file")
    try:
        foreign = name_foreign_file(path)
    except InputError as error:
        raise WeightsError(f"{error}; expected a checkpoint") from error
    if foreign:
        raise WeightsError(f"{path}: is {foreign}")
    try:
        return reader(str(path))
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: holds more than plain tensors{_named_object(error)}, and is not read since "
            "that could run code; where you trust it, save its state_dict(), or its tensors, with "
            "torch.save"
        ) from error
    except RefusedError as error:
        raise WeightsError(f"{path}: is refused: {error}") from error
    except _BROKEN as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path}: is broken or cut off ({reason}); take an earlier or another copy"
        ) from error


def _named_object(error: pickle.UnpicklingError) -> str:
    """What torch refused to build; its own message is long and advises to build it all the same."""
    named = re.search(r"(?:GLOBAL|class|function|global) ([\w.]{3,100})", str(error))
    return f", such as {named[1]}" if named else ""


def _read_safetensors(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    check_safetensors_file(Path(name))
    with safe_open(name, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
