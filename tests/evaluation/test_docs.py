"""The example of docs/evaluation.md runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from reid.evaluation.ranking import rank
from reid.registry import EVALUATOR, build
from reid.structures import FeatureSet

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"


def test_the_evaluator_of_the_page() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    query = FeatureSet.of(torch.eye(3)[:2], torch.tensor([1, 2]), torch.tensor([0, 0]))
    features = torch.tensor([[1.0, 0, 0], [0.8, 0.6, 0], [0, 1, 0]])
    gallery = FeatureSet.of(features, torch.tensor([1, 2, 3]), torch.tensor([1, 1, 1]))
    numbers = build(EVALUATOR, "FirstHit", "test.evaluator")(rank(query, gallery))
    assert numbers == {"MRR": pytest.approx((1 + 1 / 2) / 2)}
