"""However the same examples are given, they are the same examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import tda
from tda import examples
from tda.data import as_dataset, batches
from tda.errors import DataError
from tda.examples import describe

NUM = 11
_images = torch.randn(NUM, 2, 3)
_images[4] = _images[1]  # the same content twice
_labels = torch.arange(NUM) % 3
_labels[4] = _labels[1]

ARRAYS: dict[str, Any] = {
    "one array": _images,
    "tuple": (_images, _labels),
    "numpy": (_images.numpy(), _labels.numpy().astype("uint8")),
    "strided": (_images.transpose(1, 2)[:, ::2], _labels.bool()),
    "column of targets": (_images, _labels[:, None].double()),
    "several targets": (_images, torch.randn(NUM, 3)),
    "tokens": {"input_ids": _labels[:, None].expand(NUM, 5), "attention_mask": _labels > 0},
    "a float64 an example": {"input": _images.numpy(), "target": np.arange(NUM) / 7},
    "a label only shown": {"input": _images, "target": _labels, "label": NUM - _labels.numpy()},
    "bfloat16": {"input": _images.bfloat16(), "label": _labels},
    "riding along": {
        "input": _images,
        "target": _labels,
        "id": [f"n{i}" for i in range(NUM)],
        "source": np.array(["a", "b"] * 6)[:NUM],
        "text": [None, *["words"] * (NUM - 1)],
        "image": np.zeros((NUM, 4, 4), np.uint8),
    },
}


class OneByOne:
    """The same examples, of which only one is seen at a time."""

    def __init__(self, data: Any) -> None:
        self.data = as_dataset(data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return self.data[index]


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_hash_as_their_examples_do(monkeypatch, name):
    """Digests, ids and columns, whatever is laid out at a time."""
    monkeypatch.setattr(examples, "_HASHED_BYTES", 100)
    ticks: list[int] = []
    together = describe(as_dataset(ARRAYS[name]), ticks.append)
    alone = describe(OneByOne(ARRAYS[name]))
    np.testing.assert_array_equal(together.digests, alone.digests)
    np.testing.assert_array_equal(together.inputs, alone.inputs)
    np.testing.assert_array_equal(together.ids, alone.ids)
    assert together.columns.keys() == alone.columns.keys()
    for column, values in alone.columns.items():
        np.testing.assert_array_equal(together.columns[column], values, strict=True)
    assert sum(ticks) == NUM


@pytest.mark.parametrize("name", ARRAYS)
def test_a_slice_of_arrays_is_the_batch_of_their_examples(name):
    together = list(batches(as_dataset(ARRAYS[name]), 2, NUM, 4))
    alone = list(batches(OneByOne(ARRAYS[name]), 2, NUM, 4))
    torch.testing.assert_close(together, alone, rtol=0, atol=0)
    assert [type(batch) for _, batch in together] == [type(batch) for _, batch in alone]


def test_a_tensor_data_set_is_its_tensors():
    given, tensors = TensorDataset(_images, _labels), (_images, _labels)
    assert describe(as_dataset(given)).digest() == describe(as_dataset(tensors)).digest()


def test_a_model_that_changes_its_input_does_not_change_the_data(tmp_path):
    """Or the second checkpoint would see other examples than the first."""
    model = torch.nn.Sequential(
        torch.nn.ReLU(inplace=True), torch.nn.Flatten(), torch.nn.Linear(6, 3)
    )
    before = _images.clone()
    tda.index(tda.Task(model), (_images, _labels), tmp_path / "run", progress=False)
    assert torch.equal(_images, before)


def test_a_tabular_examples_numbers_ride_along_and_are_no_input(tmp_path):
    """Shown in the report and the explorer; what the model sees, and so the ids, stay the same."""
    numbers = torch.randn(NUM, 3).double()
    given = {"input": _images, "target": _labels}
    with_rows = describe(as_dataset({**given, "row": numbers.numpy()}))
    np.testing.assert_array_equal(with_rows.columns["row"], numbers.float().numpy())
    assert with_rows.columns["row"].dtype == np.float32
    assert with_rows.ids.tolist() == describe(as_dataset(given)).ids.tolist()
    run = tda.index(
        tda.Task(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 2))),
        [{"input": x, "target": y % 2, "row": [*row, 7]}
         for x, y, row in zip(_images, _labels, numbers.tolist(), strict=True)],
        tmp_path / "run",
        progress=False,
    )  # fmt: skip
    stored = tda.open(tmp_path / "run").store.table("train").column("row")
    wanted = np.column_stack([numbers.float().numpy(), np.full(NUM, 7)])
    np.testing.assert_array_equal(stored, wanted)
    assert run.store.table("train").columns().count("row") == 1


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(DataError, match="rows that ride along"):
        describe([{"input": torch.zeros(2), "row": [1.0] * (1 + i)} for i in range(2)])


class Table:
    """As pandas has it: `[]` is a column."""

    iloc: Any = None

    def __len__(self) -> int:
        return NUM


@pytest.mark.parametrize(
    "given",
    [Table(), (Table(), _labels), {"input": Table(), "target": _labels}],
    ids=["alone", "of a tuple", "of a dict"],
)
def test_a_table_is_refused_with_how_to_give_it(given: Any):
    with pytest.raises(DataError, match=r"indexed by column[^§]*Table[^§]*to_numpy"):
        as_dataset(given)


class Column:
    """As pandas has it: `[i]` is the row labelled i, and rows keep their labels when shuffled."""

    ndim, iloc = 1, None

    def __init__(self, values: np.ndarray, rows: np.ndarray) -> None:
        self.values, self.rows = values, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, label: int) -> Any:
        return self.values[label]

    def to_numpy(self) -> np.ndarray:
        return self.values[self.rows]


@pytest.mark.parametrize("of", ["dict", "tuple"])
def test_a_column_of_a_table_is_read_by_position(of):
    """A shuffled one gave every input the target of another."""
    rows, numbers = np.arange(NUM)[::-1], _labels.numpy()
    column, texts = Column(numbers, rows), Column(np.array([f"n{i}" for i in rows], object), rows)
    plain: Any = {"input": _images, "target": numbers[rows].copy(), "text": texts.to_numpy()}
    given: Any = {"input": _images, "target": column, "text": texts}
    if of == "tuple":
        plain, given = (plain["input"], plain["target"]), (given["input"], given["target"])
    found, wanted = describe(as_dataset(given)), describe(as_dataset(plain))
    assert found.digest() == wanted.digest()
    assert found.columns["label"].tolist() == numbers[rows].tolist()
    assert found.columns.keys() == wanted.columns.keys()
    for name, values in wanted.columns.items():
        np.testing.assert_array_equal(found.columns[name], values, strict=True)


class Flipped(OneByOne):
    """With a random augmentation."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return (image.flip(0) if torch.rand(()) < 0.5 else image), label


