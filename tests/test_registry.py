from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Protocol

import pytest
from fvcore.common.registry import Registry

from reid.registry import PART_OF, ConfigError, Range, Rule, build, check_spec, check_type


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
    with pytest.raises(ConfigError, match=message) as built:
        build(parts, spec, "clusterer", num_cameras=6)
    if "more than 0" in message:  # the part refuses it, not the registry
        assert check_spec(parts, spec, "clusterer", ["num_cameras"]) == {"num_cameras"}
        return
    with pytest.raises(ConfigError) as checked:
        check_spec(parts, spec, "clusterer", ["num_cameras"])
    assert str(checked.value) == str(built.value)


def test_checking_a_spec_builds_nothing(parts):
    spec = {"name": "Clusterer", "eps": 0.5}
    assert check_spec(parts, spec, "clusterer", ("num_cameras", "other")) == {"num_cameras"}
    with pytest.raises(ConfigError, match=r"clusterer\.num_cameras: Clusterer needs this option"):
        check_spec(parts, spec, "clusterer")


def test_options_of_other_frameworks_lead_to_ours(parts):
    with pytest.raises(ConfigError, match=r"here it is model\.backbone_weights"):
        check_spec(parts, {"name": "Clusterer", "pretrain_path": "x"}, "model.backbone")


class Colour(Protocol):
    """An interface of parts."""

    def name(self) -> str: ...


@pytest.fixture
def painters(monkeypatch):
    colours, painters = Registry("COLOUR"), Registry("PAINTER")
    monkeypatch.setitem(PART_OF, Colour, colours)

    @colours.register()
    class Red:
        def __init__(self, num_cameras: int, shade: float = 0.5) -> None:
            self.text = f"red {shade} {num_cameras}"

    @colours.register()
    class Mixed:
        def __init__(self, first: Colour, others: list[Colour] | None = None) -> None:
            self.text = " + ".join(colour.text for colour in (first, *(others or ())))

    @painters.register()
    class Painter:
        def __init__(
            self, wall: Colour, door: Colour | None = None, rooms: Mapping[str, Colour] = {}
        ) -> None:
            self.wall, self.door, self.rooms = wall, door, rooms

    return painters


def test_a_spec_inside_a_spec_is_built(painters):
    mixed = {"name": "Mixed", "first": "Red", "others": ["Red", {"name": "Red", "shade": 1}]}
    spec = {"name": "Painter", "wall": mixed, "door": None, "rooms": {"hall": "Red"}}
    painter = build(painters, spec, "painter", num_cameras=6, unused=1)
    assert painter.wall.text == "red 0.5 6 + red 0.5 6 + red 1.0 6"
    assert painter.door is None
    assert painter.rooms["hall"].text == "red 0.5 6"
    assert check_spec(painters, spec, "painter", ["num_cameras", "unused"]) == {"num_cameras"}


@pytest.mark.parametrize(
    ("wall", "message"),
    [
        ("Rde", r"painter\.wall\.name: 'Rde' is not registered in COLOUR \(did you mean 'Red'"),
        ({"name": "Red", "shade": "x"}, r"painter\.wall\.shade: expected float, got 'x'"),
        ({"name": "Red", "num_cameras": 1}, r"painter\.wall\.num_cameras: comes from the data"),
        ({"name": "Mixed"}, r"painter\.wall\.first: Mixed needs this option \(Colour\)"),
        (
            {"name": "Mixed", "first": "Red", "others": ["Rod"]},
            r"painter\.wall\.others\[0\]\.name:",
        ),
        (3, r"painter\.wall: expected a NAME with options"),
    ],
)
def test_what_is_wrong_inside_a_spec_is_named(painters, wall, message):
    for take in (lambda *a: build(*a, num_cameras=6), lambda *a: check_spec(*a, ["num_cameras"])):
        with pytest.raises(ConfigError, match=message):
            take(
                painters,
                {"name": "Painter", "door": wall, "wall": "Red"} | {"wall": wall},
                "painter",
            )


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
        ({2: 1}, dict[int, int], {2: 1}),
        (False, Literal["off", "fast"], "off"),
        (True, Literal["off", "on"], "on"),
        (True, Literal[True, "on"], True),
        ("1e3", Annotated[float, Range(0, 1e6)], 1000.0),
        (float("inf"), Annotated[float, Range(0, float("inf"))], float("inf")),
        (2**70, Annotated[int, Range(0, 2**80)], 2**70),
        (None, Annotated[float | None, Range(0, 1)], None),
        ("a", Annotated[list[str], Rule(prepare=lambda value: [value])], ["a"]),
    ],
)
def test_values_are_converted_where_nothing_is_lost(value, annotation, expected):
    assert check_type(value, annotation, "key") == expected


@pytest.mark.parametrize(
    ("value", "annotation", "message"),
    [
        (2**63, int, "key: expected a number from -9,223,372,036,854,775,808 to"),
        (float("inf"), float, "key: expected a finite number, got inf"),
        ("nan", float, "key: expected a finite number, got 'nan'"),
        (10**400, float, "key: expected float, got 1000"),
        (
            float("nan"),
            Annotated[float, Range(0, 1)],
            "key: expected a number from 0 to 1, got nan",
        ),
        (0, Annotated[float, Range(0, 1, above=True)], "above 0 and up to 1, got 0"),
        (1, Annotated[float, Range(0, 1, below=True)], "from 0 to below 1, got 1"),
        ([1, 2**70], list[int], r"key\[1\]: expected a number from"),
        (2**70, int | str, r"key: expected int \| str, got"),
        (2**70, int | None, "key: expected a number from -9"),
        ("a\0b", str, "key: text must not hold NUL or surrogates, got 'a.x00b'"),
        ("a\ud800b", str, "key: text must not hold NUL or surrogates"),
        (["\0"], Any, None),
        ("\0", Any, "key: text must not hold NUL or surrogates"),
        ({1: 2}, dict[str, int], "key, key: expected str, got 1"),
        (True, Literal["a", "off"], "key: expected one of 'a', 'off', got True"),
        (True, Literal[1, 2], "key: expected one of 1, 2, got True"),
        (3, list[int], r"key: expected \[int, ...\], got 3"),
        ([1], tuple[int, Annotated[int, Range(0, 1)]], r"key: expected \[int, int\], got \[1\]"),
    ],
)
def test_values_out_of_bounds_are_refused(value, annotation, message):
    if message is None:  # the part checks values of type `Any`
        assert check_type(value, annotation, "key") == value
        return
    with pytest.raises(ConfigError, match=message):
        check_type(value, annotation, "key")
