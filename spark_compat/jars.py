"""Java archives from Maven, resolved once and remembered, so that later starts need no network.

``python -m spark_compat`` resolves all of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import platformdirs

from spark_compat.errors import SparkCompatError
from spark_compat.versions import HADOOP, KAFKA, SCALA, SLF4J, SPARK

__all__ = ["kafka_broker_jars", "kafka_tools_jars", "minidfs_jars", "spark_avro_jars", "spark_connector_jars"]

_BROKER = f"org.apache.kafka:kafka_{SCALA}:{KAFKA}+org.slf4j:slf4j-simple:{SLF4J}"
_CONNECTOR = f"org.apache.spark:spark-sql-kafka-0-10_{SCALA}:{SPARK}"
_AVRO = f"org.apache.spark:spark-avro_{SCALA}:{SPARK}"
_TOOLS = f"org.apache.kafka:kafka-tools:{KAFKA}+org.slf4j:slf4j-simple:{SLF4J}"
_MINIDFS = f"org.apache.hadoop:hadoop-client-minicluster:{HADOOP}+org.slf4j:slf4j-simple:{SLF4J}"

# what pyspark does not ship itself; a second copy of what it ships would be another class of the same name
_CONNECTOR_NAMES = ("spark-sql-kafka-0-10", "spark-token-provider-kafka-0-10", "kafka-clients", "commons-pool2")


def kafka_broker_jars() -> list[Path]:
    """A Kafka broker."""
    return _resolve(_BROKER)


def spark_connector_jars() -> list[Path]:
    """Spark's Kafka source, without what pyspark ships itself."""
    return [jar for jar in _resolve(_CONNECTOR) if jar.name.startswith(_CONNECTOR_NAMES)]


def spark_avro_jars() -> list[Path]:
    """Spark's functions for Avro, without what pyspark ships itself."""
    return [jar for jar in _resolve(_AVRO) if jar.name.startswith("spark-avro")]


def kafka_tools_jars() -> list[Path]:
    """Kafka's own tools, such as ProducerPerformance."""
    return _resolve(_TOOLS)


def minidfs_jars() -> list[Path]:
    """A small HDFS in one process."""
    return _resolve(_MINIDFS)


def _resolve(endpoint: str) -> list[Path]:
    manifest = (
        Path(platformdirs.user_cache_dir("ray-pipeline"))
        / f"jars-{hashlib.sha256(endpoint.encode()).hexdigest()[:16]}.json"
    )
    if manifest.is_file():
        jars = [Path(name) for name in json.loads(manifest.read_text())]
        if jars and all(jar.is_file() for jar in jars):
            return jars
    try:
        import jgo

        jars = sorted(Path(jar) for jar in jgo.build(endpoint).all_jars)
    except Exception as error:
        raise SparkCompatError(
            f"{endpoint} could not be had from Maven ({type(error).__name__}: {error})",
            "The first start needs the network (or a Maven mirror in ~/.m2/settings.xml); later ones do not",
        ) from error
    if not jars:
        raise SparkCompatError(f"{endpoint} resolved to nothing", "Remove ~/.cache/jgo and try again")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    fresh = manifest.with_suffix(f".{os.getpid()}")
    fresh.write_text(json.dumps([str(jar) for jar in jars]))
    fresh.replace(manifest)  # whole or not at all: two processes may resolve at the same time
    return jars
