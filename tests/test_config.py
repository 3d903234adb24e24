from __future__ import annotations

import pytest

from reid.config import (
    Config,
    EvaluationConfig,
    InputConfig,
    SolverConfig,
    config_differences,
    dump_config,
    load_config,
)
from reid.registry import ConfigError


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return path


def test_defaults_are_a_valid_config():
    assert load_config() == Config()


def test_base_files_are_inherited_and_pairs_win(tmp_path):
    write(tmp_path, "base.yaml", "SEED: 4\nSOLVER: {BASE_LR: 0.1, MAX_EPOCHS: 7}\n")
    child = write(tmp_path, "child.yaml", "_BASE_: base.yaml\nSOLVER: {BASE_LR: 1e-2}\n")
    config = load_config(child, ["SOLVER.MAX_EPOCHS", "3"])
    assert (config.seed, config.solver.base_lr, config.solver.max_epochs) == (4, 0.01, 3)


def test_dump_reads_back_to_the_same_config(tmp_path):
    config = load_config(
        None,
        ["CLUSTERER", "{NAME: JaccardDBSCAN, EPS: 0.4}", "CRITERION", "[{NAME: Triplet}, A]"],
    )
    assert load_config(write(tmp_path, "dump.yaml", dump_config(config))) == config


def test_options_of_parts_can_be_set_one_by_one():
    pairs = "CLUSTERER JaccardDBSCAN CLUSTERER.EPS 0.45 CRITERION [Triplet] CRITERION.0.MARGIN 0.3"
    config = load_config(None, pairs.split())
    assert config.clusterer == {"name": "JaccardDBSCAN", "eps": 0.45}
    assert config.criterion == [{"name": "Triplet", "margin": 0.3}]


def test_null_removes_a_part(tmp_path):
    write(tmp_path, "base.yaml", "CLUSTERER: {NAME: JaccardDBSCAN}\n")
    child = write(tmp_path, "child.yaml", "_BASE_: base.yaml\nCLUSTERER: null\n")
    assert load_config(child).clusterer is None


def test_an_empty_word_is_no_file():
    assert load_config(overrides=["MODEL.BACKBONE_WEIGHTS", ""]).model.backbone_weights == ""
    with pytest.raises(ConfigError, match="output_dir: expected a folder, got ''"):
        load_config(overrides=["OUTPUT_DIR", ""])


