"""The typed config: dataclasses whose annotations say what each setting may be.

All settings stand in this one file, which is why it is long.

YAML and command line use upper-case keys (`SOLVER.BASE_LR 1e-3`); they are lower-cased once, as
they are read. A part is a mapping with `NAME` and its options; the signature of the part says what
these may be (`reid.registry.check_spec`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import yaml

from reid.checking import ConfigError, Range, Rule, check_fields, check_type, from_mapping
from reid.config_file import lower_keys as lower_keys
from reid.config_file import merge, read_pairs, read_settings, set_key, upper_keys
from reid.shipped import find_config
from reid.stage_settings import StageSettings, read_stage

Spec: TypeAlias = Annotated[
    dict[str, Any], Rule(prepare=lambda part: {"name": part} if isinstance(part, str) else part)
]
"""A part: `name` and the options of its constructor. A bare name is a part without options."""


def _is_part(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "name" in value)


def _are_parts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(part, (str, dict)) for part in value)


Specs: TypeAlias = Annotated[
    list[Any],
    Rule(
        "a list of parts, each a NAME or a mapping with NAME",
        _are_parts,
        prepare=lambda parts: [parts] if _is_part(parts) else parts,
    ),
]
"""Several parts, each a mapping with `name` or a bare name; a single one needs no list."""


Views: TypeAlias = Annotated[
    list[Any],
    Rule(
        "a list with null or a list of transforms for each further view",
        lambda views: (
            isinstance(views, list) and all(view is None or _are_parts(view) for view in views)
        ),
    ),
]
"""The transforms of view 1, view 2 and so on; None: those of view 0."""


Joined: TypeAlias = Annotated[
    Any,
    Rule(
        "a dataset, or a list of several to join",
        lambda train: isinstance(train, (str, dict)) or (_are_parts(train) and bool(train)),
    ),
]
"""One dataset, several in a list, or None."""


def _fits_disk(path: str) -> bool:
    names = path.split("/")
    return len(path.encode()) <= 3500 and all(len(name.encode()) <= 255 for name in names)


FilePath: TypeAlias = Annotated[
    str,
    Rule(
        "a path of at most 3,500 bytes, with names of at most 255",
        _fits_disk,
        prepare=lambda path: "" if path is None else path,  # YAML reads an empty word as null
    ),
]
"""A file or folder; may be empty."""

Count: TypeAlias = Annotated[int, Range(0, 1_000_000_000)]
Positive: TypeAlias = Annotated[int, Range(1, 1_000_000_000)]
Milestones: TypeAlias = Annotated[
    list[Annotated[int, Range(1, 1_000_000)]],
    Rule("ascending epochs", lambda epochs: epochs == sorted(set(epochs))),
]
Side: TypeAlias = Annotated[int, Range(1, 4096)]
Share: TypeAlias = Annotated[float, Range(0, 1)]
Mean: TypeAlias = Annotated[float, Range(-10_000, 10_000)]
Deviation: TypeAlias = Annotated[float, Range(1e-4, 10_000)]
Interpolation: TypeAlias = Literal["bicubic", "bilinear"]
Device: TypeAlias = Annotated[
    str,
    Rule(
        "auto, cpu, cuda or cuda:N",
        lambda name: (
            name in ("auto", "cpu", "cuda")
            or (name[:5] == "cuda:" and name[5:].isdecimal() and len(name) < 9)
        ),
    ),
]
Package: TypeAlias = Annotated[
    str,
    Rule(
        "the name of a package, such as tmgf",
        lambda name: len(name) <= 200 and all(word.isidentifier() for word in name.split(".")),
    ),
]


class _Section:
    """A section; its fields are checked whether a file or code makes it."""

    _where = ""

    def __init_subclass__(cls, where: str = "") -> None:
        cls._where = where

    def __post_init__(self) -> None:
        check_fields(self, self._where)


@dataclass
class DatasetsConfig(_Section, where="datasets"):
    """Where images come from.

    Attributes:
        train: The training set (DATASET registry), or a list of several that are joined. Beside
            `source` it is the target, whose identities no part of the training sees.
        source: The labelled source of domain adaptation, one data set or several; null: there is
            none.
        domains: What is trained on, if there is a source: the `source`, the `target` or `all`. A
            stage may change it.
        test: Test sets, each evaluated on its own. Empty: query and gallery of `train`.

    Beside its own options each dataset has `leave_out`: a text file that lists images to ignore,
    one path a line, absolute or relative to the root of datasets. A labelled dataset also has
    `validation`: `{identities: 0.2, seed: 1}` takes a share of the training identities (or a number
    of them) out of training and makes a query and a gallery from their images.
    """

    train: Joined = None
    source: Joined = None
    domains: Literal["all", "source", "target"] = "all"
    test: Specs = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source is None and self.domains != "all":
            raise ConfigError(
                f"datasets.domains: expected all, since datasets.source is not set; got "
                f"{self.domains}"
            )

    @property
    def source_domains(self) -> int:
        """How many labelled sources there are; of the joined training sets, they come first."""
        if self.source is None:
            return 0
        return len(self.source) if isinstance(self.source, list) else 1


@dataclass
class InputConfig(_Section, where="input"):
    """From an image file to the model's input.

    Attributes:
        size: Height and width in pixels.
        pixel_mean: Per channel, for RGB in [0, 1].
        pixel_std: Per channel, for RGB in [0, 1].
        interpolation: How training images are resized.
        test_interpolation: How images are resized in extraction and in tests.
        decoding: How training images are decoded, also to cluster them. `reduced`: JPEG files of
            twice `size` or more at a half, a quarter or an eighth of their size, in about half the
            time. Test images are always decoded in full.
        transforms: Augmentations in training, in their order (TRANSFORM registry); those on pixels
            come before those on the normalised image.
        views: Augmentations of further views of an image, for losses that compare several: first
            those of view 1, then those of view 2, and so on. An empty list is the plain image. A
            view that is null, or not listed, has `transforms`.
        maps: What is read beside each image and moved with it, such as heatmaps (MAP registry).
    """

    size: tuple[Side, Side] = (256, 128)
    pixel_mean: tuple[Mean, Mean, Mean] = (0.485, 0.456, 0.406)
    pixel_std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)
    interpolation: Interpolation = "bicubic"
    test_interpolation: Interpolation = "bicubic"
    decoding: Literal["exact", "reduced"] = "exact"
    transforms: Specs = field(
        default_factory=lambda: [
            {"name": "RandomFlip", "prob": 0.5},
            {"name": "PadCrop", "pad": 10},
            {"name": "RandomErasing", "prob": 0.5},
        ]
    )
    views: Views = field(default_factory=list)
    maps: Specs = field(default_factory=list)


@dataclass
class DataloaderConfig(_Section, where="dataloader"):
    """How images are read.

    Attributes:
        sampler: Which images come, and how long an epoch is (SAMPLER registry).
        num_workers: Processes that read images, no more than CPUs; 0 reads in the main process.
        cache: `ram` keeps the resized training images in memory, shared by the reading processes;
            `files` keeps their files as they are, in much less memory, for slow disks. The log
            states the size before it starts. `off` reads each image anew every time.
        on_error: What to do about a training image that cannot be read: `stop` ends the run,
            `skip` leaves it out of its batch and of the clusters, and counts it in the log. A test
            image that cannot be read always ends the run.
    """

    sampler: Spec = field(default_factory=dict)
    num_workers: Annotated[int, Range(0, 4096)] = 4
    cache: Literal["off", "ram", "files"] = "off"
    on_error: Literal["stop", "skip"] = "stop"


@dataclass
class ModelConfig(_Section, where="model"):
    """The network.

    Attributes:
        backbone: BACKBONE registry.
        head: HEAD registry.
        backbone_weights: Checkpoint of a pre-trained backbone (safetensors or torch), or empty.
        weights: Checkpoint of the whole model, in place of `backbone_weights`, or empty.
        students: One entry for each network that is trained beside the first one: a checkpoint of
            the whole model, or an empty word for the weights that the first one starts from. Losses
            know them as `student2`, `student3` and so on (mutual learning, as in MMT).
        bn_samples_per_group: Samples over which BatchNorm takes its statistics in training, a
            divisor of the batch; 0 = the whole batch, over all processes. A method that was
            published with four GPU replicas and a batch of 256 had 64; results depend on it (see
            `GroupedBatchNorm`).
        bn_running: Which of these groups move BatchNorm's running statistics: the `first`, as with
            replicas, or `all`, one after the other, as with a forward pass for each group.
        domain_bn: Every BatchNorm has two halves, one for the source, one for the target, as in
            SpCL (see `DomainBatchNorm`).
        compile: `off`, or how `torch.compile` runs the network: `default`, `reduce-overhead` or
            `max-autotune`, the last two with CUDA graphs on a GPU (see `compile_network`).
    """

    backbone: Spec = field(default_factory=dict)
    head: Spec = field(default_factory=lambda: {"name": "BNNeckHead"})
    backbone_weights: FilePath = ""
    weights: FilePath = ""
    students: list[FilePath] = field(default_factory=list)
    bn_samples_per_group: Count = 0
    bn_running: Literal["first", "all"] = "first"
    domain_bn: bool = False
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"


@dataclass
class SolverConfig(_Section, where="solver"):
    """The optimizer, the learning rate and the length of training.

    Attributes:
        optimizer: `SGD`, `Adam` or `AdamW`.
        base_lr: Learning rate after the warm-up.
        bias_lr_factor: Factor of the learning rate of every parameter with `bias` in its name.
        lr_factors: Factors of the learning rate by the start of the parameters' names, such as
            `{backbone: 0.1}`; the longest start counts. Losses' parameters start with `losses`.
        frozen: Parameters that do not move, by the start of their names: `always`, or the epoch,
            from 0, from which they are trained, such as `{backbone.net.patch_embed: always,
            backbone.net.blocks.0: 20}`; the longest start counts. With `stages`, the epoch is that
            of the stage.
        frozen_norms: What a BatchNorm does while all of its parameters are frozen: `train` takes
            the batch's statistics and moves the running ones, `eval` takes the running ones, as in
            tests.
        momentum: SGD's momentum.
        nesterov: SGD takes Nesterov's momentum.
        weight_decay: On every parameter.
        max_epochs: Epochs in all. With `stages` it follows from them.
        schedule: `multistep`, `cosine` or `exponential`; stepped once an epoch.
        milestones: Epochs at which `multistep` multiplies the rate by `gamma`; `exponential` starts
            to fall at the first one.
        gamma: See `milestones`.
        final_lr_factor: Where `cosine` and `exponential` end, as a share of `base_lr`.
        cosine_after_warmup: `cosine` starts at the end of the warm-up; false: in the first epoch,
            the warm-up covering its beginning, as in TransReID.
        schedule_offset: Epochs by which warm-up and schedule are ahead: epoch e has the rate of
            epoch e + `schedule_offset`. 1 in TransReID.
        warmup_epochs: Epochs of linear warm-up; 0 = none.
        warmup_iterations: Iterations of linear warm-up, as in fast-reid, in place of
            `warmup_epochs`; 0 = none.
        warmup_factor: Where the warm-up starts, as a share of `base_lr`.
        clip_grad_norm: Largest norm of the gradient of all parameters; 0 = no clipping.
        accumulation_steps: Batches whose gradients are averaged before one optimizer step.
        amp: `off`, `fp16` (with loss scaling) or `bf16`.
        on_nonfinite: What to do about a loss that is not finite: `stop` ends the run, `skip` drops
            the batch. Either way nonfinite_stepN.json in the output folder has the details.
        max_skipped: How many batches `skip` may drop in a run; one more ends the run.
    """

    optimizer: Literal["SGD", "Adam", "AdamW"] = "SGD"
    base_lr: Annotated[float, Range(1e-12, 1000)] = 3.5e-4
    bias_lr_factor: Annotated[float, Range(0, 1_000_000, above=True)] = 1.0
    lr_factors: dict[str, Annotated[float, Range(0, 1_000_000, above=True)]] = field(
        default_factory=dict
    )
    frozen: dict[str, Annotated[int, Range(0, 1_000_000)] | Literal["always"]] = field(
        default_factory=dict
    )
    frozen_norms: Literal["train", "eval"] = "train"
    momentum: Annotated[float, Range(0, 1, below=True)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Range(0, 1000)] = 5e-4
    max_epochs: Annotated[int, Range(1, 1_000_000)] = 50
    schedule: Literal["multistep", "cosine", "exponential"] = "multistep"
    milestones: Milestones = field(default_factory=lambda: [20, 40])
    gamma: Annotated[float, Range(0, 1, above=True)] = 0.1
    final_lr_factor: Share = 0.0
    cosine_after_warmup: bool = True
    schedule_offset: Count = 0
    warmup_epochs: Count = 10
    warmup_iterations: Count = 0
    warmup_factor: Share = 0.01
    clip_grad_norm: Annotated[float, Range(0, 1e9)] = 0.0
    accumulation_steps: Annotated[int, Range(1, 1_000_000)] = 1
    amp: Literal["off", "fp16", "bf16"] = "off"
    on_nonfinite: Literal["stop", "skip"] = "stop"
    max_skipped: Count = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_epochs and self.warmup_iterations:
            raise ConfigError(
                f"solver.warmup_iterations: expected 0 beside warmup_epochs {self.warmup_epochs}, "
                f"or warmup_epochs 0; got {self.warmup_iterations}"
            )
        if self.schedule == "exponential" and not (self.milestones and self.final_lr_factor):
            raise ConfigError(
                "solver.schedule: exponential needs a milestone where the rate begins to fall, and "
                f"final_lr_factor above 0; got {self.milestones} and {self.final_lr_factor}"
            )
        if self.nesterov and (self.optimizer != "SGD" or not self.momentum):
            raise ConfigError(
                "solver.nesterov: expected SGD with a momentum above 0, got "
                f"{self.optimizer} with {self.momentum}"
            )


@dataclass
class EvaluationConfig(_Section, where="test"):
    """Extraction and evaluation.

    Attributes:
        batch_size: Images per batch in extraction, for clustering and for tests.
        precision: The network's precision in extraction, for clustering and for tests: `fp32`,
            `bf16` or `fp16`, whatever `solver.amp` says. Features are stored in fp32. A CPU without
            instructions for bf16 or fp16 is slower with them.
        eval_period: Epochs between evaluations; 0 = after the last epoch only.
        eval_at_start: Evaluate before the first epoch too.
        source: Evaluate on query and gallery of `datasets.source` too.
        flip: Average the features of an image and of its mirror image, in tests only.
        evaluator: EVALUATOR registry.
        best_metric: The number by which `model_best` is chosen.
        ranked_lists: How many queries are drawn with their first ten matches after the last
            evaluation; as many clusters and a histogram of similarities are drawn too. 0 = no
            pictures.
    """

    batch_size: Annotated[int, Range(1, 65_536)] = 128
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    eval_period: Count = 10
    eval_at_start: bool = False
    source: bool = False
    flip: bool = False
    evaluator: Spec = field(default_factory=lambda: {"name": "Market1501Evaluator"})
    best_metric: str = "mAP"
    ranked_lists: Annotated[int, Range(0, 500)] = 0


@dataclass
class Config(_Section):
    """Everything that a run needs.

    Attributes:
        datasets: See `DatasetsConfig`.
        input: See `InputConfig`.
        dataloader: See `DataloaderConfig`.
        model: See `ModelConfig`.
        criterion: Losses (LOSS registry); their values are added up.
        labeller: Gives the labels of each epoch (LABELLER registry). Null: the labeller `Clusters`
            with `clusterer`, or `Identities` if that is null too. With a source: `Identities` where
            `datasets.domains` is `source`; `PerDomain` with `clusterer` where it is `all`.
        clusterer: The clusterer of the labeller `Clusters` (CLUSTERER registry).
        on_collapse: What to do if an epoch gives no cluster, or a single one. `warn` trains on a
            single one, but ends the run if there is none; `keep` uses the last epoch's labels once
            more; `stop` ends the run.
        solver: See `SolverConfig`.
        stages: Parts of the training, one after the other. Each has `epochs`, may have `name`,
            `repeat` and `labels` (see `StageSettings`), and may change `criterion`, `clusterer`,
            `labeller`, `on_collapse`, `datasets.domains`, `dataloader.sampler`, `input.transforms`,
            `model.bn_samples_per_group` and `solver`. Every time a stage begins, losses, memories,
            optimizer and sampler are new, and the epochs of `solver` count from 0; the network goes
            on. Stages with the same labeller share it, with its state. Empty: the run is one stage.
        rounds: How often the whole list of stages runs.
        test: See `EvaluationConfig`.
        hooks: More hooks (HOOK registry), called after the trainer's own.
        plugins: Packages to import, so that they register their parts.
        seed: Seed of everything random.
        device: `auto` (CUDA if there is one), `cpu`, `cuda` or `cuda:N`.
        process_timeout: Minutes that a process waits for the others before it ends with an error.
        output_dir: The folder that all files of a run go to.
        log_period: Iterations between two lines of the log.
        checkpoint_period: Epochs between checkpoints.
        checkpoint_keep: How many of the newest checkpoints stay, besides the best and the final
            weights; 0 = all.
    """

    datasets: DatasetsConfig = field(default_factory=DatasetsConfig)
    input: InputConfig = field(default_factory=InputConfig)
    dataloader: DataloaderConfig = field(default_factory=DataloaderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    criterion: Specs = field(default_factory=list)
    labeller: Spec | None = None
    clusterer: Spec | None = None
    on_collapse: Literal["warn", "keep", "stop"] = "warn"
    solver: SolverConfig = field(default_factory=SolverConfig)
    stages: list[dict[str, Any]] = field(default_factory=list)
    rounds: Annotated[int, Range(1, 1_000_000)] = 1
    test: EvaluationConfig = field(default_factory=EvaluationConfig)
    hooks: Specs = field(default_factory=list)
    plugins: list[Package] = field(default_factory=list)
    seed: Annotated[int, Range(0, 2**32 - 1)] = 1
    device: Device = "auto"
    process_timeout: Annotated[float, Range(0, 100_000, above=True)] = 30.0
    output_dir: Annotated[FilePath, Rule("a folder", bool)] = "logs/run"
    log_period: Positive = 20
    checkpoint_period: Positive = 1
    checkpoint_keep: Count = 2

    sources: ClassVar[tuple[Path, ...]] = ()
    """The files that `load_config` read, with their `_BASE_` files."""
    given: ClassVar[frozenset[str] | None] = None
    """Dotted keys that files or the command line set; None: made in code, all keys count as set."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.datasets.source is None:
            for key, value in (
                ("model.domain_bn", self.model.domain_bn),
                ("test.source", self.test.source),
            ):
                if value:
                    raise ConfigError(f"{key}: expected false, since datasets.source is not set")
        if self.model.domain_bn and self.datasets.domains == "source":
            raise ConfigError(
                "model.domain_bn: expected false where datasets.domains is source, since the "
                "target's half of each BatchNorm would not be trained"
            )
        if self.model.domain_bn and self.model.compile != "off":
            raise ConfigError(
                f"model.compile: expected off with model.domain_bn, got {self.model.compile}"
            )
        if not self.stages and self.rounds != 1:
            raise ConfigError(f"rounds: expected 1, since there are no stages; got {self.rounds}")
        if self.stages:
            stages = self.stage_settings
            epochs = self.rounds * sum(stage.epochs * stage.repeat for stage in stages)
            check_type(epochs, Annotated[int, Range(1, 1_000_000)], "stages: epochs in all")
            self.solver.max_epochs = epochs
            for number in range(len(self.stages)):
                self.of_stage(number)

    @property
    def stage_settings(self) -> list[StageSettings]:
        """The stages; a run without any is one."""
        if not self.stages:
            return [StageSettings(self.solver.max_epochs)]
        return [read_stage(stage, f"stages[{i}]")[0] for i, stage in enumerate(self.stages)]

    def of_stage(self, number: int) -> Config:
        """The config as a stage changes it; its `max_epochs` is the length of the stage.

        Raises:
            ConfigError: A setting of the stage is wrong.
        """
        if not self.stages:
            return self
        stage, changes = read_stage(self.stages[number], f"stages[{number}]")
        settings = {**asdict(self), "stages": [], "rounds": 1}
        settings["solver"]["max_epochs"] = stage.epochs
        try:
            return _from_settings(merge(settings, changes))
        except ConfigError as error:
            raise ConfigError(f"stages[{number}].{error}") from None

    def is_given(self, key: str) -> bool:
        """Whether a setting, or one below it, was set."""
        given = self.given
        return given is None or any(k == key or k.startswith(f"{key}.") for k in given)


