from __future__ import annotations

import pytest

from reid.config import Config, config_differences, dump_config, load_config
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
        (["SOLVER.BASE_LR", "-1"], r"solver\.base_lr: expected a number above 0, got -1"),
        (["SOLVER.BASE_LR", ".nan"], r"solver\.base_lr: expected a number above 0, got nan"),
        (["SOLVER.MAX_EPOCHS", "2.5"], r"solver\.max_epochs: expected int, got 2\.5"),
        (["SOLVER.MILESTONES", "[40, 20]"], r"solver\.milestones: expected ascending"),
        (["SOLVER.BIAS_LR_FACTOR", "0"], r"solver\.bias_lr_factor: expected a number above 0"),
        (["SOLVER.WARMUP_ITERATIONS", "9"], r"iterations: expected 0 beside warmup_epochs 10"),
        (["SOLVER.AMP", "fp61"], r"solver\.amp: expected one of .* got 'fp61'.*mean 'fp16'"),
        (["INPUT.SIZE", "[64]"], r"input\.size: expected \[height, width\], got \[64\]"),
        (["INPUT.SIZE", "[a, b]"], r"input\.size\[0\]: expected int, got 'a'"),
        (["INPUT.INTERPOLATION", "cubic"], r"input\.interpolation: .*mean 'bicubic'"),
        (["DATALOADER.ON_ERROR", "ignore"], r"on_error: expected one of stop, skip, got 'ignore'"),
        (["DEVICE", "gpu"], r"device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["SEED"], r"'SEED' has no value"),
        (["SEED", "[1"], r"SEED: '\[1' is not a YAML value"),
        (["SEED.X", "1"], r"seed: expected int"),
        (["SEED", "1", "SEED.X", "1"], r"SEED\.X: seed is 1, which has no options"),
        (["CRITERION", "[A]", "CRITERION.3", "B"], r"the number of an item, 0 to 0, got '3'"),
        (["OUTPUT_DIR", "${nowhere}"], r"output_dir: .*nowhere"),
    ],
)
def test_what_is_wrong_is_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides)


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
        ("SEED: 1\nseed: 2\n", "seed: the key stands twice"),
        ("_BASE_: ~nobody_of_this_name/x.yaml\n", "home directory"),
        (f"_BASE_: {'x' * 5000}\n", "does not exist"),
        ("OUTPUT_DIR: ${device}\n", r"output_dir: \$\{...\} is not filled in"),
        ("DATASETS: {TRAIN: 2024-01-01}\n", r"datasets\.train: .*'date'"),
    ],
)
def test_hostile_files_are_named(tmp_path, text, message):
    path = write(tmp_path, "hostile.yaml", text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_bases_come_to_an_end(tmp_path):
    for number in range(100):
        write(tmp_path, f"{number}.yaml", f"_BASE_: {number + 1}.yaml\n")
    with pytest.raises(ConfigError, match="more than 50"):
        load_config(tmp_path / "0.yaml")
