"""Brokers that want TLS, a password or a certificate: everything goes through, and who is not let in is told why."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_pipeline.brokers import Brokers
from ray_pipeline.config import Settings
from ray_pipeline.delivery.factory import open_delivery
from ray_pipeline.errors import BrokerUnavailableError, NotAllowedError
from ray_pipeline.kafka.client import check_broker
from ray_pipeline.kafka.read import count_records, read_topic
from ray_pipeline.kafka.rights import missing_rights
from ray_pipeline.kafka.topics import ensure_topics
from tests.conftest import clean_environment
from tests.contract.test_delivery import batch, expected, progress
from tests.secured import PASSWORD, USERNAME, SecuredBroker

WAYS: dict[str, Callable[..., Settings]] = {
    "plain": lambda broker, **more: broker.with_login("PLAIN", **more),
    "scram": lambda broker, **more: broker.with_login("SCRAM-SHA-512", **more),
    "certificate": lambda broker, **more: broker.with_certificate(**more),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fast", [False, True], ids=["plainly", "fast"])
def test_ratings_are_delivered_and_read(secured: SecuredBroker, way: str, fast: bool) -> None:
    topics = {"ratings_topic": f"secured.{way}.{fast}", "progress_topic": f"secured.{way}.{fast}.progress"}
    settings = WAYS[way](secured, partitions=1, actors=1, fast=fast, **topics)
    brokers = pickle.loads(pickle.dumps(settings.brokers))  # as it gets to an actor
    ensure_topics(settings, brokers)
    delivery = open_delivery(settings, brokers, 0)
    delivery.open(30)
    delivery.send(batch(0, 500))
    delivery.commit(progress(500))
    delivery.close()
    seen = [((r.key or "").encode(), r.value) for r in read_topic(brokers, settings.ratings_topic)]
    assert seen == expected(batch(0, 500))
    # what is not secret about them is what was given, and whoever has it alone is not let in
    assert str(brokers) == settings.bootstrap_servers
    assert count_records(secured.bootstrap_servers, settings.ratings_topic).total == 500
    for shown in (repr(settings), repr(brokers), f"{brokers}", settings.model_dump_json()):
        assert PASSWORD not in shown and "PRIVATE KEY" not in shown


@pytest.mark.parametrize(
    ("changes", "reason", "fix"),
    [
        ({"sasl_password": "wrong"}, "uthentication", "--sasl-password"),
        ({"sasl_username": "nobody"}, "uthentication", "--sasl-username"),
        ({"ssl_ca": "another-ca.pem"}, "certificate verify failed", "--ssl-ca"),
        ({"ssl_ca": None}, "certificate verify failed", "--ssl-ca"),
    ],
    ids=["password", "username", "another CA", "the machine's CAs"],
)
def test_who_is_not_let_in_is_told_why_and_at_once(
    secured: SecuredBroker, changes: dict[str, Any], reason: str, fix: str
) -> None:
    changes = {k: secured.pem / v if k == "ssl_ca" and v else v for k, v in changes.items()}
    settings = secured.with_login("SCRAM-SHA-512", **changes)
    assert settings.brokers is not None
    with pytest.raises(BrokerUnavailableError) as refused:
        check_broker(settings.brokers)
    assert reason in refused.value.problem and secured.login in refused.value.problem
    assert fix in refused.value.fix


def test_who_speaks_in_clear_where_tls_is_wanted_is_told_so(secured: SecuredBroker) -> None:
    with pytest.raises(BrokerUnavailableError) as refused:
        check_broker(Brokers(secured.login), 2.0)
    assert "--security-protocol" in refused.value.fix


def test_who_shows_no_certificate_is_told_why(secured: SecuredBroker) -> None:
    settings = secured.with_certificate(ssl_certificate=None, ssl_key=None)
    assert settings.brokers is not None
    with pytest.raises(BrokerUnavailableError) as refused:
        check_broker(settings.brokers)
    assert "certificate" in refused.value.problem and "--ssl-certificate" in refused.value.fix


def test_what_a_user_may_not_do_is_said_with_where_the_rights_are_listed(secured: SecuredBroker) -> None:
    settings = secured.with_login(
        "PLAIN", partitions=1, actors=1, ratings_topic="else", progress_topic="secured.progress"
    )
    assert settings.brokers is not None
    with pytest.raises(NotAllowedError, match=r"topic else could not be made.*docs/brokers\.md"):
        ensure_topics(settings, settings.brokers)
    ensure_topics(settings, secured.bootstrap_servers)
    there, lacking = missing_rights(settings.brokers, ["else", "secured.progress", "nowhere", "secured.nowhere"])
    assert lacking == ["Describe, Read, Write on topic else", "Describe, Read, Write on topic nowhere"]
    assert there == ["else", "secured.progress", "nowhere"]  # of what it may not see it is not told whether it is there
    delivery = open_delivery(settings, settings.brokers, 0)
    with pytest.raises(NotAllowedError, match=r"shard 0: .*docs/brokers\.md"):
        delivery.open(30)
    delivery.close()


def test_a_learner_of_the_examples_reads_and_writes_there(secured: SecuredBroker, tmp_path: Path) -> None:
    names = ("ratings", "progress", "predictions")
    topics = {f"{name}_topic": f"secured.learned.{name}" for name in names}
    settings = secured.with_login("SCRAM-SHA-512", partitions=1, actors=1, **topics)
    assert settings.brokers is not None
    ensure_topics(settings, settings.brokers)
    delivery = open_delivery(settings, settings.brokers, 0)
    delivery.open(30)
    delivery.send(batch(0, 500))
    delivery.commit(progress(500))
    delivery.close()
    properties = tmp_path / "client.properties"
    lines = {
        "security.protocol": "SASL_SSL",
        "ssl.ca.location": secured.pem / "ca.pem",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": USERNAME,
        "sasl.password": PASSWORD,
    }
    properties.write_text("# of librdkafka\n\n" + "\n".join(f"{name} = {value}" for name, value in lines.items()))
    options = ["--bootstrap-servers", secured.login, "--client-properties", properties, "--ratings", "500"]
    options += ["--ratings-topic", settings.ratings_topic, "--predictions-topic", settings.predictions_topic]
    learner = Path(__file__).parents[2] / "examples" / "online_mf.py"
    done = subprocess.run(
        [sys.executable, learner, *options], capture_output=True, text=True, timeout=60, env=clean_environment()
    )
    assert done.returncode == 0 and "500 ratings predicted" in done.stdout, done.stderr
    assert count_records(secured.bootstrap_servers, settings.predictions_topic).total == 500
