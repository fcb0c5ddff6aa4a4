"""What the topics that are judged and shown say, read as records that anybody may have written: checked, or refused with the reason.

Of a window's record only the fields that are known here are kept.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, with_config
from pydantic_core import from_json
from typing_extensions import TypedDict

from ray_pipeline.delivery.interface import Epoch
from ray_pipeline.generator.plan import RatePlan
from ray_pipeline.windows.spec import epoch_ms, iso_ms

__all__ = [
    "KINDS",
    "UnreadableRecord",
    "WindowId",
    "parse",
    "read_expected",
    "read_generator",
    "read_job",
    "read_oracle",
    "read_score",
    "read_window",
    "window_of",
]

KINDS = ("total", "topn", "genres")
"""The records that a window has in topic ``metrics``."""

WindowId = tuple[str, int]
"""Window type, and start in epoch milliseconds."""

_NOT_JSON = "cannot be read: it is not JSON"
_MOST = 2**53
_LAST_MS = epoch_ms("9999-12-31T23:59:59.999Z")


class UnreadableRecord(ValueError):
    """A record is not what its topic holds; the text says why."""


def _written_time(text: str) -> str:
    try:
        same = iso_ms(epoch_ms(text)) == text
    except (ValueError, OverflowError):
        same = False
    if not same:
        msg = "should be a time such as 2026-01-31T12:00:00.000Z"
        raise ValueError(msg)
    return text


_Time = Annotated[str, AfterValidator(_written_time)]
_Ms = Annotated[int, Field(ge=0, le=_LAST_MS)]
_Count = Annotated[int, Field(ge=0, le=_MOST)]
_Whole = Annotated[int, Field(ge=-_MOST, le=_MOST)]
_Number = Annotated[float, Field(allow_inf_nan=False)]
_Histogram = Annotated[list[_Count], Field(min_length=10, max_length=10)]


def _lived(epochs: list[Any]) -> list[Any]:
    try:
        RatePlan([Epoch.from_record(epoch) for epoch in epochs] or [Epoch(0, 0.0)])
    except (KeyError, TypeError, OverflowError) as error:
        msg = "should be a rate plan as it was lived"
        raise ValueError(msg) from error
    return epochs


_OPEN = ConfigDict(extra="allow")
"""Of what a stage says of itself, the fields that nothing here depends on may be anything."""


def _ends_later(record: dict[str, Any]) -> dict[str, Any]:
    if epoch_ms(record["window_end"]) <= epoch_ms(record["window_start"]):
        msg = "window_end should be after window_start"
        raise ValueError(msg)
    return record


class _Head(TypedDict):
    window_start: _Time
    window_end: _Time
    window_type: str
    count: _Count
    avg_rating: _Number | None


class _Actual(_Head):
    kind: str
    batch: _Whole
    updated_ms: _Ms


class _Totals(TypedDict):
    p50: _Number | None
    p95: _Number | None
    histogram: _Histogram


class _Row(TypedDict):
    count: _Count
    avg_rating: _Number


class _Movie(_Row):
    movieId: _Count


class _Genre(_Row):
    genre: str


class _Total(_Actual, _Totals):
    pass


class _TopN(_Actual):
    movies: list[_Movie]


class _Genres(_Actual):
    genres: list[_Genre]


class _Expected(_Head, _Totals):
    movies: list[_Movie]
    genres: list[_Genre]
    partitions: dict[str, _Count]
    outside: NotRequired[_Count]
    late: _Count
    unread: _Count
    unread_partitions: dict[str, _Count]
    batch: _Whole
    final: bool
    final_ms: _Ms | None
    updated_ms: _Ms


@with_config(_OPEN)
class _Status(TypedDict):
    state: str
    updated_ms: _Ms
    reason: NotRequired[str]


@with_config(_OPEN)
class _Oracle(_Status):
    batch: _Whole


@with_config(_OPEN)
class _Read(TypedDict):
    records: _Count
    next_offset: _Whole
    max_event_ms: _Whole


@with_config(_OPEN)
class _Job(_Status):
    batch: _Whole
    watermark_ms: NotRequired[_Whole | None]
    partitions: NotRequired[dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], _Read]]
    executors: NotRequired[_Whole]
    executors_wanted: NotRequired[_Whole]
    lag: NotRequired[_Whole]
    trigger_interval_ms: NotRequired[_Count]
    counted: NotRequired[_Whole]
    late_dropped: NotRequired[_Whole]
    rejected: NotRequired[_Whole]
    batch_duration_ms: NotRequired[_Number]


@with_config(_OPEN)
class _Actor(TypedDict):
    actor: int
    alive: bool
    partitions: list[int]
    restarts: int


@with_config(_OPEN)
class _Generator(_Status):
    epochs: NotRequired[Annotated[list[Any], AfterValidator(_lived)]]
    target_rate: NotRequired[_Number]
    plan_rate: NotRequired[_Number | None]
    plan: NotRequired[str | None]
    behind_s: NotRequired[_Number]
    base: NotRequired[_Whole | None]
    restarts: NotRequired[_Whole]
    clock_offset_ms: NotRequired[_Whole]
    event_reached_ms: NotRequired[_Ms | None]
    actors: NotRequired[list[_Actor]]


class _Error(TypedDict):
    rmse: _Number | None
    mae: _Number | None


@with_config(_OPEN)
class _Errors(TypedDict):
    observed: _Error
    truth: _Error


@with_config(_OPEN)
class _Score(_Errors):
    model: str
    matched: _Count
    unmatched: _Count
    scored: _Count
    repeated: _Count
    coverage: _Number
    floor: _Errors
    bias_only: _Errors
    global_mean: _Errors


@with_config(_OPEN)
class _ScoreTotals(TypedDict):
    records: _Count
    rejected: dict[str, _Count]
    state: NotRequired[str]
    reason: NotRequired[str]


_WINDOW: dict[str, TypeAdapter[Any]] = {
    "total": TypeAdapter(Annotated[_Total, AfterValidator(_ends_later)]),
    "topn": TypeAdapter(Annotated[_TopN, AfterValidator(_ends_later)]),
    "genres": TypeAdapter(Annotated[_Genres, AfterValidator(_ends_later)]),
}
_EXPECTED: TypeAdapter[Any] = TypeAdapter(Annotated[_Expected, AfterValidator(_ends_later)])
_ORACLE: TypeAdapter[Any] = TypeAdapter(_Oracle)
_JOB: TypeAdapter[Any] = TypeAdapter(_Job)
_GENERATOR: TypeAdapter[Any] = TypeAdapter(_Generator)
_SCORE: TypeAdapter[Any] = TypeAdapter(_Score)
_SCORE_TOTALS: TypeAdapter[Any] = TypeAdapter(_ScoreTotals)


def window_of(key: str) -> tuple[WindowId, str]:
    """Which window a key of topic ``metrics`` or ``metrics.expected`` names, and the kind of record; in topic ``metrics.expected`` "".

    A key that names none stands for itself: its text, start 0, kind ``""``.
    """
    window_type, _, rest = key.partition("|")
    start, bar, kind = rest.partition("|")
    try:
        _written_time(start)
    except ValueError:
        return (key, 0), ""
    if not window_type or (bar and kind not in KINDS):
        return (key, 0), ""
    return (window_type, epoch_ms(start)), kind


def read_window(key: str, value: bytes) -> dict[str, Any]:
    """A record of topic ``metrics``: the window that its key names.

    Raises:
        UnreadableRecord: it is none.
    """
    (window_type, start_ms), kind = window_of(key)
    if not kind:
        raise UnreadableRecord("stands under a key that names no window")
    record = _checked(_WINDOW[kind], value)
    if (record["window_type"], record["window_start"], record["kind"]) != (window_type, iso_ms(start_ms), kind):
        raise UnreadableRecord(
            f"is of {record['kind'][:50]} of {record['window_type'][:50]} from {record['window_start']}, which its key does not say"
        )
    return record


def read_expected(key: str, value: bytes) -> dict[str, Any]:
    """A window's record of topic ``metrics.expected``.

    Raises:
        UnreadableRecord: it is none.
    """
    (window_type, start_ms), _ = window_of(key)
    record = _checked(_EXPECTED, value)
    if f"{record['window_type']}|{record['window_start']}" != key or (window_type, start_ms) == (key, 0):
        raise UnreadableRecord("is of another window than its key says")
    if record["final"] and record["final_ms"] is None:
        raise UnreadableRecord("cannot be read: final_ms is missing")
    return record


def read_oracle(value: bytes) -> dict[str, Any]:
    """The record ``oracle`` of topic ``metrics.expected``.

    Raises:
        UnreadableRecord: it is none.
    """
    return _checked(_ORACLE, value)


def read_job(value: bytes) -> dict[str, Any]:
    """The record ``job`` of topic ``metrics.progress``.

    Raises:
        UnreadableRecord: it is none.
    """
    return _checked(_JOB, value)


def read_generator(value: bytes) -> dict[str, Any]:
    """The record ``generator`` of topic ``ratings.progress``.

    Raises:
        UnreadableRecord: it is none.
    """
    return _checked(_GENERATOR, value)


def read_score(key: str, value: bytes) -> dict[str, Any]:
    """A record of topic ``predictions.scores``: a model's, or with an empty key the totals.

    Raises:
        UnreadableRecord: it is none.
    """
    return _checked(_SCORE if key else _SCORE_TOTALS, value)


def parse(value: bytes) -> Any:
    """What a record says in JSON, if it can be said again: numbers are finite, texts are Unicode, brackets end.

    Raises:
        UnreadableRecord: it is no such JSON.
    """
    try:
        found = from_json(value, allow_inf_nan=False)
        json.dumps(found, allow_nan=False)  # 1e999 is read as infinite
    except ValueError:
        raise UnreadableRecord(_NOT_JSON) from None
    return found


def _checked(kind: TypeAdapter[Any], value: bytes) -> dict[str, Any]:
    try:
        found: dict[str, Any] = kind.validate_python(parse(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:100]
        raise UnreadableRecord(f"cannot be read: {where}{': ' if where else ''}{first['msg']}") from None
    return found
