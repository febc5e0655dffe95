"""A local web page and HTTP API over a finished run: ask, compare, mark.

    app = create_app(Explorer(run), Access())       serve(Explorer(run), Access(), port)

Needs the extra ``serve``. Every question is answered from stored rows; recipes and dampings switch
without computing a training gradient again.
"""

from __future__ import annotations

from tda.explorer.access import Access
from tda.explorer.app import create_app, serve
from tda.explorer.asking import Explorer

__all__ = ["Access", "Explorer", "create_app", "serve"]
