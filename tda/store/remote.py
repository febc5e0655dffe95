"""A prefix of an object store – s3://, gs://, az:// – spoken to by obstore.

An object is written by one request, whole or not at all, and nothing that has been written is lost:
what a folder needs renames and flushes for. Requests cost time and money, so all are counted here;
failed ones are tried again by obstore (10 times, for up to three minutes) before they are an error.
Credentials come from where the storage's own tools find them (AWS_ACCESS_KEY_ID …, AWS_PROFILE,
instance roles): they are no part of a place, so no manifest, message or pickle can hold them.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

from tda.errors import ConfigError, UnreachableError
from tda.store.local import Parts, Stat

SCHEMES = ("s3", "gs", "az")
_AT_ONCE = 8  # requests in flight; of writes, their bodies in memory
_PAGE = 1000  # objects one LIST answers with
_GAP = 128 * 2**10  # bytes; nearer ranges are read as one
_RETRY: Any = {"max_retries": 10, "retry_timeout": timedelta(seconds=180)}
_PAUSE = 1.0  # seconds
_AWAY = "the storage cannot be reached"
_SIGNED = re.compile(r"((?:Signature|Credential|X-Amz-[A-Za-z-]+|sig)=)[^&\s]+|(?:AKIA|ASIA)\w{16}")
_OF_THE_CLIENT = ("allow_http", "timeout", "connect_timeout", "proxy_url")
_SECRET = re.compile(r"key|secret|token|password|credential", re.IGNORECASE)

T = TypeVar("T")

traffic: Counter[str] = Counter()
"""Requests of this process by kind (PUT, GET …), and bytes ``up`` and ``down``."""


def traffic_said(since: Mapping[str, int]) -> str:
    """What has been asked since a copy of :data:`traffic` was made, for a person."""
    kinds = ("PUT", "GET", "HEAD", "LIST", "DELETE")
    counts = [f"{traffic[k] - since.get(k, 0):,} {k}" for k in kinds]
    sizes = [f"{(traffic[k] - since.get(k, 0)) / 1e6:.1f} MB {k}" for k in ("up", "down")]
    return ", ".join(counts + sizes)


@dataclass(frozen=True)
class Remote:
    """``bucket``: s3://name; ``key`` below it, parts joined by /. Nothing is asked to make one.

    ``options``: what obstore is told beside the environment (endpoint, region …), never secrets.
    """

    bucket: str
    key: str
    options: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def parse(url: str, options: Mapping[str, Any] | None = None) -> Remote:
        """Raises ConfigError for a URL or options that cannot be used."""
        parts = urlsplit(url)
        where = f"{parts.scheme}://{parts.hostname or ''}"
        wanted = "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or az://CONTAINER/PREFIX"
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise ConfigError(
                "a place in object storage is a bucket and a prefix, and nothing else",
                where=where,
                wanted=wanted,
                do="give credentials in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE …)",
            )
        keys = [part for part in parts.path.split("/") if part]
        if parts.scheme not in SCHEMES or not parts.netloc or not keys or {".", ".."} & set(keys):
            raise ConfigError("this is no place in object storage", found=url, wanted=wanted)
        secret = next((name for name in options or {} if _SECRET.search(name)), None)
        if secret is not None:
            raise ConfigError(
                "a storage profile holds no secrets",
                where=where,
                found=secret,
                do="take it out, and give it in the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE …)",
            )
        spelled = {name: _spelled(value) for name, value in (options or {}).items()}
        given = tuple(sorted(spelled.items()))
        return Remote(f"{parts.scheme}://{parts.netloc}", "/".join(keys), given)

    def __truediv__(self, key: object) -> Remote:
        return Remote(self.bucket, f"{self.key}/{key}", self.options)

    def __str__(self) -> str:
        return f"{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        return Remote(self.bucket, self.key.rpartition("/")[0], self.options)

    def absolute(self) -> Remote:
        return self

    def resolve(self) -> Remote:
        return self


def _spelled(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def stat(place: Remote) -> Stat | None:
    meta = _ask(place, "HEAD", lambda: _obstore().head(_client(place), place.key))
    return None if meta is None else _stat(meta)


def walk(folder: Remote) -> list[tuple[str, Stat]]:
    """Every object below a prefix."""
    prefix = f"{folder.key}/"

    def pages() -> list[Any]:
        return list(_obstore().list(_client(folder), prefix, chunk_size=_PAGE))

    found = [meta for page in _ask(folder, "LIST", pages) or () for meta in page]
    traffic["LIST"] += max(0, -(-len(found) // _PAGE) - 1)  # the first is counted already
    return [(meta["path"].removeprefix(prefix), _stat(meta)) for meta in found]


def folders(folder: Remote) -> list[str]:
    prefix = f"{folder.key}/"
    found = _ask(folder, "LIST", lambda: _obstore().list_with_delimiter(_client(folder), prefix))
    return [
        path.rstrip("/").rpartition("/")[2] for path in (found or {}).get("common_prefixes", ())
    ]


def _stat(meta: Any) -> Stat:
    changed = int(meta["last_modified"].timestamp() * 1e9)
    return Stat(meta["size"], changed, meta["e_tag"])


def get(place: Remote) -> tuple[memoryview, Stat] | None:
    """The bytes of an object, or None if there is none."""

    def call() -> tuple[memoryview, Stat]:
        answer = _obstore().get(_client(place), place.key)
        meta = _stat(answer.meta)
        return memoryview(answer.bytes()), meta

    found = _ask(place, "GET", call)
    traffic["down"] += 0 if found is None else len(found[0])
    return found


def get_ranges(place: Remote, spans: Sequence[tuple[int, int]]) -> list[memoryview] | None:
    """Bytes ``start:stop`` of an object for each span (ascending); None if there is no object."""
    merged: list[list[int]] = []
    for start, stop in spans:
        if merged and start - merged[-1][1] <= _GAP:
            merged[-1][1] = max(stop, merged[-1][1])
        else:
            merged.append([start, stop])

    def one(span: Sequence[int]) -> memoryview | None:
        return _ask(
            place,
            "GET",
            lambda: memoryview(
                _obstore().get_range(_client(place), place.key, start=span[0], end=span[1])
            ),
        )

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        read = list(pool.map(one, merged))
    pieces: list[memoryview] = []
    which = 0
    for start, stop in spans:
        while start >= merged[which][1]:
            which += 1
        data = read[which]
        if data is None or len(data) < merged[which][1] - merged[which][0]:
            return None
        offset = start - merged[which][0]
        pieces.append(data[offset : offset + stop - start])
    traffic["down"] += sum(len(data) for data in read if data is not None)
    return pieces


def put(place: Remote, data: bytes, mode: Any = "overwrite") -> Stat | None:
    """Make an object hold ``data``; durable on return.

    mode: "create" – unless there is one already –, or the stamp that it must still have; None then
    says that it was not written.
    """
    obstore = _obstore()
    free = mode == "overwrite"
    how = mode if free or mode == "create" else {"e_tag": mode}
    refused = (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError)

    def call() -> Stat | None:
        try:
            done = obstore.put(_client(place), place.key, data, mode=how, use_multipart=False)
        except refused:
            return None
        return Stat(len(data), 0, done["e_tag"])

    done = (_ask if free else _ask_again)(place, "PUT", call)
    if done is None and free:
        raise UnreachableError("there is no such bucket", where=place, do="make it first")
    traffic["up"] += len(data)
    return done


def write(folder: Remote, files: Iterable[tuple[str, Parts | None]]) -> None:
    """Put every object; all of them are there on return. None: it is there already."""

    def one(key: str, parts: Parts) -> None:
        put(folder / key, b"".join(parts))

    running: list[Future[None]] = []
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for key, parts in files:
            if parts is None:
                continue
            if len(running) >= _AT_ONCE:
                running.pop(0).result()
            running.append(pool.submit(one, key, parts))
        for each in running:
            each.result()


def get_many(places: Sequence[Remote]) -> list[tuple[memoryview, Stat] | None]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(get, places))


def remove(place: Remote) -> None:
    _delete(place, place.key)


def remove_tree(folder: Remote) -> None:
    keys = [(folder / key).key for key, _ in walk(folder)]
    for start in range(0, len(keys), _PAGE):
        some = keys[start : start + _PAGE]
        _delete(folder, some)


def _delete(place: Remote, keys: str | list[str]) -> None:
    _ask_again(place, "DELETE", lambda: _obstore().delete(_client(place), keys))


def _ask_again(place: Remote, kind: str, call: Callable[[], T]) -> T | None:
    """As `_ask`, for what obstore sends only once: deletions, and writes on a condition.

    Where the answer was lost, the second finds it done: who writes so looks whether it was itself.
    """
    until = time.monotonic() + _RETRY["retry_timeout"].total_seconds()
    for again in range(_RETRY["max_retries"], -1, -1):
        try:
            return _ask(place, kind, call)
        except UnreachableError as error:
            if not again or error.what != _AWAY or time.monotonic() > until:
                raise
        time.sleep(_PAUSE)
    raise AssertionError("the last one returns or raises")


def _obstore() -> Any:
    try:
        import obstore
        import obstore.exceptions
    except ImportError:
        raise ConfigError(
            "object storage needs a package that is not installed",
            found="no obstore",
            wanted="the extra `s3`",
            do="pip install 'tda-engine[s3]'",
        ) from None
    return obstore


def _client(place: Remote) -> Any:
    return _connected(place.bucket, place.options, os.environ.get("AWS_ENDPOINT_URL"))


@cache
def _connected(bucket: str, options: tuple[tuple[str, str], ...], endpoint: str | None) -> Any:
    """One client for all that are alike. endpoint: that of the environment, which it is read from:
    with another it is another client."""
    _obstore()
    from obstore.store import from_url

    more: dict[str, Any] = {}
    if bucket.startswith("s3:") and os.environ.get("AWS_PROFILE"):
        more["credential_provider"] = _profile(os.environ["AWS_PROFILE"])
    try:
        given = dict(options)
        # An empty one would take the place of what the environment says.
        client: Any = {n: given.pop(n) for n in _OF_THE_CLIENT if n in given} or None
        settings: Any = {**given, **more}
        return from_url(bucket, client_options=client, retry_config=_RETRY, **settings)
    except Exception as error:
        raise ConfigError(
            "object storage cannot be spoken to with these settings",
            where=bucket,
            found=error_said(error),
            do="check the environment (AWS_…) and the options of the storage profile",
        ) from None


def _profile(name: str) -> Any:
    """Credentials of a profile of ~/.aws, which boto3 reads."""
    try:
        from boto3 import Session
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ImportError:
        raise ConfigError(
            "AWS_PROFILE is read by a package that is not installed",
            found="no boto3",
            do="pip install boto3, or give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        ) from None
    return Boto3CredentialProvider(Session(profile_name=name))


def _ask(place: Remote, kind: str, call: Callable[[], T]) -> T | None:
    """One request, counted; None where there is no such object, or range of it.

    Raises UnreachableError.

    Nothing of the original error is chained: its text and traceback may quote signed requests.
    """
    errors = _obstore().exceptions
    traffic[kind] += 1
    try:
        return call()
    except (errors.NotFoundError, FileNotFoundError):
        return None
    except (errors.UnauthenticatedError, errors.PermissionDeniedError, PermissionError) as error:
        what, found = "the storage refuses access", error_said(error)
        do = "check the credentials (AWS_ACCESS_KEY_ID …, AWS_PROFILE) and what they may do"
    except (errors.BaseError, OSError) as error:
        found = error_said(error)
        if "InvalidRange" in found:  # the object is shorter than it was
            return None
        if "NoSuchBucket" in found:
            what, do = "there is no such bucket", "make it first, or check its name"
        else:
            what = _AWAY
            do = (
                "check the network and the endpoint, then run the same command again: what is "
                "finished is kept"
            )
    raise UnreachableError(what, where=place, found=found, do=do)


def error_said(error: BaseException) -> str:
    """An error's own words in a line, without what identifies or authenticates anyone."""
    text = " ".join(str(error).partition("Debug source")[0].split())
    code = re.search(r"<Code>([^<]*)</Code>", text)
    text = text.partition("<?xml")[0].partition("<Error>")[0].strip(" :")
    if code is not None:
        text += f" ({code.group(1)})"
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 6:
            text = text.replace(value, "…")
    return _SIGNED.sub(lambda m: f"{m.group(1) or ''}…", text)[:300]
