"""The audit of a partition: exactly what was tampered with, never more, never fewer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ray_pipeline.codec import encode_keys, encode_values
from ray_pipeline.config import load_settings
from ray_pipeline.delivery.interface import Epoch, ShardProgress
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.truth.audit import KINDS, PartitionAudit, PartitionVerdict
from ray_pipeline.truth.replay import ShardReplay, build_models

START_MS = 1_700_000_000_000
COUNT = 3_000
SETTINGS = load_settings(users=5_000, movies=2_000, partitions=2, actors=1)
CATALOGUE = load_catalogue(SETTINGS)
MODEL = build_models(SETTINGS, CATALOGUE, [1])[1]
EPOCHS = (Epoch(START_MS, 400.0), Epoch(START_MS + 3_000, 0.0), Epoch(START_MS + 4_000, 3_000.0))

Record = tuple[bytes | None, bytes | None]


def replay(count: int = COUNT) -> ShardReplay:
    config = SETTINGS.digest(CATALOGUE.digest)
    return ShardReplay(MODEL, ShardProgress("run", config, 1, count, START_MS, START_MS, EPOCHS, 0.5, 0.75))


def stream(count: int = COUNT, first: int = 0) -> list[Record]:
    events = replay().events(first, count)
    return list(zip(encode_keys(events), encode_values(events), strict=True))


RECORDS = stream(COUNT + 200)


def audited(records: list[Record], expected: int = COUNT, piece: int = 700, first: int = 0) -> PartitionVerdict:
    audit = PartitionAudit(replay(expected), expected, first)
    for start in range(0, len(records), piece):
        part = records[start : start + piece]
        audit.take([k for k, _ in part], [v for _, v in part], lambda n, start=start: 10 * (start + n))
    return audit.finish()


def counts(**found: int) -> dict[str, int]:
    return {**dict.fromkeys(KINDS, 0), **found}


def changed(record: Record, **fields: Any) -> Record:
    assert record[1] is not None
    return record[0], json.dumps({**json.loads(record[1]), **fields}, separators=(",", ":")).encode()


def test_what_is_as_it_must_be_agrees_however_it_is_cut() -> None:
    for piece in (1, 7, 700, 10_000):
        verdict = audited(RECORDS[:COUNT], piece=piece)
        assert verdict.agreed and (verdict.expected, verdict.found) == (COUNT, COUNT) and verdict.findings == []


def test_a_lost_head_and_a_lost_tail_are_missing() -> None:
    verdict = audited(RECORDS[500 : COUNT - 20])
    assert verdict.counts == counts(missing=520)
    assert [(f.index, f.offset) for f in verdict.findings] == [(0, 0), (COUNT - 20, None)]
    assert "ratings 0 to 499" in verdict.findings[0].detail


def test_an_empty_partition_misses_everything() -> None:
    assert audited([]).counts == counts(missing=COUNT)


def test_more_than_was_sent_is_beyond() -> None:
    verdict = audited(RECORDS[: COUNT + 7])
    assert verdict.counts == counts(beyond=7)


def test_what_the_shard_sent_while_it_was_read_is_not_beyond() -> None:
    audit = PartitionAudit(replay(), COUNT)
    audit.take([k for k, _ in RECORDS[: COUNT + 7]], [v for _, v in RECORDS[: COUNT + 7]], lambda n: n)
    assert audit.finish(sent=lambda: COUNT + 50).agreed


def test_a_rating_far_from_its_place_is_one_out_of_order_not_a_thousand() -> None:
    records = RECORDS[:COUNT]
    moved = [*records[:100], records[2000], *records[100:2000], *records[2001:]]
    assert audited(moved).counts == counts(out_of_order=1)
    late = [*records[:100], *records[101:2000], records[100], *records[2000:]]
    assert audited(late).counts == counts(out_of_order=1)


def test_a_swap_of_two_neighbours_is_one_out_of_order_and_a_wide_one_two() -> None:
    near = RECORDS[:COUNT]
    near[50], near[51] = near[51], near[50]
    assert audited(near).counts == counts(out_of_order=1)
    wide = RECORDS[:COUNT]
    wide[50], wide[1500] = wide[1500], wide[50]
    assert audited(wide).counts == counts(out_of_order=2)


def test_what_was_sent_twice_after_a_crash_is_repeated() -> None:
    verdict = audited([*RECORDS[:1000], *RECORDS[800:COUNT]])
    assert verdict.counts == counts(repeated=200)
    assert verdict.findings[0].index == 800 and len(verdict.findings) == 20


def test_an_early_copy_is_repeated_and_its_original_is_not() -> None:
    records = [*RECORDS[:100], RECORDS[900], *RECORDS[100:COUNT]]
    verdict = audited(records)
    assert verdict.counts == counts(repeated=1) and verdict.findings[0].offset == 1000


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda r: changed(r, rating=0.25), "rating is 0.25"),
        (lambda r: changed(r, userId=1), "userId is 1"),
        (lambda r: changed(r, movieId=1_999_999), "movieId is 1999999"),
        (lambda r: changed(r, timestamp=17), "timestamp is 17"),
        (lambda r: (b"77", r[1]), "the key is 77"),
        (lambda r: (None, r[1]), "the key is nothing"),
        (lambda r: (r[0], b"damaged"), "the value is damaged"),
        (lambda r: (r[0], None), "the value is nothing"),
        (lambda r: (r[0], r[1].replace(b",", b", ")), "is written"),
        (lambda r: changed(r, extra=1), "is written"),
    ],
)
def test_an_altered_record_is_named_field_by_field(change: Callable[[Any], Record], detail: str) -> None:
    records = RECORDS[:COUNT]
    records[1234] = change(records[1234])
    verdict = audited(records)
    assert verdict.counts == counts(altered=1), verdict.findings
    finding = verdict.findings[0]
    assert (finding.index, finding.offset) == (1234, 12340) and detail in finding.detail


def test_ratings_of_somebody_else_are_foreign() -> None:
    other = [(b"5", b'{"userId":5,"movieId":7,"rating":3.0,"timestamp":1700000001000}'), (None, b"\xff"), (b"x", None)]
    verdict = audited([*RECORDS[:70], *other, *RECORDS[70:COUNT]])
    assert verdict.counts == counts(foreign=3)
    assert [f.offset for f in verdict.findings] == [700, 710, 720]
    assert audited([*RECORDS[:COUNT], *other]).counts == counts(foreign=3)
    assert audited(other * 7_000).counts == counts(foreign=21_000, missing=COUNT)  # more than is kept at a time


def test_a_stream_of_another_plan_is_altered_throughout() -> None:
    shifted = [changed(r, timestamp=json.loads(r[1] or b"")["timestamp"] + 3_600_000) for r in RECORDS[:COUNT]]
    verdict = audited(shifted)
    assert verdict.counts == counts(altered=COUNT) and "timestamp" in verdict.findings[0].detail


def test_only_a_part_may_be_looked_at() -> None:
    records = RECORDS[:COUNT]
    records[10] = (b"1", b"damaged")
    records[1500] = changed(records[1500], rating=0.25)
    verdict = audited(records, first=1000)
    assert verdict.counts == counts(altered=1) and (verdict.expected, verdict.found) == (2000, 2000)
    for end in (1400, 2000):
        part = PartitionAudit(replay(), end, 1000, bounded=True)
        part.take([k for k, _ in records], [v for _, v in records], lambda n: n)
        found = part.finish()
        assert found.counts == counts(altered=int(end > 1500)) and (found.expected, found.found) == (end - 1000,) * 2


# -- any tampering

FOREIGN = (b"9", b'{"userId":9,"movieId":3,"rating":9.0,"timestamp":5}')


Named = tuple[str, int | None, int]
"""Kind, index and offset of what is wrong."""


def tampered(kinds: list[str], places: list[int]) -> tuple[list[Record], dict[str, int], list[Named]]:
    """Tamper at places that lie apart; returns the records, how many of each kind must be found, and what must be named."""
    out: list[list[tuple[Record, tuple[str, int | None] | None]]] = [[(r, None)] for r in RECORDS[:COUNT]]
    must = counts()
    for kind, place in zip(kinds, places, strict=False):
        at = 100 * place + 50
        if kind == "missing":
            out[at : at + 4] = [[], [], [], [(RECORDS[at + 3], ("missing", at))]]
            must["missing"] += 3
        elif kind == "repeated":
            out[at].append((RECORDS[at - 40], ("repeated", at - 40)))
            must["repeated"] += 1
        elif kind == "altered":
            out[at] = [(changed(RECORDS[at], rating=0.25), ("altered", at))]
            must["altered"] += 1
        elif kind == "swapped":
            out[at : at + 2] = [[(RECORDS[at + 1], ("out_of_order", at + 1))], [(RECORDS[at], None)]]
            must["out_of_order"] += 1
        elif kind == "foreign":
            out[at].append((FOREIGN, ("foreign", None)))
            must["foreign"] += 1
        elif kind == "lost and foreign":
            out[at : at + 2] = [[(FOREIGN, ("foreign", None))], [(RECORDS[at + 1], ("missing", at))]]
            must["foreign"] += 1
            must["missing"] += 1
    rows = [row for rows in out for row in rows]
    named = [(*note, 10 * n) for n, (_, note) in enumerate(rows) if note]
    return [record for record, _ in rows], must, named


@hypothesis_settings(max_examples=60)
@given(
    st.lists(
        st.sampled_from(["missing", "repeated", "altered", "swapped", "foreign", "lost and foreign"]), max_size=25
    ),
    st.permutations(range(29)),
    st.sampled_from([1, 333, 5_000]),
)
def test_exactly_what_was_tampered_with_is_found(kinds: list[str], places: list[int], piece: int) -> None:
    records, must, named = tampered(kinds, places)
    verdict = audited(records, piece=piece)
    assert verdict.counts == must
    for kind in KINDS:  # of each kind the first 20 are listed
        found = [(f.kind, f.index, f.offset) for f in verdict.findings if f.kind == kind]
        assert found == [name for name in named if name[0] == kind][:20]