def test_random_augmentation_is_noticed_before_anything_is_computed(tmp_path):
    task = tda.Task(torch.nn.Linear(6, 2))
    data = Flipped((torch.randn(40, 6), torch.arange(40) % 2))
    with pytest.raises(DataError, match=r"each time it is read[^§]*example \d[^§]*augmentation"):
        tda.index(task, data, tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "manifest.json").exists()


@pytest.mark.parametrize("label", [torch.tensor(1), np.int64(1), np.array(1), 1], ids=repr)
def test_one_example_is_asked_for_as_a_slice(label):
    for data in ((torch.zeros(6), label), {"input": torch.zeros(6), "target": label}):
        with pytest.raises(DataError, match=r"no axis of examples[^§]*x\[i : i \+ 1\]"):
            as_dataset(data)


@pytest.mark.parametrize("given", [TensorDataset, "train.csv"], ids=["class", "path"])
def test_what_is_indexed_but_holds_no_examples_is_no_data_set(given):
    with pytest.raises(DataError, match="not a map-style data set"):
        as_dataset(given)


def test_arrays_that_cannot_be_written_are_read_without_a_word(tmp_path):
    """As those of a mapped file; a warning of torch's would be an error here."""
    np.save(tmp_path / "x.npy", np.arange(12, dtype=np.float32).reshape(4, 3))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    listed = as_dataset([(mapped[i], i % 2) for i in range(4)])
    plain = as_dataset([(np.array(mapped[i]), i % 2) for i in range(4)])
    assert np.array_equal(describe(listed).digests, describe(plain).digests)
    assert np.array_equal(
        describe(as_dataset((mapped, np.arange(4) % 2))).digests,
        describe(as_dataset((np.array(mapped), np.arange(4) % 2))).digests,
    )