def test_off_is_a_word(tmp_path):
    assert load_config(write(tmp_path, "a.yaml", "SOLVER: {AMP: off}")).solver.amp == "off"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.BASE_LRR", "1"], r"solver\.base_lrr: unknown key.*mean 'solver.base_lr'"),
        (["SLOVER", "1"], r"slover: unknown key.*mean 'solver'"),
        (["SOLVER", "1"], r"solver: expected KEY: VALUE lines, got 1"),
        (["SOLVER.BASE_LR", "fast"], r"solver\.base_lr: expected float, got 'fast'"),
        (["SOLVER.BASE_LR", "-1"], r"base_lr: expected a number from 1e-12 to 1,000, got -1"),
        (["SOLVER.BASE_LR", ".nan"], r"base_lr: expected a number from 1e-12 to 1,000, got nan"),
        (["SOLVER.MOMENTUM", "1"], r"momentum: expected a number from 0 to below 1, got 1"),
        (["SOLVER.MAX_EPOCHS", "2.5"], r"max_epochs: expected int.* got 2\.5"),
        (["SOLVER.MILESTONES", "[40, 20]"], r"solver\.milestones: expected ascending"),
        (["SOLVER.BIAS_LR_FACTOR", "0"], r"solver\.bias_lr_factor: expected a number above 0"),
        (["SOLVER.WARMUP_ITERATIONS", "9"], r"iterations: expected 0 beside warmup_epochs 10"),
        (["SOLVER.AMP", "fp61"], r"solver\.amp: expected one of .* got 'fp61'.*mean 'fp16'"),
        (["SOLVER.AMP", "true"], r"solver\.amp: expected one of 'off', .* got True"),
        (["INPUT.SIZE", "[64]"], r"input\.size: expected \[int, int\], got \[64\]"),
        (["INPUT.SIZE", "[a, b]"], r"input\.size\[0\]: expected int.* got 'a'"),
        (["INPUT.INTERPOLATION", "cubic"], r"input\.interpolation: .*mean 'bicubic'"),
        (["DATALOADER.ON_ERROR", "ignore"], r"on_error: expected one of 'stop', 'skip', got 'ig"),
        (["DATALOADER.NUM_WORKERS", "true"], r"num_workers: expected int.* got True \(bool\)"),
        (["DEVICE", "gpu"], r"device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["OUTPUT_DIR", "off"], r"output_dir: expected str.* got False \(bool\)"),
        (["CRITERION", "{A: 1}"], r"criterion: expected a list, got"),
        (["CRITERION", "[3]"], r"criterion: expected a list of parts, each a NAME or .*got \[3\]"),
        (["HOOKS", "[2024-01-01]"], r"HOOKS\[0\]: expected text, .* got .*\(date\)"),
        (["SEED"], r"'SEED' has no value"),
        (["SEED=3"], r"'SEED=3': write 'SEED 3', without ="),
        (["SEED", "[1"], r"SEED: '\[1' is not a YAML value"),
        (["SEED.X", "1"], r"SEED\.X: seed is 1, which has no options"),
        (["CRITERION", "[A]", "CRITERION.3", "B"], r"the number of an item, 0 to 0; got '3'"),
        (["CRITERION.0.MARGIN", "1"], r"number of an item, but the list is empty; got '0'"),
        (["A" + ".A" * 1000, "1"], r"has more than 50 levels"),
        (["OUTPUT_DIR", "${nowhere}"], r"OUTPUT_DIR: .*nowhere"),
    ],
)
def test_what_is_wrong_is_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SEED", 2**64), ("SEED", -1), ("SOLVER.MAX_EPOCHS", 10**22), ("SOLVER.MAX_EPOCHS", 0),
        ("SOLVER.MAX_EPOCHS", "1e22"), ("PROCESS_TIMEOUT", "1e18"), ("PROCESS_TIMEOUT", 0),
        ("PROCESS_TIMEOUT", ".inf"), ("INPUT.SIZE", "[99999999, 128]"), ("INPUT.SIZE", "[0, 128]"),
        ("TEST.BATCH_SIZE", 10**12), ("TEST.RANKED_LISTS", 10**9), ("SOLVER.MILESTONES", "[0]"),
        ("DATALOADER.NUM_WORKERS", 10**9), ("SOLVER.WEIGHT_DECAY", ".inf"), ("SOLVER.GAMMA", 1.1),
        ("INPUT.PIXEL_MEAN", "[.nan, 0, 0]"), ("INPUT.PIXEL_STD", "[1e-320, 1, 1]"),
        ("INPUT.PIXEL_STD", "[.inf, 1, 1]"), ("INPUT.PIXEL_STD", "[1, 1]"),
        ("PLUGINS", "['']"), ("PLUGINS", "[.x]"), ("PLUGINS", "[../x]"), ("PLUGINS", "[a b]"),
        ("DEVICE", "'cuda:\u00b2'"), ("DEVICE", "cuda:99999999999"), ("OUTPUT_DIR", "x" * 100_000),
        ("OUTPUT_DIR", "/".join(["x" * 200] * 30)), ("OUTPUT_DIR", "y/" + "\u4eba" * 100),
        ("OUTPUT_DIR", '"a\\0b"'), ("OUTPUT_DIR", '"a\\uD800b"'), ("MODEL.WEIGHTS", '"\\0"'),
        ("CRITERION.\u00b2", "A"), ("LOG_PERIOD", 2**70), ("SOLVER.ACCUMULATION_STEPS", 10**9),
    ],
)  # fmt: skip
def test_every_number_and_name_has_bounds(key, value):
    with pytest.raises(
        ConfigError, match=rf"(?i)^{key.partition('.')[0]}.*\(on the command line\)$"
    ):
        load_config(None, ["CRITERION", "[A]", key, str(value)])


