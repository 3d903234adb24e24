from __future__ import annotations

from typing import Literal

import pytest
from fvcore.common.registry import Registry

from reid.registry import ConfigError, build, check_type


@pytest.fixture
def parts():
    registry = Registry("PART")

    @registry.register()
    class Clusterer:
        def __init__(
            self,
            eps: float,
            num_cameras: int,
            k1: int = 20,
            mode: Literal["exact", "fast"] = "exact",
            sizes: tuple[int, int] | None = None,
        ) -> None:
            if eps <= 0:
                raise ValueError(f"eps: expected more than 0, got {eps}")
            self.options = (eps, num_cameras, k1, mode, sizes)

    return registry


def test_options_come_from_the_config_and_facts_from_the_caller(parts):
    spec = {"name": "Clusterer", "eps": "1e-2", "sizes": [3, 4]}
    part = build(parts, spec, "clusterer", num_cameras=6, unused=1)
    assert part.options == (0.01, 6, 20, "exact", (3, 4))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "Clustrer", "eps": 1}, r"clusterer\.name: 'Clustrer'.*mean 'Clusterer'"),
        ({"name": "Clusterer", "esp": 1}, r"clusterer\.esp: .*no such option.*mean 'eps'"),
        ({"name": "Clusterer"}, r"clusterer\.eps: .*needs this option \(float\)"),
        ({"name": "Clusterer", "eps": [1]}, r"clusterer\.eps: expected float, got \[1\] \(list\)"),
        ({"name": "Clusterer", "eps": 1, "k1": 2.5}, r"clusterer\.k1: expected int, got 2.5"),
        ({"name": "Clusterer", "eps": 1, "k1": True}, r"clusterer\.k1: expected int, got True"),
        ({"name": "Clusterer", "eps": 1, "mode": "fats"}, r"one of 'exact', 'fast', got 'fats'"),
        ({"name": "Clusterer", "eps": 1, "sizes": [1]}, r"clusterer\.sizes: expected"),
        ({"name": "Clusterer", "eps": 1, "num_cameras": 3}, "comes from the data"),
        ({"name": "Clusterer", "eps": -1}, r"clusterer \(Clusterer\): eps: expected more than 0"),
        ({"eps": 1}, "expected a NAME with options"),
        (None, "expected a NAME with options"),
    ],
)
def test_what_is_wrong_is_named(parts, spec, message):
    with pytest.raises(ConfigError, match=message):
        build(parts, spec, "clusterer", num_cameras=6)


def test_a_bare_name_is_a_part_without_options():
    registry = Registry("PART")

    @registry.register()
    def nothing() -> str:
        return "built"

    assert build(registry, "nothing", "part") == "built"


@pytest.mark.parametrize(
    ("value", "annotation", "expected"),
    [
        (1, float, 1.0),
        ([1, 2], list[int], [1, 2]),
        ([1, 2], tuple[float, ...], (1.0, 2.0)),
        (None, int | None, None),
        ({"a": 1}, dict[str, int], {"a": 1}),
    ],
)
def test_values_are_converted_where_nothing_is_lost(value, annotation, expected):
    assert check_type(value, annotation, "key") == expected
