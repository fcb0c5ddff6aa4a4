"""Rate shapes: what a text means, that counts are those of a slow integral, and that they can be had from anywhere."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_pipeline.config import load_settings
from ray_pipeline.errors import ConfigurationError, PlanError
from ray_pipeline.rates.curve import NEVER_MS, Curve
from ray_pipeline.rates.language import curve_of, parse_plan
from ray_pipeline.rates.shapes import UNIT

HOUR_MS, DAY_MS = 3_600_000, 86_400_000


@dataclass(frozen=True)
class Naive:
    """A plan's text beside its rate as a plain function of the time in ms."""

    text: str
    rate: Callable[[float], float]
    length_ms: int | None


lengths = st.integers(100, 1_200)
values = st.sampled_from([0.0, 0.5, 20.0, 333.0, 5_000.0])


def constant(rate: float) -> Naive:
    return Naive(f"{rate}", lambda _: rate, None)


def ramp(first: float, last: float, length: int) -> Naive:
    return Naive(f"ramp({first}..{last}, {length}ms)", lambda t: first + (last - first) * t / length, length)


def sine(mean: float, part: float, period: int, phase: int) -> Naive:
    text = f"sine(mean={mean}, amplitude={mean * part}, period={period}ms, phase={phase}ms)"
    return Naive(text, lambda t: mean * (1 + part * math.sin(2 * math.pi * (t + phase) / period)), None)


def burst(rate: float, length: int, gap: int, after: int) -> Naive:
    text = f"burst({rate} for {length}ms every {length + gap}ms after {after}ms)"
    return Naive(text, lambda t: rate if t >= after and (t - after) % (length + gap) < length else 0.0, None)


def spike(peak: float, rise: int, hold: int, fall: int) -> Naive:
    def rate(t: float) -> float:
        up = min(t / rise, 1.0, (rise + hold + fall - t) / fall)
        return peak * up * up * (3 - 2 * up)

    text = f"spike(peak={peak}, rise={rise}ms, fall={fall}ms, hold={hold}ms)"
    return Naive(text, rate, rise + hold + fall)


def cut(one: Naive, length: int) -> Naive:
    end = length if one.length_ms is None else min(length, one.length_ms)
    return Naive(f"({one.text}) for {length}ms", lambda t: one.rate(t) if t < end else 0.0, length)


def chain(first: Naive, second: Naive, length: int) -> Naive:
    first = cut(first, length)
    end = None if second.length_ms is None else length + second.length_ms
    text = f"{first.text} then ({second.text})"
    return Naive(text, lambda t: first.rate(t) if t < length else second.rate(t - length), end)


def total(one: Naive, other: Naive) -> Naive:
    ends = [n.length_ms for n in (one, other) if n.length_ms is not None]

    def rate(t: float) -> float:
        return sum(n.rate(t) for n in (one, other) if n.length_ms is None or t < n.length_ms)

    return Naive(f"({one.text}) + ({other.text})", rate, max(ends) if len(ends) == 2 else None)


def loop(one: Naive, length: int) -> Naive:
    one = cut(one, length)
    return Naive(f"loop({one.text})", lambda t: one.rate(t % length), None)


plans = st.recursive(
    st.one_of(
        st.builds(constant, values),
        st.builds(ramp, values, values, lengths),
        st.builds(sine, values, st.sampled_from([0.0, 0.5, 1.0]), lengths, lengths),
        st.builds(burst, values, lengths, lengths, lengths),
        st.builds(spike, values, lengths, lengths, lengths),
    ),
    lambda inner: st.one_of(
        st.builds(cut, inner, lengths),
        st.builds(chain, inner, inner, lengths),
        st.builds(total, inner, inner),
        st.builds(loop, inner, lengths),
    ),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(0, 4_000))
def test_what_is_due_is_the_integral_of_the_rate(plan: Naive, until: int) -> None:
    shape = parse_plan(plan.text)
    assert shape.length_ms == plan.length_ms
    ends = until if plan.length_ms is None else min(until, plan.length_ms)
    slow = sum(plan.rate(t + 0.5) for t in range(ends)) / 1000
    assert Curve(shape).upto(until) / UNIT == pytest.approx(slow, abs=0.05, rel=2e-4)  # within a step of a curve
    assert shape.peak >= max((plan.rate(t + 0.5) for t in range(ends)), default=0) * 1e9 * (1 - 1e-12)


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(1, 2_000), st.integers(0, 10**6), st.data())
def test_times_invert_counts_and_any_of_them_can_be_had_alone(
    plan: Naive, count: int, first: int, data: object
) -> None:
    assert isinstance(data, st.DataObject)
    units = (np.arange(first, first + count) + 0.5) * UNIT
    times = Curve(parse_plan(plan.text)).time_of(units)
    assert (np.diff(times) >= 0).all()
    at = data.draw(st.integers(0, count))
    fresh = Curve(parse_plan(plan.text))
    assert (np.concatenate([fresh.time_of(units[at:]), fresh.time_of(units[:at])]) == np.roll(times, -at)).all()
    mixed = np.random.default_rng(at).permutation(count)
    assert (fresh.time_of(units[mixed]) == times[mixed]).all()
    for n in {0, at - 1, count - 1} & set(range(count)):
        if times[n] < NEVER_MS:
            assert fresh.upto(int(times[n])) <= units[n] + 2 and fresh.upto(int(times[n]) + 1) >= units[n] - 2


