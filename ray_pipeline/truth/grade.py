"""Marks for another system: what it kept, rejected or called late, against the answer key. Pure: no Kafka.

A record of the other system is known by its place (fields ``partition`` and ``offset``), else by its content: the four fields of a
rating, or the text that was rejected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ray_pipeline.codec import parse_object

__all__ = ["ROLES", "Grade", "grade_deduplicated", "grade_flagged", "once_a_place"]

ROLES = ("deduplicated", "rejected", "late", "attacked")
"""What a topic may be said to hold."""

_FIELDS = ("userId", "movieId", "rating", "timestamp")
_EXAMPLES = 5


@dataclass
class Grade:
    """The marks.

    Attributes:
        role: one of :data:`ROLES`.
        kind: the kind of case it was graded on; empty = all that belong to the role.
        expected: records that must be in the topic.
        found: records that are in it, without those that count neither way.
        ignored: records that count neither way.
        true_positives: records that are in it and must be.
        false_positives: records that are in it and must not be, or more often than they must.
        false_negatives: records that must be in it and are not.
        examples: the first ``false_positives`` and ``false_negatives``.
    """

    role: str
    kind: str = ""
    expected: int = 0
    found: int = 0
    ignored: int = 0
    true_positives: int = 0
    false_positives: int = 0
    false_negatives: int = 0
    examples: dict[str, list[Any]] = field(default_factory=lambda: {"false_positives": [], "false_negatives": []})

    @property
    def precision(self) -> float:
        """Share of what is in the topic that must be; 1 when nothing is and nothing must be."""
        return _share(self.true_positives, self.false_positives, self.false_negatives)

    @property
    def recall(self) -> float:
        """Share of what must be in the topic that is."""
        return _share(self.true_positives, self.false_negatives, self.false_positives)

    @property
    def f1(self) -> float:
        """Harmonic mean of both."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        marks = {name: round(getattr(self, name), 6) for name in ("precision", "recall", "f1")}
        return {**asdict(self), **marks}

    def wrong(self, name: str, example: Any, count: int = 1) -> None:
        """Count a ``false_positives`` or ``false_negatives``."""
        setattr(self, name, getattr(self, name) + count)
        if len(self.examples[name]) < _EXAMPLES:
            self.examples[name].append(example)


def grade_flagged(
    role: str,
    cases: Iterable[Mapping[str, Any]],
    values: Iterable[bytes | None],
    kind: str = "",
    lateness_ms: int = 0,
) -> Grade:
    """Grade a topic of rejected, of late, or of an attack's records.

    Args:
        role: ``rejected``, ``late`` or ``attacked``.
        cases: records of the answer key.
        values: values of the topic's records.
        kind: only cases of this kind must be in it; others of the role count neither way.
        lateness_ms: as ``late`` count those at least so late; others that are late at all count neither way.
    """
    grade = Grade(role, kind)
    must: dict[Hashable, Mapping[str, Any]] = {}
    by_content: dict[Hashable, list[Hashable]] = {}
    place: Hashable
    neutral: set[Hashable] = set()
    held: list[Mapping[str, Any]] = []
    for case in cases:
        place, content = (case["partition"], case["offset"]), _content(case)
        standing = _standing(role, case, kind, lateness_ms)
        if standing == "must":
            must[place] = case
            by_content.setdefault(content, []).append(place)
        elif standing == "may":
            neutral |= {place, content}
        elif role == "late" and case["kind"] in ("silent", "clock_skew"):
            held.append(case)
    grade.expected = len(must)
    left = dict(must)
    for value in values:
        place, content = _place_of(value), _content_of(value)
        same = by_content.get(content, []) if place is None else [place]
        hit = next((p for p in same if p in left), None)
        if hit is not None:
            del left[hit]
            grade.true_positives += 1
        elif place in neutral or (place is None and content in neutral) or _is_held(value, held):
            grade.ignored += 1
            continue
        else:
            grade.wrong("false_positives", _shown(value))
        grade.found += 1
    for case in left.values():
        grade.wrong("false_negatives", dict(case))
    return grade


