"""The table of data sets as it fits the small ones of hub_support.py. Importing it is quick."""

from __future__ import annotations

from dataclasses import replace

from tools.data.data_sources import DATA_SETS, DataSet

ROWS = {  # of each file
    "wikitext": (8,),
    "squad_v2": (4,),
    "openbookqa": (2, 3, 4),
    "banking77": (2, 1),
    "clinc150": (2, 2, 2),
    "ag_news": (4,),
    "sst2": (3, 1),
    "stsb": (2,),
}


def small_sets() -> dict[str, DataSet]:
    """Their rows, a branch instead of a commit, no checksums."""
    found = {}
    for name, rows in ROWS.items():
        known = DATA_SETS[name]
        files = [replace(file, rows=count, sha256=None) for file, count in zip(known.sources, rows, strict=True)]
        found[name] = replace(known, revision="main", sources=tuple(files), written={})
    return found
