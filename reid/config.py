"""The typed config: dataclasses, read from YAML files and the command line.

YAML and command line use upper-case keys (`SOLVER.BASE_LR 1e-3`); they are lower-cased here, once.
A part is written as a mapping with `NAME` and its options, and is checked when it is built
(`reid.registry.build`). All else is checked here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from reid.registry import ConfigError, check_type, nearest, shortened
from reid.yaml_text import parse_yaml, read_yaml

_MOST_BASES = 50

Spec = dict[str, Any]
"""A part: `name` and the options of its constructor."""


def _require(condition: bool, key: str, value: object, expected: str) -> None:
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {shortened(value)}")


def _require_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(
            f"{key}: expected one of {', '.join(choices)}, got {shortened(value)}"
            f"{nearest(value, choices)}"
        )


@dataclass
class DatasetsConfig:
    """Where images come from.

    Attributes:
        train: The training set (DATASET registry), or a list of several that are joined.
        test: Test sets, each evaluated on its own. Empty: the training sets' query and gallery.

    Each dataset has the option `leave_out`, besides its own: a file with a path a line, absolute
    or relative to the root of datasets, of images that are as if they were not there. A labelled
    one has `validation`: `{identities: 0.2, seed: 1}` takes a share of the training identities, or
    a number of them, out of training and makes query and gallery of them.
    """

    train: Any = None  # Spec | list[Spec | str] | str; OmegaConf knows no such type
    test: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        one = isinstance(self.train, (str, dict, type(None)))
        several = isinstance(self.train, list) and bool(self.train)
        _require(
            one or several, "datasets.train", self.train, "a dataset, or a list of several to join"
        )


@dataclass
class InputConfig:
    """From an image file to the model's input.

    Attributes:
        size: Height and width in pixels.
        pixel_mean: Per channel, for RGB in [0, 1].
        pixel_std: Per channel, for RGB in [0, 1].
        interpolation: Of the resize: `bicubic` or `bilinear`.
        test_interpolation: The same in extraction and in tests.
        transforms: Augmentations in training, in their order (TRANSFORM registry); those on pixels
            stand before those on the normalised image.
    """

    size: list[int] = field(default_factory=lambda: [256, 128])
    pixel_mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    pixel_std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])
    interpolation: str = "bicubic"
    test_interpolation: str = "bicubic"
    transforms: list[Any] = field(
        default_factory=lambda: [
            {"name": "RandomFlip", "prob": 0.5},
            {"name": "PadCrop", "pad": 10},
            {"name": "RandomErasing", "prob": 0.5},
        ]
    )

    def __post_init__(self) -> None:
        _require(
            len(self.size) == 2 and min(self.size) > 0, "input.size", self.size, "[height, width]"
        )
        for key in ("pixel_mean", "pixel_std"):
            value = getattr(self, key)
            _require(len(value) == 3, f"input.{key}", value, "three numbers")
        _require(min(self.pixel_std) > 0, "input.pixel_std", self.pixel_std, "numbers above 0")
        for key in ("interpolation", "test_interpolation"):
            _require_choice(f"input.{key}", getattr(self, key), ("bicubic", "bilinear"))


@dataclass
class DataloaderConfig:
    """How images are read.

    Attributes:
        sampler: Which images come, and how long an epoch is (SAMPLER registry).
        num_workers: Processes that read images, no more than CPUs; 0 reads in the main process.
        cache: `ram` keeps the resized training images in memory, shared by the reading processes;
            the log states the size before it starts. `off`: every image is read anew.
        on_error: What a training image that cannot be read does: `stop` ends the run, `skip` leaves
            it out of its batch and of the clusters, and counts it in the log. In tests it ends the
            run.
    """

    sampler: Spec = field(default_factory=dict)
    num_workers: int = 4
    cache: str = "off"
    on_error: str = "stop"

    def __post_init__(self) -> None:
        _require_choice("dataloader.cache", self.cache, ("off", "ram"))
        _require_choice("dataloader.on_error", self.on_error, ("stop", "skip"))
        _require(self.num_workers >= 0, "dataloader.num_workers", self.num_workers, "0 or more")


@dataclass
class ModelConfig:
    """The network.

    Attributes:
        backbone: BACKBONE registry.
        head: HEAD registry.
        backbone_weights: Checkpoint of a pre-trained backbone (safetensors or torch), or empty.
        weights: Checkpoint of the whole model, in place of `backbone_weights`, or empty.
        bn_samples_per_group: Samples over which BatchNorm takes its statistics in training, a
            divisor of the batch; 0 = the whole batch, over all processes. A method that was
            published with four GPU replicas and a batch of 256 had 64: results depend on it (see
            `GroupedBatchNorm`).
        compile: `off`, or how `torch.compile` runs the network: `default`, `reduce-overhead` or
            `max-autotune`, the last two with CUDA graphs on a GPU (see `compile_network`).
    """

    backbone: Spec = field(default_factory=dict)
    head: Spec = field(default_factory=lambda: {"name": "BNNeckHead"})
    backbone_weights: str = ""
    weights: str = ""
    bn_samples_per_group: int = 0
    compile: str = "off"

    def __post_init__(self) -> None:
        _require_choice(
            "model.compile", self.compile, ("off", "default", "reduce-overhead", "max-autotune")
        )
        _require(
            self.bn_samples_per_group >= 0,
            "model.bn_samples_per_group",
            self.bn_samples_per_group,
            "0 or more",
        )


@dataclass
class SolverConfig:
    """The optimizer, the learning rate and the length of training.

    Attributes:
        optimizer: `SGD`, `Adam` or `AdamW`.
        base_lr: Learning rate after the warm-up.
        bias_lr_factor: Factor of the learning rate of every parameter with `bias` in its name.
        momentum: Of SGD.
        weight_decay: On every parameter.
        max_epochs: Epochs in all.
        schedule: `multistep` or `cosine`; stepped once an epoch.
        milestones: Epochs at which `multistep` multiplies the rate by `gamma`.
        gamma: See `milestones`.
        final_lr_factor: Where `cosine` ends, as a share of `base_lr`.
        cosine_after_warmup: `cosine` starts at the end of the warm-up; false: in the first epoch,
            the warm-up covering its beginning, as in TransReID.
        warmup_epochs: Epochs of linear warm-up; 0 = none.
        warmup_iterations: Iterations of linear warm-up, as in fast-reid, in place of
            `warmup_epochs`; 0 = none.
        warmup_factor: Where the warm-up starts, as a share of `base_lr`.
        clip_grad_norm: Largest norm of the gradient of all parameters; 0 = no clipping.
        accumulation_steps: Batches whose gradients are averaged before one optimizer step.
        amp: `off`, `fp16` (with loss scaling) or `bf16`.
        on_nonfinite: What a loss does that is not finite: `stop` ends the run, `skip` passes over
            the batch. Either way nonfinite_stepN.json in the output folder tells of it.
        max_skipped: Batches that `skip` passes over in a run; the next one ends it.
    """

    optimizer: str = "SGD"
    base_lr: float = 3.5e-4
    bias_lr_factor: float = 1.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    max_epochs: int = 50
    schedule: str = "multistep"
    milestones: list[int] = field(default_factory=lambda: [20, 40])
    gamma: float = 0.1
    final_lr_factor: float = 0.0
    cosine_after_warmup: bool = True
    warmup_epochs: int = 10
    warmup_iterations: int = 0
    warmup_factor: float = 0.01
    clip_grad_norm: float = 0.0
    accumulation_steps: int = 1
    amp: str = "off"
    on_nonfinite: str = "stop"
    max_skipped: int = 10

    def __post_init__(self) -> None:
        _require_choice("solver.optimizer", self.optimizer, ("SGD", "Adam", "AdamW"))
        _require_choice("solver.schedule", self.schedule, ("multistep", "cosine"))
        _require_choice("solver.amp", self.amp, ("off", "fp16", "bf16"))
        _require_choice("solver.on_nonfinite", self.on_nonfinite, ("stop", "skip"))
        _require(self.max_skipped >= 0, "solver.max_skipped", self.max_skipped, "0 or more")
        _require(0 < self.base_lr < math.inf, "solver.base_lr", self.base_lr, "a number above 0")
        _require(0 <= self.momentum < 1, "solver.momentum", self.momentum, "0 <= momentum < 1")
        _require(
            0 <= self.weight_decay < math.inf, "solver.weight_decay", self.weight_decay, "0 or more"
        )
        _require(self.max_epochs >= 1, "solver.max_epochs", self.max_epochs, "1 or more")
        _require(
            self.milestones == sorted(set(self.milestones)) and min(self.milestones, default=1) > 0,
            "solver.milestones",
            self.milestones,
            "ascending epochs above 0",
        )
        _require(0 < self.gamma <= 1, "solver.gamma", self.gamma, "0 < gamma <= 1")
        for key in ("final_lr_factor", "warmup_factor"):
            value = getattr(self, key)
            _require(0 <= value <= 1, f"solver.{key}", value, "a share from 0 to 1")
        _require(
            0 < self.bias_lr_factor < math.inf,
            "solver.bias_lr_factor",
            self.bias_lr_factor,
            "a number above 0",
        )
        for key in ("warmup_epochs", "warmup_iterations"):
            _require(getattr(self, key) >= 0, f"solver.{key}", getattr(self, key), "0 or more")
        _require(
            not self.warmup_epochs or not self.warmup_iterations,
            "solver.warmup_iterations",
            self.warmup_iterations,
            f"0 beside warmup_epochs {self.warmup_epochs}, or warmup_epochs 0",
        )
        _require(
            0 <= self.clip_grad_norm < math.inf,
            "solver.clip_grad_norm",
            self.clip_grad_norm,
            "0 or more",
        )
        _require(
            self.accumulation_steps >= 1,
            "solver.accumulation_steps",
            self.accumulation_steps,
            "1 or more",
        )


@dataclass
class TestConfig:
    """Extraction and evaluation.

    Attributes:
        batch_size: Images per batch in extraction, for clustering and for tests.
        precision: Of the network in extraction, for clustering and for tests: `fp32`, `bf16` or
            `fp16`, whatever training has (`solver.amp`). Features are kept in fp32. A CPU without
            instructions for bf16 or fp16 is slower with them.
        eval_period: Epochs between evaluations; 0 = after the last epoch only.
        eval_at_start: Evaluate before the first epoch too.
        flip: Flip-test: features of an image and of its mirror image are averaged, in tests only.
        evaluator: EVALUATOR registry.
        best_metric: The number by which `model_best` is chosen.
        ranked_lists: Queries drawn with their first ten matches after the last evaluation, and as
            many clusters, and a histogram of similarities; 0 = no pictures.
    """

    __test__ = False  # not a pytest class

    batch_size: int = 128
    precision: str = "fp32"
    eval_period: int = 10
    eval_at_start: bool = False
    flip: bool = False
    evaluator: Spec = field(default_factory=lambda: {"name": "Market1501Evaluator"})
    best_metric: str = "mAP"
    ranked_lists: int = 0

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "test.batch_size", self.batch_size, "1 or more")
        _require_choice("test.precision", self.precision, ("fp32", "bf16", "fp16"))
        _require(self.eval_period >= 0, "test.eval_period", self.eval_period, "0 or more epochs")
        _require(self.ranked_lists >= 0, "test.ranked_lists", self.ranked_lists, "0 or more")


@dataclass
class Config:
    """Everything that a run needs.

    Attributes:
        datasets: See `DatasetsConfig`.
        input: See `InputConfig`.
        dataloader: See `DataloaderConfig`.
        model: See `ModelConfig`.
        criterion: Losses (LOSS registry); their values are added up.
        clusterer: Where labels come from (CLUSTERER registry); null = the identities.
        on_collapse: What happens where an epoch gives no cluster, or a single one: `warn` trains on
            a single one, but cannot on none; `keep` takes the last epoch's labels once more; `stop`
            ends the run.
        solver: See `SolverConfig`.
        test: See `TestConfig`.
        hooks: More hooks (HOOK registry), called after the trainer's own.
        plugins: Packages to import, so that they register their parts.
        seed: Of everything random.
        device: `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.
        process_timeout: Minutes that a process waits for the others before it ends with an error.
        output_dir: Where all that a run writes goes.
        log_period: Iterations between two lines of the log.
        checkpoint_period: Epochs between checkpoints.
        checkpoint_keep: Newest checkpoints that are kept, besides the best and the final weights;
            0 = all.
    """

    datasets: DatasetsConfig = field(default_factory=DatasetsConfig)
    input: InputConfig = field(default_factory=InputConfig)
    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    criterion: list[Any] = field(default_factory=list)
    clusterer: Spec | None = None
    on_collapse: str = "warn"
    solver: SolverConfig = field(default_factory=SolverConfig)
    test: TestConfig = field(default_factory=TestConfig)
    hooks: list[Any] = field(default_factory=list)
    plugins: list[str] = field(default_factory=list)
    seed: int = 1
    device: str = "auto"
    process_timeout: float = 30.0
    output_dir: str = "logs/run"
    log_period: int = 20
    checkpoint_period: int = 1
    checkpoint_keep: int = 2

    def __post_init__(self) -> None:
        _require_choice("on_collapse", self.on_collapse, ("warn", "keep", "stop"))
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(
            0 < self.process_timeout < math.inf,
            "process_timeout",
            self.process_timeout,
            "minutes above 0",
        )
        _require(bool(self.output_dir), "output_dir", self.output_dir, "a folder")
        _require(self.log_period >= 1, "log_period", self.log_period, "1 or more iterations")
        _require(
            self.checkpoint_period >= 1, "checkpoint_period", self.checkpoint_period, "1 or more"
        )
        _require(self.checkpoint_keep >= 0, "checkpoint_keep", self.checkpoint_keep, "0 or more")
        valid = self.device in ("auto", "cpu", "cuda") or (
            self.device.startswith("cuda:") and self.device[5:].isdigit()
        )
        _require(valid, "device", self.device, "auto, cpu, cuda or cuda:N")


def load_config(
    file: str | Path | Sequence[str | Path] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Reads a YAML file with its `_BASE_` files, then applies `KEY VALUE KEY VALUE`.

    Args:
        file: None: the defaults. `_BASE_: other.yaml`, relative to the file, names a file whose
            settings count where this one has none. A part with another NAME than in the base
            replaces it with all its options. Of several files each lies over those before it, as
            over a `_BASE_`: what a method does in one, on which data in another.
        overrides: Dotted upper-case keys, each followed by a YAML value. A mapping as a value
            replaces what stood there: `CLUSTERER "{NAME: JaccardDBSCAN, EPS: 0.45}"`.

    Raises:
        ConfigError: The file is missing or is not YAML, a key is unknown, or a value has a wrong
            type or range.
    """
    files = [file] if isinstance(file, str | Path) else list(file or ())
    raw: dict[str, Any] = {}
    for path in files:
        raw = _merge(raw, _read_yaml(Path(path)))
    if len(overrides) % 2:
        raise ConfigError(
            f"expected KEY VALUE pairs after the options, got {' '.join(overrides)!r}; "
            f"{overrides[-1]!r} has no value"
        )
    for key, text in zip(overrides[::2], overrides[1::2], strict=True):
        try:
            value = parse_yaml(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: {shortened(text)} is not a YAML value ({error})") from error
        _set(raw, key, lower_keys(value))
    try:
        _refuse_references(raw)
        checked = _check(raw, Config, "")
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), checked))
    except (ConfigError, OmegaConfBaseException) as error:
        where = f" (in {', '.join(map(str, files))})" if files else ""
        cause: object = error
        if isinstance(error, OmegaConfBaseException):
            ours = isinstance(error.__cause__, ConfigError)
            cause = error.__cause__ if ours else f"{error.full_key}: {error.msg or error}"
        raise ConfigError(f"{cause}{where}") from None
    assert isinstance(config, Config)
    return config


def dump_config(config: Config) -> str:
    """The config as YAML that `load_config` reads back to the same config."""
    return str(yaml.safe_dump(_upper_keys(asdict(config)), sort_keys=False, width=100))


def config_differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that differ, as dotted key: (old value, new value).

    A list is one setting. A key that only one of the two has counts as None in the other.
    """
    before, after = (dict(_leaves(asdict(config))) for config in (old, new))
    keys = [*before, *(key for key in after if key not in before)]
    return {
        key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)
    }


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _read_yaml(path: Path, readers: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a file and its `_BASE_` files, with lower-case keys."""
    if not _is_file(path):
        raise ConfigError(
            f"config file {str(path)!r} does not exist"
            + (f", but {str(readers[-1])!r} names it as _BASE_" if readers else "")
        )
    if len(readers) >= _MOST_BASES:
        raise ConfigError(f"config file {str(path)!r}: is the _BASE_ of more than {_MOST_BASES}")
    if path.resolve() in readers:
        raise ConfigError(f"config file {str(path)!r} is its own _BASE_")
    try:
        content = read_yaml(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(content, dict | None):
        raise ConfigError(
            f"config file {str(path)!r}: expected KEY: VALUE lines, got {shortened(content)}"
        )
    try:
        own: dict[str, Any] = lower_keys(content or {})
    except ConfigError as error:
        raise ConfigError(f"config file {str(path)!r}: {error}") from None
    base = own.pop("_base_", None)
    if base is None:
        return own
    if not isinstance(base, str):
        raise ConfigError(
            f"config file {str(path)!r}: expected a file as _BASE_, got {shortened(base)}"
        )
    try:
        below = path.parent / Path(base).expanduser()
    except RuntimeError as error:  # a user who does not exist
        raise ConfigError(f"config file {str(path)!r}: _BASE_ {base!r}: {error}") from error
    return _merge(_read_yaml(below, (*readers, path.resolve())), own)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with characters that no name has
        return False


def _refuse_references(tree: object, where: str = "") -> None:
    """Refuses `${...}`: what a few of them stand for may have any size."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            _refuse_references(value, f"{where}.{key}" if where else key)
    elif isinstance(tree, list):
        for place, value in enumerate(tree):
            _refuse_references(value, f"{where}[{place}]")
    elif isinstance(tree, str) and "${" in tree:
        raise ConfigError(
            f"{where}: ${{...}} is not filled in, write the value itself; got {shortened(tree)}"
        )


def _merge(base: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of both; `own` wins."""
    if base.get("name") != own.get("name") and {"name"} <= base.keys() & own.keys():
        return dict(own)
    merged = dict(base)
    for key, value in own.items():
        below = merged.get(key)
        if isinstance(value, str) and isinstance(below, dict):
            value = {"name": value}  # a part without options
        if isinstance(value, dict) and isinstance(below, dict):
            value = _merge(below, value)
        merged[key] = value
    return merged


def _set(tree: dict[str, Any], dotted: str, value: object) -> None:
    """Sets a dotted key; list items are addressed by number (`CRITERION.0.SMOOTHING`)."""
    *parents, last = dotted.lower().split(".")
    node: Any = tree
    for depth, key in enumerate(parents):
        place: Any = _item(node, key, dotted) if isinstance(node, list) else key
        child = node[place] if isinstance(node, list) else node.get(place)
        if child is None:
            child = {}
        elif isinstance(child, str):
            child = {"name": child}
        elif not isinstance(child, (dict, list)):
            where = ".".join(parents[: depth + 1])
            raise ConfigError(f"{dotted}: {where} is {child!r}, which has no options")
        node[place] = child
        node = child
    if last == "name" and isinstance(node, dict) and node.get("name") != value:
        node.clear()  # options belong to the part that had them
    node[_item(node, last, dotted) if isinstance(node, list) else last] = value


def _item(items: list[Any], key: str, dotted: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(
            f"{dotted}: expected the number of an item, 0 to {len(items) - 1}, got {key!r}"
        )
    return int(key)


def lower_keys(value: Any) -> Any:
    """A YAML value with the keys of all its mappings in lower case.

    Raises:
        ConfigError: A key stands twice, in capitals and small letters.
    """
    if isinstance(value, Mapping):
        lowered: dict[str, Any] = {}
        for key, item in value.items():
            name = str(key).lower()
            if name in lowered:
                raise ConfigError(f"{name}: the key stands twice, in capitals and small letters")
            lowered[name] = lower_keys(item)
        return lowered
    if isinstance(value, list):
        return [lower_keys(item) for item in value]
    return value


def _upper_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key).upper(): _upper_keys(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_upper_keys(item) for item in value]
    return value


def _check(tree: object, schema: type, where: str) -> dict[str, Any]:
    """The settings in `tree`, each of the type that the dataclass `schema` names."""
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{where.rstrip('.')}: expected KEY: VALUE lines, got {shortened(tree)}")
    hints = get_type_hints(schema)
    checked: dict[str, Any] = {}
    for key, value in tree.items():
        if key not in hints:
            known = [where + name for name in hints]
            hint = nearest(where + key, known) or f"; known: {', '.join(known)}"
            raise ConfigError(f"{where}{key}: unknown key{hint}")
        if is_dataclass(hints[key]):
            checked[key] = _check(value, hints[key], f"{where}{key}.")
            continue
        if hints[key] is str and isinstance(value, bool):
            value = "on" if value else "off"  # YAML 1.1 reads these words as booleans
        if hints[key] is str and value is None:
            value = ""  # YAML 1.1 reads an empty word as null
        if hints[key] in (Spec, Spec | None) and isinstance(value, str):
            value = {"name": value}
        checked[key] = check_type(value, hints[key], f"{where}{key}")
    return checked
