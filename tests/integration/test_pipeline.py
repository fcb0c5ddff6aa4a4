"""One pipeline, started as a user starts it: looked at, controlled, fed with rubbish, killed part by part, stopped, audited."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pandas as pd
import psutil
import pytest

from ray_pipeline.codec import InvalidRating, decode_value
from ray_pipeline.config import load_settings
from ray_pipeline.kafka.broker import EmbeddedBroker
from ray_pipeline.kafka.client import make_producer
from ray_pipeline.kafka.read import read_compacted, read_topic, read_topic_from
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.model.population import build_movies, build_user_map, build_users
from ray_pipeline.model.ratings import ShardModel
from ray_pipeline.windows.reference import Ratings, reference
from ray_pipeline.windows.spec import iso_ms
from tests.conftest import Running, command, has_ended, wait_for

pytestmark = pytest.mark.timeout(400)


class Api:
    """The pipeline's HTTP API."""

    def __init__(self, pipeline: Running) -> None:
        self.url = str(pipeline.info()["urls"]["api"])

    def get(self, path: str) -> Any:
        answer = httpx.get(self.url + path, timeout=20)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, **body: Any) -> Any:
        answer = httpx.post(self.url + path, json=body or None, timeout=20)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def set_rate(self, rate: float) -> None:
        """Returns when the generator follows."""
        self.post("/control/rate", rate=rate)
        wait_for("the rate", lambda: self.get("/metrics/summary")["generator"]["target_rate"] == rate)

    def health(self) -> dict[str, Any]:
        return dict(self.get("/metrics/health"))

    def delivered_rate(self) -> float:
        return float(self.get("/metrics/summary")["generator"]["delivered_rate"])

    def job(self) -> dict[str, Any]:
        return dict(self.get("/metrics/summary")["job"])


@pytest.fixture(scope="module")
def api(pipeline: Running) -> Api:
    return Api(pipeline)


def healthy(api: Api, deadline_s: float = 90.0) -> dict[str, Any]:
    """The first record that says so: the next one may say that somebody was slow to answer."""

    def said() -> dict[str, Any] | None:
        found = api.health()
        return found if found["status"] == "healthy" else None

    found: dict[str, Any] = wait_for("health", said, deadline_s)
    return found


# -- looking


def test_it_starts_says_what_it_does_and_becomes_healthy(pipeline: Running, api: Api) -> None:
    wait_for("the first windows", lambda: api.health()["last_update"])
    found = healthy(api)
    assert found["kafka_connected"] is True and found["reasons"] == []
    for line in ("starting the Kafka broker", "starting Spark on Ray", "stages: ", "dashboard: http", "API: http"):
        assert line in pipeline.text
    wait_for("a status line", lambda: re.search(r"target 200/s, delivered [\d.,]+/s .* lag", pipeline.text))


def test_its_jvms_have_their_classes_from_an_archive(pipeline: Running) -> None:
    """``make install`` made one for the broker and one for the four of Spark; a start would take some seconds more without."""
    jvms = java(pipeline)
    mapped = [{Path(area.path).name.rpartition("-")[0] for area in jvm.memory_maps()} for jvm in jvms]
    found = Counter(name for names in mapped for name in names if name.startswith("classes-"))
    assert found == {"classes-kafka": 1, "classes-spark": 4} and len(jvms) == 5


def test_summary_history_top_movies_and_genres_have_data(api: Api) -> None:
    def two_windows() -> Any:
        found = api.get("/metrics/history")["windows"]
        return found if len(found) >= 2 else None

    windows = wait_for("two windows", two_windows)
    wait_for("a verified window", lambda: api.get("/metrics/verification")["verified"] > 0, 90)
    assert api.get("/metrics/verification")["wrong"] == 0
    checked = api.health()["windows"]
    assert checked["verified"] > 0 and (checked["wrong"], checked["wrong_windows"]) == (0, [])
    assert api.get("/metrics/history")["windows"][0]["verdict"] in ("verified", "late by design")
    assert list(windows[0])[:5] == ["window_start", "window_end", "window_type", "count", "avg_rating"]
    summary = api.get("/metrics/summary")
    assert set(summary["windows"]) == {"tumbling_10s", "sliding_30s_10s"}
    sliding = summary["windows"]["sliding_30s_10s"]
    assert sliding["count"] == sum(sliding["histogram"]) > 0 and 0.5 <= sliding["avg_rating"] <= 5
    top = api.get("/metrics/topn?limit=5&window_type=sliding_30s_10s")["movies"]
    assert len(top) == 5 and all(movie["title"] for movie in top)
    assert [m["count"] for m in top] == sorted((m["count"] for m in top), reverse=True)
    assert api.get("/metrics/genres")["genres"]
    latency = wait_for("latency", lambda: api.get("/metrics/summary")["latency_ms"])
    assert 0 < latency["p50"] <= latency["p95"]


