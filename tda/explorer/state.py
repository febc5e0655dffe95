"""What a page's address says: which query, which recipe, which filters."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import urlencode

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tda.explorer.library import Keep, Order
from tda.explorer.schema import MAX_K, MAX_NAME, Finite

Text = Annotated[str, Field(max_length=MAX_NAME)]
DampingValue = Annotated[Finite, Field(ge=0)] | Literal["auto"]


class Asked(BaseModel):
    """The query part of an address. Every page understands all of it, so nothing that was chosen
    is lost on the way from one to another. An empty field, as forms send it, is one left out."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    set: Text | None = None
    query: Annotated[int, Field(ge=0)] | Literal["all"] | None = None
    recipe: Text | None = None
    damping: DampingValue = "auto"
    other: Text | None = None
    other_damping: DampingValue = "auto"
    k: Annotated[int, Field(ge=1, le=MAX_K)] | None = None
    source: Text | None = None
    group: Text | None = None
    label: Text | None = None
    search: Text = ""
    order: Order = "lowest_p"
    page: Annotated[int, Field(ge=1, le=10**9)] = 1
    exact: bool = False

    @model_validator(mode="before")
    @classmethod
    def _without_blanks(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return {name: value for name, value in given.items() if value not in ("", [""])}
        return given

    @property
    def keep(self) -> Keep:
        return Keep(self.source, self.group, self.label)

    def link(self, path: str, **changes: Any) -> str:
        """The address of a page with all that was chosen but for ``changes`` (None: left out)."""
        given = self.model_dump(exclude_defaults=True) | changes
        known = type(self).model_fields
        kept = {k: v for k, v in given.items() if v is not None and v != known[k].default}
        return path + ("?" + urlencode(kept) if kept else "")

    def hidden(self, *without: str) -> dict[str, Any]:
        """Fields a form must carry along, but for those it has itself."""
        given = self.model_dump(exclude_defaults=True)
        return {name: value for name, value in given.items() if name not in without}
