"""Three real Kafka brokers that hold a copy each; the first is the controller too."""

from __future__ import annotations

from pathlib import Path

from ray_pipeline.kafka.broker import EmbeddedBroker
from ray_pipeline.kafka.client import make_admin

_COPIES = """
default.replication.factor=3
min.insync.replicas=2
offsets.topic.replication.factor=3
transaction.state.log.replication.factor=3
transaction.state.log.min.isr=2
"""
_FOLLOWER = """
process.roles=broker
node.id={node}
listeners=BROKER://{host}:{port}
controller.quorum.bootstrap.servers={controller}
"""


class _Node(EmbeddedBroker):
    """One of the three. Of two values in a file of properties the last one counts."""

    def __init__(self, folder: Path, node: int, controller: str) -> None:
        super().__init__(folder)
        self._node, self._controller = node, controller
        if controller:
            self._quorum = ()

    def _write_properties(self) -> Path:
        path = super()._write_properties()
        with path.open("a") as file:
            file.write(_COPIES)
            if self._controller:
                file.write(
                    _FOLLOWER.format(node=self._node, host=self._host, port=self._port, controller=self._controller)
                )
        return path

    @property
    def controller(self) -> str:
        """Where its controller listens, HOST:PORT."""
        lines = (self._folder / "server.properties").read_text().splitlines()
        return next(line.split("=", 1)[1] for line in lines if line.startswith("controller.quorum.bootstrap.servers"))


class ReplicatedBrokers:
    """Three brokers; any but the first may be killed and started again.

    Attributes:
        nodes: the brokers, by node id.
    """

    def __init__(self, folder: Path) -> None:
        first = _Node(folder / "1", 1, "")
        first.start()
        self.nodes = {1: first, **{n: _Node(folder / str(n), n, first.controller) for n in (2, 3)}}
        for node in (2, 3):
            self.nodes[node].start()

    @property
    def bootstrap_servers(self) -> str:
        """All of them, for clients."""
        return ",".join(node.bootstrap_servers for node in self.nodes.values())

    def leader(self, topic: str, partition: int) -> int:
        """Node id of a partition's leader."""
        found = make_admin(self.bootstrap_servers).list_topics(topic, timeout=15).topics[topic].partitions[partition]
        return int(found.leader)

    def in_sync(self, topic: str) -> set[int]:
        """How many copies of each partition are in step."""
        found = make_admin(self.bootstrap_servers).list_topics(topic, timeout=15).topics[topic].partitions
        return {len(partition.isrs) for partition in found.values()}

    def stop(self) -> None:
        """End them in order, the controller last."""
        for node in reversed(self.nodes.values()):
            node.stop()