def test_a_day_curve_is_exact_after_years_and_remembers_no_more_than_it_must() -> None:
    curve = Curve(parse_plan("sine(mean=300, amplitude=200, period=24h)"))
    per_day = 300 * 86_400
    assert [curve.upto(days * DAY_MS) for days in (1, 30, 3_650)] == [d * per_day * UNIT for d in (1, 30, 3_650)]
    assert curve.rate_at(3_650 * DAY_MS + 6 * HOUR_MS) == pytest.approx(500, rel=1e-4)
    assert curve.rate_at(3_650 * DAY_MS + 18 * HOUR_MS) == pytest.approx(100, rel=1e-4)
    for days in range(0, 2_000, 10):
        assert curve.time_of(np.array([days * per_day * UNIT + 1.0]))[0] // 1000 == days * 86_400
    assert curve._block.cache_info().currsize <= 64


def test_fractions_below_one_a_second() -> None:
    for text, gap_ms in (("0.2", 5_000), ("30/min", 2_000), ("1/h", 3_600_000)):
        times = Curve(parse_plan(text)).time_of((np.arange(5) + 0.5) * UNIT)
        assert np.diff(times) == pytest.approx([gap_ms] * 4, abs=1 + gap_ms / 10_000), text


def test_the_sum_binds_tighter_than_the_sequence_and_for_tighter_than_both() -> None:
    curve = Curve(parse_plan("10 for 1s then 20 + burst(100 for 1s every 2s)"))
    assert [curve.rate_at(t) for t in (500, 1_500, 2_500, 3_500)] == [10, 120, 20, 120]
    assert [Curve(parse_plan("100 + 50 for 1s")).rate_at(t) for t in (500, 1_500)] == [150, 100]
    ended = Curve(parse_plan("step(100..300, by=100, every=1s)"))
    assert [ended.rate_at(t) for t in (500, 1_500, 2_500, 3_500)] == [100, 200, 300, 0]
    assert ended.total() == 600 * UNIT and ended.time_of(np.array([601.0 * UNIT]))[0] == NEVER_MS
    assert parse_plan("loop(5 for 1s, times=3)").length_ms == 3_000


def berlin(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo("Europe/Berlin")).timestamp() * 1000)


@pytest.mark.parametrize("zero", ["2026-03-01T12:34", "2026-07-31T23:59", "2026-07-31T20:00"])
def test_a_day_curve_has_its_crest_at_the_time_of_day_that_is_named(zero: str) -> None:
    text = 'sine(mean=300, amplitude=200, period=24h, crest="20:00", zone="Europe/Berlin")'
    zero_ms = berlin(zero)
    for plan, later_ms in ((text, 0), (f"5 for 90m then {text}", 90 * 60_000)):
        curve = curve_of(plan, zero_ms)
        after_ms = berlin(f"{zero[:10]}T20:00") + DAY_MS - zero_ms
        assert after_ms > later_ms
        assert curve.rate_at(after_ms) == pytest.approx(500, rel=1e-4)
        assert curve.rate_at(after_ms + 12 * HOUR_MS) == pytest.approx(100, rel=1e-3)


@pytest.mark.parametrize("zero", ["2026-03-01T12:34", "2025-12-31T00:00", "2026-03-28T09:30"])
def test_cron_windows_open_by_the_wall_clock_of_their_zone_in_summer_and_winter(zero: str) -> None:
    zero_ms = berlin(zero)
    curve = curve_of('1 + cron("0 9 * * MON-FRI", length=8h, rate=500, zone="Europe/Berlin")', zero_ms)

    def rate(text: str) -> float:
        return curve.rate_at(berlin(text) - zero_ms)

    friday, monday, sunday = "2026-03-27", "2026-03-30", "2026-03-29"  # summer time begins on the Sunday
    if zero < friday:
        assert [rate(f"{friday}T{hour}") for hour in ("08:59", "09:00", "16:59", "17:00")] == [1, 501, 501, 1]
    assert [rate(f"{monday}T{hour}") for hour in ("08:59", "09:00", "16:59", "17:00")] == [1, 501, 501, 1]
    assert rate(f"{sunday}T12:00") == 1
    assert [rate(f"2026-10-26T{hour}") for hour in ("08:59", "09:00", "17:00")] == [1, 501, 1]
    days = [curve.upto(berlin(f"2026-04-{d:02}T00:00") - zero_ms) for d in (1, 2)]
    assert (days[1] - days[0]) / UNIT == pytest.approx(86_400 + 8 * 3600 * 500)


