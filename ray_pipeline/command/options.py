"""Options of the command line, made from the settings model: what a setting means is said in one place."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from rich.markup import escape

from ray_pipeline.config import ENVIRONMENT_PREFIX, FAULT_FIELDS, SECURITY_FIELDS, Settings, flag_of, load_settings
from ray_pipeline.errors import ConfigurationError, RayPipelineError
from ray_pipeline.knobs import Knob, knob_of

__all__ = [
    "BROKER",
    "EVENTS",
    "FORMAT",
    "GENERATOR",
    "JSON",
    "NAMED_BROKER",
    "PROCESSOR",
    "SERVING",
    "SINK",
    "STATE",
    "TOPICS",
    "VERIFIER",
    "emit_json",
    "with_settings",
]

STATE = ("state_dir",)
NAMED_BROKER = ("bootstrap_servers", *SECURITY_FIELDS)
BROKER = (*NAMED_BROKER, "broker_port", *STATE)
EVENTS = (
    "preset",
    "seed",
    "partitions",
    "users",
    "movies",
    "catalog",
    "model",
    "rank",
    "mean_rating",
    "rating_sd",
    "user_bias_share",
    "movie_bias_share",
    "factor_share",
    "popularity_exponent",
    "activity_sigma",
    "genre_share",
    "user_scale_sigma",
    "whole_star_share",
    "taste_exposure",
    "session_length",
    "new_user_share",
    "new_movie_share",
    "arrival_ratings",
    "drift",
    "attack",
    "arrivals",
    *FAULT_FIELDS,
)
FORMAT = ("format", "field_names", "padding_bytes", "schema_registry_url")
TOPICS = (
    "ratings_topic",
    "metrics_topic",
    "rejected_topic",
    "outside_topic",
    "progress_topic",
    "control_topic",
    "job_topic",
    "batches_topic",
    "expected_topic",
    "truth_topic",
    "predictions_topic",
    "scores_topic",
    "replication_factor",
)
GENERATOR = (
    "rate",
    "plan",
    "duration_s",
    "ratings",
    "start_time_ms",
    "speed",
    "actors",
    "delivery",
    "fast",
    "commit_interval_ms",
    *FORMAT,
    "ray_address",
    "stop_timeout_s",
    *EVENTS,
    *TOPICS,
)
SINK = ("sink", "output")
PROCESSOR = (
    "preset",
    "tumbling_s",
    "sliding_s",
    "slide_s",
    "watermark_s",
    "max_ahead_s",
    "top_n",
    "checkpoint",
    "trigger_interval_ms",
    "max_offsets_per_trigger",
    "archive",
    "archive_interval_s",
    "fair_scheduler_file",
    "executors",
    "executor_cores",
    "executor_memory",
    *FORMAT,
    "ray_address",
    "stop_timeout_s",
    "partitions",
    "movies",
    "catalog",
    "model",
    *TOPICS,
)
SERVING = (
    "preset",
    "api_host",
    "api_port",
    "ui_host",
    "ui_port",
    "ui",
    "refresh_s",
    "control_token",
    *FORMAT,
    "tumbling_s",
    "sliding_s",
    "slide_s",
    "top_n",
    "partitions",
    "movies",
    "catalog",
    "model",
    *TOPICS,
)

VERIFIER = ("preset", "partitions", "movies", "catalog", "model", *TOPICS)

JSON = Annotated[bool, typer.Option("--json", help="print JSON")]


def with_settings(*names: str) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Give a command the options of some settings, and ``--config FILE``; it is called with ``settings``.

    Errors of the package end the command with one line and their exit code.
    """
    fields = dict.fromkeys(names)

    def decorate(command: Callable[..., Any]) -> Callable[..., None]:
        parameters = inspect.signature(command, eval_str=True).parameters.values()
        own = [_as_written(p) for p in parameters if p.name != "settings"]
        meaning = f"settings file, TOML; the environment may hold any setting too, as {ENVIRONMENT_PREFIX}NAME"
        config = Annotated[Path | None, typer.Option("--config", help=meaning)]
        file = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config)
        options = [_option(name) for name in fields]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            # an option that may stand several times and does not is an empty list
            flags = {name: None if value == [] else value for name in fields for value in [given.pop(name)]}
            file = given.pop("config")
            with errors_as_lines():
                for parameter in own:
                    _require_finite(parameter, given[parameter.name])
                settings = load_settings(file, **flags)
                configure_logging(settings)
                command(settings=settings, **given)

        by_name = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = inspect.Signature([*by_name, *options, file])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in (*by_name, *options, file)}
        del run.__wrapped__
        return run

    return decorate