def once_a_place(records: Iterable[tuple[str | None, bytes | None]]) -> Iterator[bytes | None]:
    """Values of a topic whose keys may be places, ``<partition>/<offset>``, as those of topic ``ratings.rejected`` are.

    Who writes under such keys may write again after a failure, and compaction leaves the newest of each in the end. Until then a value
    that is, byte for byte, the last one under its own place is left out. All others are given as often as they are there.

    Args:
        records: key and value of each record.
    """
    seen: dict[str, int] = {}  # hashes in place of values, which would need as much room as the topic
    for key, value in records:
        place = _place_of(value)
        if place is None or key != f"{place[0]}/{place[1]}":
            yield value
        elif seen.get(key) != hash(value):
            seen[key] = hash(value)
            yield value


def grade_deduplicated(
    cases: Iterable[Mapping[str, Any]],
    ratings: Iterable[tuple[int, int, bytes | None]],
    values: Iterable[bytes | None],
) -> Grade:
    """Grade a topic that must hold each valid rating once.

    Args:
        cases: records of the answer key.
        ratings: partition, offset and value of the records of topic ``ratings``.
        values: values of the graded topic's records.
    """
    grade = Grade("deduplicated")
    out = {(c["partition"], c["offset"]) for c in cases if c["kind"] == "duplicate" or c.get("rejected")}
    held = (_content_of(value) for p, offset, value in ratings if (p, offset) not in out)
    must = Counter(content for content in held if isinstance(content, tuple))
    grade.expected = sum(must.values())
    seen: Counter[Hashable] = Counter()
    for value in values:
        content = _content_of(value)
        grade.found += 1
        seen[content] += 1
        if isinstance(content, tuple) and seen[content] <= must[content]:
            grade.true_positives += 1
        else:
            grade.wrong("false_positives", _shown(value))
    for content, count in must.items():
        # two honest ratings may be alike to the millisecond: nobody can tell whether one of them is a repeat
        if not seen[content]:
            grade.wrong("false_negatives", dict(zip(_FIELDS, content, strict=True)), count)
    return grade


# -- inside


def _standing(role: str, case: Mapping[str, Any], kind: str, lateness_ms: int) -> str:
    """Whether a case ``must`` be in a topic of this role, ``may`` be, or neither (empty)."""
    if role == "rejected":
        if not case.get("rejected"):
            return ""
        return "must" if kind in ("", case["kind"]) else "may"
    if role == "attacked":
        if case["kind"] != "attack_rating":
            return ""
        return "may" if case["camouflage"] else "must"
    late = case.get("lateness_ms", 0)
    if case.get("rejected") or late <= 0:
        return ""
    return "must" if case["kind"] == (kind or "late") and late >= lateness_ms else "may"


def _is_held(value: bytes | None, held: list[Mapping[str, Any]]) -> bool:
    """Whether a record may well be late because its partition was silent, or its clock behind."""
    found = parse_object(value)
    time = None if found is None else found.get("timestamp")
    if not isinstance(time, int):
        return False
    for case in held:
        if found is not None and found.get("partition", case["partition"]) != case["partition"]:
            continue
        if case["kind"] == "clock_skew" and case["shift_ms"] < 0:
            return True
        if case["kind"] == "silent" and case["from_ms"] <= time < case["to_ms"]:
            return True
    return False


def _content(case: Mapping[str, Any]) -> Hashable:
    if "value" in case:
        return _content_of(case["value"].encode())
    rating = case.get("rating")
    return None if rating is None else tuple(rating[name] for name in _FIELDS)


def _content_of(value: bytes | None) -> Hashable:
    """The four fields of a rating; else the text; None where there is none."""
    if value is None:
        return None
    found = parse_object(value)
    if found is not None and all(type(found.get(name)) in (int, float) for name in _FIELDS):
        return tuple(found[name] for name in _FIELDS)
    return value.decode(errors="replace")


def _place_of(value: bytes | None) -> tuple[int, int] | None:
    found = parse_object(value)
    partition, offset = (found or {}).get("partition"), (found or {}).get("offset")
    return (partition, offset) if isinstance(partition, int) and isinstance(offset, int) else None


def _shown(value: bytes | None) -> str:
    return "nothing" if value is None else value.decode(errors="replace")[:200]


def _share(right: int, wrong: int, other: int) -> float:
    return right / (right + wrong) if right + wrong else float(not other)
