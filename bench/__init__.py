"""Benchmarks, run by name: ``python -m bench [producer|windows|latency|capacity|pacing|coldstart|memory]``.

Each compares side by side in one run, in alternated rounds, and checks in Kafka that what was sent was delivered and
counted. The result is printed, and written as JSON to ``bench/results`` with commit, machine and versions.
"""
