"""Names in published checkpoints, and ours for them: one table, read when weights are loaded.

Here a whole model has names in `backbone.` and `head.`, and the network inside a backbone is `net`.
The names below were read in the published code of each project (TransReID, TransReID-SSL with its
DINO, fast-reid, torchreid, reid-strong-baseline), since the published files could not be
downloaded; if authors saved a file in another way, its names are reported as unmapped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

VIT_NAMES = r"(cls_token|pos_embed|patch_embed\..+|blocks\..+|norm\.weight|norm\.bias)"
_RESNET = r"((?:conv1|bn1)\.[a-z_]+|layer\d\.\d+\.(?:conv\d|bn\d|downsample)\..+)"
_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_LAST = "<last>"
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of the pixels, per channel, for RGB in [0, 1]."""


@dataclass(frozen=True)
class Rule:
    r"""How names that match a pattern are renamed, or why they are left out.

    Attributes:
        pattern: Regular expression that a whole name matches; `<last>` stands for the number of
            the last transformer layer in the file.
        target: Our name, with `\1` for the first group; None: left out.
        reason: Why such a tensor is left out; with a target, what a model without a place for it
            leaves out.
        change: Gives the tensor our layout; None: it has that already.
    """

    pattern: str
    target: str | None = None
    reason: str = ""
    change: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Format:
    """How some project names its tensors.

    Attributes:
        name: For `--format`.
        project: Who writes it.
        rules: The first one that matches a name counts.
        has: Regular expressions; each matches a name of such a file.
        lacks: Regular expressions; none matches a name of such a file.
        statistics: The project's mean and deviation of pixels; None: they differ between files.
        note: Anything else that a user must know.
    """

    name: str
    project: str
    rules: tuple[Rule, ...]
    has: tuple[str, ...]
    lacks: tuple[str, ...] = ()
    statistics: Statistics | None = None
    note: str = ""

    def fits(self, names: Iterable[str]) -> bool:
        """Whether a file with these names is of this format."""
        known = list(names)

        def found(pattern: str) -> bool:
            return any(re.match(pattern, name) for name in known)

        return all(map(found, self.has)) and not any(map(found, self.lacks))


@dataclass(frozen=True)
class Translation:
    """A checkpoint under our names.

    Attributes:
        state: The tensors that have a name here.
        renamed: Their old names and ours.
        left_out: Names that a rule leaves out, and why.
        unmapped: Names that no rule knows.
        optional: Our names that some models have no place for, and what these tensors are.
    """

    state: dict[str, Tensor]
    renamed: dict[str, str]
    left_out: dict[str, str]
    unmapped: tuple[str, ...]
    optional: dict[str, str]


_CLASSIFIER = "classifier of the training identities"
_LOCAL = "local branch"
_IMAGENET_CLASSIFIER = "classifier of the pre-training"
_PROJECTION = "projection head of the pre-training"
_ENCODER = r"(?:encoder_q|base_encoder|encoder|backbone)\."
_STATISTICS = "counted in as the statistics of the pixels"
_OSNET = "for MODEL.BACKBONE {NAME: OSNet, WIDTH: W}, where the first convolution has 64 W channels"