class errors_as_lines:
    """Ends the process with one line and the error's exit code when an error of the package comes up."""

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Translate."""
        if isinstance(error, RayPipelineError):
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None


def emit_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def configure_logging(settings: Settings) -> None:
    """Our own log goes to a file in the state directory, warnings of others to the terminal."""
    root = logging.getLogger()
    if root.handlers:
        return
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setLevel(logging.ERROR)
    # a broker that is away is told in a line of its own; the client says so several times a second: that is for the file
    terminal.addFilter(lambda record: record.name != "ray_pipeline.kafka.librdkafka")
    terminal.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root.addHandler(terminal)
    try:
        folder = settings.state_dir / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / "pipeline.log")
    except OSError:
        return  # a command that needs the folder says so itself
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("ray_pipeline").setLevel(logging.INFO)
    logging.getLogger("ray_pipeline").addHandler(file)


def _option(name: str) -> inspect.Parameter:
    knob = knob_of(name)
    meaning = knob.help
    flag = flag_of(name)
    annotation: Any = str | None
    names = (flag,)
    if knob.kind == "flag":
        annotation, names = bool | None, (f"{flag}/--no-{flag[2:]}",)
    if knob.kind == "texts":
        annotation, meaning = list[str] | None, f"{meaning}; may be given several times"
    if knob.default not in (None, (), ""):
        meaning += f"  [default: {_default(knob)}]"
    info = typer.Option(
        *names,
        help=escape(meaning),
        metavar=_metavar(knob),
        show_default=False,
        show_envvar=False,
        rich_help_panel=knob.group,  # a table each, no wider than its own names
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, info])


def _default(knob: Knob) -> str:
    if knob.kind == "flag":
        return f"{'' if knob.default else 'no-'}{knob.name}"
    return f"{knob.default} {knob.unit}".rstrip()


def _require_finite(parameter: inspect.Parameter, value: Any) -> None:
    """Refuse what is a number to Click: inf in a range without an end, nan in none.

    Raises:
        ConfigurationError: it is one of those.
    """
    if isinstance(value, float) and not math.isfinite(value):
        info = get_args(parameter.annotation)[1]
        # an option's first name stands where its default would, were it not for Annotated
        names = (info.default, *(info.param_decls or ()), f"--{parameter.name.replace('_', '-')}")
        flag = next(name for name in names if isinstance(name, str))
        raise ConfigurationError(problem=f"{flag} {value:g} is not a finite number", fix="Give another")


def _as_written(parameter: inspect.Parameter) -> inspect.Parameter:
    """A command's own parameter whose help is shown as it stands: Rich would read ``[default: all]`` as markup, and swallow it."""
    kind, info = get_args(parameter.annotation)
    info = copy.copy(info)
    info.help = escape(info.help or "")
    return parameter.replace(annotation=Annotated[kind, info])


def _metavar(knob: Knob) -> str | None:
    if knob.kind == "choice":
        return "|\n".join(map(str, knob.choices))  # one below the other: the widest takes its room from the names
    return {"whole": "INTEGER", "number": "NUMBER", "path": "PATH", "flag": None}.get(knob.kind, "TEXT")
