"""The one settings model: flag > environment (``RAY_PIPELINE_…``) > file (TOML) > preset > default.

Every setting is declared once, here, with its unit, range and help text; the command line, the error messages and
the documentation read it from here. Unknown keys are refused.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from ray_pipeline.brokers import Brokers, Security
from ray_pipeline.clock import LAST_MS
from ray_pipeline.errors import ConfigurationError
from ray_pipeline.fitted import RAW_MEAN_MOST, RAW_SD_MOST, REPLACED_FIELDS, declared_settings
from ray_pipeline.presets import load_preset
from ray_pipeline.rates.language import parse_plan, tidy
from ray_pipeline.scenario import parse_attack, parse_drift
from ray_pipeline.spans import parse_clock_skew, parse_silent
from spark_compat.paths import hadoop_uri

__all__ = [
    "ENVIRONMENT_PREFIX",
    "EVENT_FIELDS",
    "FAULT_FIELDS",
    "FAULT_SHARES",
    "FIELDS",
    "FORMAT_FIELDS",
    "GROUPS",
    "SECURITY_FIELDS",
    "Settings",
    "flag_of",
    "flags_of",
    "load_settings",
    "parse_field_names",
    "settings_of",
]

ENVIRONMENT_PREFIX = "RAY_PIPELINE_"

FAULT_SHARES = (
    "late_share",
    "disorder_share",
    "duplicate_share",
    "future_share",
    "unknown_field_share",
    "malformed_share",
    "missing_field_share",
    "out_of_range_share",
    "tombstone_share",
)
"""Shares of the records that have one fault or another; each record has one at most."""

FAULT_FIELDS = (
    *FAULT_SHARES,
    "late_law",
    "late_mean_s",
    "late_max_s",
    "disorder_s",
    "duplicate_distance",
    "drop_share",
    "future_s",
    "clock_skew",
    "silent",
)
"""The settings that break the stream on purpose."""

_FIRST_EVENT_FIELDS = (
    "seed",
    "users",
    "movies",
    "rank",
    "mean_rating",
    "rating_sd",
    "user_bias_share",
    "movie_bias_share",
    "factor_share",
    "popularity_exponent",
    "activity_sigma",
    "partitions",
)

EVENT_FIELDS = (
    *_FIRST_EVENT_FIELDS,
    "arrivals",
    *FAULT_FIELDS,
    "genre_share",
    "user_scale_sigma",
    "whole_star_share",
    "taste_exposure",
    "session_length",
    "new_user_share",
    "new_movie_share",
    "arrival_ratings",
    "drift",
    "attack",
)
"""The settings that an event is a function of, together with the catalogue's content (see :meth:`Settings.digest`); a fitted
model is a catalogue too, and its content is the whole file's."""

_SENT_LATE_MS = 3_600_000
"""A sender may be down for so long before what the job makes of a record with a future time becomes uncertain."""


FORMAT_FIELDS = ("format", "field_names", "padding_bytes")
"""The settings that say how an event is written into a record's value."""

SECURITY_FIELDS = (
    "security_protocol",
    "sasl_mechanism",
    "sasl_username",
    "sasl_password",
    "ssl_ca",
    "ssl_certificate",
    "ssl_key",
)
"""The settings that say how brokers that are named are spoken to."""

FIELDS = ("userId", "movieId", "rating", "timestamp")
"""The fields of a rating, in the contract's order."""

GROUPS = {
    "preset": "Load",
    "sink": "Where ratings go",
    "format": "Format",
    "seed": "Users and movies",
    "late_share": "Late and broken data",
    "genre_share": "How people behave",
    "bootstrap_servers": "Kafka",
    "actors": "Generator",
    "tumbling_s": "Windows",
    "ray_address": "Ray and Spark",
    "api_host": "API and dashboard",
    "state_dir": "State",
}
"""Name of each group of settings, by its first one: those that the model declares up to the next group's belong to it."""

_FIELD_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def _default_state_dir() -> Path:
    return Path(platformdirs.user_state_dir("ray-pipeline"))


