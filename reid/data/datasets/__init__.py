"""The datasets; importing this package registers them."""

from reid.data.datasets.base import ReIDDataset, Split, SplitCounts
from reid.data.datasets.csv_dataset import CSV
from reid.data.datasets.cuhk03np import CUHK03NP
from reid.data.datasets.cuhk_sysu import CUHKSYSU
from reid.data.datasets.dukemtmc import DukeMTMCreID
from reid.data.datasets.folder import Folder
from reid.data.datasets.market1501 import Market1501
from reid.data.datasets.msmt17 import MSMT17
from reid.data.datasets.occluded_duke import OccludedDuke
from reid.data.datasets.pattern import Pattern
from reid.data.datasets.personx import PersonX
from reid.data.datasets.randperson import RandPerson
from reid.data.datasets.synthetic_persons import SyntheticPersons
from reid.data.datasets.vehicleid import VehicleID
from reid.data.datasets.veri776 import VeRi776
from reid.data.datasets.veriwild import VeRiWild

__all__ = [
    "CSV",
    "CUHK03NP",
    "CUHKSYSU",
    "MSMT17",
    "DukeMTMCreID",
    "Folder",
    "Market1501",
    "OccludedDuke",
    "Pattern",
    "PersonX",
    "RandPerson",
    "ReIDDataset",
    "Split",
    "SplitCounts",
    "SyntheticPersons",
    "VeRi776",
    "VeRiWild",
    "VehicleID",
]
