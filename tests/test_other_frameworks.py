"""For keys of other frameworks, the table names keys that exist here."""

from __future__ import annotations

import re

import pytest

import reid.assembly.parts
import reid.projects.clustercontrast
import reid.projects.tmgf  # noqa: F401  (registers the parts)
from reid import registry
from reid.config import load_config
from reid.other_frameworks import NOT_HERE, OUR_KEYS, our_key
from reid.registry import ConfigError

PARTS = {
    "clusterer": registry.CLUSTERER, "criterion": registry.LOSS, "datasets.train": registry.DATASET,
    "dataloader.sampler": registry.SAMPLER, "model.head": registry.HEAD,
    "model.backbone": registry.BACKBONE, "test.evaluator": registry.EVALUATOR,
}  # fmt: skip


def ours() -> list[str]:
    """Every key that the table names, including those in parentheses."""
    texts = (re.sub(r"[()]", " ", text) for text in OUR_KEYS.values())
    words = {word.strip(";:,") for text in texts for word in text.split()}
    keys = {word for word in words if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", word)}
    whole = {text.split(" (")[0] for text in OUR_KEYS.values()}
    return sorted(keys | {text for text in whole if " and " not in text and "--" not in text})


@pytest.mark.parametrize("key", ours())
def test_our_keys_exist(key: str) -> None:
    part = next((part for part in PARTS if key.startswith(f"{part}.")), None)
    if part is None:
        with pytest.raises(ConfigError) as caught:
            load_config(None, [key, "[[]]"])
        assert "unknown key" not in str(caught.value)
        return
    option = key[len(part) + 1 :].removeprefix("0.").removeprefix("1.")
    known = {name for _, made in PARTS[part] for name in registry._parameters(made)}
    assert option in known | {"weight"}


def test_no_key_of_the_table_is_ours() -> None:
    settings = load_config()
    for key in [*OUR_KEYS, *NOT_HERE]:
        node: object = settings
        for name in key.split("."):
            node = getattr(node, name, None) if not isinstance(node, dict) else None
        assert node is None, key


def test_keys_inside_a_mapping_are_looked_up() -> None:
    assert our_key("solver.base_lr") == ""
    value = {"optimizer": {"lr": 1, "type": "SGD", "odd": 2}}
    assert our_key("optim_wrapper", value) == (
        " (here optim_wrapper.optimizer.lr is solver.base_lr, "
        "optim_wrapper.optimizer.type is solver.optimizer)"
    )


@pytest.mark.parametrize(("pairs", "message"), [
    (["SOLVER.WEIGHT_DECAY_BIAS", "0"],
     "solver.weight_decay_bias: unknown key (there is no such setting here: solver.weight_decay "),
    (["SOLVER.HEADS_LR_FACTOR", "10"],
     "solver.heads_lr_factor: unknown key (here it is solver.lr_factors (such as {head: 10}))"),
    (["model.type", "BaseReID"],
     "model.type: unknown key (here it is model.backbone and model.head)"),
    (["train.fixbase_epoch", "5"],
     "train: unknown key (there is no train.fixbase_epoch here: solver.frozen "),
    (["SOLVER.SWA.ENABLED", "True"], "solver.swa: unknown key (there is no such setting here: "),
    (["model.resume", "x"], "model.resume: unknown key (here it is the option --resume)"),
    (["SOLVER.BASE_LRR", "1"], "solver.base_lrr: unknown key (did you mean 'solver.base_lr'?)"),
    (["SOLVER.ZZZ", "1"], "solver.zzz: unknown key; known: solver.optimizer, "),
    (["INPUT.SIZE", "(256, 128)"],
     "input.size: expected [int, int], got '(256, 128)' (str); write a list as [256, 128]"),
    (["SOLVER.MILESTONES", "(30,)"],
     "solver.milestones: expected [int, ...], got '(30,)' (str); write a list as [30]"),
])  # fmt: skip
def test_habits_of_others_on_the_command_line(pairs: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, pairs)
    assert str(caught.value).startswith(message)
    assert str(caught.value).endswith(" (on the command line)")


def test_a_tuple_of_names_leads_to_a_list() -> None:
    with pytest.raises(ConfigError, match=r"DATASET; write a list as \['Market1501'\]; known: "):
        registry.check_spec(registry.DATASET, "('Market1501',)", "datasets.test[0]")
