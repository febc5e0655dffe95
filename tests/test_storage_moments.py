"""What is done but of which the answer is lost is asked for again, and happens once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
from object_storage import Server

from tda.errors import StoreError, UnreachableError
from tda.store import remote
from tda.store.files import Remote, as_place, create_file, extend_file, read_file

DELETIONS: dict[str, Callable[[Remote], None]] = {
    "object": remote.remove,
    "tree": lambda place: remote.remove_tree(place.parent),
}


@pytest.fixture(scope="module", autouse=True)
def _storage() -> Iterator[None]:
    pytest.importorskip("moto")
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield
    server.kill()


@pytest.fixture
def losing(monkeypatch) -> Callable[..., list[int]]:
    """Requests are done, but so many times nobody hears of it; how often they were made."""
    import obstore

    def lose(times: int, what: str = "delete") -> list[int]:
        request, asked = getattr(obstore, what), [0]

        def lost(*given: Any, **options: Any) -> Any:
            asked[0] += 1
            answer = request(*given, **options)
            if asked[0] <= times:
                raise obstore.exceptions.GenericError("error sending request")
            return answer

        monkeypatch.setattr(obstore, what, lost)
        quick = {"max_retries": 3, "retry_timeout": timedelta(seconds=10)}
        monkeypatch.setattr(remote, "_RETRY", quick)
        return asked

    return lose


@pytest.mark.parametrize("what", DELETIONS)
def test_a_lost_answer_costs_a_moment(losing, what) -> None:
    place = as_place(f"s3://bucket/{what}/object")
    assert isinstance(place, Remote)
    remote.put(place, b"old")
    asked = losing(2)
    DELETIONS[what](place)
    assert asked == [3]
    assert remote.get(place) is None


def test_what_is_created_is_created(losing) -> None:
    place = as_place("s3://bucket/created/object")
    asked = losing(1, "put")
    create_file(place, b"new")
    assert asked == [2]
    assert read_file(place) == b"new"
    with pytest.raises(StoreError, match="another process"):
        create_file(place, b"other")


def test_a_line_is_added_once(losing) -> None:
    place = as_place("s3://bucket/lines/object")
    for times, line in ((1, b"one\n"), (0, b"two\n"), (2, b"three\n")):
        losing(times, "put")
        extend_file(place, lambda before, line=line: line)  # type: ignore[misc]
    assert read_file(place) == b"one\ntwo\nthree\n"


def test_a_storage_that_stays_silent_is_an_error(losing) -> None:
    place = as_place("s3://bucket/silent/object")
    assert isinstance(place, Remote)
    remote.put(place, b"old")
    asked = losing(100)
    with pytest.raises(UnreachableError, match="cannot be reached"):
        remote.remove(place)
    assert asked == [4]
