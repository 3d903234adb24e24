"""What a person can choose to be asked."""

from __future__ import annotations

from typing import Literal

View = Literal["auto", "clusters", "sure", "doubtful", "persons", "random"]

VIEWS: dict[View, str] = {
    "auto": "What tells most",
    "clusters": "Clusters",
    "sure": "Surest pairs",
    "doubtful": "Doubtful pairs",
    "persons": "Persons that look alike",
    "random": "Random samples",
}
