"""For keys of other frameworks, the table names keys that exist here."""

from __future__ import annotations

import re

import pytest

import reid.assembly.parts
import reid.projects.clustercontrast
import reid.projects.tmgf  # noqa: F401  (registers the parts)
from reid import registry
from reid.config import load_config
from reid.other_frameworks import OUR_KEYS, our_key
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
    return sorted(keys | {text.split(" (")[0] for text in OUR_KEYS.values() if " and " not in text})


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
    for key in OUR_KEYS:
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
