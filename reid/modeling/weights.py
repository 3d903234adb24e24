"""Checkpoints in, checkpoints out; loading never runs code from a file."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from reid.files import replacing

_WRAPPERS = ("model", "state_dict", "teacher")


class WeightsError(ValueError):
    """A checkpoint is missing, broken, or does not fit the model."""


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of a checkpoint and of a model.

    Attributes:
        loaded: Names that were taken as they are.
        resized: Names that were resized, with both shapes.
        missing: Names in the model that the file does not have; they keep their values.
        unexpected: Names in the file that the model does not have.
        skipped: Names in the file that belong to its own data set, such as camera embeddings.
    """

    loaded: tuple[str, ...]
    resized: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"  loaded      {len(self.loaded)} tensors"]
        for title in ("resized", "missing", "unexpected", "skipped"):
            names = getattr(self, title)
            shown = ", ".join(names[:6]) + (f", ... ({len(names) - 6} more)" if names[6:] else "")
            lines.append(f"  {title:<11} {len(names)}{': ' + shown if names else ''}")
        return "\n".join(lines)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and the metadata of a safetensors file.

    Tensors may lie at the top or under `model`, `state_dict` or `teacher`; a `module.` before the
    names is dropped. What is no tensor is passed over.

    Raises:
        WeightsError: The file is missing, broken, or would run code when read.
    """
    metadata: dict[str, str] = {}
    content: Mapping[str, Any]
    if path.suffix == ".safetensors":
        content, metadata = _read(path, _read_safetensors)
    else:
        content = load_checkpoint(path)
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
    return state, metadata


def load_weights(
    module: nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str = "checkpoint",
    allow_missing: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> LoadReport:
    """Loads tensors by name, all or none of them.

    A module may define `rename_foreign(state)`, which gives other code's names ours, and
    `resize_tensor(name, tensor)`, which fits a tensor of another shape or returns None.

    Args:
        module: What to fill.
        state: Tensors by name.
        source: For messages.
        allow_missing: Patterns of names that the file need not have.
        skip: Patterns of names that are not taken from the file, and that it need not have.

    Raises:
        WeightsError: A shape does not fit, a tensor is missing or not finite, or no name fits.
            The module is as it was.
    """
    rename = getattr(module, "rename_foreign", None)
    found = dict(state)
    if rename is not None:
        known, left = rename(found)
        found = known | left
    target = module.state_dict()
    resize: Callable[[str, Tensor], Tensor | None] = getattr(
        module, "resize_tensor", lambda name, tensor: None
    )
    taken: dict[str, Tensor] = {}
    loaded, resized, unexpected, skipped, wrong = [], [], [], [], []
    for name, tensor in found.items():
        if any(fnmatch(name, pattern) for pattern in skip):
            skipped.append(name)
        elif name not in target:
            unexpected.append(name)
        elif tensor.shape == target[name].shape:
            taken[name] = tensor
            loaded.append(name)
        elif (fitted := resize(name, tensor)) is not None and fitted.shape == target[name].shape:
            taken[name] = fitted
            resized.append(f"{name} {tuple(tensor.shape)} to {tuple(fitted.shape)}")
        else:
            wrong.append(f"{name}: file {tuple(tensor.shape)}, model {tuple(target[name].shape)}")
    if wrong:
        raise WeightsError(
            f"{source}: shapes do not fit, nothing was loaded:\n  " + "\n  ".join(wrong)
        )
    if not taken:
        raise WeightsError(
            f"{source}: no name fits the model, nothing was loaded; the file has "
            f"{', '.join(unexpected[:4])}, ...; the model has {', '.join(list(target)[:4])}, ..."
        )
    broken = [name for name, tensor in taken.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise WeightsError(f"{source}: values are not finite, nothing was loaded: {broken}")
    missing = [
        name
        for name in target
        # a counter that checkpoints of old versions do not have; nothing here depends on it
        if name not in taken and not name.endswith("num_batches_tracked")
    ]
    needed = [
        name
        for name in missing
        if not any(fnmatch(name, pattern) for pattern in (*allow_missing, *skip))
    ]
    if needed:
        raise WeightsError(
            f"{source}: {len(needed)} of the model's {len(target)} tensors are not in the file, "
            f"nothing was loaded: {', '.join(needed[:8])}{', ...' if needed[8:] else ''}"
            + (f"; the file's own: {', '.join(unexpected[:4])}, ..." if unexpected else "")
        )
    module.load_state_dict(taken, strict=False)
    return LoadReport(*map(tuple, (loaded, resized, missing, unexpected, skipped)))


def load_backbone_weights(backbone: nn.Module, path: Path) -> LoadReport:
    """Loads pre-trained weights into a backbone.

    The file may hold a backbone alone or a whole model (`backbone.` before the names). What a
    backbone lists as `dataset_specific`, such as camera embeddings, is not taken.

    Raises:
        WeightsError: The file is missing or broken, or does not fit (see `load_weights`).
    """
    state, _ = read_checkpoint(path)
    inner = {
        name.removeprefix("backbone."): tensor
        for name, tensor in state.items()
        if name.startswith("backbone.")
    }
    report = load_weights(
        backbone,
        inner or state,
        source=str(path),
        skip=getattr(backbone, "dataset_specific", ()),
    )
    others = tuple(name for name in state if inner and not name.startswith("backbone."))
    return LoadReport(
        report.loaded, report.resized, report.missing, report.unexpected + others, report.skipped
    )


def export_backbone(
    model: Path, output: Path, drop: Sequence[str] = ("*camera_embed*",)
) -> dict[str, int]:
    """Writes the backbone of a model's checkpoint in half precision, as weights to start from.

    Args:
        model: Checkpoint of a whole model.
        output: safetensors file to write.
        drop: Patterns of names that are left out.

    Returns:
        Numbers of tensors, parameters and bytes.

    Raises:
        WeightsError: The file is missing or broken, or holds no backbone.
    """
    state, metadata = read_checkpoint(model)
    backbone = {
        name.removeprefix("backbone."): tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
        if name.startswith("backbone.") and not any(fnmatch(name, pattern) for pattern in drop)
    }
    if not backbone:
        raise WeightsError(f"{model}: holds no backbone (no name starts with `backbone.`)")
    save_weights(output, backbone, {"part": "backbone", **metadata})
    parameters = sum(tensor.numel() for tensor in backbone.values())
    return {"tensors": len(backbone), "parameters": parameters, "bytes": output.stat().st_size}


def save_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes tensors as safetensors, whole or not at all."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, dict(metadata))


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Writes tensors, numbers, strings, lists and dicts, whole or not at all."""
    with replacing(path) as temporary:
        torch.save(dict(state), temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads what `save_checkpoint` or other code's `torch.save` wrote, data alone.

    Raises:
        WeightsError: The file is missing, broken, or would run code when read.
    """
    content = _read(path, lambda name: torch.load(name, map_location="cpu", weights_only=True))
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: expected a dict of tensors, got {type(content).__name__}")
    return content


def _read(path: Path, reader: Callable[[str], Any]) -> Any:
    if not path.is_file():
        raise WeightsError(f"{path}: there is no such checkpoint file")
    try:
        return reader(str(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if str(error) else "broken pickle"
        raise WeightsError(
            f"{path}: cannot be read as plain tensors, and is not read in any other way since "
            f"that could run code ({reason}); convert it to safetensors where you trust it"
        ) from error
    except (
        SafetensorError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        UnicodeDecodeError,
        OverflowError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{path}: is broken or cut off ({reason}); take an earlier or another copy"
        ) from error


def _read_safetensors(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(name, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