def test_a_cron_window_that_is_open_at_the_beginning_counts_from_there_and_overlaps_do_not_add_up() -> None:
    noon_ms = berlin("2026-06-01T12:00")
    open_ = curve_of('cron("0 9 * * *", length=8h, rate=100, zone="Europe/Berlin")', noon_ms)
    assert open_.rate_at(0) == 100 and open_.upto(DAY_MS) / UNIT == pytest.approx(8 * 3600 * 100)
    over = curve_of('cron("*/10 * * * *", length=15m, rate=100)', noon_ms)
    assert over.upto(HOUR_MS) / UNIT == pytest.approx(3600 * 100)


@pytest.mark.parametrize(
    ("text", "place", "expected"),
    [
        ("", 1, "a rate such as"),
        ("ramp(0..500 10m)", 13, "ramp(0..500, 10m)"),
        ("rampp(0..5, 1m)", 1, "burst, spike, cron, loop"),
        ("500 for 10", 9, "a length such as"),
        ("500 then 3", 5, "give it a length"),
        ("100 + -3", 7, "never below 0"),
        ("sine(mean=1, amplitude=2, period=1h)", 6, "not above the mean"),
        ('sine(mean=1, amplitude=1, period=24h, crest="8")', 45, "a time of day such as"),
        ('sine(mean=1, amplitude=1, period=24h, zone="UTC")', 6, "crest with a zone"),
        ("sine(mean=1)", 12, "amplitude="),
        ("sine(mean=1, mean=2)", 14, "amplitude="),
        ("burst(1 for 3s every 2s)", 16, "shorter than the time"),
        ("burst(1 for 3ms every 9ms)", 23, "at least 100ms"),
        ("loop(5)", 6, "a plan that ends"),
        ("step(1..10, by=4, every=1m)", 11, "whole steps"),
        ("99_000_000", 1, "at most 10,000,000/s"),
        ("5/day", 3, "s, min or h"),
        ('cron("0 9 * *", length=1h, rate=3)', 6, "five fields"),
        ('cron("0 9 30 2 *", length=1h, rate=3)', 6, "day-of-month"),
        ('cron("0 9 * * *", length=1h, rate=3, zone="Mars/Base")', 43, "a time zone such as"),
        ('loop(cron("* * * * *", length=1s, rate=1) for 1m)', 11, "no cron windows inside loop"),
        ("5 % 3", 3, "a rate, a name or a sign"),
        ("(" * 30, 21, "levels of brackets"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_its_place(text: str, place: int, expected: str) -> None:
    with pytest.raises(PlanError) as caught:
        parse_plan(text)
    said = str(caught.value)
    assert f"character {place}:" in said and expected in said and "▶" in said and "\n" not in said
    assert str(pickle.loads(pickle.dumps(caught.value))) == said


def test_a_plan_that_reaches_more_than_can_be_is_refused() -> None:
    with pytest.raises(PlanError, match="18,000,000/s, more than 10,000,000/s"):
        parse_plan("9000000 + burst(9000000 for 1s every 1m)")
    with pytest.raises(PlanError, match="characters"):
        parse_plan("1 + " * 2_000 + "1")


def test_as_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(plan="  500   for 10m ").plan == "500 for 10m"
    with pytest.raises(ConfigurationError, match=r"setting plan .*character 9: expected a length.*--plan"):
        load_settings(plan="500 for x")
    with pytest.raises(ConfigurationError, match="rate and plan exclude each other"):
        load_settings(plan="500", rate="3")
    monkeypatch.setenv("RAY_PIPELINE_PLAN", "7 for 1m")
    by_flag = load_settings(rate="3")
    assert (by_flag.rate, by_flag.plan) == (3.0, None)
    with pytest.raises(ConfigurationError, match="speed=max needs start_time_ms"):
        load_settings(speed="max")
    with pytest.raises(ConfigurationError, match="setting speed"):
        load_settings(speed="0.5", start_time_ms="1")
