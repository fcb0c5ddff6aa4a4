"""``ray-pipeline``: the command line's entry point."""

from __future__ import annotations

import typer

from ray_pipeline.command import asking, backfilling, checking, conforming, modelling, running, storming

__all__ = ["app", "main"]

app = typer.Typer(
    name="ray-pipeline",
    help="Trustworthy streams of synthetic ratings: Ray actors to Kafka, windowed by Spark on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for _command in (running.run, running.broker, running.generate, running.process, running.serve, running.verify):
    app.command(rich_help_panel="Run")(_command)
for _command in (asking.rate, asking.plan, asking.pause, asking.resume, asking.scale, backfilling.backfill):
    app.command(rich_help_panel="Control a running pipeline")(_command)
for _command in (asking.status, asking.scoreboard, asking.batch, asking.doctor_command, asking.reset):
    app.command(name=_command.__name__.removesuffix("_command"), rich_help_panel="Look and tidy")(_command)
for _command in (checking.audit, conforming.conformance, checking.explain, checking.grade, storming.chaos):
    app.command(rich_help_panel="Prove")(_command)
for _command in (modelling.fit, modelling.presets):
    app.command(rich_help_panel="Shape")(_command)
app.add_typer(asking.topics, name="topics", rich_help_panel="Look and tidy")
app.add_typer(asking.jobs, name="jobs", rich_help_panel="Look and tidy")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
