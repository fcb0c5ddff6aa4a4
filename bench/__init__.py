"""Benchmarks, run by name: ``make bench ARGS="delivery windows"``; without a name all of them.

Each compares side by side in one run, in alternated rounds, and checks in Kafka that what was sent was delivered and
counted. The result is printed, with a table of the goals, and written as JSON to ``bench/results`` with commit, machine and versions.
"""
