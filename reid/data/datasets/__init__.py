"""The datasets; importing this package registers them."""

from reid.data.datasets.base import ReIDDataset, Split, SplitCounts
from reid.data.datasets.csv_dataset import CSV
from reid.data.datasets.dukemtmc import DukeMTMCreID
from reid.data.datasets.market1501 import Market1501
from reid.data.datasets.msmt17 import MSMT17
from reid.data.datasets.synthetic_persons import SyntheticPersons

__all__ = [
    "CSV",
    "MSMT17",
    "DukeMTMCreID",
    "Market1501",
    "ReIDDataset",
    "Split",
    "SplitCounts",
    "SyntheticPersons",
]