def test_bounds_count_however_a_section_is_made():
    with pytest.raises(ConfigError, match=r"solver\.max_epochs: expected a number from 1"):
        SolverConfig(max_epochs=0)
    with pytest.raises(ConfigError, match=r"test\.precision: expected one of 'fp32'"):
        EvaluationConfig(precision="fp23")
    assert InputConfig(size=[64, 32]).size == (64, 32)


def test_a_single_part_needs_no_list():
    pairs = ["DATASETS.TEST", "Market1501", "CRITERION", "{NAME: Triplet, MARGIN: 1}", "HOOKS", "A"]
    config = load_config(None, [*pairs, "DATASETS.TRAIN", "MSMT17"])
    assert (config.datasets.test, config.hooks) == (["Market1501"], ["A"])
    assert config.criterion == [{"name": "Triplet", "margin": 1}]
    assert config.datasets.train == "MSMT17"


def test_a_part_without_a_name_is_the_default_with_other_options(tmp_path):
    path = write(tmp_path, "a.yaml", "TEST: {EVALUATOR: {RERANKING: true}}")
    whole = {"name": "Market1501Evaluator", "reranking": True}
    assert load_config(path).test.evaluator == whole
    assert load_config(None, ["TEST.EVALUATOR", "{RERANKING: true}"]).test.evaluator == whole
    config = load_config(None, ["INPUT.TRANSFORMS.0.PROB", "0.25"])
    assert config.input.transforms[0] == {"name": "RandomFlip", "prob": 0.25}
    assert load_config().input.transforms[0]["prob"] == 0.5


def test_the_command_line_is_blamed_for_what_is_typed_there(tmp_path):
    right = write(tmp_path, "right.yaml", "SEED: 3\n")
    wrong = write(tmp_path, "wrong.yaml", "SEED: -3\n")
    with pytest.raises(ConfigError, match=r"sede: unknown key.* \(on the command line\)$"):
        load_config(right, ["SEDE", "1"])
    with pytest.raises(ConfigError, match=r"seed: .* got -4 \(on the command line\)$"):
        load_config(wrong, ["SEED", "-4"])
    with pytest.raises(ConfigError, match=r"seed: .* got -3 \(in .*wrong\.yaml\)$"):
        load_config(wrong, ["DEVICE", "cpu"])
    assert load_config(wrong, ["SEED", "4"]).seed == 4


@pytest.mark.parametrize(
    ("key", "value", "ours"),
    [
        ("MODEL.DEVICE", "cpu", "device"),
        ("SOLVER.IMS_PER_BATCH", "32", "dataloader.sampler.batch_size"),
        ("SOLVER.MAX_ITER", "100", "solver.max_epochs"),
        ("DATASETS.NAMES", "Market1501", "datasets.train"),
        ("SOLVER.AMP.ENABLED", "true", "solver.amp.enabled is solver.amp"),
        ("INPUT.REA.PROB", "0.5", "input.transforms"),
        ("train.max_epoch", "60", "train.max_epoch is solver.max_epochs"),
        ("param_scheduler", "[{type: MultiStepLR}]", "solver.schedule and solver.warmup_epochs"),
        ("EPOCHS", "3", "solver.max_epochs"),
    ],
)
def test_keys_of_other_frameworks_lead_to_ours(key, value, ours):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [key, value])
    assert f"(here it is {ours}" in str(caught.value) or f"(here {ours}" in str(caught.value)
    assert str(caught.value).endswith("(on the command line)")


def test_a_wrong_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml.*does not exist"):
        load_config(tmp_path / "nowhere.yaml")
    for text in ("SEED: [1", "- a\n- b\n", "SEED: !!python/object/apply:os.system ['true']\n"):
        with pytest.raises(ConfigError, match=r"broken\.yaml"):
            load_config(write(tmp_path, "broken.yaml", text))
    with pytest.raises(ConfigError, match=r"missing\.yaml"):
        load_config(write(tmp_path, "child.yaml", "_BASE_: missing.yaml"))
    with pytest.raises(ConfigError, match=r"solver\.base_lr.*typo\.yaml"):
        load_config(write(tmp_path, "typo.yaml", "SOLVER: {BASE_LRR: 1}"))


