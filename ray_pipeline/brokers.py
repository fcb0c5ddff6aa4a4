"""Where Kafka is and how it is spoken to: in clear or over TLS, with or without a name and a password.

Clients of two families read this: librdkafka and, in Spark, Kafka's Java client. They secure the same connection with settings of
their own, so both translations stand here, beside each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["Brokers", "Security", "librdkafka_settings", "spark_options"]

_LOGIN_MODULES = {
    "PLAIN": "org.apache.kafka.common.security.plain.PlainLoginModule",
    "SCRAM-SHA-256": "org.apache.kafka.common.security.scram.ScramLoginModule",
    "SCRAM-SHA-512": "org.apache.kafka.common.security.scram.ScramLoginModule",
}


@dataclass(frozen=True, slots=True)
class Security:
    """How the connection to brokers is secured. Keys and certificates are here as text: files of one machine are not on the next.

    Attributes:
        protocol: ``SSL``, ``SASL_PLAINTEXT`` or ``SASL_SSL``.
        mechanism: ``PLAIN``, ``SCRAM-SHA-256`` or ``SCRAM-SHA-512``; empty without SASL.
        username: who logs in; empty without SASL.
        password: their password.
        ca: certificates that the brokers' are checked against, PEM; empty = those that the machine trusts.
        certificate: certificate of this client, with those between it and its CA, PEM; empty = none is shown.
        key: its private key, PEM, PKCS #8, not encrypted.
    """

    protocol: str
    mechanism: str = ""
    username: str = ""
    password: str = field(default="", repr=False)
    ca: str = field(default="", repr=False)
    certificate: str = field(default="", repr=False)
    key: str = field(default="", repr=False)


class Brokers(str):
    """Brokers as HOST:PORT[,…]. It is that text wherever it is shown, compared or written down, which a secret never is.

    Attributes:
        security: how their clients connect; None = in clear.
    """

    security: Security | None

    def __new__(cls, text: str, security: Security | None = None) -> Brokers:
        """Brokers at ``text``."""
        made = super().__new__(cls, text)
        made.security = security
        return made


def librdkafka_settings(bootstrap: str) -> dict[str, str]:
    """Settings with which a client of librdkafka reaches some brokers; those that are plain text are spoken to in clear."""
    return _settings(bootstrap, _of_librdkafka)


def spark_options(bootstrap: str) -> dict[str, str]:
    """The same for Spark's Kafka source, which hands what begins with ``kafka.`` to Kafka's Java client."""
    return {f"kafka.{name}": value for name, value in _settings(bootstrap, _of_java).items()}


def _settings(bootstrap: str, translate: Callable[[Security], dict[str, str]]) -> dict[str, str]:
    """Where the brokers are, and of what one family of clients calls the rest all that is set."""
    security = getattr(bootstrap, "security", None)
    secured = translate(security) if security is not None else {}
    return {"bootstrap.servers": str(bootstrap)} | {name: value for name, value in secured.items() if value}


def _of_librdkafka(security: Security) -> dict[str, str]:
    return {
        "security.protocol": security.protocol,
        "sasl.mechanism": security.mechanism,
        "sasl.username": security.username,
        "sasl.password": security.password,
        "ssl.ca.pem": security.ca,
        "ssl.certificate.pem": security.certificate,
        "ssl.key.pem": security.key,
    }


def _of_java(security: Security) -> dict[str, str]:
    return {
        "security.protocol": security.protocol,
        "sasl.mechanism": security.mechanism,
        "sasl.jaas.config": _login(security) if security.mechanism else "",
        "ssl.truststore.type": "PEM" if security.ca else "",
        "ssl.truststore.certificates": security.ca,
        "ssl.keystore.type": "PEM" if security.key else "",
        "ssl.keystore.certificate.chain": security.certificate,
        "ssl.keystore.key": security.key,
    }


def _login(security: Security) -> str:
    """As JAAS writes it: in quotes, with a backslash before a quote and a backslash."""
    username, password = (
        text.replace("\\", "\\\\").replace('"', '\\"') for text in (security.username, security.password)
    )
    return f'{_LOGIN_MODULES[security.mechanism]} required username="{username}" password="{password}";'