def test_the_stream_sends_events(api: Api) -> None:
    with httpx.stream("GET", api.url + "/metrics/stream", timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.iter_lines()
        assert next(lines) == "event: summary"
        data = next(line for line in lines if line.startswith("data: "))
        assert json.loads(data[6:])["status"] == "ok"


def test_the_live_tail_and_prometheus(api: Api) -> None:
    rows = wait_for("ratings", lambda: api.get("/ratings/tail?limit=5")["ratings"])
    assert len(rows) == 5 and decode_value(rows[0]["value"].encode())
    line = 'ray_pipeline_health{state="healthy"} 1.0'
    wait_for("health", lambda: line in httpx.get(api.url + "/metrics", timeout=20).text)


# -- the command line, while it runs


def test_rate_pause_and_resume_from_the_command_line(pipeline: Running, api: Api) -> None:
    state = ("--state-dir", pipeline.state_dir)
    done = command("rate", "600", *state)
    assert done.returncode == 0 and "target rate 600/s" in done.stdout, done.stderr
    wait_for("600/s", lambda: 540 < api.delivered_rate() < 660)
    assert command("pause", *state).returncode == 0
    wait_for("nothing delivered", lambda: api.delivered_rate() < 5)
    assert api.get("/metrics/summary")["generator"]["state"] == "paused"
    done = command("resume", "--json", *state)
    assert json.loads(done.stdout)["state"] == "running"
    assert command("rate", "200", *state).returncode == 0
    wait_for("200/s", lambda: 180 < api.delivered_rate() < 220)


def test_a_plan_is_followed_and_on_record_at_every_shard(pipeline: Running, api: Api) -> None:
    text = "200 + burst(700 for 3s every 7s)"
    done = command("plan", text, "--state-dir", pipeline.state_dir)
    assert done.returncode == 0 and f"plan {text}" in done.stdout, done.stderr
    for _ in range(2):
        wait_for("a burst", lambda: api.delivered_rate() > 600, 15)
        wait_for("its end", lambda: api.delivered_rate() < 400, 15)
    ahead = api.get("/metrics/plan")
    assert ahead["plan"] == text and max(rate for _, rate in ahead["planned"]) > 600 and ahead["delivered"]
    records = read_compacted(pipeline.info()["bootstrap"], "ratings.progress")
    lived = [record["epochs"][-1] for key, record in records.items() if key.startswith("shard/")]
    assert len(lived) == 4 and {epoch["plan"] for epoch in lived} == {text}
    assert len({epoch["zero_ms"] for epoch in lived}) == 1
    healthy(api)
    api.set_rate(200)


@pytest.fixture
def at_500(api: Api) -> Iterator[float]:
    """The rate is raised from 200/s to 500/s at the time given, epoch milliseconds, and lowered again."""
    wait_for("200/s", lambda: 180 < api.delivered_rate() < 220)
    api.set_rate(500)
    yield time.time() * 1000
    api.set_rate(200)  # also after a failure: all that follows is at 200/s


def test_a_change_shows_in_the_delivered_rate_within_two_seconds(pipeline: Running, api: Api, at_500: float) -> None:
    wait_for("all of it shown", lambda: 450 < api.delivered_rate() < 550)
    wait_for("a second more", lambda: time.time() * 1000 > at_500 + 3_500)
    progress = [r for r in read_topic(pipeline.info()["bootstrap"], "ratings.progress") if r.key and r.value]
    shards = [json.loads(r.value) for r in progress if r.value and str(r.key).startswith("shard/")]

    # what is shown is a mean; what was delivered is at the new rate from the second second on, at each shard from commit to commit
    rate = 0.0
    for partition in range(4):
        mine = [s for s in shards if s["partition"] == partition and 1_000 <= s["committed_ms"] - at_500 <= 3_000]
        rate += (mine[-1]["next_index"] - mine[0]["next_index"]) / (mine[-1]["committed_ms"] - mine[0]["committed_ms"])
    assert rate * 1000 == pytest.approx(500, rel=0.05)


def test_status_and_jobs(pipeline: Running) -> None:
    state = ("--state-dir", pipeline.state_dir)

    def told() -> Any:
        found = json.loads(command("status", "--json", *state).stdout)
        held = {holder["who"]: holder for holder in found["pipelines"][0]["holders"]}
        # Spark tells the memory of its executors with their first heartbeat
        return (found, held) if held.get("Spark executors", {}).get("memory_bytes") else None

    found, held = wait_for("the executors' memory", told)
    (pipeline_record,) = found["pipelines"]
    assert pipeline_record["pid"] == pipeline.process.pid
    settings = load_settings()
    assert {who: holder["cpus"] for who, holder in held.items()} == {
        "generator": settings.actors * 0.25,
        "Spark driver": 0.5,
        "Spark executors": settings.executors * settings.executor_cores,
        "API and dashboard": 0.25,
        "oracle": 0.25,
        "supervisor": 0,
        "Kafka broker": 0,
    }
    # what each of them says for itself is what Ray has given away in all
    cluster = pipeline_record["cluster"]
    assert sum(holder["cpus"] for holder in held.values()) == pytest.approx(cluster["cpus"] - cluster["cpus_free"])
    assert all(holder["memory_bytes"] > 20_000_000 for holder in held.values()), held
    assert held["generator"]["processes"] == settings.actors and held["Spark driver"]["processes"] >= 2
    of_broker = psutil.Process(broker_jvm(pipeline).pid).memory_info().rss
    assert held["Kafka broker"]["memory_bytes"] == pytest.approx(of_broker, rel=0.5)
    assert found["job"]["executors"] == 1
    shown = command("status", *state)
    assert "1 of 1 executors alive" in shown.stdout, shown.stdout + shown.stderr
    assert "streaming (2, 1)" in shown.stdout
    assert "0 wrong" in shown.stdout and all(word in shown.stdout for word in ("expected", "actual", "difference"))
    (row,) = json.loads(command("jobs", "list", "--json", *state).stdout)
    assert row["job"]["state"] == "running" and row["generator"] == {"state": "running", "actors": settings.actors}
    assert row["pid"] == pipeline.process.pid and set(row["stages"]) == {"generate", "process", "serve", "verify"}
    unknown = command("jobs", "stop", "nobody", *state)
    assert unknown.returncode == 2 and "nobody" in unknown.stderr


def test_tail_prints_the_last_ratings_as_they_are(pipeline: Running) -> None:
    done = command("topics", "tail", "ratings", "-n", "3", "--state-dir", pipeline.state_dir)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert all(
        re.fullmatch(r'\{"userId":\d+,"movieId":\d+,"rating":[0-5]\.[05],"timestamp":\d{13}\}', x) for x in lines
    )


def test_a_second_run_in_the_same_state_directory_is_refused(pipeline: Running) -> None:
    done = command("run", "--state-dir", pipeline.state_dir, "--api-port", "0", "--ui-port", "0")
    assert done.returncode == 3 and str(pipeline.process.pid) in done.stderr
    done = command("reset", "--yes", "--state-dir", pipeline.state_dir)
    assert done.returncode == 3 and "Stop it first" in done.stderr


def test_a_port_in_use_is_named(pipeline: Running, api: Api, tmp_path: Any) -> None:
    port = api.url.rsplit(":", 1)[1]
    done = command("run", "--state-dir", tmp_path, "--api-port", port)
    assert done.returncode == 3 and port in done.stderr and "--api-port" in done.stderr


# -- rubbish in the topic


def test_a_window_that_somebody_alters_turns_health_red_within_ten_seconds_until_it_is_right_again(
    pipeline: Running, api: Api
) -> None:
    healthy(api)
    bootstrap, path = pipeline.info()["bootstrap"], "/metrics/history?window_type=tumbling_10s"
    verified = wait_for("it", lambda: [w for w in api.get(path)["windows"] if w["verdict"] == "verified"])
    key = f"tumbling_10s|{verified[0]['window_start']}|total"
    true, producer = read_compacted(bootstrap, "metrics")[key], make_producer(bootstrap)
    producer.produce("metrics", json.dumps({**true, "count": true["count"] + 1}), key)
    assert producer.flush(20) == 0
    wait_for("red", lambda: api.health()["status"] == "unhealthy", 10)
    assert verified[0]["window_start"] in " ".join(api.health()["reasons"])
    told = json.loads(command("status", "--json", "--state-dir", pipeline.state_dir).stdout)["windows"]
    assert told["wrong"] == 1 and verified[0]["window_start"] in told["first_wrong"]
    producer.produce("metrics", json.dumps(true), key)
    assert producer.flush(20) == 0
    healthy(api)


def test_rubbish_is_counted_kept_and_does_not_stop_the_job(pipeline: Running, api: Api) -> None:
    before = api.job()["rejected"]
    producer = make_producer(pipeline.info()["bootstrap"])
    good = {"userId": 1, "movieId": 1, "rating": 3.0, "timestamp": int(time.time() * 1000)}
    rubbish: list[bytes | None] = [
        b"nonsense",
        b'{"userId":1,"movieId":1,"timestamp":1700000000000}',
        json.dumps({**good, "rating": 7.5}).encode(),
        json.dumps({**good, "rating": "high"}).encode(),
        json.dumps({**good, "timestamp": -1}).encode(),
        b"\xff\xfe\x00",
        None,
    ]
    for value in rubbish:
        producer.produce("ratings", key=b"1", value=value, partition=0)
    assert producer.flush(20) == 0
    wait_for("rejects", lambda: api.job()["rejected"] == before + len(rubbish))

    def shown() -> Any:
        rows = api.get("/ratings/rejected")["rejected"]
        return rows if len(rows) >= len(rubbish) else None

    rows = wait_for("rejects shown", shown)
    kept = read_compacted(pipeline.info()["bootstrap"], "ratings.rejected")
    assert len(kept) == before + len(rubbish)
    assert {row["value"] for row in kept.values()} >= {"nonsense", None}
    assert all(row["reason"] and key == f"{row['partition']}/{row['offset']}" for key, row in kept.items())
    assert rows[0]["reason"]
    batch = api.job()["batch"]
    wait_for("more batches", lambda: api.job()["batch"] > batch + 2)
    # and health says that somebody else has written
    wait_for("health", lambda: "no shard sent" in " ".join(api.health()["reasons"]), 40)


# -- a batch job beside the stream


def test_windows_keep_coming_while_a_batch_job_runs(pipeline: Running, api: Api, tmp_path: Any) -> None:
    first = api.job()["batch"]
    done = command("batch", "--json", "--parquet", tmp_path / "report", "--state-dir", pipeline.state_dir)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["total"] == sum(row["count"] for row in report["histogram"]) > 1000
    assert report["rejected"] == 7 and report["genres"] and report["top_movies"][0]["rank"] == 1
    # as Spark's scheduler has it: the file of pools was read, and the stages of both ran in theirs
    pools = {pool["name"]: (pool["weight"], pool["min_share"]) for pool in api.job()["pools"]}
    assert pools == {"streaming": (2, 1), "batch": (1, 1), "generator": (1, 1), "default": (1, 0)}
    assert report["pool"] == "batch" and api.job()["pool"] == "streaming"
    assert api.job()["batch"] > first
    # and not only before and after it
    batches = read_compacted(pipeline.info()["bootstrap"], "metrics.batches").values()
    assert any(report["started_ms"] < batch["at_ms"] < report["ended_ms"] for batch in batches)
    assert pd.read_parquet(tmp_path / "report" / "histogram.parquet")["count"].sum() == report["total"]


def test_history_is_the_same_from_any_number_of_tasks_and_as_it_was_sent(pipeline: Running, tmp_path: Any) -> None:
    tables = []
    for tasks in (1, 3):
        folder = tmp_path / f"by-{tasks}"
        where = ("--to", folder.as_uri(), "--state-dir", pipeline.state_dir)
        done = command("backfill", "--events", "5000", "--tasks", str(tasks), "--json", *where)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["events"] == 5000 and json.loads(done.stdout)["pool"] == "generator"
        assert len(list(folder.glob("*.parquet"))) == tasks
        tables.append(pd.read_parquet(folder).sort_values(["partition", "index"], ignore_index=True))
    assert tables[0].equals(tables[1]) and len(tables[0]) == 5000
    taken = command("backfill", "--events", "5000", *where)
    assert taken.returncode == 2 and "something at" in taken.stderr
    bootstrap = pipeline.info()["bootstrap"]
    for partition in range(2):
        mine = tables[0][tables[0]["partition"] == partition]
        valid = (v for v in (_valid(r.value) for r in read_topic_from(bootstrap, "ratings", partition, 0)) if v)
        sent = [next(valid) for _ in range(len(mine))]
        names = {"user_id": "userId", "movie_id": "movieId", "rating": "rating", "timestamp": "timestamp"}
        assert all(mine[ours].tolist() == [r[theirs] for r in sent] for ours, theirs in names.items())


def _valid(value: bytes | None) -> dict[str, Any] | None:
    try:
        return decode_value(value)
    except InvalidRating:
        return None


# -- killing


def descendants(pipeline: Running) -> list[psutil.Process]:
    return psutil.Process(pipeline.process.pid).children(recursive=True)


def java(pipeline: Running, *words: str) -> list[psutil.Process]:
    """JVMs that have all these words in their command lines; other processes may end in this moment, as Spark's many short ones."""
    found = []
    for process in descendants(pipeline):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name() == "java" and set(words) <= set(process.cmdline()):
                found.append(process)
    return found


def executor_jvm(pipeline: Running) -> psutil.Process:
    """The newest Java worker of Ray: its master comes before its executors."""
    return max(java(pipeline, "io.ray.runtime.runner.worker.DefaultWorker"), key=lambda p: p.create_time())


def broker_jvm(pipeline: Running) -> psutil.Process:
    (broker,) = java(pipeline, "kafka.Kafka")
    return broker


def generator_actor(pipeline: Running, api: Api) -> psutil.Process:
    return psutil.Process(api.get("/metrics/summary")["generator"]["actors"][0]["pid"])


def spark_driver(pipeline: Running, api: Api) -> psutil.Process:
    return psutil.Process(api.job()["pid"])


@pytest.mark.parametrize(
    ("part", "victim"),
    [
        ("a generator actor", lambda pipeline, api: generator_actor(pipeline, api)),
        ("the Spark executor", lambda pipeline, api: executor_jvm(pipeline)),
        ("the Spark driver's actor", lambda pipeline, api: spark_driver(pipeline, api)),
        ("the broker", lambda pipeline, api: broker_jvm(pipeline)),
    ],
    ids=["generator", "executor", "driver", "broker"],
)
def test_it_recovers_from_sigkill(
    pipeline: Running, api: Api, part: str, victim: Callable[[Running, Api], psutil.Process]
) -> None:
    process = victim(pipeline, api)
    os.kill(process.pid, signal.SIGKILL)
    wait_for(f"{part} is gone", lambda: has_ended(process), 10)
    killed_ms = time.time() * 1000

    def recovered() -> bool:
        assert pipeline.process.poll() is None, pipeline.text
        summary = api.get("/metrics/summary")
        job, generator = summary["job"], summary["generator"]
        fresh = max((p["max_event_ms"] for p in job.get("partitions", {}).values()), default=0) > killed_ms + 2_000
        rate = 150 < generator["delivered_rate"] < 260
        return bool(fresh and rate and job["state"] == "running" and job["executors"] == 1 and job["lag"] < 1000)

    wait_for(f"recovery from the death of {part}", recovered, 150)


# -- the end


def test_it_ends_in_order_and_every_rating_is_in_kafka_once_and_counted_once(pipeline: Running) -> None:
    children = descendants(pipeline)
    raylet = next(process for process in children if process.name() == "raylet")
    session = Path(next(a for a in raylet.cmdline() if a.startswith("--session_dir=")).partition("=")[2])
    assert any(file.name.startswith("librocksdbjni") for file in (session / "java").iterdir()), "of two killed JVMs"
    assert pipeline.end() == 0, pipeline.text
    assert "Summary" in pipeline.text
    gone, alive = psutil.wait_procs(children, timeout=20)
    assert alive == [], [p.cmdline() for p in alive]
    del gone
    assert {entry.name for entry in session.iterdir()} == {"logs", "ray-pipeline.json"}
    settings = load_settings(state_dir=pipeline.state_dir)
    broker = EmbeddedBroker(pipeline.state_dir)
    broker.start()
    try:
        progress = read_compacted(broker.bootstrap_servers, "ratings.progress")
        metrics = read_compacted(broker.bootstrap_servers, "metrics")
        job = read_compacted(broker.bootstrap_servers, "metrics.progress")["job"]
        records = defaultdict(list)
        for record in read_topic(broker.bootstrap_servers, "ratings"):
            records[record.partition].append(record.value)
    finally:
        broker.stop()
    valid: list[dict[str, Any]] = []
    movies = build_movies(settings, load_catalogue(settings))
    user_map = build_user_map(settings)
    foreign = 0
    for partition in range(settings.partitions):
        mine = []
        for value in records[partition]:
            try:
                mine.append(decode_value(value))
            except InvalidRating:
                foreign += 1
        sent = progress[f"shard/{partition}"]["next_index"]
        drawn = ShardModel(settings, partition, build_users(settings, user_map.users_of(partition)), movies).draw(
            0, sent
        )
        assert [r["userId"] for r in mine] == drawn.user_ids.tolist()
        assert [r["movieId"] for r in mine] == drawn.movie_ids.tolist()
        assert [r["rating"] * 2 for r in mine] == drawn.half_stars.tolist()
        valid += mine
    assert (foreign, job["rejected"]) == (7, 7)
    assert job["state"] == "stopped"
    assert (job["valid"], job["counted"] + job["late_dropped"]) == (len(valid), len(valid))
    check_windows(metrics, valid, int(job["late_dropped"]))
    check_archive(pipeline, valid, int(job["counted"]))


def check_windows(metrics: dict[str, dict[str, Any]], valid: list[dict[str, Any]], late: int) -> None:
    """Every tumbling and sliding window against the reference on what is in Kafka."""
    columns = Ratings(
        np.array([r["movieId"] for r in valid]),
        np.array([r["rating"] for r in valid]),
        np.array([r["timestamp"] for r in valid]),
    )
    missing = 0
    for name, size, slide in (("tumbling_10s", 10_000, 10_000), ("sliding_30s_10s", 30_000, 10_000)):
        truth = reference([columns], size, slide, 10**15).windows
        for start, window in truth.items():
            record = metrics.get(f"{name}|{iso_ms(start)}|total", {"count": 0})
            if record["count"] != window.count:
                assert record["count"] < window.count
                missing += (window.count - record["count"]) if name == "tumbling_10s" else 0
                continue
            assert record["histogram"] == window.histogram()
            top = metrics[f"{name}|{iso_ms(start)}|topn"]["movies"]
            assert [(m["movieId"], m["count"], m["avg_rating"]) for m in top] == window.top(100)
    assert missing == late


def check_archive(pipeline: Running, valid: list[dict[str, Any]], counted: int) -> None:
    """What plain pandas finds: every valid rating of the topic once, whatever was killed, and every window."""
    rows = pd.read_parquet(pipeline.state_dir / "archive" / "ratings")
    assert not rows.duplicated(["partition", "offset"]).any()
    rows = rows.sort_values(["partition", "offset"])
    names = ["userId", "movieId", "rating", "timestamp"]
    assert rows[names].to_dict("records") == valid
    at = pd.to_datetime(rows["timestamp"], unit="ms", utc=True)
    assert (at.dt.strftime("%Y-%m-%d") == rows["date"].astype(str)).all()
    assert (at.dt.hour == rows["hour"].astype(int)).all()
    windows = pd.read_parquet(pipeline.state_dir / "archive" / "windows")
    assert not windows.duplicated(["window_type", "window_start"]).any()
    tumbling = windows[windows["window_type"] == "tumbling_10s"]
    assert tumbling["count"].sum() == counted and tumbling["final"].sum() > 5


def test_commands_that_read_work_after_the_end(pipeline: Running) -> None:
    assert pipeline.process.poll() == 0
    done = command("topics", "count", "ratings", "--json", "--state-dir", pipeline.state_dir)
    found = json.loads(done.stdout)
    assert found["total"] == sum(found["partitions"].values()) > 1000
    done = command("topics", "count", "ratings", "--state-dir", pipeline.state_dir)
    assert f"Total: {found['total']}" in done.stdout
    done = command("status", "--state-dir", pipeline.state_dir)
    assert done.returncode == 2 and "no pipeline runs" in done.stderr


def test_the_audit_finds_what_was_added_and_nothing_else(pipeline: Running) -> None:
    done = command("audit", "--json", "--state-dir", pipeline.state_dir)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["verdict"] == "disagreed", done.stderr
    wrong = {kind: n for kind, n in found["records"].items() if n and kind not in ("expected", "found")}
    assert wrong == {"foreign": 7}, found["findings"]
    assert found["windows"]["wrong"] == 0 and found["windows"]["checked"] > 10, found["findings"]
    shown = command("explain", "--partition", "1", "--index", "0", "--state-dir", pipeline.state_dir)
    assert shown.returncode == 0 and "in Kafka at offset 0: the same" in shown.stdout, shown.stdout + shown.stderr
