"""Get ready what starts need beside Python: Java archives from Maven, and archives of the classes that the JVMs load."""

from __future__ import annotations

import argparse
import gzip
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from spark_compat.classes import ClassArchive, broker_classes, class_list, names_of, remove_orphans, spark_classes
from spark_compat.errors import SparkCompatError
from spark_compat.jars import (
    kafka_broker_jars,
    kafka_tools_jars,
    minidfs_jars,
    spark_avro_jars,
    spark_connector_jars,
)
from spark_compat.jvm import find_java

_JARS = {
    "Kafka broker": kafka_broker_jars,
    "Spark's Kafka source": spark_connector_jars,
    "Spark's Avro": spark_avro_jars,
    "Kafka tools": kafka_tools_jars,
    "HDFS for tests": minidfs_jars,
}
_RENEW = """
Which classes are archived stands in spark_compat/class_lists. After a change of versions, renew it in a checkout:

  mkdir lists
  JDK_JAVA_OPTIONS=-XX:DumpLoadedClassList=$PWD/lists/%p.lst ray-pipeline run --duration 90 --state-dir state
  python -m spark_compat --class-lists lists
"""


def main() -> int:
    """Resolve and archive, or renew the lists of classes; a line for each, exit code 1 when jars could not be had."""
    parser = argparse.ArgumentParser(
        "python -m spark_compat", None, __doc__, _RENEW, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--class-lists", type=Path, metavar="DIR", help="make the lists of classes from what JVMs wrote to DIR"
    )
    folder = parser.parse_args().class_lists
    if folder is not None:
        _renew(folder)
        return 0
    try:
        for name, resolve in _JARS.items():
            _say(f"{name}: {len(resolve())} archives")
        java = find_java()
    except SparkCompatError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    remove_orphans()
    _say("archiving the classes that the JVMs load, for faster starts (half a minute)")
    with ThreadPoolExecutor() as pool:
        for said in pool.map(_archive, (broker_classes(java), spark_classes(java))):
            _say(said)
    return 0


def _archive(classes: ClassArchive) -> str:
    if classes.is_made():
        return f"{classes.name}: is there"
    begun = time.monotonic()
    try:
        classes.make()
    except SparkCompatError as error:  # they serve speed alone
        return f"{classes.name}: {error}"
    return f"{classes.name}: {classes.file.stat().st_size >> 20} MiB in {time.monotonic() - begun:.0f} s"


def _renew(folder: Path) -> None:
    dumped = [file.read_text().splitlines() for file in sorted(folder.glob("*.lst"))]
    brokers = [any(line.startswith("kafka/") for line in lines) for lines in dumped]
    for name, wanted in (("kafka", True), ("spark", False)):
        names = names_of(
            line for lines, broker in zip(dumped, brokers, strict=True) if broker == wanted for line in lines
        )
        text = "\n".join(names) + "\n"
        file = class_list(name)
        file.write_bytes(gzip.compress(text.encode(), mtime=0))
        _say(f"{file}: {len(names)} lines")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
