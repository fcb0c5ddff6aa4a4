"""Settings: precedence, and errors that name the setting and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_pipeline.brokers import librdkafka_settings, spark_options
from ray_pipeline.command.documenting import settings_page
from ray_pipeline.config import Settings, flag_of, load_settings
from ray_pipeline.errors import ConfigurationError


def test_flag_beats_environment_beats_file_beats_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("rate = 7\nseed = 7\nactors = 3\n")
    monkeypatch.setenv("RAY_PIPELINE_RATE", "8")
    monkeypatch.setenv("RAY_PIPELINE_SEED", "8")
    settings = load_settings(file, rate="9", users=None)
    assert (settings.rate, settings.seed, settings.actors, settings.users) == (9.0, 8, 3, 138_493)


def test_a_preset_beats_defaults_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('preset = "quiet"\nmovies = 300\n')
    monkeypatch.setenv("RAY_PIPELINE_USERS", "400")
    settings = load_settings(file, rate="9")
    assert (settings.rate, settings.users, settings.movies, settings.partitions) == (9.0, 400, 300, 1)
    monkeypatch.setenv("RAY_PIPELINE_PRESET", "movielens")
    assert load_settings(file).factor_share == 0.1
    assert load_settings(file, preset="quiet").factor_share == Settings.model_fields["factor_share"].default


@pytest.mark.parametrize(
    ("given", "actors"), [({}, 2), ({"partitions": "1"}, 1), ({"partitions": 8}, 2), ({"preset": "quiet"}, 1)]
)
def test_actors_that_nobody_names_are_no_more_than_partitions(given: dict[str, object], actors: int) -> None:
    assert load_settings(**given).actors == actors
    with pytest.raises(ConfigurationError, match="actors=2 is more than partitions=1"):
        load_settings(partitions=1, actors=2)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"'loud' does not exist\. The presets are: .*movielens"):
        load_settings(preset="loud")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"rate": "0"}, "rate"),
        ({"rate": "-3"}, "rate"),
        ({"rate": "fast"}, "rate"),
        ({"rate": "nan"}, "rate"),
        ({"rate": "inf"}, "rate"),
        ({"duration_s": "10", "ratings": "10"}, "duration_s and ratings"),
        ({"partitions": "2", "actors": "3"}, "actors=3"),
        ({"factor_share": "0.9"}, "factor_share"),
        ({"sliding_s": "100"}, "sliding_s=100"),
        ({"executor_memory": "lots"}, "executor_memory"),
        ({"delivery": "maybe"}, "delivery"),
        ({"fast": "yes", "delivery": "at-least-once"}, "fast=True does not go with delivery=at-least-once"),
        ({"sink": "ndjson", "ratings": "5"}, "sink=ndjson needs a file"),
        ({"sink": "parquet", "output": "x"}, "sink=parquet makes a file that must end"),
        ({"output": "x"}, "output=x does not go with sink=kafka"),
        ({"api_port": "70000"}, "api_port"),
        ({"security_protocol": "ssl3"}, "security_protocol"),
        ({"security_protocol": "SASL_SSL", "sasl_username": "me"}, "needs sasl_mechanism and sasl_password"),
        ({"sasl_password": "hush"}, "sasl_password does not go with security_protocol=PLAINTEXT"),
        ({"ssl_ca": "ca.pem"}, "ssl_ca does not go with security_protocol=PLAINTEXT"),
        ({"security_protocol": "SSL", "ssl_key": "key.pem"}, "ssl_certificate and ssl_key go together"),
        ({"stop_timeout_s": "inf"}, "stop_timeout_s"),
        ({"stop_timeout_s": "nan"}, "stop_timeout_s"),
        ({"stop_timeout_s": "1e300"}, "--stop-timeout"),
        ({"control_token": "pässwört1"}, "--control-token"),
        ({"control_token": "secret token "}, "printable ASCII"),
        ({"control_token": "two\nlines of it"}, "printable ASCII"),
        ({"metrics_topic": "ratings"}, "--ratings-topic or --metrics-topic"),
        ({"scores_topic": "mine", "control_topic": "mine"}, "control_topic and scores_topic are both 'mine'"),
        ({"start_time_ms": "0"}, "epoch milliseconds"),
        ({"start_time_ms": "1700000000000000"}, "epoch milliseconds"),
        ({"start_time_ms": "1700000000000000000"}, "--start-time"),
        ({"mean_rating": "35"}, "before it is rounded and cut off"),
        ({"rating_sd": "21"}, "rating_sd"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_value_is_named_with_a_fix(flags: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings(**flags)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_token_that_a_header_can_carry_is_taken() -> None:
    assert load_settings(control_token="a token: {of} #1~").control_token == "a token: {of} #1~"


@pytest.mark.parametrize("variable", ["RAY_PIPELINE_RATE", "ray_pipeline_rate", "Ray_Pipeline_Rate"])
def test_the_case_of_an_environment_variable_does_not_change_its_precedence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('plan = "100"\n')
    monkeypatch.setenv(variable, "77")
    settings = load_settings(file)
    assert (settings.rate, settings.plan) == (77.0, None)
    assert load_settings(file, plan="50").plan == "50"
    monkeypatch.setenv("ray_pipeline_plan", "50")
    with pytest.raises(ConfigurationError, match="exclude each other"):
        load_settings(file)
    monkeypatch.setenv("ray_pipeline_rte", "7")
    with pytest.raises(ConfigurationError, match="ray_pipeline_rte names no setting"):
        load_settings()


@pytest.mark.parametrize("protocol", ["SSL", "SASL_PLAINTEXT", "SASL_SSL"])
def test_both_families_of_clients_connect_as_the_settings_say(tmp_path: Path, protocol: str) -> None:
    for name, kind in (("ca", "CERTIFICATE"), ("certificate", "CERTIFICATE"), ("key", "PRIVATE KEY")):
        (tmp_path / f"{name}.pem").write_text(f"-----BEGIN {kind}-----\n{name}\n")
    given: dict[str, object] = {"security_protocol": protocol, "bootstrap_servers": "kafka:9093"}
    if protocol.startswith("SASL"):
        given |= {"sasl_mechanism": "SCRAM-SHA-256", "sasl_username": "me", "sasl_password": 'a"b\\c'}
    if protocol.endswith("SSL"):
        given |= {f"ssl_{name}": tmp_path / f"{name}.pem" for name in ("ca", "certificate", "key")}
    brokers = load_settings(**given).brokers
    assert brokers is not None and brokers == "kafka:9093"
    ours, spark = librdkafka_settings(brokers), spark_options(brokers)
    for name in ("bootstrap.servers", "security.protocol", "sasl.mechanism"):
        assert ours.get(name) == spark.get(f"kafka.{name}"), name
    assert ours["security.protocol"] == protocol
    if protocol.startswith("SASL"):
        assert (ours["sasl.username"], ours["sasl.password"]) == ("me", 'a"b\\c')
        assert spark["kafka.sasl.jaas.config"].endswith(
            'ScramLoginModule required username="me" password="a\\"b\\\\c";'
        )
    if protocol.endswith("SSL"):
        of_java = ("ssl.truststore.certificates", "ssl.keystore.certificate.chain", "ssl.keystore.key")
        for ours_name, java_name in zip(("ssl.ca.pem", "ssl.certificate.pem", "ssl.key.pem"), of_java, strict=True):
            assert ours[ours_name] == spark[f"kafka.{java_name}"] != ""
        assert spark["kafka.ssl.truststore.type"] == spark["kafka.ssl.keystore.type"] == "PEM"
    assert set(librdkafka_settings("kafka:9092")) == {"bootstrap.servers"}


@pytest.mark.parametrize(
    ("name", "content", "problem", "fix"),
    [
        ("ssl_ca", None, "does not exist", "PEM file"),
        ("ssl_ca", "-----BEGIN PRIVATE KEY-----", "holds no certificate", "--ssl-ca"),
        ("ssl_key", "-----BEGIN RSA PRIVATE KEY-----", "holds no private key", "openssl pkcs8"),
    ],
)
def test_a_file_that_is_no_certificate_or_key_is_named_with_a_fix(
    tmp_path: Path, name: str, content: str | None, problem: str, fix: str
) -> None:
    good, bad = tmp_path / "good.pem", tmp_path / "bad.pem"
    good.write_text("-----BEGIN CERTIFICATE-----\n-----BEGIN PRIVATE KEY-----\n")
    if content is not None:
        bad.write_text(content)
    files = {"ssl_ca": good, "ssl_certificate": good, "ssl_key": good, name: bad}
    settings = load_settings(bootstrap_servers="kafka:9093", security_protocol="SSL", **files)
    with pytest.raises(ConfigurationError) as refused:
        _ = settings.brokers
    assert name in refused.value.problem and problem in refused.value.problem and fix in refused.value.fix


def test_unknown_keys_are_refused_in_file_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("rte = 7\n")
    with pytest.raises(ConfigurationError, match="'rte'"):
        load_settings(file)
    file.write_text("rate = = 7\n")
    with pytest.raises(ConfigurationError, match="TOML"):
        load_settings(file)
    with pytest.raises(ConfigurationError, match="does not exist"):
        load_settings(tmp_path / "none.toml")
    monkeypatch.setenv("RAY_PIPELINE_RTE", "7")
    with pytest.raises(ConfigurationError, match="RAY_PIPELINE_RTE"):
        load_settings()


def test_a_settings_file_that_may_not_be_read_is_named_with_a_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    file = tmp_path / "settings.toml"
    file.write_text("rate = 7\n")
    for method in ("open", "stat"):  # neither the file, nor the folder that it is in
        with monkeypatch.context() as denied:
            denied.setattr(Path, method, refuse)
            with pytest.raises(ConfigurationError, match=r"settings\.toml cannot be read .*denied.*--config"):
                load_settings(file)
    with pytest.raises(ConfigurationError, match="does not exist"):
        load_settings(tmp_path)


def test_every_setting_says_what_it_means_and_has_a_flag_of_its_own() -> None:
    assert all(field.description for field in Settings.model_fields.values())
    flags = [flag_of(name) for name in Settings.model_fields]
    assert len(set(flags)) == len(flags)


def test_the_page_of_settings_is_what_the_settings_model_says() -> None:
    page = Path(__file__).parents[2] / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == settings_page(), "write it anew with: make settings"
