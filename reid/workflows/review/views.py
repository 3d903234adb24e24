"""The kinds of questions that the page offers."""

from __future__ import annotations

from typing import Literal

View = Literal["auto", "clusters", "sure", "doubtful", "persons", "random"]

VIEWS: dict[View, str] = {
    "auto": "Most informative",
    "clusters": "Clusters",
    "sure": "Surest pairs",
    "doubtful": "Doubtful pairs",
    "persons": "Persons that look alike",
    "random": "Random samples",
}
