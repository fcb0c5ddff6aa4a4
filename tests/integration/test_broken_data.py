"""A pipeline whose data is broken on purpose in many ways: all is well, the answer key is complete, and marks are right."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tomli_w
from confluent_kafka.admin import NewTopic  # type: ignore[attr-defined]

from ray_pipeline.clock import SystemClock
from ray_pipeline.config import load_settings
from ray_pipeline.events import Fault
from ray_pipeline.kafka.client import make_admin, make_producer
from ray_pipeline.kafka.read import count_records, read_compacted, read_topic
from ray_pipeline.model.catalogue import load_catalogue
from ray_pipeline.truth.replay import ShardReplay, build_models
from ray_pipeline.verification.answers import AnswerFeed, reached_key
from ray_pipeline.verification.audit import audit, published_run
from ray_pipeline.verification.explain import Explainer
from ray_pipeline.verification.grading import grade
from tests.conftest import Running, command, wait_for
from tests.secured import PASSWORD, SecuredBroker

pytestmark = pytest.mark.timeout(300)

NAMES = (
    "ratings", "metrics", "rejected", "progress", "control", "job", "batches", "expected", "truth", "predictions",
    "scores",
)  # fmt: skip
TOPICS = {f"{name}_topic": f"broken.{name}" for name in NAMES}
FLAGS = """
    --rate 600 --no-ui --api-port 0 --tumbling 5 --sliding 10 --slide 5 --watermark 2 --fast
    --late-share 0.1 --late-mean 20 --late-max 60 --disorder-share 0.1 --disorder 2 --duplicate-share 0.05 --drop-share 0.02
    --malformed-share 0.02 --missing-field-share 0.02 --unknown-field-share 0.02 --out-of-range-share 0.02
    --tombstone-share 0.02 --future-share 0.01 --clock-skew 1:-1s --silent 2:every=15s,for=4s
"""


@pytest.fixture(scope="module")
def broker(secured: SecuredBroker) -> str:
    """As the tests themselves read it, which show no password."""
    return secured.bootstrap_servers


def test_all_is_well_with_data_that_is_broken_as_told(
    secured: SecuredBroker, starter: Callable[..., Running], tmp_path: Path
) -> None:
    """And all of it, from the shards to Spark's executor, by way of a broker that wants TLS and a password."""
    settings = secured.with_login("SCRAM-SHA-512", **TOPICS)
    names = ("bootstrap_servers", "security_protocol", "sasl_mechanism", "sasl_username", "ssl_ca")
    file = tmp_path / "settings.toml"
    file.write_text(
        tomli_w.dumps({**{name: str(getattr(settings, name)) for name in names}, "sasl_password": PASSWORD, **TOPICS})
    )
    running = starter("run", "--config", str(file), *shlex.split(FLAGS))
    api, seen = running.info()["urls"]["api"], set()

    def enough() -> bool:
        """What comes before the job's first batch cannot be late, however long the job takes to start."""
        found = httpx.get(f"{api}/metrics/summary", timeout=30).json()
        seen.add(httpx.get(f"{api}/metrics/health", timeout=30).json()["status"])
        return found["generator"]["delivered_total"] > 10_000 and found["job"].get("late_dropped", 0) > 100

    wait_for("ratings that come too late", enough, 150)
    # nothing of the password is on disk: who asks a run of the state directory shows it again
    assert command("rate", "800", "--config", file, "--state-dir", running.state_dir).returncode == 0
    unknown = command("topics", "count", "ratings", "--state-dir", running.state_dir)
    assert unknown.returncode == 4 and "--security-protocol" in unknown.stderr, unknown.stderr
    assert running.end_by_timeout() == 0, running.text
    assert PASSWORD not in running.text and not secret_in(running.state_dir)
    assert "Summary" in running.text and "did not end in order" not in running.text, running.text
    assert "healthy" in seen and "unhealthy" not in seen, running.text

    broker = secured.bootstrap_servers
    assert settings.brokers is not None
    report = audit(settings, settings.brokers)
    sent = count_records(broker, settings.ratings_topic).total
    assert (report.verdict, report.records["expected"]) == ("agreed", sent), report
    assert report.windows["late_dropped"] > 100 and report.windows["checked"] > 10
    assert set(report.by_design) == {fault.name.lower() for fault in Fault if fault}

    cases = _check_key(broker)
    marks = grade(settings, broker, settings.rejected_topic, "rejected")
    assert (marks["precision"], marks["recall"]) == (1.0, 1.0) and marks["expected"] > 600, marks
    _check_future(broker, cases, sent)
    _check_explanations(broker, cases)


def secret_in(folder: Path) -> list[Path]:
    """The files below it that hold the password as it is, or as JSON or JAAS writes it."""
    written = {PASSWORD.encode(), json.dumps(PASSWORD)[1:-1].encode()}
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [file for file in files if any(text in file.read_bytes() for text in written)]