def _osnet_rules(
    transition: str, streams: Mapping[str, str], instance_norm: str
) -> tuple[Rule, ...]:
    """Rules for torchreid's OSNets, which call the stages conv2 to conv4.

    Args:
        transition: Pattern of the layer after stage N; `N` stands for the number in `convN`.
        streams: Patterns of the light convolutions of a block, and our names for them.
        instance_norm: Our name of a block's InstanceNorm.
    """
    kind = r"(?P<kind>weight|bias|running_mean|running_var|num_batches_tracked)"
    layers = {"conv1": "stem", "conv5": "last"}
    within = {}
    for number, stage in (("2", 0), ("3", 1), ("4", 2)):
        block, ours = rf"conv{number}\.(?P<block>[01])", rf"stages.{stage}.\g<block>"
        layers[transition.replace("N", number)] = f"transitions.{stage}"
        for theirs, layer in (("conv1", "reduce"), ("conv3", "expand"), ("downsample", "shortcut")):
            layers[rf"{block}\.{theirs}"] = f"{ours}.{layer}"
        within[rf"{block}\.gate\.fc1\."] = f"{ours}.gate.squeeze."
        within[rf"{block}\.gate\.fc2\."] = f"{ours}.gate.excite."
        within[rf"{block}\.IN\."] = f"{ours}.{instance_norm}."
        for theirs, stream in streams.items():
            within[rf"{block}\.{theirs}\.conv1\."] = f"{ours}.{stream}.pointwise."
            within[rf"{block}\.{theirs}\.conv2\."] = f"{ours}.{stream}.depthwise."
            within[rf"{block}\.{theirs}\.bn\."] = f"{ours}.{stream}.norm."
    for theirs, layer in layers.items():
        within[rf"{theirs}\.conv\."] = f"{layer}.conv."
        within[rf"{theirs}\.bn\."] = f"{layer}.norm."
    within |= {r"fc\.0\.": "fc.", r"fc\.1\.": "fc_norm."}
    return (
        *(Rule(f"{old}{kind}", rf"backbone.net.{new}\g<kind>") for old, new in within.items()),
        Rule(r"classifier\..+", reason=_CLASSIFIER),
    )


