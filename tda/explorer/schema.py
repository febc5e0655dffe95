"""What the HTTP API takes and gives, as its OpenAPI schema shows it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tda.decisions import Action

MAX_K = 200
MAX_NOTE = 1000
MAX_NAME = 400
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Fault(BaseModel):
    """An error: what happened, where, what was found, what was wanted, what to do."""

    kind: str
    what: str
    where: str | None = None
    found: str | None = None
    wanted: str | None = None
    do: str | None = None


class MarkOut(BaseModel):
    """A decision about a training example; ``revision`` changes with each new one."""

    id: str
    action: Action
    label: str | None = None
    note: str = ""
    at: str
    revision: int
    index: int | None = Field(None, description="Of the training example; null if it is gone.")


class ExampleOut(BaseModel):
    """One example. ``image`` is the address of its picture."""

    index: int
    id: str
    label: str | None = None
    source: str | None = None
    group: str | None = None
    text: str | None = None
    row: list[float | None] | None = None
    image: str | None = None
    loss: float | None = None
    p: float | None = Field(None, description="Probability of the label, at the last checkpoint.")
    mark: MarkOut | None = None


class ScoredOut(BaseModel):
    example: ExampleOut
    score: float
    reliable: bool | None = None


class RecipeOut(BaseModel):
    name: str
    summary: str
    formula: str
    explained: str
    reference: str
    has_damping: bool
    available: bool = Field(description="Whether this run can answer with it.")
    obstacle: Fault | None = None


class RunOut(BaseModel):
    """The card of the run that is served."""

    run: str
    num_train: int
    num_checkpoints: int
    query_sets: dict[str, int] = Field(description="Name to number of queries.")
    default_recipe: str
    default_k: int
    layers: list[str] = Field(description="Empty where the rows do not keep layers apart.")
    choices: dict[str, list[str]] = Field(description="Values to filter training examples by.")
    uploads: list[str] = Field(description="Kinds of query that can be uploaded here.")
    exact: bool = Field(description="Whether searches are exact when nothing else is asked for.")
    manifest: dict[str, Any]


class QueriesOut(BaseModel):
    total: int
    page: int
    size: int
    queries: list[ExampleOut]


class AnswerOut(BaseModel):
    """Proponents (score > 0: training on it helps the query) and opponents (< 0)."""

    query_set: str
    query: ExampleOut | None = Field(description="Null for the mean over the whole set.")
    recipe: str
    explained: str
    damping: list[float] = Field(description="λ as used at each checkpoint; empty without one.")
    num_kept: int = Field(description="Training examples that the filters leave.")
    recall: float | None = Field(None, description="Of an approximate search, as measured.")
    seconds: float
    proponents: list[ScoredOut]
    opponents: list[ScoredOut]


class LayersOut(BaseModel):
    """Score of each training example shown, layer by layer; columns sum to the scores."""

    layers: list[str]
    indices: list[int]
    scores: list[list[float]] = Field(description="[layer, example]")


class SideOut(BaseModel):
    recipe: str
    damping: list[float]
    proponents: list[ScoredOut]
    opponents: list[ScoredOut]


class ComparisonOut(BaseModel):
    left: SideOut
    right: SideOut
    k: int
    overlap_proponents: float
    overlap_opponents: float
    chance: float = Field(description="Overlap that unrelated answers would have.")
    spearman: float | None = Field(description="Of the scores of the whole training set.")
    num_train: int


class GroupOut(BaseModel):
    name: str
    count: int
    total: float = Field(description="Sum of scores.")
    mean: float
    share: float = Field(description="Of the sum of |score| over the training set.")
    share_of_examples: float
    share_helping: float


class GroupsOut(BaseModel):
    column: str
    groups: list[GroupOut]


class RankedOut(BaseModel):
    total: int
    page: int
    size: int
    mean: float = Field(description="Over the whole training set.")
    examples: list[ScoredOut]


class ReachOut(BaseModel):
    """The queries that one training example helps and hurts most."""

    helped: list[ScoredOut]
    hurt: list[ScoredOut]


class MarkIn(BaseModel):
    """A decision about a training example, named by ``id`` or ``index``.

    ``revision``: of the mark it replaces (0: there was none); if another one holds by now, the
    answer is 409 and nothing is changed. Left out, any mark is replaced.
    """

    model_config = ConfigDict(extra="forbid")

    id: str | None = Field(None, max_length=MAX_NAME)
    index: int | None = Field(None, ge=0)
    action: Action
    label: str | None = Field(None, max_length=MAX_NAME, description="The right one, to relabel.")
    note: str = Field("", max_length=MAX_NOTE)
    revision: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _one_example(self) -> MarkIn:
        if (self.id is None) == (self.index is None):
            raise ValueError("name the example by its id or by its index")
        if self.action == "relabel" and not self.label:
            raise ValueError("relabel needs the right label")
        return self


class QueryIn(BaseModel):
    """A new query: one of ``image`` (a picture file in base64), ``text`` or ``row``.

    ``label``: what the model was asked for; left out, the class it thinks most likely.
    """

    model_config = ConfigDict(extra="forbid")

    image: str | None = Field(None, max_length=11 * 2**20)
    text: str | None = Field(None, min_length=1, max_length=100_000)
    row: list[Finite] | None = Field(None, min_length=1, max_length=100_000)
    label: Finite | None = Field(None, ge=-(2**31), le=2**31)

    @model_validator(mode="after")
    def _one_kind(self) -> QueryIn:
        if sum(value is not None for value in (self.image, self.text, self.row)) != 1:
            raise ValueError("give one of image, text and row")
        return self

    @property
    def kind(self) -> Literal["image", "text", "row"]:
        if self.image is not None:
            return "image"
        return "text" if self.text is not None else "row"

    @property
    def value(self) -> Any:
        return getattr(self, self.kind)


class QueryOut(BaseModel):
    query_set: str
    query: ExampleOut
    page: str = Field(description="Where to see its answer.")