class Settings(BaseSettings):
    """All settings of the pipeline."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True)

    # -- load: how much, how long
    preset: str | None = Field(
        None,
        description="settings that belong together, by name (see ray-pipeline presets); any other source beats them",
    )
    rate: float = Field(100.0, gt=0, le=1e9, description="target rate, ratings per second; fractions allowed")
    plan: str | None = Field(
        None, min_length=1, description="rates over time in place of rate, such as 'ramp(0..500, 10m) then 500'"
    )
    arrivals: Literal["regular", "poisson"] = Field(
        "regular", description="how ratings follow each other: regular (evenly) or poisson (at random)"
    )
    duration_s: float | None = Field(
        None, gt=0, le=86_400 * 36_600, description="stop after this many seconds of event time"
    )
    ratings: int | None = Field(None, gt=0, description="stop after exactly this many ratings")
    backfill: int | None = Field(
        None,
        gt=0,
        description="ratings of history that a Spark job sends before the first live one; into an empty topic only",
    )
    start_time_ms: int | None = Field(
        None,
        ge=1,
        le=LAST_MS,  # the windows' job takes no later event time
        description="event time of the first instant, epoch milliseconds UTC (date +%s%3N), up to the year 9999; default: now",
    )
    speed: Annotated[float, Field(ge=1, le=1e6, allow_inf_nan=False)] | Literal["max"] = Field(
        1.0,
        description="event time by real time, a number or max: from start_time_ms on, until it has reached the present",
    )

    # -- where the ratings go
    sink: Literal["kafka", "stdout", "ndjson", "parquet"] = Field(
        "kafka",
        description="where ratings go; all but kafka are written by one process, without Ray, Spark and a broker",
    )
    output: Path | None = Field(None, description="file of sink ndjson or parquet; it must not exist")

    # -- what the ratings look like in Kafka
    format: Literal["json", "avro", "protobuf"] = Field(
        "json", description="format of the values; avro and protobuf need a schema registry"
    )
    schema_registry_url: str | None = Field(
        None,
        pattern=r"^(https?|mock)://.+",
        description="Confluent schema registry of formats avro and protobuf, such as http://registry:8081",
    )
    field_names: str = Field("", description="other names for fields, such as userId=user,movieId=item")
    padding_bytes: int = Field(
        0, ge=0, le=1_000_000, description="length of an additional field padding in each value, bytes; 0 = none"
    )

    # -- the events: what an event is a function of
    seed: int = Field(42, ge=0, lt=2**63, description="seed of everything that is drawn")
    users: int = Field(138_493, ge=1, le=2**31 - 1, description="number of users; ids are 1 … users")
    movies: int = Field(27_278, ge=1, le=2**24, description="number of movies of the built-in catalogue")
    catalog: Path | None = Field(None, description="movies.csv in MovieLens layout, in place of the built-in catalogue")
    model: Path | None = Field(
        None,
        description="model file made by ray-pipeline fit: users and movies of your own data, in place of drawn ones",
    )
    rank: int = Field(20, ge=1, le=512, description="number of latent factors")
    mean_rating: float = Field(
        3.5,
        ge=-RAW_MEAN_MOST,
        le=RAW_MEAN_MOST,
        description="mean of the raw score, in stars: before it is rounded and cut off at 0.5 and 5, so it may lie beyond them",
    )
    rating_sd: float = Field(
        1.1,
        gt=0,
        le=RAW_SD_MOST,
        description="standard deviation of the raw score, in stars: before rounding and cutting off",
    )
    user_bias_share: float = Field(0.15, ge=0, le=1, description="share of variance due to the user's bias")
    movie_bias_share: float = Field(0.2, ge=0, le=1, description="share of variance due to the movie's bias")
    factor_share: float = Field(
        0.35, ge=0, le=1, description="signal strength: share of variance explained by the factors"
    )
    popularity_exponent: float = Field(0.9, ge=0, le=3, description="Zipf exponent of movie popularity; 0 = uniform")
    activity_sigma: float = Field(1.2, ge=0, le=3, description="sigma of lognormal user activity; 0 = all equal")
    partitions: int = Field(4, ge=1, le=10_000, description="partitions of the ratings topic (= shards)")

    # -- data that is broken on purpose, all of it known to those who check the stream
    late_share: float = Field(0.0, ge=0, le=0.9, description="share of the records whose event time is late")
    late_law: Literal["fixed", "uniform", "exponential"] = Field(
        "exponential", description="law of the lateness: always the mean, from 0 to twice the mean, or exponential"
    )
    late_mean_s: float = Field(60.0, ge=0.001, le=86_400 * 30, description="mean lateness before late_max, seconds")
    late_max_s: float = Field(600.0, ge=0.001, le=86_400 * 30, description="greatest lateness, seconds")
    disorder_share: float = Field(
        0.0, ge=0, le=0.9, description="share of the records whose event time lies a little back: out of order"
    )
    disorder_s: float = Field(5.0, ge=0.001, le=86_400, description="how far back at most, seconds")
    duplicate_share: float = Field(0.0, ge=0, le=0.9, description="share of the records that repeat an earlier one")
    duplicate_distance: int = Field(
        100, ge=1, le=100_000, description="how many records back in its partition the repeated one lies at most"
    )
    drop_share: float = Field(
        0.0, ge=0, le=0.9, description="ratings that are lost and never sent, as a share of those that are sent"
    )
    malformed_share: float = Field(0.0, ge=0, le=0.5, description="share of the records that are cut off: no JSON")
    missing_field_share: float = Field(0.0, ge=0, le=0.5, description="share of the records that lack a field")
    unknown_field_share: float = Field(
        0.0, ge=0, le=0.5, description="share of the records with a field that nobody knows; they stay valid"
    )
    out_of_range_share: float = Field(
        0.0, ge=0, le=0.5, description="share of the records with a rating that is none of 0.5 … 5.0"
    )
    tombstone_share: float = Field(0.0, ge=0, le=0.5, description="share of the records without a value")
    future_share: float = Field(0.0, ge=0, le=0.9, description="share of the records with an event time in the future")
    future_s: float = Field(86_400.0, ge=0.001, le=86_400 * 3_660, description="how far in the future, seconds")
    clock_skew: str = Field(
        "", description="shards whose clock is wrong, such as 1:-30s,2:500ms (partition:by how much)"
    )
    silent: str = Field(
        "", description="partitions that fall silent and catch up, such as '2:every=600s,for=120s; 3:every=1h,for=5m'"
    )

    # -- how people and movies behave
    genre_share: float = Field(
        0.0, ge=0, le=1, description="share of the movie factors' variance that comes from the movie's genres"
    )
    user_scale_sigma: float = Field(
        0.0, ge=0, le=1, description="sigma of the lognormal scale on which a user uses the stars; 0 = all alike"
    )
    whole_star_share: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the users who give whole stars only, 1 to 5; the others give half ones too",
    )
    taste_exposure: float = Field(
        0.0, ge=0, le=1, description="how far a user's taste decides what is watched; 0 = popularity alone"
    )
    session_length: float = Field(
        1.0, ge=1, le=1_000, description="mean number of ratings that a user gives in a row; 1 = no sessions"
    )
    new_user_share: float = Field(0.0, ge=0, le=0.95, description="share of the users who join during the run")
    new_movie_share: float = Field(0.0, ge=0, le=0.95, description="share of the movies that appear during the run")
    arrival_ratings: int = Field(
        1_000_000, ge=1, le=10**12, description="ratings of all shards until the last new user and movie are there"
    )
    drift: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="shift of scores, e.g. 'abrupt at=100000 genre=Horror size=-1' (also gradual, recurring; cohort=, movie=)",
    )
    attack: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="attack on a movie, e.g. 'review-bomb movie=318 at=50000 ratings=5000 cohort=0.01 rating=0.5'"
    )

    # -- Kafka
    bootstrap_servers: str | None = Field(
        None, min_length=1, description="brokers, HOST:PORT[,…]; default: an embedded broker"
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        "PLAINTEXT", description="how brokers that are named are spoken to; the embedded one is in clear, on loopback"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(
        None, description="how the password is shown to the brokers"
    )
    sasl_username: str | None = Field(None, description="user name at the brokers")
    sasl_password: SecretStr | None = Field(
        None, description="its password; better in the environment or a file than on a command line that others can see"
    )
    ssl_ca: Path | None = Field(
        None, description="PEM file of the CAs that may sign for the brokers; default: those that the machine trusts"
    )
    ssl_certificate: Path | None = Field(
        None, description="PEM file of a certificate to show, where brokers want one of each client"
    )
    ssl_key: Path | None = Field(None, description="PEM file of its private key: PKCS #8, without a password")
    broker_port: int = Field(0, ge=0, le=65535, description="port of the embedded broker; 0 = any free port")
    replication_factor: int = Field(1, ge=1, le=32_767, description="replicas of topics that are created")
    ratings_topic: str = Field("ratings", description="topic of the ratings")
    metrics_topic: str = Field("metrics", description="topic of the windows (compacted)")
    rejected_topic: str = Field("ratings.rejected", description="topic of records that are no valid rating")
    outside_topic: str = Field(
        "ratings.outside", description="topic of which ratings came from outside, and where they are"
    )
    progress_topic: str = Field("ratings.progress", description="topic of the shards' progress (compacted)")
    control_topic: str = Field("ratings.control", description="topic of rate changes, pause and resume")
    job_topic: str = Field("metrics.progress", description="topic of the Spark job's progress (compacted)")
    batches_topic: str = Field("metrics.batches", description="topic of what each micro-batch read")
    expected_topic: str = Field("metrics.expected", description="topic of what the windows must hold (compacted)")
    predictions_topic: str = Field("predictions", description="topic of learners' predictions")
    truth_topic: str = Field(
        "ratings.truth", description="topic of what is broken on purpose: the answer key (compacted)"
    )
    scores_topic: str = Field("predictions.scores", description="topic of the learners' scores (compacted)")

    # -- generator
    actors: int = Field(2, ge=1, le=10_000, description="generator actors; at most one a partition")
    delivery: Literal["exactly-once", "at-least-once"] = Field(
        "exactly-once", description="exactly-once (a transaction a commit) or at-least-once (idempotent only)"
    )
    fast: bool = Field(
        False,
        description="deliver by columns: one call into librdkafka a block instead of one a rating; exactly-once only",
    )
    commit_interval_ms: int = Field(100, ge=10, le=60_000, description="time between commits of a shard, ms")

    # -- windows
    tumbling_s: int = Field(60, ge=1, le=86_400, description="length of the tumbling window, seconds")
    sliding_s: int = Field(300, ge=1, le=86_400 * 7, description="length of the sliding window, seconds")
    slide_s: int = Field(60, ge=1, le=86_400, description="slide of the sliding window, seconds")
    watermark_s: float = Field(
        60.0, ge=0, description="how long a window waits for late ratings, seconds of event time"
    )
    max_ahead_s: float = Field(
        600.0,
        ge=0,
        le=86_400 * 3_660,
        description="a record whose event time is further ahead of the time it was sent is rejected, seconds; 0 = none is",
    )
    top_n: int = Field(100, ge=1, le=10_000, description="movies kept in each window's top-N")
    checkpoint: str | None = Field(
        None, description="Hadoop URI of the Spark checkpoint; default: a folder in the state directory"
    )
    trigger_interval_ms: int = Field(
        0, ge=0, le=600_000, description="least time between micro-batches, ms; 0 = at once"
    )
    max_offsets_per_trigger: int = Field(1_000_000, ge=1_000, description="most records in one micro-batch")
    archive: str | None = Field(
        None, min_length=1, description="Hadoop URI where ratings and windows are kept as Parquet by date and hour"
    )
    archive_interval_s: float = Field(
        30.0, ge=1, le=3_600, description="time between additions to the archive, seconds"
    )
    fair_scheduler_file: Path | None = Field(None, description="fairscheduler.xml in place of the shipped one")

    # -- Ray and Spark
    ray_address: str | None = Field(
        None, description="Ray cluster to join; local = a Ray of its own; default: RAY_ADDRESS, else local"
    )
    executors: int = Field(1, ge=1, le=10_000, description="Spark executors")
    executor_cores: int = Field(2, ge=1, le=1_024, description="cores of a Spark executor")
    executor_memory: str = Field("1g", pattern=r"^\d+[kmgtKMGT]$", description="memory of a Spark executor")

    # -- serving
    api_host: str = Field("127.0.0.1", description="address the HTTP API listens on")
    api_port: int = Field(8000, ge=0, le=65535, description="port of the HTTP API; 0 = any free port")
    ui_host: str = Field("127.0.0.1", description="address the dashboard listens on")
    ui_port: int = Field(8501, ge=0, le=65535, description="port of the dashboard; 0 = any free port")
    ui: bool = Field(True, description="show the dashboard")
    refresh_s: float = Field(2.0, ge=0.5, le=5.0, description="refresh interval of the dashboard, seconds")
    control_token: str | None = Field(
        None, min_length=8, description="token for control requests from other machines; default: made by run or serve"
    )

    # -- state
    state_dir: Path = Field(default_factory=_default_state_dir, description="where state is kept between runs")
    stop_timeout_s: float = Field(120.0, gt=0, le=86_400 * 30, description="longest orderly shutdown, seconds")

    @field_validator("rate", "duration_s", "watermark_s", "archive_interval_s")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and value in (float("inf"), float("-inf")):
            msg = "must be a finite number"
            raise ValueError(msg)
        return value

    @field_validator("control_token")
    @classmethod
    def _fits_a_header(cls, value: str | None) -> str | None:
        if value is not None and not (value.isascii() and value.isprintable() and value == value.strip()):
            msg = (
                "must be printable ASCII without spaces around it: no other text comes through an HTTP header as it was"
            )
            raise ValueError(msg)
        return value

    @field_validator("drift", "attack", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        """One text, or several with semicolons between them, as an environment variable has them."""
        return [part.strip() for part in value.split(";") if part.strip()] if isinstance(value, str) else value

    @field_validator("drift")
    @classmethod
    def _drifts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_drift(text)
        return value

    @field_validator("attack")
    @classmethod
    def _attacks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for text in value:
            parse_attack(text)
        return value

    @field_validator("plan")
    @classmethod
    def _plan_is_well_formed(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parse_plan(value)
        return tidy(value)

    @model_validator(mode="before")
    @classmethod
    def _actors_follow_partitions(cls, values: Any) -> Any:
        """Where nobody says how many actors there are, they are no more than the partitions."""
        if not isinstance(values, dict) or "actors" in values or "partitions" not in values:
            return values
        try:
            partitions = int(values["partitions"])
        except (TypeError, ValueError):
            return values  # the field says what is wrong with it
        return {**values, "actors": max(1, min(cls.model_fields["actors"].default, partitions))}

    @model_validator(mode="after")
    def _belong_together(self) -> Settings:
        if self.duration_s is not None and self.ratings is not None:
            msg = "duration_s and ratings exclude each other: give one of them"
            raise ValueError(msg)
        if self.speed != 1.0 and self.start_time_ms is None:
            msg = f"speed={self.speed} needs start_time_ms: give the time in the past to begin at, or drop speed"
            raise ValueError(msg)
        if self.actors > self.partitions:
            msg = (
                f"actors={self.actors} is more than partitions={self.partitions}: an actor owns whole partitions, "
                "so lower actors or raise partitions"
            )
            raise ValueError(msg)
        if self.fast and self.delivery != "exactly-once":
            msg = (
                f"fast=True does not go with delivery={self.delivery}: only a transaction's commit says that every rating "
                "sent by columns arrived, so drop fast or set delivery to exactly-once"
            )
            raise ValueError(msg)
        if self.user_bias_share + self.movie_bias_share + self.factor_share > 1 + 1e-9:
            msg = "user_bias_share + movie_bias_share + factor_share is more than 1: noise gets the rest, lower one"
            raise ValueError(msg)
        if self.taste_exposure and not self.movie_bias_share + self.factor_share:
            msg = "taste_exposure needs tastes: raise factor_share or movie_bias_share, or set taste_exposure to 0"
            raise ValueError(msg)
        if self.genre_share and not self.factor_share:
            msg = "genre_share is a share of the factors' variance, and factor_share is 0: raise it, or set genre_share to 0"
            raise ValueError(msg)
        if self.sliding_s % self.slide_s:
            msg = f"sliding_s={self.sliding_s} is not a multiple of slide_s={self.slide_s}"
            raise ValueError(msg)
        return self

    @field_validator("field_names")
    @classmethod
    def _names(cls, value: str) -> str:
        parse_field_names(value)
        return value

    @model_validator(mode="after")
    def _format_fits(self) -> Settings:
        if self.plain_format:
            return self
        broken = next((name for name in FAULT_SHARES if getattr(self, name)), None)
        if broken is not None:
            msg = f"{broken} breaks the contract's JSON: drop it, or format, field_names and padding_bytes"
            raise ValueError(msg)
        if self.fast:
            msg = "fast=True goes with the plain format alone: drop fast, or format, field_names and padding_bytes"
            raise ValueError(msg)
        if self.format != "json" and self.schema_registry_url is None:
            msg = f"format={self.format} needs schema_registry_url"
            raise ValueError(msg)
        if self.format != "json" and self.sink != "kafka":
            msg = f"format={self.format} does not go with sink={self.sink}: it is for Kafka"
            raise ValueError(msg)
        if self.sink == "parquet":
            msg = "field_names and padding_bytes do not go with sink=parquet, whose columns are fixed: drop them"
            raise ValueError(msg)
        return self

    @property
    def plain_format(self) -> bool:
        """Whether values are the contract's, byte for byte."""
        return self.format == "json" and not self.field_names and not self.padding_bytes

    @model_validator(mode="after")
    def _sink_fits(self) -> Settings:
        to_file = self.sink in ("ndjson", "parquet")
        if self.sink != "kafka" and self.speed != 1.0:
            msg = f"speed={self.speed} does not go with sink={self.sink}: the past is written there at once, so drop speed"
            raise ValueError(msg)
        if to_file and self.output is None:
            msg = f"sink={self.sink} needs a file: give output"
            raise ValueError(msg)
        if self.output is not None and not to_file:
            msg = (
                f"output={self.output} does not go with sink={self.sink}: set sink to ndjson or parquet, or drop output"
            )
            raise ValueError(msg)
        if to_file and self.ratings is None and self.duration_s is None:
            msg = f"sink={self.sink} makes a file that must end: give ratings or duration_s"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _topics_differ(self) -> Settings:
        first: dict[str, str] = {}
        for field in (name for name in type(self).model_fields if name.endswith("_topic")):
            topic = getattr(self, field)
            other = first.setdefault(topic, field)
            if other != field:
                msg = f"{other} and {field} are both {topic!r}: give each its own, with {flag_of(other)} or {flag_of(field)}"
                raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _security_fits(self) -> Settings:
        protocol = self.security_protocol
        login = ("sasl_mechanism", "sasl_username", "sasl_password")
        files = ("ssl_ca", "ssl_certificate", "ssl_key")
        missing = [name for name in login if not getattr(self, name)] if protocol.startswith("SASL") else []
        if missing:
            msg = f"security_protocol={protocol} needs {' and '.join(missing)}: give {'it' if len(missing) == 1 else 'them'}"
            raise ValueError(msg)
        for names, fits in ((login, ("SASL_PLAINTEXT", "SASL_SSL")), (files, ("SSL", "SASL_SSL"))):
            idle = next((name for name in names if getattr(self, name) is not None), None)
            if idle is not None and protocol not in fits:
                msg = f"{idle} does not go with security_protocol={protocol}: set that to {' or '.join(fits)}, or drop {idle}"
                raise ValueError(msg)
        if (self.ssl_certificate is None) != (self.ssl_key is None):
            msg = "ssl_certificate and ssl_key go together: give both, or neither"
            raise ValueError(msg)
        return self

    @field_validator("clock_skew")
    @classmethod
    def _skews(cls, value: str) -> str:
        parse_clock_skew(value)
        return value

    @field_validator("silent")
    @classmethod
    def _silences(cls, value: str) -> str:
        parse_silent(value)
        return value

    @model_validator(mode="after")
    def _faults_fit(self) -> Settings:
        shares = {name: getattr(self, name) for name in FAULT_SHARES if getattr(self, name)}
        if sum(shares.values()) > 0.95:
            msg = f"{' + '.join(shares)} is more than 0.95: a record has one fault at most, and some must be whole; lower one"
            raise ValueError(msg)
        for name, named in (("clock_skew", parse_clock_skew(self.clock_skew)), ("silent", parse_silent(self.silent))):
            unknown = [p for p in named if p >= self.partitions]
            if unknown:
                msg = f"{name} names partition {unknown[0]}, there are {self.partitions}, counted from 0: correct it"
                raise ValueError(msg)
        if self.silent and self.sink != "kafka":
            msg = f"silent does not go with sink={self.sink}: only a partition of a topic can fall silent, so drop one of them"
            raise ValueError(msg)
        if self.sink == "parquet" and self.text_fault:
            msg = f"{self.text_fault} does not go with sink=parquet: columns hold no broken text, so drop it or set sink to ndjson"
            raise ValueError(msg)
        if self.backfill and self.future_share and self.guard_ms:
            msg = (
                "future_share does not go with backfill: the job tells the future by the wall clock, which is ahead of history, so "
                "drop one of them or set max_ahead_s to 0"
            )
            raise ValueError(msg)
        self._check_start()
        self._check_ahead()
        return self

    def _check_start(self) -> None:
        """Times that are shifted on purpose must not leave the calendar at a stream's beginning."""
        if self.start_time_ms is None:
            return
        skews_ms = (0, *parse_clock_skew(self.clock_skew).values())
        late_s, disorder_s = self.late_share and self.late_max_s, self.disorder_share and self.disorder_s
        least_ms = 1 + math.ceil(max(late_s, disorder_s) * 1000) - min(skews_ms)
        most_ms = LAST_MS - math.ceil(self.future_share and self.future_s * 1000) - max(skews_ms)
        if not least_ms <= self.start_time_ms <= most_ms:
            msg = (
                f"start_time_ms={self.start_time_ms} is too near to the calendar's end for event times that are shifted on purpose: "
                f"give {least_ms} … {most_ms}, or lower late_max_s, disorder_s, future_s or clock_skew"
            )
            raise ValueError(msg)

    def _check_ahead(self) -> None:
        """A record must be clearly within what the job takes, or clearly beyond it: it may be sent late, as after a silence."""
        if not self.guard_ms:
            return
        skews = parse_clock_skew(self.clock_skew)
        beyond = next((p for p, skew_ms in skews.items() if skew_ms > self.guard_ms), None)
        if beyond is not None:
            msg = (
                f"clock_skew of partition {beyond} is beyond max_ahead_s={self.max_ahead_s:g}: the job would reject all of it, "
                "so lower it, raise max_ahead_s, or set max_ahead_s to 0"
            )
            raise ValueError(msg)
        held_ms = max((s.for_ms for s in parse_silent(self.silent).values()), default=0)
        least_ms = self.guard_ms + held_ms + _SENT_LATE_MS
        future_ms = round(self.future_s * 1000) if self.future_share else 0
        for skew_ms in (0, *skews.values()):
            if self.guard_ms < future_ms + skew_ms < least_ms:
                msg = (
                    f"future_s={self.future_s:g} is too near to max_ahead_s={self.max_ahead_s:g} to know whether the job rejects "
                    f"such records when they are sent late: with clock_skew they must be at least {least_ms / 1000:g} s ahead, or at "
                    "most max_ahead_s; or set max_ahead_s to 0"
                )
                raise ValueError(msg)

    @property
    def text_fault(self) -> str:
        """The first setting that breaks texts of records; empty when none does."""
        return next((name for name in FAULT_SHARES[4:] if getattr(self, name)), "")

    @property
    def guard_ms(self) -> int:
        """How far ahead of its sending a rating's event time may lie, milliseconds; 0 = as far as it likes.

        With a fixed event clock nothing can be said: honest ratings may then be far ahead of the wall clock.
        """
        return 0 if self.start_time_ms is not None else round(self.max_ahead_s * 1000)

    @property
    def brokers(self) -> Brokers | None:
        """The brokers that are named, and how they are spoken to; None = an embedded one.

        Raises:
            ConfigurationError: a file of a certificate or a key cannot be used.
        """
        return None if self.bootstrap_servers is None else self.secured(self.bootstrap_servers)

    def secured(self, bootstrap: str) -> Brokers:
        """Brokers, spoken to as these settings say.

        Args:
            bootstrap: brokers that are not embedded, HOST:PORT[,…].

        Raises:
            ConfigurationError: a file of a certificate or a key cannot be used.
        """
        if self.security_protocol == "PLAINTEXT":
            return Brokers(bootstrap)
        security = Security(
            self.security_protocol,
            self.sasl_mechanism or "",
            self.sasl_username or "",
            self.sasl_password.get_secret_value() if self.sasl_password else "",
            ca=_pem(self.ssl_ca, "ssl_ca", "CERTIFICATE"),
            certificate=_pem(self.ssl_certificate, "ssl_certificate", "CERTIFICATE"),
            key=_pem(self.ssl_key, "ssl_key", "PRIVATE KEY"),
        )
        return Brokers(bootstrap, security)

    @property
    def checkpoint_uri(self) -> str:
        """Where Spark keeps its checkpoint, as a Hadoop URI."""
        return self.checkpoint or hadoop_uri(self.state_dir / "checkpoint")

    @property
    def archive_checkpoint_uri(self) -> str:
        """Where Spark keeps how far the archive is, as a Hadoop URI."""
        return f"{self.checkpoint_uri.rstrip('/')}-archive"

    def event_settings(self) -> dict[str, Any]:
        """The settings that an event and its value are functions of, ready for JSON."""
        return {name: getattr(self, name) for name in (*EVENT_FIELDS, *FORMAT_FIELDS)}

    def with_events(self, published: Mapping[str, Any]) -> Settings:
        """These settings with the event settings that a run published, as :meth:`event_settings` of then, from JSON.

        A setting that there was not yet then has its default.
        """
        fields = type(self).model_fields
        values = {name: published.get(name, fields[name].default) for name in (*EVENT_FIELDS, *FORMAT_FIELDS)}
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return self.model_copy(update={**values, **lists})

    def digest(self, catalogue_digest: str) -> str:
        """Name of the stream these settings define: 16 hex digits of a SHA-256.

        Args:
            catalogue_digest: digest of the movie catalogue's content.
        """
        named = {
            name: value
            for name, value in self.event_settings().items()
            # what was added later has no part in the name while it changes nothing: streams of before can be gone on with
            if name in _FIRST_EVENT_FIELDS or value != type(self).model_fields[name].default
        }
        text = json.dumps({**named, "catalogue": catalogue_digest}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _pem(file: Path | None, name: str, kind: str) -> str:
    """Content of a PEM file that holds one thing of a kind at least; empty for no file.

    Raises:
        ConfigurationError: it cannot be read, or does not.
    """
    if file is None:
        return ""
    with ConfigurationError.reading(file, name, "PEM file", flag_of(name)):
        text = file.read_text(errors="replace")
    if f"-----BEGIN {kind}-----" not in text:
        fix = f"openssl pkcs8 -topk8 -nocrypt -in {file} -out key.pem makes one of any other key"
        raise ConfigurationError(
            problem=f"{name} {file} holds no {kind.lower()} (-----BEGIN {kind}-----)",
            fix=fix if name == "ssl_key" else f"Name a PEM file of one with {flag_of(name)}",
        )
    return text


def parse_field_names(text: str) -> dict[str, str]:
    """``userId=user,movieId=item`` → the other names, by the contract's.

    Raises:
        ValueError: a field is unknown, or a name is not one, or given twice.
    """
    names: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        name, _, other = (piece.strip() for piece in part.partition("="))
        if name not in FIELDS:
            msg = f"{name!r} is none of {', '.join(FIELDS)}: write such as userId=user,movieId=item"
            raise ValueError(msg)
        if not _FIELD_NAME.fullmatch(other):
            msg = f"{other!r} is no name for a field: use letters, digits and _"
            raise ValueError(msg)
        names[name] = other
    # Spark tells no case apart, and Protobuf's JSON neither case nor _
    every = [names.get(name, name).replace("_", "").lower() for name in FIELDS]
    if len({*every, "padding"}) < len(every) + 1:
        msg = "two fields have one name, but for case and _, or one is called padding: give each its own"
        raise ValueError(msg)
    return names


def flag_of(name: str) -> str:
    """The command line option of a setting: seconds and event times without their unit."""
    short = "start_time" if name == "start_time_ms" else name.removesuffix("_s")
    return "--" + short.replace("_", "-")


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """The words of a command line that give some settings; a list that is empty has none."""
    words: list[str] = []
    for name, value in values.items():
        flag = flag_of(name)
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
            continue
        for text in map(_text, value if isinstance(value, tuple) else (value,)):
            words += [f"{flag}={text}"] if text.startswith("-") else [flag, text]
    return words


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _explain(error: ValidationError) -> ConfigurationError:
    first = error.errors()[0]
    names = [str(part) for part in first["loc"]]
    if not names:
        return ConfigurationError(str(first["msg"]).removeprefix("Value error, "))
    name = names[0]
    if first["type"] == "extra_forbidden":
        known = ", ".join(sorted(Settings.model_fields))
        return ConfigurationError(f"unknown setting {name!r}", f"The settings are: {known}")
    field = Settings.model_fields.get(name)
    meaning = f" ({field.description})" if field and field.description else ""
    reason = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input ")
    value = first.get("input")
    return ConfigurationError(
        f"setting {name}{meaning}: {value!r} {reason}",
        f"Set it with {flag_of(name)}, {ENVIRONMENT_PREFIX}{name.upper()} or {name} in the settings file",
    )


class _Preset(PydanticBaseSettingsSource):
    """The settings of the preset that a source before this one names."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Not used: all values come at once."""
        return None, field_name, False

    def __call__(self) -> dict[str, Any]:
        """The values."""
        name = self.current_state.get("preset")
        return load_preset(str(name)) if name is not None else {}


def _of_model(settings: Settings) -> dict[str, Any]:
    """The settings that the model file brings, if there is one.

    Raises:
        ConfigurationError: the file cannot be used, or one of its settings was given as well.
    """
    if settings.model is None:
        return {}
    twice = [name for name in ("catalog", *REPLACED_FIELDS) if name in settings.model_fields_set]
    if twice:
        raise ConfigurationError(
            f"{twice[0]} does not go with model={settings.model}: the model file brings its own",
            f"Leave {twice[0]} out ({flag_of(twice[0])}, environment, file and preset), or leave --model out",
        )
    return declared_settings(settings.model)


def _rate_or_plan(merged: Settings, given: Mapping[str, Any], file: Path | None) -> dict[str, Any]:
    """Which of rate and plan counts where both were given: the one that was given with the higher precedence.

    Raises:
        ConfigurationError: both were given in the same place.
    """
    if merged.plan is None or not {"rate", "plan"} <= merged.model_fields_set:
        return {}

    in_file = tomllib.loads(file.read_text()) if file else {}
    in_environment = {variable.upper() for variable in os.environ}  # their case does not matter

    def precedence(name: str) -> int:
        return (
            3 if name in given else 2 if ENVIRONMENT_PREFIX + name.upper() in in_environment else int(name in in_file)
        )

    if precedence("rate") == precedence("plan"):
        raise ConfigurationError(
            "rate and plan exclude each other: a plan says the rates itself", "Give one of --rate and --plan"
        )
    return (
        {"plan": None} if precedence("rate") > precedence("plan") else {"rate": Settings.model_fields["rate"].default}
    )


def load_settings(file: Path | None = None, **flags: Any) -> Settings:
    """Settings from flags, environment, file, preset and defaults, in this order of precedence.

    Args:
        file: TOML file; None = none.
        flags: values that were given on the command line; those that are None count as not given.

    Raises:
        ConfigurationError: a value is out of range, a key or the preset is unknown, or the file cannot be read.
    """
    if file is not None:
        with ConfigurationError.reading(file, "settings file", "TOML file", "--config"):
            file.open("rb").close()
    known = {ENVIRONMENT_PREFIX + name.upper() for name in Settings.model_fields}
    for variable in sorted(os.environ):
        if variable.upper().startswith(ENVIRONMENT_PREFIX) and variable.upper() not in known:
            raise ConfigurationError(f"environment variable {variable} names no setting", "Correct or unset it")

    given = {name: value for name, value in flags.items() if value is not None}
    try:
        return _complete(_reader(file, environment=True)(**given), given, file)
    except ValidationError as error:
        raise _explain(error) from None
    except ValueError as error:  # malformed TOML
        raise ConfigurationError(f"settings file {file}: {error}", "Correct the TOML") from None


@functools.cache
def _reader(file: Path | None, *, environment: bool) -> type[Settings]:
    """The settings with their sources beside what is given: the environment or none, a file or none, and the preset."""

    class _Reader(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            sources = [init_settings]
            if environment:
                sources.append(env_settings)
            if file:
                sources.append(TomlConfigSettingsSource(settings_cls, file))
            return (*sources, _Preset(settings_cls))

    return _Reader


def settings_of(values: Mapping[str, Any]) -> Settings:
    """What :func:`load_settings` makes of a file with these values, wherever nothing but the file says anything.

    Raises:
        ConfigurationError: a value is out of range, or a key or the preset is unknown.
    """
    try:
        return _complete(_reader(None, environment=False)(**values), values, None)
    except ValidationError as error:
        raise _explain(error) from None


def _complete(merged: Settings, given: Mapping[str, Any], file: Path | None) -> Settings:
    """With what a model file brings, and with one of rate and plan; as set count those that anybody has said."""
    brought = _of_model(merged)
    chosen = {**brought, **_rate_or_plan(merged, given, file)}
    try:
        settings = Settings.model_validate({**merged.model_dump(), **chosen})
    except ValidationError as error:
        explained, where = _explain(error), error.errors()[0]["loc"]
        if where and where[0] in brought:  # nobody may set it beside the file
            raise ConfigurationError(
                f"model file {merged.model}: {explained.problem}", "Make the file again with ray-pipeline fit"
            ) from None
        raise
    settings.model_fields_set.intersection_update({*merged.model_fields_set, *chosen})
    return settings
