"""The answer key of drift and attacks: what changes from which rating of a partition on, and which ratings an attack gave."""

from __future__ import annotations

from typing import Any

from ray_pipeline.config import Settings
from ray_pipeline.model.arrival import first_at
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.scenario import Attack, Drift, Scope, parse_attack, parse_drift

__all__ = ["attack_ratings", "labels"]


def labels(settings: Settings, partition: int, share: float) -> list[dict[str, Any]]:
    """What the settings change on purpose in the course of one partition.

    Args:
        settings: the event settings are used.
        partition: the partition.
        share: its share of all ratings.

    Returns:
        An entry, ready for JSON, for each drift and then each attack: ``kind`` (``drift``, ``attack``), ``number`` (its place
        in the setting), ``text`` (as it was set), ``partition``, ``index`` of the first rating that it may touch, ``end``, the
        index of the first behind it, None for what never ends. Of a drift further ``shape`` (``abrupt``, ``gradual``,
        ``recurring``), ``scope``, ``size`` (stars), ``complete`` (index from which on a gradual one is there in full),
        ``period`` and ``on`` (ratings of all partitions, and share of the period, of a recurring one). Of an attack
        ``movieId``, ``stars`` (who gives whole ones only rounds them), ``ratings`` (how many to expect in all partitions),
        ``cohort``, ``stealth``, ``intensity`` (shares).
    """
    drifts = [_drift(number, parse_drift(text), share) for number, text in enumerate(settings.drift)]
    attacks = [_attack(number, parse_attack(text), share) for number, text in enumerate(settings.attack)]
    return [{**entry, "partition": partition} for entry in (*drifts, *attacks)]


def attack_ratings(model: ShardModel, first: int, count: int) -> list[dict[str, Any]]:
    """The ratings of attacks among ``first … first + count - 1`` of a shard, ready for JSON.

    Returns:
        ``kind`` (``attack_rating``), ``partition``, ``index``, ``attack`` (its number), ``camouflage`` (an honest rating of
        another movie).
    """
    strikes = model.attacks(first, count)
    if strikes is None:
        return []
    rows = zip(strikes.rows.tolist(), strikes.attack.tolist(), strikes.hit.tolist(), strict=True)
    return [
        {
            "kind": "attack_rating",
            "partition": model.partition,
            "index": first + row,
            "attack": attack,
            "camouflage": not hit,
        }
        for row, attack, hit in rows
    ]


def _drift(number: int, drift: Drift, share: float) -> dict[str, Any]:
    last = None if drift.end is None else first_at(drift.end, share)
    entry: dict[str, Any] = {
        "kind": "drift",
        "number": number,
        "text": drift.text,
        "shape": drift.kind,
        "scope": _scope(drift.scope),
        "size": drift.size,
        "index": first_at(drift.start, share),
    }
    if drift.kind == "gradual":
        return {**entry, "end": None, "complete": last}
    return {**entry, "end": last, **({"period": drift.period, "on": drift.on} if drift.period else {})}


def _attack(number: int, attack: Attack, share: float) -> dict[str, Any]:
    return {
        "kind": "attack",
        "number": number,
        "text": attack.text,
        "movieId": attack.movie,
        "stars": attack.rating,
        "ratings": attack.ratings,
        "cohort": attack.cohort,
        "stealth": attack.stealth,
        "intensity": attack.intensity,
        "index": first_at(attack.start, share),
        "end": first_at(attack.end, share),
    }


def _scope(scope: Scope) -> dict[str, Any]:
    named = {"genre": scope.genre, "cohort": scope.cohort, "movieId": scope.movie}
    return {"of": scope.kind, **{name: value for name, value in named.items() if value}}
