"""Hostile YAML gives the config it describes, or a `ConfigError` that names the file."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import yaml

from reid.config import Config, dump_config, load_config
from reid.registry import ConfigError
from reid.yaml_text import parse_yaml

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
LAUGHS = "A: &a [lol, lol]\n" + "".join(
    f"{chr(66 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(24)
)
MERGES = "A: &a {x: 1}\n" + "".join(
    f"{chr(66 + i)}: &{chr(98 + i)} {{<<: [*{chr(97 + i)}, *{chr(97 + i)}]}}\n" for i in range(24)
)
REFERENCES = "A: lol\n" + "".join(
    f"{chr(66 + i)}: ${{{chr(97 + i)}}}${{{chr(97 + i)}}}\n" for i in range(24)
)
WRONG = (
    LAUGHS,
    MERGES,
    REFERENCES,
    f"SEED: &a {'x' * 2000}\nHOOKS: [{'*a, ' * 50_000}]\n",
    "CRITERION: &a [*a]\n",
    "MODEL: &a {BACKBONE: *a}\n",
    "HOOKS: " + "[" * 100_000,
    "HOOKS: " + "[" * 60 + "]" * 60,
    "MODEL: " + "{A: " * 2000 + "1" + "}" * 2000,
    "".join(f"{' ' * i}A:\n" for i in range(1000)),
    "- " * 3000 + "x",
    "? " * 3000 + "x",
    "SEED: 1\nSEED: 2\n",
    "SEED: 1\nseed: 2\n",
    "MODEL: {WEIGHTS: a, Weights: b}\n",
    "OUTPUT_DIR: !!python/object/apply:os.system ['touch canary']\n",
    "OUTPUT_DIR: !!python/object/new:subprocess.Popen [['touch', 'canary']]\n",
    "OUTPUT_DIR: !!python/name:os.system\n",
    "OUTPUT_DIR: !!python/module:antigravity\n",
    "OUTPUT_DIR: ${oc.env:HOME}\n",
    "OUTPUT_DIR: ${oc.decode:'[1]'}\n",
    "OUTPUT_DIR: ${output_dir}\n",
    "OUTPUT_DIR: " + "${" * 3000 + "}" * 3000,
    "SEED: " + "9" * 5000,
    "SEED: 0x" + "f" * 5000,
    "SEED: 1" + ":59" * 200_000,
    "SEED: 0b_\n",
    "SEED: !!int x\n",
    "SEED: !!int\n",
    "SEED: !!float x\n",
    "SEED: !!bool x\n",
    "SEED: !!timestamp x\n",
    "SEED: !!binary \N{SNOWMAN}\n",
    "SEED: !!set {a, b}\n",
    "SEED: !!omap [a]\n",
    "SEED: 2024-13-45\n",
    "SEED: 2024-01-01\n",
    "SEED: 1e999\n",
    "SEED: .nan\n",
    "SOLVER: {BASE_LR: .nan}\n",
    "SOLVER: {BASE_LR: .inf}\n",
    "DATASETS: {TRAIN: 2024-01-01}\n",
    "DATASETS: {TEST: [!!binary aGk=]}\n",
    "CLUSTERER: {NAME: A, B: [[!!set {a}]]}\n",
    "CLUSTERER: {NAME: A, B: {C: 2024-01-01 10:00:00}}\n",
    "[a, b]: 1\n",
    "? {a: b}\n: 1\n",
    "1: 2\n",
    "null: 1\n",
    "<<: 3\n",
    "<<: [3]\n",
    "=: 3\n",
    "SEED: *nothing\n",
    "SEED: 1\n---\nSEED: 2\n",
    "%YAML 9.9\n---\nSEED: 1\n",
    "%TAG ! tag:yaml.org,2002:python/\n---\nSEED: !object/apply:os.system ['touch canary']\n",
    "SEED: \0\n",
    "SEED: \x1b[2J\n",
    "SEED: 1\n\tSEED: 2\n",
    "SEED: 'open\n",
    'SEED: "\\xZZ"\n',
    'SEED: "\\UFFFFFFFF"\n',
    'OUTPUT_DIR: "\\uD800"\n',
    'OUTPUT_DIR: "a\\0b"\n',
    'OUTPUT_DIR: ""\n',
    "OUTPUT_DIR: off\n",
    "OUTPUT_DIR: " + "x" * 100_000,
    "OUTPUT_DIR: " + "x/" * 10_000,
    "OUTPUT_DIR: " + "\N{CJK UNIFIED IDEOGRAPH-4EBA}" * 100,
    f"SEED: {2**32}\n",
    f"SEED: {2**64}\n",
    "SEED: -1\n",
    f"SOLVER: {{MAX_EPOCHS: {10**22}}}\n",
    f"LOG_PERIOD: {2**63}\n",
    "PROCESS_TIMEOUT: 1e18\n",
    "PROCESS_TIMEOUT: -.inf\n",
    "INPUT: {SIZE: [99999999, 128]}\n",
    "INPUT: {PIXEL_MEAN: [.nan, 0, 0]}\n",
    "INPUT: {PIXEL_STD: [1e-320, 1, 1]}\n",
    "INPUT: {PIXEL_STD: [.inf, 1, 1]}\n",
    f"TEST: {{BATCH_SIZE: {10**12}}}\n",
    f"TEST: {{RANKED_LISTS: {10**9}}}\n",
    "PLUGINS: ['']\n",
    "PLUGINS: [.x]\n",
    "PLUGINS: [../x]\n",
    "PLUGINS: x\n",
    "DEVICE: cuda:\N{SUPERSCRIPT TWO}\n",
    "HOOKS: [3]\n",
    "CRITERION: {}\n",
    "CLUSTERER: [A]\n",
    "x" * 2**20,
    "# " + "x" * 2**21,
    "a" * 500_000 + ": 1\n",
    "just words\n",
    "- a list\n",
    "_BASE_: hostile.yaml\n",
    "_BASE_: .\n",
    "_BASE_: ..\n",
    "_BASE_: /dev/zero\n",
    "_BASE_: /dev/stdin\n",
    "_BASE_: nowhere.yaml\n",
    "_BASE_: ~nobody_of_this_name/x.yaml\n",
    f"_BASE_: {'x' * 5000}\n",
    '_BASE_: "\\0"\n',
    '_BASE_: "\\uD800"\n',
    "_BASE_: [hostile.yaml]\n",
    "_BASE_: 3\n",
    "_BASE_: {A: 1}\n",
)
RAW = (
    b"\xff\xfeS\x00E\x00E\x00D\x00",
    b"SEED: \xff\n",
    b"\xef\xbb\xbf\xef\xbb\xbfSEED: 1",
    b"\x80",
)
RIGHT = (
    ("", {}),
    ("# nothing\n", {}),
    ("\ufeffSEED: 3\n", {"seed": 3}),
    ("SEED: 3\r\nDEVICE: cpu\r\n", {"seed": 3, "device": "cpu"}),
    ("SEED: 0x1F\n", {"seed": 31}),
    ("PLUGINS: &a [x]\nHOOKS: *a\n", {"plugins": ["x"], "hooks": ["x"]}),
    ("CLUSTERER: {<<: {NAME: A, EPS: 1}, EPS: 2}\n", {"clusterer": {"name": "A", "eps": 2}}),
    ("OUTPUT_DIR: caf\N{LATIN SMALL LETTER E WITH ACUTE}\n", {"output_dir": "caf\u00e9"}),
    ("OUTPUT_DIR: " + "x" * 255, {"output_dir": "x" * 255}),
    (f"SEED: {2**32 - 1}\n", {"seed": 2**32 - 1}),
    ("HOOKS: A\nPLUGINS: [a.b_1]\n", {"hooks": ["A"], "plugins": ["a.b_1"]}),
)


def check(config: Config) -> None:
    """Checks that the config can be written, and that reading it back gives the same."""
    text = dump_config(config)
    again = parse_yaml(text)
    assert dump_config(load_config(None, [str(w) for p in again.items() for w in pair(*p)])) == text


def pair(key: str, value: object) -> tuple[str, str]:
    return key, yaml.safe_dump(value, sort_keys=False)


def test_made_up_configs(fuzz: Callable[..., Counter[str]]) -> None:
    wrong = [*(text.encode("utf-8", "surrogatepass") for text in WRONG), *RAW]

    def case(number: int, folder: Path) -> str:
        path = folder / "hostile.yaml"
        if number < len(wrong):
            path.write_bytes(wrong[number])
            load_config(path)
            raise AssertionError(f"was read: {wrong[number][:200]!r}")
        text, expected = RIGHT[number - len(wrong)]
        path.write_text(text, "utf-8", newline="")
        config = load_config(path)
        assert {key: getattr(config, key) for key in expected} == expected
        return "accepted"

    outcomes = fuzz(case, range(len(wrong) + len(RIGHT)), ConfigError, seconds=60)
    assert outcomes == {"refused": len(wrong), "accepted": len(RIGHT)}


def test_long_chain_of_bases(fuzz: Callable[..., Counter[str]]) -> None:
    def case(length: int, folder: Path) -> str:
        for number in range(length):
            text = f"_BASE_: {number + 1}.yaml\n" if number < length - 1 else "SEED: 7\n"
            (folder / f"{number}.yaml").write_text(text)
        assert load_config(folder / "0.yaml").seed == 7
        return "accepted"

    assert fuzz(case, (1, 40, 2000), ConfigError) == {"accepted": 3}


def test_changed_configs(
    fuzz: Callable[..., Counter[str]], seeds: range, mutated: Callable[..., bytes]
) -> None:
    whole = [path.read_bytes() for path in CONFIGS]
    assert whole
    others = [text.encode("utf-8", "surrogatepass") for text in WRONG if len(text) < 3000]

    def case(seed: int, folder: Path) -> str:
        rng = random.Random(seed)
        chosen = rng.choice(whole if rng.random() < 0.7 else others)
        content = mutated(chosen, rng, [*whole, rng.choice(others)])
        path = folder / "hostile.yaml"
        path.write_bytes(content)
        config = load_config(path)
        text = content.decode("utf-8")
        if "\r" not in text:
            assert repr(parse_yaml(text)) == repr(yaml.safe_load(text))
        check(config)
        return "accepted"

    assert set(fuzz(case, seeds, ConfigError)) == {"accepted", "refused"}


def test_changed_overrides(
    fuzz: Callable[..., Counter[str]], seeds: range, mutated: Callable[..., bytes]
) -> None:
    keys = (b"SEED", b"SOLVER.BASE_LR", b"CRITERION.0.NAME", b"MODEL.BACKBONE", b"DATASETS.TEST",
            b"INPUT.TRANSFORMS.0.PROB", b"INPUT.SIZE.1", b"PLUGINS", b"CRITERION.\xc2\xb2",
            b"SOLVER.AMP.ENABLED", b"OUTPUT_DIR", b"SEED=3")  # fmt: skip
    values = (b"3", b"1e-3", b"[{NAME: A}]", b"{NAME: A, B: [1, 2]}", b"on", b"null", b"&a [*a]",
              b"1e999", b"99999999999999999999", b".nan", b'"\\uD800"', b"../x", b"")  # fmt: skip

    def case(seed: int, folder: Path) -> str:
        rng = random.Random(seed)
        words = []
        for _ in range(rng.randrange(1, 4)):
            for known in (keys, values):
                word = rng.choice(known)
                word = word if rng.random() < 0.5 else mutated(word, rng, known)
                words.append(word.decode("utf-8", "replace"))
        try:
            check(load_config(None, words))
        except ConfigError as error:  # names the key, not a file
            return "refused" if str(error).endswith("(on the command line)") else str(error)
        return "accepted"

    assert set(fuzz(case, seeds, ConfigError)) == {"accepted", "refused"}