def _check_key(broker: str) -> list[dict[str, Any]]:
    """The answer key is complete, and each place in it is right."""
    settings = load_settings(**TOPICS)
    run = published_run(settings, broker)
    known = read_compacted(broker, settings.truth_topic)
    places: dict[int, list[int]] = {}
    for record in read_topic(broker, settings.ratings_topic):
        places.setdefault(record.partition, []).append(record.offset)
    models = build_models(run.settings, load_catalogue(run.settings), run.progress)
    for p, progress in run.progress.items():
        assert known[reached_key(p)]["index"] == progress.next_index == len(places[p])
        faults = ShardReplay(models[p], progress).events(0, progress.next_index).faults
        assert faults is not None
        for index in np.flatnonzero(faults).tolist():
            case = known[f"{Fault(int(faults[index])).name.lower()}/{p}/{index}"]
            assert case["offset"] == places[p][index]
    cases = [case for case in known.values() if "kind" in case]
    kinds = {case["kind"] for case in cases}
    assert kinds == {*(f.name.lower() for f in Fault if f), "dropped", "silent", "clock_skew"}
    return cases


def _check_future(broker: str, cases: list[dict[str, Any]], sent: int) -> None:
    """Event times of tomorrow were rejected with a reason, and closed no window."""
    rejected = read_compacted(broker, TOPICS["rejected_topic"])
    ahead = {key for key, record in rejected.items() if "ahead" in record["reason"]}
    assert ahead == {f"{c['partition']}/{c['offset']}" for c in cases if c["kind"] == "future"} and len(ahead) > 20
    job = read_compacted(broker, TOPICS["job_topic"])["job"]
    newest_ms = max(said["max_event_ms"] for said in job["partitions"].values())
    assert job["watermark_ms"] <= newest_ms and job["counted"] > 0.7 * sent
    assert all(c["rating"]["timestamp"] > newest_ms for c in cases if c["kind"] == "future")


def _check_explanations(broker: str, cases: list[dict[str, Any]]) -> None:
    explainer = Explainer(load_settings(**TOPICS), broker)
    for kind in ("tombstone", "malformed", "duplicate", "late"):
        case = next(c for c in cases if c["kind"] == kind and c["index"] > 500)
        found = explainer.by_index(case["partition"], case["index"])
        assert found["fault"]["kind"] == kind
        assert (found["kafka"]["offset"], found["kafka"]["agrees"]) == (case["offset"], True)
        assert explainer.by_offset(case["partition"], case["offset"])["index"] == case["index"]


def test_the_answer_key_goes_on_where_it_was(broker: str) -> None:
    """As after a kill: what was written since the last mark is written again, and nothing is different."""
    settings = load_settings(**TOPICS)
    before = read_compacted(broker, settings.truth_topic)
    reached = before[reached_key(0)]
    case = next(c for c in before.values() if c.get("partition") == 0 and c.get("kind") == "late" and c["index"] > 900)
    producer = make_producer(broker)
    mark = {**reached, "index": case["index"], "offset": case["offset"]}
    producer.produce(settings.truth_topic, key=reached_key(0).encode(), value=json.dumps(mark).encode())
    producer.flush(30)
    feed = AnswerFeed(settings, broker, SystemClock())
    feed.start()
    feed.stop(60)
    again = [c for c in before.values() if c.get("partition") == 0 and "kind" in c and c["index"] >= case["index"]]
    assert feed.status() == {"state": "stopped", "reason": "", "published": len(again)}
    assert read_compacted(broker, settings.truth_topic) == before


def test_a_system_that_keeps_too_much_gets_the_marks_it_deserves(broker: str) -> None:
    """Another system's topic: it took repeats out, but forgot one partition."""
    settings = load_settings(**TOPICS)
    known = read_compacted(broker, settings.truth_topic)
    out = {(c["partition"], c["offset"]) for c in known.values() if c.get("kind") == "duplicate" or c.get("rejected")}
    admin = make_admin(broker)  # its futures live as long as it does
    admin.create_topics([NewTopic("broken.clean", 1, 1)])["broken.clean"].result(30)
    producer = make_producer(broker)
    wrong = right = 0
    for record in read_topic(broker, settings.ratings_topic):
        repeated = (record.partition, record.offset) in out
        if repeated and record.partition:
            continue
        wrong, right = wrong + repeated, right + (not repeated)
        producer.produce("broken.clean", value=record.value, partition=0)
        producer.poll(0)
    producer.flush(30)
    marks = grade(settings, broker, "broken.clean", "deduplicated")
    assert (marks["recall"], marks["false_positives"], marks["true_positives"]) == (1.0, wrong, right)
    assert 0.8 < marks["precision"] < 1
    assert len(marks["examples"]["false_positives"]) == 5
