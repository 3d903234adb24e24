"""The papers' packages: `reid.projects.tmgf` is the folder `projects/TMGF/tmgf`.

`setup.py` installs them here. In a checkout, where they lie beside `reid`, the search path below
finds them. `PLUGINS: [tmgf]` in a config imports `reid.projects.tmgf`.
"""

from pathlib import Path

__path__ += sorted(map(str, Path(__file__).parents[2].glob("projects/*/")))

MOVED = {
    "CameraProxyClusterer": "cap",
    "ClusterContrastLoss": "clustercontrast",
    "O2CAPLoss": "o2cap",
}
"""Parts that once stood in the core, and the projects that register them now.

A config that names one without its project in PLUGINS goes on working.
"""
