"""Plotly's JavaScript for one page, compressed: read from the installed package, whose Python part is not imported."""
from __future__ import annotations

import base64
import gzip
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from dpo_dist.config.errors import UserError

LEVEL = 1                                # of gzip: the highest makes a page 14 % smaller in three times the time


@cache
def plotly_base64() -> str:
    """gzip as base64, which a browser unpacks by itself: 2.3 MB where the plain text has 4.8. UserError where Plotly is
    not installed."""
    spec = find_spec("plotly")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("plotly is not installed, and the report's plots are drawn with it; run: pip install plotly")
    script = Path(next(iter(spec.submodule_search_locations)), "package_data", "plotly.min.js")
    # no time in it: the same files give the same page
    return base64.b64encode(gzip.compress(script.read_bytes(), LEVEL, mtime=0)).decode("ascii")
