"""The scoreboard: learners' predictions against the truth, beside the best that anybody can reach. Pure: no Kafka, no clock.

A prediction names a rating of the stream by user, movie and event time. The truth of user and movie is E[rating], exact, with
rounding, clipping and what drift adds at its time (:mod:`ray_pipeline.truth.law`); the observed rating is drawn again
(:mod:`ray_pipeline.truth.lookup`). The baselines are scored on the same ratings as the model beside them. What an attack gives
its movie is nobody's taste: predictions of such ratings are counted, and scored against nothing.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_pipeline.codec import parse_json
from ray_pipeline.config import Settings
from ray_pipeline.delivery.interface import ShardProgress
from ray_pipeline.model.partitioner import partition_of
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.truth.law import BiasOnly, RatingLaw
from ray_pipeline.truth.lookup import find_ratings
from ray_pipeline.truth.replay import ShardReplay
from ray_pipeline.truth.validity import FreshRecords

__all__ = ["MODELS_MOST", "InvalidPrediction", "Prediction", "Scoreboard", "parse_prediction", "parse_record"]

MODELS_MOST = 100
"""How many models are scored; predictions of further ones are refused, and counted."""

WAITING_MOST = 200_000
"""How many predictions may wait for their rating to be delivered; the oldest is judged without when there are more."""

WAITING_MS = 15_000
"""How long a prediction waits for its rating to be delivered: longer than the longest transaction holds readers up."""

SEEN_CHUNKS = 512
"""How many stretches of 65,536 ratings of a shard are remembered for each model, 8 KiB each, the last used ones: a repeat of an
older prediction counts again."""

DEFAULT_MODEL = "default"
_NAME_MOST = 100
_STARS_MOST = 1e9
_TIME_MOST = 2**53
_ID_MOST = 2**31
_AT_ONCE = 1 << 16
_CHUNK_BITS = 16
_MEAN_OVER = 1 << 18

Columns = npt.NDArray[np.float64]


class InvalidPrediction(ValueError):
    """A record is no prediction; the text says why, one of few."""


Prediction = tuple[str, int, int, float, int]
"""Model, user, movie, prediction in stars, event time in epoch milliseconds."""


def parse_record(value: bytes | None) -> Prediction:
    """A prediction from a record's value.

    Raises:
        InvalidPrediction: it is none.
    """
    try:
        found = parse_json(value)
    except ValueError:
        raise InvalidPrediction("not JSON") from None
    return parse_prediction(found)


def parse_prediction(found: Any) -> Prediction:
    """A prediction from ``{"userId","movieId","prediction","timestamp"[,"model"]}``; further fields are passed over.

    Raises:
        InvalidPrediction: it is none.
    """
    if not isinstance(found, dict):
        raise InvalidPrediction("not a JSON object")
    user, movie, time_ms = found.get("userId"), found.get("movieId"), found.get("timestamp")
    if type(user) is not int or not 0 < user < _ID_MOST:
        raise InvalidPrediction("userId is missing or no user's id")
    if type(movie) is not int or not 0 < movie < _ID_MOST:
        raise InvalidPrediction("movieId is missing or no movie's id")
    if type(time_ms) is not int or not 0 < time_ms < _TIME_MOST:
        raise InvalidPrediction("timestamp is missing or no time in epoch milliseconds")
    stars = found.get("prediction")
    # NaN is no less than anything
    if not isinstance(stars, (int, float)) or isinstance(stars, bool) or not abs(stars) <= _STARS_MOST:
        raise InvalidPrediction("prediction is missing or not a finite number")
    model = found.get("model", DEFAULT_MODEL)
    if type(model) is not str or not 0 < len(model) <= _NAME_MOST or not model.isprintable():
        raise InvalidPrediction(f"model is no name of 1 to {_NAME_MOST} printable characters")
    return model, user, movie, float(stars), time_ms


@dataclass(frozen=True, slots=True)
class _Batch:
    """Predictions in columns, in the order in which they came; each of shape (n,)."""

    model: npt.NDArray[np.int64]
    user_id: npt.NDArray[np.int64]
    movie_id: npt.NDArray[np.int64]
    stars: Columns
    time_ms: npt.NDArray[np.int64]
    partition: npt.NDArray[np.int64]
    came_ms: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.model)

    def where(self, chosen: npt.NDArray[Any]) -> _Batch:
        return _Batch(*(getattr(self, f.name)[chosen] for f in fields(self)))

    def and_then(self, other: _Batch) -> _Batch:
        return _Batch(*(np.concatenate([getattr(self, f.name), getattr(other, f.name)]) for f in fields(self)))


def _empty() -> _Batch:
    none = np.empty(0, np.int64)
    return _Batch(none, none, none, np.empty(0), none, none, none)


class _Seen:
    """Which ratings a model has predicted: a bit a rating, in stretches; bounded, see :data:`SEEN_CHUNKS`."""

    def __init__(self) -> None:
        self._chunks: OrderedDict[tuple[int, int], npt.NDArray[np.uint8]] = OrderedDict()

    def add(self, partition: int, indexes: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Note ratings of a shard; tells of each, shape (n,), whether it was new."""
        fresh = np.zeros(len(indexes), np.bool_)
        distinct, first = np.unique(indexes, return_index=True)
        numbers = distinct >> _CHUNK_BITS
        for number in np.unique(numbers).tolist():
            mine = numbers == number
            place = distinct[mine] & ((1 << _CHUNK_BITS) - 1)
            bits = np.unpackbits(self._chunk(partition, number))
            fresh[first[mine]] = bits[place] == 0
            bits[place] = 1
            self._chunks[partition, number][:] = np.packbits(bits)
        return fresh

    def _chunk(self, partition: int, number: int) -> npt.NDArray[np.uint8]:
        found = self._chunks.setdefault((partition, number), np.zeros((1 << _CHUNK_BITS) // 8, np.uint8))
        self._chunks.move_to_end((partition, number))
        if len(self._chunks) > SEEN_CHUNKS:
            self._chunks.popitem(last=False)
        return found


# what is summed up for each model, over the ratings that count
_DISTURB_BIAS_ONLY = ("taste_exposure", "new_user_share", "new_movie_share", "attack")
"""Settings under which what the biases alone can tell is computed for another law of users and movies than the stream's."""

_PREDICTORS = ("model", "bias_only", "global_mean", "floor")
_SUMS = (
    "scored",
    "matched",
    *(f"{p}_{a}_{e}" for p in _PREDICTORS for a in ("truth", "observed") for e in ("se", "ae")),
)


class _Tally:
    """One model's numbers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.came = 0
        self.repeated = 0
        self.attacked = 0
        self.sums = dict.fromkeys(_SUMS, 0.0)
        self.seen = _Seen()
        self.first_ms: int | None = None
        self.last_ms: int | None = None
        self.before = 0

    def errors(self, predictor: str) -> dict[str, dict[str, float | None]]:
        """RMSE and MAE of the model or a baseline, against truth and observed ratings; None without any."""
        found: dict[str, dict[str, float | None]] = {}
        for against, counted in (("observed", "matched"), ("truth", "scored")):
            n, name = self.sums[counted], f"{predictor}_{against}"
            found[against] = {
                "rmse": round(math.sqrt(self.sums[f"{name}_se"] / n), 6) if n else None,
                "mae": round(self.sums[f"{name}_ae"] / n, 6) if n else None,
            }
        return found


class Scoreboard:
    """Takes progress and predictions, gives each model's score.

    A prediction is judged when its shard's progress has reached its event time: from then on the rate plan, and so which
    rating is meant, cannot change. The first prediction of a rating by a model counts, others are counted as repeated. One
    that names no rating of the stream is unmatched: it is scored against the truth alone, and since nothing tells it from
    another, each counts.

    All users are held in memory: about 15 MB with the default settings, 1 GB for ten million users.

    Args:
        settings: the run's event settings.
        models: every shard's model, by partition.
        shares: each partition's share of all ratings.
        run: id of the run.
        config: digest of the run's event settings and catalogue.
    """

    def __init__(
        self, settings: Settings, models: Mapping[int, ShardModel], shares: Sequence[float], run: str, config: str
    ) -> None:
        self._models = models
        self._partitions = settings.partitions
        self._user_ids = np.sort(np.concatenate([model.users.user_ids for model in models.values()]))
        self._run, self._config = run, config
        self._law = RatingLaw(models[0].noise_sd)
        self._bias_only = BiasOnly([models[p] for p in range(settings.partitions)], shares)
        self._disturbing = [name for name in _DISTURB_BIAS_ONLY if getattr(settings, name)]
        self.global_mean = _mean_of_stream(models, shares)
        self._replays: dict[int, ShardReplay] = {}
        self._fresh = {p: FreshRecords(model.faults) for p, model in models.items() if model.faults is not None}
        self._reached = np.full(settings.partitions, -1, np.int64)
        self._next_index = dict.fromkeys(range(settings.partitions), 0)
        self._tallies: list[_Tally] = []
        self._codes: dict[str, int] = {}
        self._waiting = _empty()
        self._records = 0
        self._rejected: Counter[str] = Counter()

    # -- in

    def progress(self, progress: ShardProgress) -> None:
        """A shard of the run has come further: a record that it can have written (:class:`ProgressRecords`)."""
        p = progress.partition
        if p in self._replays:
            self._replays[p].update(progress)
        else:
            self._replays[p] = ShardReplay(self._models[p], progress)
            for tally in self._tallies:
                tally.before = self._due_before(tally.first_ms)
        self._next_index[p] = progress.next_index
        self._reached[p] = -1 if progress.event_time_ms is None else progress.event_time_ms

    def take(self, values: Iterable[bytes | None], now_ms: int) -> None:
        """Values of records of topic ``predictions``; those that are none are counted by reason."""
        rows: list[tuple[int, int, int, float, int]] = []
        for value in values:
            self._records += 1
            try:
                model, *rest = parse_record(value)
                rows.append((self._code(model), *rest))  # type: ignore[arg-type]
            except InvalidPrediction as error:
                self._rejected[str(error)] += 1
        if rows:
            self._add(rows, now_ms)

    def settle(self, now_ms: int | None) -> None:
        """Judge the predictions whose rating was delivered, or that have waited long enough.

        Args:
            now_ms: time, on the clock that :meth:`take` was told; None = judge all, nothing more will come.
        """
        waiting = self._waiting
        if not len(waiting):
            return
        ready = self._reached[waiting.partition] >= waiting.time_ms
        if now_ms is None:
            ready[:] = True
        else:
            ready |= waiting.came_ms <= now_ms - WAITING_MS
            ready[: max(0, len(waiting) - WAITING_MOST)] = True
        self._waiting = waiting.where(~ready)
        chosen = np.flatnonzero(ready)
        for lo in range(0, len(chosen), _AT_ONCE):
            self._judge(waiting.where(chosen[lo : lo + _AT_ONCE]))

    # -- out

    def scores(self) -> list[dict[str, Any]]:
        """Each model's record, in the order in which they first came, without the time of publishing."""
        waiting = np.bincount(self._waiting.model, minlength=len(self._tallies))
        told = any(tally.first_ms is not None for tally in self._tallies)
        delivered = sum(self._fresh_before(p, n) for p, n in self._next_index.items()) if told else 0
        return [self._score(t, int(n), delivered) for t, n in zip(self._tallies, waiting.tolist(), strict=True)]

    def totals(self) -> dict[str, Any]:
        """What came in over all: records, models, and how many records were rejected, by reason."""
        return {
            "run": self._run,
            "config": self._config,
            "records": self._records,
            "rejected": dict(sorted(self._rejected.items())),
        }

    # -- inside

    def _code(self, model: str) -> int:
        code = self._codes.get(model)
        if code is None:
            if len(self._tallies) >= MODELS_MOST:
                raise InvalidPrediction(f"more than {MODELS_MOST} models")
            code = self._codes[model] = len(self._tallies)
            self._tallies.append(_Tally(model))
        return code

    def _add(self, rows: list[tuple[int, int, int, float, int]], now_ms: int) -> None:
        codes, users, movies, stars, times = zip(*rows, strict=True)
        user_id, movie_id = np.array(users, np.int64), np.array(movies, np.int64)
        partition = partition_of(user_id, self._partitions).astype(np.int64)
        came_ms = np.full(len(rows), now_ms, np.int64)
        batch = _Batch(
            np.array(codes, np.int64), user_id, movie_id, np.array(stars), np.array(times, np.int64), partition, came_ms
        )
        no_user = ~_among(self._user_ids, user_id)
        no_movie = ~_among(self._models[0].movies.movie_ids, movie_id)
        self._rejected += Counter({"no such user": int(no_user.sum())})
        self._rejected += Counter({"no such movie": int((no_movie & ~no_user).sum())})
        batch = batch.where(~no_user & ~no_movie)
        for code, count in enumerate(np.bincount(batch.model, minlength=len(self._tallies)).tolist()):
            self._tallies[code].came += count
        self._waiting = self._waiting.and_then(batch)

    def _judge(self, batch: _Batch) -> None:
        """Look the ratings up, sort repeats out, and add the errors to the sums."""
        order = np.argsort(batch.partition, kind="stable")
        cuts = np.flatnonzero(np.diff(batch.partition[order])) + 1
        for rows in np.split(order, cuts):
            self._judge_shard(batch.where(rows))

    def _judge_shard(self, batch: _Batch) -> None:
        partition = int(batch.partition[0])
        replay = self._replays.get(partition)
        index, half_stars = np.full(len(batch), -1, np.int64), np.zeros(len(batch), np.uint8)
        if replay is not None:
            index, half_stars = find_ratings(replay, batch.user_id, batch.movie_id, batch.time_ms)
        counts, hits = index < 0, self._models[partition].hits(index)
        for code in np.unique(batch.model).tolist():
            tally = self._tallies[code]
            mine = np.flatnonzero((batch.model == code) & (index >= 0))
            fresh = tally.seen.add(partition, index[mine])
            tally.repeated += int(len(mine) - fresh.sum())
            tally.attacked += int((fresh & hits[mine]).sum())
            counts[mine] = fresh & ~hits[mine]
            self._note_times(tally, batch.time_ms[mine])
        if counts.any():
            # what names no rating has the scores of its time
            at = index if replay is None else np.where(index < 0, replay.first_at(batch.time_ms), index)
            self._sum_up(batch.where(counts), half_stars[counts], np.maximum(at[counts], 0))

    def _note_times(self, tally: _Tally, times_ms: npt.NDArray[np.int64]) -> None:
        if not len(times_ms):
            return
        first_ms = int(times_ms.min())
        tally.last_ms = max(tally.last_ms or 0, int(times_ms.max()))
        if tally.first_ms is None or first_ms < tally.first_ms:
            tally.first_ms = first_ms
            tally.before = self._due_before(first_ms)

    def _due_before(self, time_ms: int | None) -> int:
        """How many ratings of all shards are due before an event time, of those that can be predicted."""
        if time_ms is None:
            return 0
        found = 0
        for p, replay in self._replays.items():
            skew_ms = 0 if replay.model.faults is None else replay.model.faults.skew_ms
            found += self._fresh_before(p, replay.count_before(time_ms - skew_ms))
        return found

    def _fresh_before(self, partition: int, index: int) -> int:
        """How many records of a shard before one are ratings that repeat none: all, where nothing is broken on purpose."""
        fresh = self._fresh.get(partition)
        return index if fresh is None else fresh.before(index)

    def _sum_up(self, batch: _Batch, half_stars: npt.NDArray[np.uint8], index: npt.NDArray[np.int64]) -> None:
        model = self._models[int(batch.partition[0])]
        user = np.searchsorted(model.users.user_ids, batch.user_id)
        movie = np.searchsorted(model.movies.movie_ids, batch.movie_id)
        truth = self._law.moments(model.score_at(user, movie, index), model.users.habits.of(user))
        drift = model.drift_at(user, movie, index)
        matched = (half_stars > 0).astype(np.float64)
        observed = half_stars / 2.0
        columns = {
            "scored": np.ones(len(batch)),
            "matched": matched,
            "floor_observed_se": truth.variance * matched,
            "floor_observed_ae": truth.deviation * matched,
        }
        for name, stars in (
            ("model", batch.stars),
            ("bias_only", self._bias_only.predict(model, user, movie, drift)),
            ("global_mean", np.full(len(batch), self.global_mean)),
        ):
            for against, wanted, weight in (("truth", truth.mean, 1.0), ("observed", observed, matched)):
                error = (stars - wanted) * weight
                columns[f"{name}_{against}_se"], columns[f"{name}_{against}_ae"] = error**2, np.abs(error)
        for name, column in columns.items():
            for code, total in enumerate(np.bincount(batch.model, column).tolist()):
                self._tallies[code].sums[name] += total

    def _score(self, tally: _Tally, waiting: int, delivered: int) -> dict[str, Any]:
        scored, matched = int(tally.sums["scored"]), int(tally.sums["matched"])
        # progress may be a moment behind what a learner has read
        since = max(delivered - tally.before, matched + tally.attacked) if tally.first_ms is not None else 0
        return {
            "model": tally.name,
            "run": self._run,
            "config": self._config,
            "predictions": tally.came,
            "scored": scored,
            "matched": matched,
            "unmatched": scored - matched,
            "repeated": tally.repeated,
            "attacked": tally.attacked,
            "waiting": waiting,
            "first_event_ms": tally.first_ms,
            "last_event_ms": tally.last_ms,
            "delivered": since,
            "coverage": round((matched + tally.attacked) / since, 6) if since else 0.0,
            **tally.errors("model"),
            "floor": tally.errors("floor"),
            "bias_only": {**tally.errors("bias_only"), "inexact_by": self._disturbing},
            "global_mean": {"value": round(self.global_mean, 6), **tally.errors("global_mean")},
        }


def _among(known: npt.NDArray[np.int64], ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which ids are among ascending known ones."""
    return np.asarray(known[np.minimum(np.searchsorted(known, ids), len(known) - 1)] == ids)


def _mean_of_stream(models: Mapping[int, ShardModel], shares: Sequence[float]) -> float:
    """Mean of the stream's first quarter of a million ratings, whenever they are due; its standard error is 0.002 stars."""
    total = count = 0
    for partition, share in enumerate(shares):
        drawn = models[partition].draw(0, max(1, round(share * _MEAN_OVER)))
        total += int(drawn.half_stars.sum(dtype=np.int64))
        count += len(drawn.half_stars)
    return total / count / 2