class Picture:
    """As Pillow has it: its text holds its address."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.numbers.__array_interface__


class Graph:
    def __init__(self, **parts: Any) -> None:
        self.__dict__.update(parts)


_long = np.arange(5000)
CONTENTS: dict[str, Any] = {
    "picture": lambda v: Picture(np.full((2, 2, 3), v, np.uint8)),
    "object": lambda v: Graph(nodes=torch.full((3,), v), of={"edges": [Graph(name=f"{v}")]}),
    "picture in a dict": lambda v: {"seen": Picture(np.full((2, 2), v))},
    "long array in a dict": lambda v: {"seen": np.where(_long == 2500, v, _long)},
    "array of text in a dict": lambda v: {"seen": np.array([f"{v}", None], object)},
    "text of an address": lambda v: f"a segmentation fault at 0x{v:x}",
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_digest_is_that_of_the_content_at_every_reading(name):
    """Or a run would not be resumed: its first example would be another one."""
    made = CONTENTS[name]
    first, again, other = (describe([(made(v), 1)]).digest() for v in (7, 7, 8))
    assert first == again != other


def _circle() -> Graph:
    graph = Graph()
    graph.next = graph  # type: ignore[attr-defined]
    return graph


@pytest.mark.parametrize("content", [object(), Graph(), lambda: 0, _circle()], ids=range(4))
def test_content_that_cannot_be_told_is_refused_with_how_to_give_it(content):
    given = [{"input": torch.zeros(2), "id": "a"}, {"input": content, "id": "b"}]
    with pytest.raises(DataError, match=r"example 1 cannot be told[^§]*as a tensor"):
        describe(given)


@pytest.mark.parametrize("of", [as_dataset, OneByOne], ids=["arrays", "one by one"])
def test_numbers_of_a_tensor_are_the_ids_and_columns_that_numbers_are(of):
    numbers = torch.arange(NUM) * 3
    given = {"id": numbers, "source": numbers % 2, "group": numbers % 4 > 1, "text": numbers / 2}
    found = describe(of({"input": _images, **given}))
    wanted = describe(of({"input": _images, **{name: v.tolist() for name, v in given.items()}}))
    assert found.ids.tolist() == wanted.ids.tolist() == [str(3 * i) for i in range(NUM)]
    for name in ("source", "group", "text"):
        np.testing.assert_array_equal(found.columns[name], wanted.columns[name], strict=True)


_names = np.array(["cat", "dog"] * NUM)[:NUM]
NO_NUMBERS: dict[str, tuple[Any, str]] = {
    "names of classes": ((_images, _names), r"no numbers[^§]*'cat'"),
    "a list of names": ({"input": _images, "target": _names.tolist()}, "targets are text"),
    "a name an example": ([(x, "cat") for x in _images], "targets are text"),
    "lists of text": (
        {"input": _images, "target": _labels, "words": [["a", "b"]] * NUM},
        r"no numbers[^§]*\['a', 'b'\]",
    ),
    "lists of many lengths": ([(x, [[1], [1, 2]]) for x in _images], "no numbers"),
    "objects": ([(x, np.array([1, None])) for x in _images], "no numbers"),
    "a name that is shown": (
        [{"input": x, "target": 1, "label": "cat"} for x in _images],
        r"a label is no number[^§]*example 0[^§]*'cat'",
    ),
    "two labels": (
        [{"input": x, "target": 1, "label": torch.zeros(2)} for x in _images],
        r"a label is no number[^§]*example 0",
    ),
}


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_are_no_numbers_are_refused_with_how_to_number_them(tmp_path, name):
    given, message = NO_NUMBERS[name]
    task = tda.Task(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 3)))
    with pytest.raises(DataError, match=message + r"[^§]*np\.unique\(names"):
        tda.index(task, given, tmp_path / "run", progress=False)


LOGIT = torch.nn.Linear(6, 1)
SCALED = torch.linspace(-1, 1, 40 * 6).reshape(40, 6)


@pytest.mark.parametrize("measurement", ["binary_cross_entropy", "multi_label"])
@pytest.mark.parametrize("wrong", [-1.0, 1.5, np.nan])
def test_a_target_that_is_no_probability_is_refused_by_example(tmp_path, measurement, wrong):
    """Of labels ±1 the cross-entropy is a number, and means nothing."""
    task = tda.Task(LOGIT, measurement=measurement)
    labels = torch.arange(40.0).remainder(2).reshape(40, 1)
    labels[17] = wrong
    message = rf"no probability[^§]*example 17[^§]*{wrong}[^§]*±1"
    with pytest.raises(DataError, match=message):
        tda.index(task, (SCALED, labels), tmp_path / "run", batch_size=4, progress=False)
    with pytest.raises(DataError, match=message):
        tda.attribute(task, (SCALED, labels), (SCALED[:2], labels[:2]), "grad_dot", progress=False)


@pytest.mark.parametrize("wrong", [3, -1, -100])
def test_a_target_that_is_no_class_is_refused_by_example(tmp_path, wrong):
    model = torch.nn.Linear(6, 3)
    labels = torch.arange(40) % 3
    given = SCALED, torch.where(torch.arange(40) == 17, wrong, labels)
    message = rf"no class[^§]*example 17[^§]*{wrong}\n[^§]*0 … 2[^§]*3 outputs"
    with pytest.raises(DataError, match=message):
        tda.index(tda.Task(model), given, tmp_path / "run", batch_size=4, progress=False)
    with pytest.raises(DataError, match=message):
        tda.attribute(tda.Task(model), given, (SCALED[:2], labels[:2]), "grad_dot", progress=False)


def test_soft_labels_have_the_loss_and_gradients_of_their_cross_entropy(tmp_path):
    labels = torch.linspace(0, 1, 40)[:, None]
    queries = SCALED[:3], labels[:3]
    found = {}
    for measurement in ("binary_cross_entropy", "multi_label"):
        task = tda.Task(LOGIT, measurement=measurement)
        options = {"projection": "identity", "dtype": "float32", "progress": False}
        run = tda.index(task, (SCALED, labels), tmp_path / measurement, **options)
        loss = run.store.table("train").column("loss")[0]
        logits = LOGIT(SCALED).detach()
        wanted = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, labels, reduction="none"
        )
        np.testing.assert_allclose(loss, wanted[:, 0], rtol=1e-5)
        found[measurement] = run.scores(queries, "grad_dot").compute()
    one, other = found.values()
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


TEXTS = torch.tensor([[1, 2, 3, 3, 4], [2, 2, 0, 1, 3], [4, 3, 2, 1, 0]])
AFTER = torch.cat([TEXTS[:, 1:], torch.full((3, 1), -100)], 1)
HALF = torch.where(torch.arange(5) < 2, -100, AFTER)
MOVED = {
    "tuples": (TEXTS, AFTER),
    "dict": {"input": TEXTS, "target": AFTER},
    "Hugging Face": {"input_ids": TEXTS, "labels": AFTER},
    "prompts left out": (TEXTS, HALF),
}


class Bigrams(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(5, 5)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table(input_ids)


@pytest.mark.parametrize("name", MOVED)
def test_targets_that_are_the_next_tokens_already_are_refused(tmp_path, name):
    task = tda.Task(Bigrams(), measurement="causal_lm")
    with pytest.raises(DataError, match=r"next token already[^§]*example 0[^§]*\(tokens, tokens\)"):
        tda.index(task, MOVED[name], tmp_path / "run", progress=False)


def test_a_target_that_is_no_token_is_refused_by_example(tmp_path):
    labels = torch.where(torch.arange(5) == 4, 5, TEXTS)
    labels[:2] = torch.where(torch.arange(5) < 2, -100, TEXTS[:2])  # left out, and no class
    task = tda.Task(Bigrams(), measurement="causal_lm")
    with pytest.raises(DataError, match=r"no class[^§]*example 2[^§]*5\n[^§]*0 … 4"):
        tda.index(task, (TEXTS, labels), tmp_path / "run", progress=False)


def test_tokens_as_their_own_targets_are_taken_also_where_they_repeat(tmp_path):
    same = torch.ones(3, 5, dtype=torch.int64)
    masked = torch.where(torch.arange(5) < 2, -100, TEXTS)
    alike = torch.where(torch.arange(5) < 4, -100, TEXTS)  # only the last counts
    task = tda.Task(Bigrams(), measurement="causal_lm")
    for number, data in enumerate([(same, same), (TEXTS, masked), (TEXTS, alike)]):
        tda.index(task, data, tmp_path / str(number), progress=False)
