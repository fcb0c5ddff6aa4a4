"""Commands about what ratings are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ray_pipeline.command.options import JSON, emit_json, with_settings
from ray_pipeline.config import Settings
from ray_pipeline.errors import EnvironmentProblem
from ray_pipeline.presets import load_preset, preset_names, preset_purpose

__all__ = ["fit", "presets"]


@with_settings("seed", "rank")
def fit(
    settings: Settings,
    ratings: Annotated[Path, typer.Argument(metavar="RATINGS", help="CSV with a header, or Parquet")],
    output: Annotated[Path, typer.Option("--output", "-o", help="model file to write, .npz")],
    movies: Annotated[Path | None, typer.Option("--movies", help="movies.csv: titles and genres")] = None,
    user_column: Annotated[str, typer.Option(help="column of the user's id, a whole number")] = "userId",
    movie_column: Annotated[str, typer.Option(help="column of the movie's id, a whole number")] = "movieId",
    rating_column: Annotated[str, typer.Option(help="column of the rating, 0.5 … 5.0 stars by halves")] = "rating",
    held_out: Annotated[
        float,
        typer.Option("--held-out", min=0.01, max=0.5, help="share of ratings held out to measure error and noise"),
    ] = 0.1,
    regularisation: Annotated[
        float, typer.Option(min=1e-6, max=10, help="of the factors: more makes them smaller")
    ] = 0.05,
    iterations: Annotated[int, typer.Option(min=1, max=200, help="alternations of the least squares")] = 15,
    as_json: JSON = False,
) -> None:
    """Make a model file of your own ratings, for run --model: factors, biases, noise, habits, popularity, activity.

    Needs Java, and neither Kafka nor Ray. The same file, options and seed give the same model.
    """
    from ray_pipeline.fitted import write_fitted
    from ray_pipeline.fitting.als import SparkAls
    from ray_pipeline.fitting.fit import fit as fit_model
    from ray_pipeline.fitting.reading import ColumnNames, read_ratings
    from ray_pipeline.model.catalogue import load_catalogue

    def tell(line: str) -> None:
        typer.echo(line, err=as_json)  # JSON stands alone on standard output

    if not output.absolute().parent.is_dir():
        raise EnvironmentProblem(f"{output} cannot be written: its folder does not exist", "Name another with --output")
    catalogue = (
        None if movies is None else load_catalogue(settings.model_copy(update={"catalog": movies, "model": None}))
    )
    data = read_ratings(ratings, ColumnNames(user_column, movie_column, rating_column), tell)
    tell(f"read {len(data):,} ratings of {len(data.user_ids):,} users and {len(data.movie_ids):,} movies")
    model = fit_model(
        data, catalogue, settings.rank, settings.seed, held_out, SparkAls(regularisation, iterations), tell
    )
    digest = write_fitted(output, model)
    if as_json:
        emit_json({"model": str(output), "digest": digest, "settings": model.settings, "report": model.report})
    else:
        _print_model(output, digest, model.settings, model.report)


def presets(as_json: JSON = False) -> None:
    """List the presets: settings that belong together, for --preset NAME."""
    if as_json:
        emit_json({name: {"purpose": preset_purpose(name), "settings": load_preset(name)} for name in preset_names()})
        return
    for name in preset_names():
        typer.echo(f"{name:<14}{preset_purpose(name)}")


# -- inside


def _print_model(output: Path, digest: str, settings: Any, report: Any) -> None:
    rmse = report["rmse"]
    typer.echo(
        f"held-out RMSE: global mean {rmse['global_mean']:.4f}, biases alone {rmse['bias_only']:.4f}, model {rmse['model']:.4f} "
        f"(on {report['held_out']:,} ratings)"
    )
    shares = [f"{name} {settings[f'{name}_share']:.3f}" for name in ("user_bias", "movie_bias", "factor")]
    typer.echo(f"shares of variance: {', '.join(shares)}; noise {report['noise_sd']:.3f} stars")
    typer.echo(
        f"users of whole stars alone: {settings['whole_star_share']:.1%} (standard error {report['whole_star_error']:.1%}); "
        f"{report['whole_ratings']:.1%} of the ratings are whole"
    )
    typer.echo(f"wrote {output} ({digest}); stream from it with: ray-pipeline run --model {output}")
