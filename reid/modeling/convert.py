"""Converts a published checkpoint to safetensors that record where it came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from reid.files import file_sha256
from reid.modeling.formats import FORMATS, Format, Statistics, Translation, find_format, translate
from reid.modeling.osnet import WIDTHS, Norm, OSNet
from reid.modeling.weights import WeightsError, fits_any, read_tensors, save_weights
from reid.registry import nearest

_SHOWN = 12
_MOST_LAYERS = 1000  # a file may give a layer any number


@dataclass(frozen=True)
class Conversion:
    """The outcome of a conversion.

    Attributes:
        written: The format of the source.
        renamed: Names in the source and in the output.
        left_out: Names that are not in the output, and why.
        unmapped: Names that the format does not know; not in the output.
        missing: Names that the output should have, but that have no source.
        metadata: Metadata of the output.
        parameters: How many numbers the output holds.
        lacks: Why the output cannot be loaded alone, and what to do; empty if it can.
    """

    written: Format
    renamed: dict[str, str]
    left_out: dict[str, str]
    unmapped: tuple[str, ...]
    missing: tuple[str, ...]
    metadata: dict[str, str]
    parameters: int
    lacks: str = ""

    def __str__(self) -> str:
        lines = [f"format      {self.written.name} ({self.written.project})"]
        if self.written.note:
            lines.append(f"note        {self.written.note}")
        lines.append(f"mapped      {len(self.renamed)} tensors, {self.parameters:,} parameters")
        for pattern, ours in _summarised(self.renamed.items()):
            lines.append(f"  {pattern} -> {ours}")
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            lines.append(f"left out    {len(names)}: {_listed(names)} ({reason})")
        for title, found in (("unmapped", self.unmapped), ("missing", self.missing)):
            lines.append(f"{title:<11} {len(found)}{': ' + _listed(found) if found else ''}")
        lines += [f"metadata    {key}: {value}" for key, value in self.metadata.items()]
        lines += [f"WARNING     {self.lacks}"] if self.lacks else []
        return "\n".join(lines)


def convert_weights(
    source: Path,
    output: Path,
    *,
    written_as: str | None = None,
    part: Literal["model", "backbone"] = "model",
    half: bool = False,
    partial: bool = False,
    drop: Sequence[str] = (),
    url: str = "",
    statistics: Statistics | None = None,
    image_size: tuple[int, int] | None = None,
) -> Conversion:
    """Writes a checkpoint of another project, or of this one, as safetensors under our names.

    Args:
        source: safetensors, or a file of `torch.save`; read as plain tensors.
        output: safetensors file to write.
        written_as: Name of the source's format; None: recognised by the tensors' names.
        part: `backbone` leaves out head and camera embeddings, for weights to start from.
        half: Write in half precision.
        partial: Write even if names are unmapped or missing.
        drop: Patterns (`*` and `?`) of names, ours or the source's, that are left out as well.
        url: Where the source came from, for the metadata.
        statistics: Mean and standard deviation of the pixels in training; None: the file's, or
            those that its project always uses, if any.
        image_size: (H, W) in pixels of the images in training, for the metadata.

    Returns:
        The outcome. The metadata have `format`, `source` (the file's name), `sha256`, `part`, and
        if known `url`, `pixel_mean`, `pixel_std`, `image_size` and `num_cameras`.

    Raises:
        WeightsError: The source is missing or broken, would run code, has an unknown format,
            is not mapped completely, or has values that are not finite.
    """
    state, old_metadata = read_tensors(source)
    written = _format(source, state, written_as)
    found = _translate(source, state, written)
    patterns = (*drop, "head.*", "backbone.camera_embed") if part == "backbone" else tuple(drop)
    unwanted = _unwanted(found, patterns, drop)
    unmapped = tuple(name for name in found.unmapped if name not in unwanted)
    left_out = {**found.left_out, **dict.fromkeys(unwanted, "not wanted")}
    renamed = {old: ours for old, ours in found.renamed.items() if old not in left_out}
    kept = {ours: found.state[ours] for ours in renamed.values()}
    missing = tuple(name for name in missing_names(kept) if not fits_any(name, patterns))
    if not kept:
        raise WeightsError(f"{source}: nothing to write; the file has {_listed(state)}")
    if (unmapped or missing) and not partial:
        raise _incomplete(source, written, unmapped, missing)
    if half:
        kept = {name: t.half() if t.is_floating_point() else t for name, t in kept.items()}
    _check_finite(source, kept, " in half precision" if half else "")
    metadata = _lasting(old_metadata, part) | _metadata(source, state, kept, written, statistics)
    size = {} if image_size is None else {"image_size": json.dumps(list(image_size))}
    metadata |= {"part": part, **({"url": url} if url else {}), **size}
    save_weights(output, kept, metadata)
    parameters = sum(tensor.numel() for tensor in kept.values())
    lacks = _lacking_layers(kept, old_metadata, source) if part == "backbone" else ""
    return Conversion(written, renamed, left_out, unmapped, missing, metadata, parameters, lacks)


def _lasting(metadata: Mapping[str, str], part: str) -> dict[str, str]:
    """The source's metadata that is true of the output too."""
    gone = ("num_cameras", "cameras") if part == "backbone" else ("num_cameras",)
    return {key: value for key, value in metadata.items() if key not in gone}


def _unwanted(found: Translation, ours: Sequence[str], theirs: Sequence[str]) -> list[str]:
    """The source's names that fit a pattern, by our name or by the source's."""
    mapped = [
        old for old, new in found.renamed.items() if fits_any(new, ours) or fits_any(old, theirs)
    ]
    return mapped + [name for name in found.unmapped if fits_any(name, theirs)]


def _lacking_layers(kept: Mapping[str, Tensor], metadata: Mapping[str, str], source: Path) -> str:
    """Says that the head holds the backbone's last layers, if so; else an empty text."""
    try:
        depth = json.loads(metadata.get("backbone", "{}")).get("depth")
    except (ValueError, AttributeError, RecursionError):
        return ""
    blocks = {name.split(".")[3] for name in kept if name.startswith("backbone.net.blocks.")}
    if type(depth) is not int or not 0 < len(blocks) < depth:
        return ""
    return (
        f"{depth - len(blocks)} of {depth} layers are in the head, so this backbone cannot be "
        f"loaded alone: go on from the whole model with MODEL.WEIGHTS {source}"
    )


def _translate(source: Path, state: Mapping[str, Tensor], written: Format) -> Translation:
    try:
        return translate(state, written)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from error


def _incomplete(
    source: Path, written: Format, unmapped: Sequence[str], missing: Sequence[str]
) -> WeightsError:
    return WeightsError(
        f"{source}: not mapped completely as {written.name} ({written.project}): "
        f"{len(unmapped)} unmapped ({_listed(unmapped) or 'none'}), "
        f"{len(missing)} missing ({_listed(missing) or 'none'}). Name another --format, or a "
        "package that knows it with --plugins, leave names out with --drop, or write what there is "
        "with --partial"
    )


def _check_finite(source: Path, tensors: Mapping[str, Tensor], precision: str) -> None:
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise WeightsError(f"{source}: values are not finite{precision}: {_listed(broken)}")


def missing_names(state: Mapping[str, Tensor]) -> list[str]:
    """Names that a checkpoint lacks, judged by those that it has.

    The layers of a stage are numbered without gaps and built alike. ViTs and ResNets also need some
    fixed names, and all names of an OSNet are known. Other architectures are checked by their
    stages only.

    Args:
        state: Tensors under our names.
    """
    expected: set[str] = set()
    if "backbone.net.blocks.0.attn.qkv.weight" in state or "backbone.net.cls_token" in state:
        expected |= {f"backbone.net.{name}" for name in _VIT_NAMES}
        if any(name.startswith("backbone.net.norm_pre.") for name in state):  # CLIP
            expected |= {f"backbone.net.norm_pre.{kind}" for kind in ("weight", "bias")}
            expected -= {"backbone.net.patch_embed.proj.bias"}
    elif "backbone.net.layer1.0.conv1.weight" in state:
        # The last stage may be in the head, as in ABD-Net.
        in_head = any(name.startswith("head.last_stages.") for name in state)
        names = (name for name in _RESNET_NAMES if not (in_head and name.startswith("layer4")))
        expected |= {f"backbone.net.{name}" for name in names}
    elif "backbone.net.stages.0.0.reduce.conv.weight" in state:
        expected |= {f"backbone.{name}" for name in _osnet_names(state)}
    stages: dict[str, dict[int, set[str]]] = {}
    for name in state:
        stage = re.match(r"(.+\.(?:blocks|layer\d|branches|part_necks))\.(\d+)\.(.+)", name)
        # only the first block of a stage projects its shortcut
        if stage is not None and not stage[3].startswith("downsample"):
            stages.setdefault(stage[1], {}).setdefault(int(stage[2]), set()).add(stage[3])
    for stage_name, layers in stages.items():
        inside = set().union(*layers.values())
        expected |= {
            f"{stage_name}.{number}.{name}"
            for number in range(min(max(layers) + 1, _MOST_LAYERS))
            for name in inside
        }
    return sorted(
        name for name in expected - state.keys() if not name.endswith("num_batches_tracked")
    )


_VIT_NAMES = (
    "cls_token",
    "pos_embed",
    "patch_embed.proj.weight",
    "patch_embed.proj.bias",
    *(
        f"blocks.0.{layer}.{kind}"
        for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
        for kind in ("weight", "bias")
    ),
)
_RESNET_NAMES = (
    "conv1.weight",
    *(f"bn1.{kind}" for kind in ("weight", "bias", "running_mean", "running_var")),
    *(f"layer{stage}.0.conv{conv}.weight" for stage in (1, 2, 3, 4) for conv in (1, 2)),
)


def _osnet_names(state: Mapping[str, Tensor]) -> Iterable[str]:
    """All names of the OSNet that the given tensors belong to."""
    if "backbone.net.stages.1.1.expand.norm.running_mean" not in state:
        norm: Norm = "ain"
    else:
        norm = "ibn" if "backbone.net.stages.0.0.norm.weight" in state else "batch"
    with torch.device("meta"):
        return OSNet(min(WIDTHS), norm).state_dict()


def _format(source: Path, state: Mapping[str, Tensor], name: str | None) -> Format:
    if name is None:
        found = find_format(state)
        if found is not None:
            return found
        raise WeightsError(
            f"{source}: of no known format; the file has {_listed(state)}. Known: "
            f"{', '.join(known.name for known in FORMATS)}; --plugins names packages that know more"
        )
    by_name = {known.name: known for known in FORMATS}
    if name not in by_name:
        raise WeightsError(
            f"format: expected one of {', '.join(by_name)}, got {name!r}{nearest(name, by_name)}"
        )
    return by_name[name]


def _metadata(
    source: Path,
    state: Mapping[str, Tensor],
    kept: Mapping[str, Tensor],
    written: Format,
    statistics: Statistics | None,
) -> dict[str, str]:
    metadata = {"format": written.name, "source": source.name, "sha256": file_sha256(source)}
    if statistics is None and {"pixel_mean", "pixel_std"} <= state.keys():
        # fast-reid's values are for pixels from 0 to 255
        mean, std = (
            tuple(round(float(value) / 255, 6) for value in state[name].flatten())
            for name in ("pixel_mean", "pixel_std")
        )
        statistics = mean, std
    statistics = statistics or written.statistics
    if statistics is not None:
        metadata["pixel_mean"] = json.dumps(list(statistics[0]))
        metadata["pixel_std"] = json.dumps(list(statistics[1]))
    cameras = kept.get("backbone.camera_embed")
    if cameras is not None and cameras.ndim:
        metadata["num_cameras"] = str(len(cameras))
    return metadata


def _summarised(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Pairs of names with `*` for numbers, each once."""
    return list(
        dict.fromkeys((re.sub(r"\d+", "*", old), re.sub(r"\d+", "*", ours)) for old, ours in pairs)
    )


def _listed(names: Iterable[str]) -> str:
    found = list(names)
    more = f", ... ({len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
    return ", ".join(found[:_SHOWN]) + more
