"""A real Kafka broker that speaks TLS: with a name and a password, or with a certificate of each client.

The user may do there what is needed, and no more.
"""

from __future__ import annotations

from pathlib import Path

import trustme
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)

from ray_pipeline.config import Settings, load_settings
from ray_pipeline.kafka.broker import EmbeddedBroker
from ray_pipeline.kafka.client import make_admin
from ray_pipeline.ports import any_free_port

USERNAME, PASSWORD = "reader", 'se"cr\\et = 1'
PREFIXES = ("ratings", "metrics", "predictions", "secured.", "broken.")
"""Names of topics, and of transactions, that the user has rights to begin with one of these."""
RIGHTS = (
    (ResourceType.TOPIC, PREFIXES, (AclOperation.DESCRIBE, AclOperation.READ, AclOperation.WRITE, AclOperation.CREATE)),
    (ResourceType.TRANSACTIONAL_ID, PREFIXES, (AclOperation.DESCRIBE, AclOperation.WRITE)),
    (ResourceType.GROUP, ("ray-pipeline",), (AclOperation.DESCRIBE,)),
    (ResourceType.GROUP, ("example-",), (AclOperation.DESCRIBE, AclOperation.READ)),
)
"""What docs/brokers.md lists, but for what reset alone needs."""
_HOST = "127.0.0.1"
_LOGIN_MODULES = "org.apache.kafka.common.security"
_LISTENERS = """
listeners=BROKER://{host}:{clear},CONTROLLER://{host}:{controller},LOGIN://{host}:{login},MUTUAL://{host}:{mutual}
advertised.listeners=BROKER://{host}:{clear},LOGIN://{host}:{login},MUTUAL://{host}:{mutual}
controller.quorum.bootstrap.servers={host}:{controller}
listener.security.protocol.map=BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT,LOGIN:SASL_SSL,MUTUAL:SSL
ssl.keystore.type=PEM
ssl.keystore.location={folder}/broker.pem
ssl.truststore.type=PEM
ssl.truststore.location={folder}/ca.pem
listener.name.mutual.ssl.client.auth=required
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
super.users=User:ANONYMOUS
ssl.principal.mapping.rules=RULE:^.*$/{username}/
listener.name.login.sasl.enabled.mechanisms=PLAIN,SCRAM-SHA-512
listener.name.login.plain.sasl.jaas.config={modules}.plain.PlainLoginModule required user_{username}="{password}";
listener.name.login.scram-sha-512.sasl.jaas.config={modules}.scram.ScramLoginModule required;
"""


class SecuredBroker(EmbeddedBroker):
    """Three doors: ``bootstrap_servers`` in clear, ``login`` with name and password over TLS, ``mutual`` with certificates."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.pem = folder
        ca = trustme.CA()
        ca.cert_pem.write_to_path(folder / "ca.pem")
        trustme.CA().cert_pem.write_to_path(folder / "another-ca.pem")
        for name in ("broker", "client"):
            made = ca.issue_cert(_HOST)
            _as_pkcs8(made.private_key_pem.bytes(), folder / f"{name}-key.pem")
            chain = b"".join(blob.bytes() for blob in made.cert_chain_pems)
            (folder / f"{name}-certificate.pem").write_bytes(chain)
        parts = (folder / f"broker-{part}.pem" for part in ("key", "certificate"))
        (folder / "broker.pem").write_bytes(b"".join(part.read_bytes() for part in parts))
        self.login = self.mutual = ""

    def _write_properties(self) -> Path:
        path = super()._write_properties()
        ports = [any_free_port(_HOST, besides=(self._port,)) for _ in range(3)]
        self.login, self.mutual = (f"{_HOST}:{port}" for port in ports[:2])
        password = PASSWORD.replace("\\", "\\\\").replace('"', '\\"').replace("\\", "\\\\")  # JAAS, then properties
        with path.open("a") as file:  # of two values the last one counts
            file.write(
                _LISTENERS.format(
                    host=_HOST,
                    clear=self._port,
                    login=ports[0],
                    mutual=ports[1],
                    controller=ports[2],
                    folder=self.pem,
                    modules=_LOGIN_MODULES,
                    username=USERNAME,
                    password=password,
                )
            )
        return path

    def start(self, deadline_s: float = 60.0) -> None:
        super().start(deadline_s)
        credential = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
        change = UserScramCredentialUpsertion(USERNAME, credential, PASSWORD.encode())
        admin = make_admin(self.bootstrap_servers)
        for done in admin.alter_user_scram_credentials([change]).values():
            done.result(30)
        rights = [
            AclBinding(
                kind, name, ResourcePatternType.PREFIXED, f"User:{USERNAME}", "*", operation, AclPermissionType.ALLOW
            )
            for kind, names, operations in RIGHTS
            for name in names
            for operation in operations
        ]
        for done in admin.create_acls(rights).values():
            done.result(30)

    def with_login(self, mechanism: str, **more: object) -> Settings:
        """Settings that log in."""
        login = {"sasl_mechanism": mechanism, "sasl_username": USERNAME, "sasl_password": PASSWORD}
        given = {"security_protocol": "SASL_SSL", "ssl_ca": self.pem / "ca.pem", **login, **more}
        return load_settings(bootstrap_servers=self.login, **given)

    def with_certificate(self, **more: object) -> Settings:
        """Settings that show a certificate."""
        files = {"ssl_certificate": self.pem / "client-certificate.pem", "ssl_key": self.pem / "client-key.pem"}
        given = {"security_protocol": "SSL", "ssl_ca": self.pem / "ca.pem", **files, **more}
        return load_settings(bootstrap_servers=self.mutual, **given)


def _as_pkcs8(key: bytes, file: Path) -> None:
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_pem_private_key,
    )

    private = load_pem_private_key(key, None)
    file.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