FORMATS: list[Format] = [
    Format(
        "reid",
        "this project",
        (
            Rule(r"((?:backbone|head)\..+)", r"\1"),
            Rule(r"(net\..+|camera_embed|exponent)", r"backbone.\1"),
        ),
        has=(r"(?:backbone\.)?net\.",),
    ),
    Format(
        "dino",
        "DINO pre-training of TransReID-SSL and others: teacher with backbone and projection head",
        (
            Rule(rf"backbone\.{VIT_NAMES}", r"backbone.net.\1"),
            Rule(r"head\..+", reason=_PROJECTION),
            Rule(r"backbone\.(fc|head)\..+", reason=_IMAGENET_CLASSIFIER),
        ),
        has=(r"backbone\.cls_token$",),
    ),
    Format(
        "vit",
        "a plain ViT: LUPerson weights as TransReID-SSL publishes them, timm, DINO",
        (
            Rule(VIT_NAMES, r"backbone.net.\1"),
            Rule(r"sie_embed", "backbone.camera_embed"),
            Rule(r"(fc|head|head_dist|pre_logits)\..+", reason=_IMAGENET_CLASSIFIER),
            Rule("dist_token", reason="token of the distillation"),
        ),
        has=(r"cls_token$", r"blocks\.0\."),
        lacks=(r"bottleneck\.",),
    ),
    Format(
        "transreid-ssl-usl",
        "TransReID-SSL, unsupervised: a ViT with its neck",
        (
            Rule(VIT_NAMES, r"backbone.net.\1"),
            Rule(rf"bottleneck\.{_NORM}", r"head.neck.\1"),
            Rule(r"fc\..+", reason=_IMAGENET_CLASSIFIER),
        ),
        has=(r"cls_token$", r"bottleneck\."),
        statistics=_HALF,
    ),
    Format(
        "transreid",
        "TransReID and TransReID-SSL, supervised, without local features",
        (
            Rule(rf"base\.{VIT_NAMES}", r"backbone.net.\1"),
            Rule(r"base\.sie_embed", "backbone.camera_embed"),
            Rule(rf"bottleneck\.{_NORM}", r"head.neck.\1"),
            Rule(r"base\.fc\..+", reason=_IMAGENET_CLASSIFIER),
            Rule(r"classifier\..+", reason=_CLASSIFIER),
        ),
        has=(r"base\.cls_token$", r"bottleneck\."),
        lacks=(r"b1\.", r"part_bns\."),
        statistics=_HALF,
        note="tested on the feature before the neck: MODEL.HEAD.NECK_FEATURE before",
    ),
    Format(
        "transreid-jpm",
        "TransReID with local features (JPM): the global branch is a plain ViT",
        (
            Rule(rf"base\.(?:blocks\.{_LAST}|norm)\..+", reason="the branches' copies replace it"),
            Rule(rf"base\.{VIT_NAMES}", r"backbone.net.\1"),
            Rule(r"base\.sie_embed", "backbone.camera_embed"),
            Rule(r"b1\.0\.(.+)", rf"backbone.net.blocks.{_LAST}.\1"),
            Rule(r"b1\.1\.(.+)", r"backbone.net.norm.\1"),
            Rule(rf"bottleneck\.{_NORM}", r"head.neck.\1"),
            Rule(r"b2\.([01]\..+)", r"head.local.\1", _LOCAL),
            *(
                Rule(rf"bottleneck_{i + 1}\.{_NORM}", rf"head.part_necks.{i}.\1", _LOCAL)
                for i in range(4)
            ),
            Rule(r"base\.fc\..+", reason=_IMAGENET_CLASSIFIER),
            Rule(r"classifier(?:_\d+)?\..+", reason=_CLASSIFIER),
        ),
        has=(r"base\.cls_token$", r"b1\.0\.", r"bottleneck_1\."),
        statistics=_HALF,
        note="MODEL.HEAD {NAME: JPMHead} of PLUGINS [transreid] joins four local features to the"
        " global one, as TransReID does; other heads leave them out",
    ),
    Format(
        "strong-baseline",
        "reid-strong-baseline and TransReID's ResNets",
        (
            Rule(rf"base\.{_RESNET}", r"backbone.net.\1"),
            Rule(rf"bottleneck\.{_NORM}", r"head.neck.\1"),
            Rule(r"classifier\..+", reason=_CLASSIFIER),
        ),
        has=(r"base\.conv1\.weight$", r"base\.layer1\."),
        statistics=_IMAGENET,
    ),
    Format(
        "fast-reid",
        "fast-reid's ResNets, with average or GeM pooling",
        (
            Rule(rf"backbone\.{_RESNET}", r"backbone.net.\1"),
            Rule(rf"heads\.(?:bottleneck\.0|bnneck)\.{_NORM}", r"head.neck.\1"),
            Rule(r"heads\.(?:pool_layer|pool_layer\.1)\.p", "backbone.exponent"),
            Rule(r"heads\.(?:weight|classifier\..+|cls_layer\..+)", reason=_CLASSIFIER),
            Rule(r"pixel_(?:mean|std)", reason=_STATISTICS),
        ),
        has=(r"backbone\.conv1\.weight$", r"backbone\.layer1\.", r"heads\."),
        statistics=_IMAGENET,
        note="fast-reid's max pooling rounds sizes up without padding, timm's pads: features differ"
        " a little from fast-reid's own",
    ),
    Format(
        "self-supervised",
        "MoCo (v1 to v3), SimSiam, Barlow Twins and others: an encoder with its projection head",
        (
            Rule(_ENCODER + _RESNET, r"backbone.net.\1"),
            Rule(_ENCODER + VIT_NAMES, r"backbone.net.\1"),
            Rule(_ENCODER + r"(?:fc|head)\..+", reason=_PROJECTION),
            Rule(r"(?:projector|predictor|projection_head|prototypes|bn)\..+", reason=_PROJECTION),
            Rule(
                r"(?:encoder_k|momentum_encoder)\..+",
                reason="the averaged encoder of the pre-training",
            ),
            Rule(r"queue(?:_ptr)?", reason="the queue of the pre-training"),
        ),
        has=(_ENCODER + r"(?:conv1\.weight|cls_token)$", _ENCODER + r"(?:layer1|blocks)\."),
        lacks=(r"heads\.", r"bottleneck\."),
    ),
    Format(
        "resnet",
        "a plain ResNet: torchreid, torchvision, timm, IBN-Net",
        (
            Rule(_RESNET, r"backbone.net.\1"),
            Rule(r"classifier\..+", reason=_CLASSIFIER),
            Rule(r"fc\.(?:weight|bias)", reason=_IMAGENET_CLASSIFIER),
            Rule(r"(?:projection_head|prototypes)\..+", reason=_PROJECTION),  # of SwAV
        ),
        has=(r"conv1\.weight$", r"layer1\.0\.conv1\.weight$"),
        statistics=_IMAGENET,
    ),
    Format(
        "osnet",
        "torchreid's OSNets, plain or IBN",
        _osnet_rules(
            r"convN\.2\.0",
            {
                "conv2a": "streams.0.0",
                r"conv2b\.(\d)": r"streams.1.\2",
                r"conv2c\.(\d)": r"streams.2.\2",
                r"conv2d\.(\d)": r"streams.3.\2",
            },
            "norm",
        ),
        has=(r"conv1\.conv\.weight$", r"conv2\.0\.conv2a\."),
        statistics=_IMAGENET,
        note=f"{_OSNET}, with NORM: ibn if there are InstanceNorms (IN)",
    ),
    Format(
        "osnet-ain",
        "torchreid's OSNet-AIN",
        _osnet_rules(r"poolN\.0", {r"conv2\.(\d)\.layers\.(\d)": r"streams.\2.\3"}, "expand.norm"),
        has=(r"conv1\.conv\.weight$", r"conv2\.0\.conv2\.0\.layers\."),
        statistics=_IMAGENET,
        note=f"{_OSNET}, with NORM: ain",
    ),
]
"""The known formats; a plug-in adds its own with `register_format`."""


