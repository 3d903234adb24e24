from __future__ import annotations

import pytest
import yaml

from reid.yaml_text import parse_yaml


@pytest.mark.parametrize(
    "text",
    [
        "A: 1\nB: [x, 1.5, null, {C: 2024-01-01}]\n",
        "A: &a {B: 1, C: 2}\nD: {<<: *a, C: 3}\nE: [*a, *a]\n",
        "",
        "- 1:30\n- 0x1F",
    ],
)
def test_reads_as_pyyaml_does(text: str) -> None:
    assert parse_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "".join(f"- &a{i + 1} [*a{i}, *a{i}]\n" for i in range(30)).replace("*a0", "x"),
            "100,000",
        ),
        (f"- &a {'x' * 5000}\n- [{'*a, ' * 9999}]", "100,000 values"),
        ("&a [*a]", "an alias names a value that contains it"),
        ("[" * 100_000, "more than 50 levels"),
        ("A: 1\nB: 2\nA: 3", "'A' appears twice"),
        ("1" + ":59" * 100_000, "too many digits"),
        ("9" * 5000, "too many digits"),
        ("2024-13-45", "not what its tag or form says"),
        ("!!bool perhaps", "not what its tag or form says"),
        ("x" * 2_000_000, "more than 1,048,576 characters"),
        ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_refuses(text: str, message: str) -> None:
    with pytest.raises(yaml.YAMLError, match=message):
        parse_yaml(text)
