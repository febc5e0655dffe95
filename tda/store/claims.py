"""What a manifest may claim: fields, types and ranges. Imported late: pydantic takes a moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tda.store.bounds import MOST
from tda.store.encoding import Dtype

Count = Annotated[int, Field(ge=1, le=MOST)]
Place = Annotated[int, Field(ge=0, le=MOST)]
Real = Annotated[float, Field(allow_inf_nan=False)]


class _Claim(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class Checkpoint(_Claim):
    name: str
    digest: str
    step: int | None = None
    learning_rate: Real | None = None
    learning_rate_sum: Real | None = None
    momentum: Real | None = None
    weight_decay: Real | None = None
    optimizer: str | None = None
    optimizer_digest: str | None = None
    noise: Real | None = None
    noise_of: str | None = None


class Measurement(_Claim):
    name: str = "unknown"
    digest: str | None = None
    has_margin: bool = False


class Projection(_Claim):
    dim: Count
    kind: str = "identity"
    seed: int = 0
    rank_one: list[str] = []
    ring: Count | None = None
    filters: dict[str, Count] = {}
    bases_digest: str | None = None


class Layer(_Claim):
    name: str
    offset: Place
    size: Place


class Data(_Claim):
    num_rows: Count
    digest: str
    deleted: str | None = None
    train: str | None = None


class Manifest(_Claim):
    format: int = 1
    model: dict[str, Any] = {}
    checkpoints: Annotated[list[Checkpoint], Field(min_length=1)]
    measurement: Measurement = Measurement()
    metric: Literal["euclidean", "adam", "second_moment", "adam_update"] = "euclidean"
    projection: Projection
    layers: list[Layer] = []
    bases: list[str] = []
    dtype: Dtype
    chunk_rows: Count
    data: dict[Literal["train", "curvature"], Data] = {}
    versions: dict[str, str] = {}


def manifest_fault(manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with a manifest, as ``field: why``, or None."""
    try:
        found = Manifest.model_validate(dict(manifest))
    except ValidationError as error:
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"[:200]
    if found.bases and len(found.bases) != len(found.checkpoints):
        return f"bases: {len(found.bases)} for {len(found.checkpoints)} checkpoints"
    dim = found.projection.dim
    for i, layer in enumerate(found.layers):
        if layer.offset + layer.size > dim:
            return f"layers.{i}: it ends after the {dim} numbers of a row"
    return None
