"""pyDVL: KNN-Shapley of a data file, in pyDVL's environment; nothing of tda is imported.

python pydvl_knn.py DATA.npz OUT.npz        DATA: x, y, z, wanted (train and queries), k
"""

from __future__ import annotations

import sys
import time
import warnings

import numpy as np

warnings.filterwarnings("ignore")

from pydvl.valuation import Dataset, KNNShapleyValuation  # noqa: E402
from sklearn.neighbors import KNeighborsClassifier  # noqa: E402

data = np.load(sys.argv[1])
train, queries = Dataset(data["x"], data["y"]), Dataset(data["z"], data["wanted"])
model = KNeighborsClassifier(int(data["k"]), algorithm="brute")
begun, busy = time.perf_counter(), time.process_time()
valuation = KNNShapleyValuation(model, queries, progress=False)
values = valuation.fit(train).result.sort(key="index").values
np.savez(
    sys.argv[2],
    values=values,
    seconds=time.perf_counter() - begun,
    processor_seconds=time.process_time() - busy,
)
