"""Every check, and every setting that needs none. A new setting must be named here, or a test fails.

A check is a function from evidence to a measure, and one line below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ray_pipeline.config import SECURITY_FIELDS
from ray_pipeline.conformance import changes, choices, identity, learning, people, spoilt, timing, values
from ray_pipeline.conformance.evidence import Evidence
from ray_pipeline.conformance.measure import Measure
from ray_pipeline.events import Fault

__all__ = ["CHECKS", "NOT_OF_THE_DATA", "Check", "checks_of"]


@dataclass(frozen=True, slots=True)
class Check:
    """One property of the data.

    Attributes:
        name: short and unique.
        settings: the settings that it judges: turning one of them makes it deviate.
        statistic: what is measured, for the report.
        unit: of the numbers; empty for a pure number.
        measure: measures it.
    """

    name: str
    settings: tuple[str, ...]
    statistic: str
    unit: str
    measure: Callable[[Evidence], Measure]


CHECKS: tuple[Check, ...] = (
    Check("seed", ("seed",), "share of ratings with the user and movie that the seed draws", "", identity.same_draws),
    Check("start", ("start_time_ms",), "event time of the first rating", "ms", timing.start),
    Check("rate", ("rate", "plan"), "ratings a second of event time", "1/s", timing.rate),
    Check(
        "arrivals",
        ("rate", "plan", "arrivals"),
        "variance over mean of counts in stretches of the plan",
        "",
        timing.arrivals,
    ),
    Check("amount", ("ratings", "duration_s"), "ratings of the whole run", "", timing.amount),
    Check("placement", ("partitions",), "ratings in a partition that is not their key's", "", choices.placement),
    Check("partition shares", ("partitions",), "distance from the shares of activity", "", choices.partition_shares),
    Check("user ids", ("users", "model"), "ratings by no declared user", "", choices.user_ids),
    Check("distinct users", ("users",), "different users", "", choices.distinct_users),
    Check("activity", ("activity_sigma",), "sigma of lognormal activity", "", choices.activity),
    Check("movie ids", ("movies", "catalog", "model"), "ratings of no movie in the catalogue", "", choices.movie_ids),
    Check("distinct movies", ("movies",), "different movies", "", choices.distinct_movies),
    Check("popularity", ("popularity_exponent",), "Zipf exponent", "", choices.popularity),
    Check("genres", ("popularity_exponent",), "distance from the catalogue's genres by popularity", "", choices.genres),
    Check("mean", ("mean_rating",), "mean of the raw score", "stars", values.mean),
    Check("spread", ("rating_sd",), "standard deviation of the raw score", "stars", values.spread),
    Check("user bias", ("user_bias_share",), "share of variance", "", values.user_bias_share),
    Check("movie bias", ("movie_bias_share",), "share of variance", "", values.movie_bias_share),
    Check("factors", ("factor_share",), "share of variance", "", values.factor_share),
    Check(
        "noise",
        ("user_bias_share", "movie_bias_share", "factor_share"),
        "share of variance that is left",
        "",
        values.noise_share,
    ),
    Check("rank", ("rank",), "factors that ratings depend on", "", values.rank),
    Check(
        "identifiability",
        ("factor_share",),
        "squared error that learned factors save beyond biases, at least half of what is possible",
        "stars²",
        learning.learnable,
    ),
    Check("genre weight", ("genre_share",), "root of the genres' share of the factors", "", people.genre_weight),
    Check("user scales", ("user_scale_sigma",), "sigma of the users' scales", "", people.scale_spread),
    Check("whole stars", ("whole_star_share",), "share of ratings that are whole", "", people.whole_stars),
    Check("taste", ("taste_exposure",), "mean taste for what is watched, standard deviations", "", people.taste),
    Check("sessions", ("session_length",), "ratings of a user in a row", "", people.session_length),
    Check(
        "joining users",
        ("new_user_share", "arrival_ratings"),
        "mean of the number that decides who joins later",
        "",
        people.joining_users,
    ),
    Check(
        "joining movies",
        ("new_movie_share", "arrival_ratings"),
        "mean of the number that decides what appears later",
        "",
        people.joining_movies,
    ),
    Check("drift", ("drift",), "what is left of ratings, by stretch and genre", "stars", changes.drift),
    Check("attacks", ("attack",), "lowest and highest ratings, by stretch", "", changes.attacks),
    Check(
        "late", ("late_share", "disorder_share"), "share of records that are late or out of order", "", spoilt.behind
    ),
    Check(
        "lateness",
        ("late_law", "late_mean_s", "late_max_s", "disorder_s"),
        "distance from the law of late records and those out of order",
        "",
        spoilt.lateness,
    ),
    Check("repeats", ("duplicate_share",), "share of records that repeat one", "", spoilt.repeats),
    Check("repeat distance", ("duplicate_distance",), "mean number of records back", "", spoilt.repeat_distance),
    Check("lost", ("drop_share",), "lost ratings of the answer key for each that was sent", "", spoilt.lost),
    Check("future", ("future_share",), "share of records from the future", "", spoilt.future_share),
    Check("future by", ("future_s",), "how far they are ahead", "s", spoilt.future),
    Check("clocks", ("clock_skew",), "by how much the shards' clocks are wrong, together", "s", spoilt.clock),
    Check("silence", ("silent",), "share of ratings that are held back", "", spoilt.silence),
    *(
        Check(name, (setting,), f"share of records: {what}", "", spoilt.text_share(fault, setting))
        for name, setting, what, fault in (
            ("malformed", "malformed_share", "no JSON", Fault.MALFORMED),
            ("missing fields", "missing_field_share", "a field is missing", Fault.MISSING_FIELD),
            ("unknown fields", "unknown_field_share", "a field too many", Fault.UNKNOWN_FIELD),
            ("out of range", "out_of_range_share", "no rating of 0.5 … 5.0", Fault.OUT_OF_RANGE),
            ("tombstones", "tombstone_share", "no value", Fault.TOMBSTONE),
        )
    ),
    Check(
        "histogram",
        ("mean_rating", "rating_sd"),
        "distance from the exact law of the ten ratings",
        "",
        values.histogram,
    ),
)

NOT_OF_THE_DATA: Mapping[str, tuple[str, ...]] = {
    "who sends, and when it is sent, not what": (
        "speed",
        "actors",
        "delivery",
        "fast",
        "commit_interval_ms",
        "backfill",
        "ray_address",
        "stop_timeout_s",
    ),
    "where records are kept, not what they say": (
        "bootstrap_servers",
        *SECURITY_FIELDS,
        "broker_port",
        "replication_factor",
        "ratings_topic",
        "metrics_topic",
        "rejected_topic",
        "outside_topic",
        "progress_topic",
        "control_topic",
        "job_topic",
        "batches_topic",
        "expected_topic",
        "truth_topic",
        "predictions_topic",
        "scores_topic",
        "state_dir",
        "sink",
        "output",
    ),
    "how a value is written; the audit proves it to the byte": (
        "format",
        "field_names",
        "padding_bytes",
        "schema_registry_url",
    ),
    "a name for other settings, which are judged": ("preset",),
    "a setting of the windows; the audit proves those": (
        "tumbling_s",
        "sliding_s",
        "slide_s",
        "watermark_s",
        "max_ahead_s",
        "top_n",
        "checkpoint",
        "trigger_interval_ms",
        "max_offsets_per_trigger",
        "archive",
        "archive_interval_s",
        "fair_scheduler_file",
        "executors",
        "executor_cores",
        "executor_memory",
    ),
    "a setting of API and dashboard": (
        "api_host",
        "api_port",
        "ui_host",
        "ui_port",
        "ui",
        "refresh_s",
        "control_token",
    ),
}
"""Settings that are no property of the data, by the reason."""


def checks_of(setting: str) -> tuple[Check, ...]:
    """The checks that judge a setting."""
    return tuple(check for check in CHECKS if setting in check.settings)
