"""Another format on real parts: written to Kafka, windowed by Spark, verified and audited as the contract's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.kafka.client import make_producer
from ray_pipeline.kafka.read import read_compacted, read_topic
from ray_pipeline.kafka.topics import ensure_topics
from ray_pipeline.truth.audit import KINDS
from ray_pipeline.verification.audit import audit
from ray_pipeline.verification.explain import Explainer
from tests.integration.test_truth import later_ms, make_world, run_job, verdicts_of, world_settings

pytestmark = pytest.mark.timeout(300)

WAYS: dict[str, dict[str, Any]] = {
    "avro": {"format": "avro", "schema_registry_url": "mock://integration", "field_names": "userId=user"},
    "protobuf": {"format": "protobuf", "schema_registry_url": "mock://integration", "field_names": "userId=user"},
    "padded": {"field_names": "userId=user,rating=stars", "padding_bytes": 50},
}


@pytest.mark.parametrize("name", WAYS)
def test_the_job_the_oracle_and_the_audit_read_it(name: str, broker: str, tmp_path: Path) -> None:
    settings = world_settings(tmp_path, **WAYS[name])
    ensure_topics(settings, broker)
    world = make_world(settings, broker)
    del world.rounds[2:]
    producer = make_producer(broker)
    rubbish = [
        b"rubbish",
        b"\0\0\0\0\1",
        b"\0\0\0\0\1\0\xff",
        b"\0\0\0\0\1\0",
        b'{"userId":1,"movieId":1,"rating":3.0,"timestamp":1700000040000}',
    ]
    for value in rubbish:
        producer.produce(settings.ratings_topic, key=b"1", value=value, partition=0)
    assert producer.flush(20) == 0
    run_job(world, settings)
    found = verdicts_of(settings, broker).tally(later_ms())
    assert found.wrong == 0 and found.verified + found.late + found.pending > 1, found.first_wrong
    total = sum(world.rounds[-1].values())
    job = read_compacted(broker, settings.job_topic)["job"]
    assert (job["valid"], job["rejected"]) == (total, len(rubbish))
    rejected = read_compacted(broker, settings.rejected_topic).values()
    assert {"rubbish", rubbish[-1].decode()} <= {record["value"] for record in rejected}
    report = audit(settings, broker, processes=1)
    wanted = {"expected": total, "found": total + len(rubbish), "outside": 0, **dict.fromkeys(KINDS, 0)}
    assert report.records == {**wanted, "foreign": len(rubbish)}, report.findings
    assert report.windows["wrong"] == 0 and report.windows["checked"] > 1
    told = Explainer(settings, broker).by_index(1, 5)
    assert told["kafka"]["agrees"] and told["kafka"]["value"] == told["value"]
    assert told["value"].encode() not in {record.value for record in read_topic(broker, settings.ratings_topic)}