def register_format(added: Format) -> None:
    """Adds a format before all others; it replaces one of the same name."""
    FORMATS[:] = [added, *(known for known in FORMATS if known.name != added.name)]


def find_format(names: Iterable[str]) -> Format | None:
    """The format of a file with these names; None: none fits."""
    known = list(names)
    return next((candidate for candidate in FORMATS if candidate.fits(known)), None)


def translate(state: Mapping[str, Tensor], written: Format) -> Translation:
    """The tensors of a checkpoint under our names.

    Args:
        state: Tensors by name, as the file has them.
        written: The file's format.

    Raises:
        ValueError: Two tensors get the same name.
    """
    layers = [int(found[1]) for name in state if (found := re.search(r"\bblocks\.(\d+)\.", name))]
    last = str(max(layers, default=0))
    rules = [(re.compile(rule.pattern.replace(_LAST, last)), rule) for rule in written.rules]
    translated: dict[str, Tensor] = {}
    renamed: dict[str, str] = {}
    left_out: dict[str, str] = {}
    optional: dict[str, str] = {}
    unmapped = []
    for name, tensor in _without_distillation(state).items():
        match, rule = next(
            ((found, rule) for pattern, rule in rules if (found := pattern.fullmatch(name))),
            (None, None),
        )
        if match is None or rule is None:
            unmapped.append(name)
        elif rule.target is None:
            left_out[name] = rule.reason
        else:
            ours = match.expand(rule.target.replace(_LAST, last))
            if ours in translated:
                raise ValueError(f"{name} and another tensor both become {ours}")
            scalar = ours == "backbone.exponent" and tensor.numel() == 1
            tensor = tensor.reshape(()) if scalar else tensor
            translated[ours] = tensor if rule.change is None else rule.change(tensor)
            renamed[name] = ours
            if rule.reason:
                optional[ours] = rule.reason
    return Translation(translated, renamed, left_out, tuple(unmapped), optional)


def _without_distillation(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A distilled DeiT without the position of its second token, which a ViT here does not have."""
    if "dist_token" not in state or "pos_embed" not in state or state["pos_embed"].ndim != 3:
        return state
    position = state["pos_embed"]
    return {**state, "pos_embed": torch.cat((position[:, :1], position[:, 2:]), 1)}


class NamedTensors(dict[str, Tensor]):
    """Tensors of a file by our names, or by the file's names if its format is unknown.

    Args:
        state: The tensors.
        left_out: Names among them that a format or some models leave out, and why.
    """

    def __init__(
        self, state: Mapping[str, Tensor], left_out: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(state)
        self.left_out: dict[str, str] = dict(left_out or {})


def use_our_names(state: Mapping[str, Tensor]) -> NamedTensors:
    """The tensors of a file under our names; of an unknown format, under the file's names.

    Raises:
        ValueError: Two tensors get the same name.
    """
    written = find_format(state)
    if written is None:
        return NamedTensors(state)
    found = translate(state, written)
    others = {name: state[name] for name in (*found.left_out, *found.unmapped)}
    return NamedTensors(found.state | others, found.left_out | found.optional)
