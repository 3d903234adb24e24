"""IICS as a plug-in: importing this package registers it."""
from reid.projects.iics import formats
from reid.projects.iics.backbone import AIBNResNet