def test_another_part_replaces_the_one_of_the_base(tmp_path):
    write(
        tmp_path,
        "base.yaml",
        "CLUSTERER: {NAME: JaccardDBSCAN, EPS: 0.4}\nMODEL: {HEAD: {NAME: A, X: 1}}\n",
    )
    text = "_BASE_: base.yaml\nCLUSTERER: {K1: 9}\nMODEL: {HEAD: {NAME: B, Y: 2}}\n"
    child = write(tmp_path, "child.yaml", text)
    config = load_config(child)
    assert config.clusterer == {"name": "JaccardDBSCAN", "eps": 0.4, "k1": 9}
    assert config.model.head == {"name": "B", "y": 2}
    assert load_config(child, ["MODEL.HEAD.NAME", "C"]).model.head == {"name": "C"}
    short = write(tmp_path, "short.yaml", "_BASE_: base.yaml\nMODEL: {HEAD: C}\n")
    assert load_config(short).model.head == {"name": "C"}


def test_a_file_that_is_its_own_base(tmp_path):
    write(tmp_path, "a.yaml", "_BASE_: b.yaml\n")
    child = write(tmp_path, "b.yaml", "_BASE_: a.yaml\n")
    with pytest.raises(ConfigError, match=r"b\.yaml' is its own _BASE_"):
        load_config(child)


def test_files_lie_over_each_other_from_left_to_right(tmp_path):
    data = write(tmp_path, "data.yaml", "MODEL: {HEAD: {NAME: A, X: 1, Y: 2}}\nCLUSTERER: C\n")
    method = write(tmp_path, "method.yaml", "MODEL: {HEAD: {X: 3}}\nCLUSTERER: null\n")
    other = write(tmp_path, "other.yaml", "MODEL: {HEAD: {NAME: B}}\n")
    config = load_config([data, method], ["SEED", "5"])
    assert (config.model.head, config.clusterer) == ({"name": "A", "x": 3, "y": 2}, None)
    assert load_config([data, method, other]).model.head == {"name": "B"}
    wrong = write(tmp_path, "wrong.yaml", "SEDE: 1\n")
    with pytest.raises(ConfigError, match=r"sede: unknown key.*\(in .*data\.yaml, .*wrong\.yaml\)"):
        load_config([data, wrong])


def test_differences_of_two_configs_are_named():
    old = load_config(None, ["MODEL.HEAD", "{NAME: A, X: 1}", "CRITERION", "[Triplet]"])
    new = load_config(None, ["MODEL.HEAD", "{NAME: A, Y: 1}", "SOLVER.MAX_EPOCHS", "3"])
    assert config_differences(old, old) == {}
    assert config_differences(old, new) == {
        "model.head.x": (1, None),
        "criterion": (["Triplet"], []),
        "solver.max_epochs": (50, 3),
        "model.head.y": (None, 1),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SEED: 1\nseed: 2\n", "seed: the key appears twice"),
        ("_BASE_: ~nobody_of_this_name/x.yaml\n", "home directory"),
        (f"_BASE_: {'x' * 5000}\n", "does not exist"),
        ("OUTPUT_DIR: ${device}\n", r"output_dir: references \$\{...\} are not supported"),
        ("DATASETS: {TRAIN: 2024-01-01}\n", r"datasets\.train: expected text.*\(date\)"),
        ("DATASETS: {TRAIN: 3}\n", r"datasets\.train: expected a dataset, or a list"),
    ],
)
def test_hostile_files_are_named(tmp_path, text, message):
    path = write(tmp_path, "hostile.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_a_long_chain_of_bases_has_an_end(tmp_path):
    for number in range(1500):
        write(tmp_path, f"{number}.yaml", f"_BASE_: {number + 1}.yaml\n")
    with pytest.raises(ConfigError, match=r"1500\.yaml' does not exist, but .*1499\.yaml' names"):
        load_config(tmp_path / "0.yaml")