def load_config(
    file: str | Path | Sequence[str | Path] | None = None, overrides: Sequence[str] = ()
) -> Config:
    """Reads a YAML file with its `_BASE_` files, then applies `KEY VALUE KEY VALUE`.

    Args:
        file: A path, or the short name of a shipped config (`tmgf/demo.yaml`, see
            `reid.shipped.find_config`). None: the defaults. `_BASE_: other.yaml`, relative to the
            file, names a file that gives the settings which this one lacks. A part with another
            NAME than in the base replaces it with all its options. Of several files, each
            overrides those before it: a method may be in one, its data in another.
        overrides: Dotted upper-case keys, each followed by a YAML value. A mapping
            replaces the whole old value: `CLUSTERER "{NAME: JaccardDBSCAN, EPS: 0.45}"`.

    Raises:
        ConfigError: The file is missing or is not YAML, a key is unknown, or a value has a wrong
            type or range. The message says whether a file or the command line has it.
    """
    named = [file] if isinstance(file, str | Path) else list(file or ())
    files = [find_config(path) for path in named]
    settings = asdict(Config())
    given: set[str] = set()
    sources: list[Path] = []
    for path in files:
        own, read = read_settings(path)
        sources += read
        given.update(key for key, _ in _leaves(own))
        settings = merge(settings, own)
    changed = settings
    try:
        pairs = list(read_pairs(overrides))
        for key, value in pairs:
            changed = set_key(changed, key, value)
        config = _from_settings(changed)
        _check_length(config, dict(pairs))
        vars(config)["sources"] = tuple(sources)
        vars(config)["given"] = frozenset((*given, *(key.lower() for key, _ in pairs)))
        return config
    except ConfigError as error:
        source = "on the command line"
        try:
            _from_settings(settings)
        except ConfigError as before:
            if str(before) == str(error):  # without the command line it fails too
                source = f"in {', '.join(map(str, files))}"
        raise ConfigError(f"{error} ({source})") from None


def _check_length(config: Config, pairs: Mapping[str, Any]) -> None:
    """Requires that the command line does not set a length which the stages set.

    Raises:
        ConfigError: It does.
    """
    epochs = config.solver.max_epochs
    for key, value in pairs.items():
        if key.lower() == "solver.max_epochs" and value != epochs:
            raise ConfigError(
                f"solver.max_epochs: follows from stages, which have {epochs} epochs; got {value}; "
                "set the stages' EPOCHS and REPEAT, or ROUNDS, instead"
            )


def _from_settings(settings: Mapping[str, Any]) -> Config:
    # Merged over the defaults, so that a part without a NAME takes the default's NAME.
    return from_mapping(Config, merge(asdict(Config()), settings))


def dump_config(config: Config) -> str:
    """The config as YAML that `load_config` reads back to the same config."""
    return str(yaml.safe_dump(upper_keys(asdict(config)), sort_keys=False, width=100))


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
