"""One run on disk: raw projected rows and what is known of each example, as Zarr v3.

    files → encoding, arrays → marks, manifest → table → planning, verify → store

``stores/README.md`` is the format. What holds at any moment, whatever was interrupted:
a chunk with a mark is whole, on the disk, and belongs to the model, data and settings of the run.
"""

from tda.store.deleted import Remaining
from tda.store.store import Store
from tda.store.table import Table
from tda.store.verify import Fault

__all__ = ["Fault", "Remaining", "Store", "Table"]
