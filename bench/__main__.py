"""Runs benchmarks by name."""

from __future__ import annotations

import importlib
import sys

from bench.common import save

NAMES = ("delivery", "knobs", "audit", "windows", "latency", "capacity", "pacing", "coldstart", "memory")


def main() -> int:
    wanted = sys.argv[1:] or list(NAMES)
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        print(f"unknown: {', '.join(unknown)}; there are {', '.join(NAMES)}", file=sys.stderr)
        return 2
    for name in wanted:
        print(f"== {name}", flush=True)
        save(name, importlib.import_module(f"bench.{name}").run())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
