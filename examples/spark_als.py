"""A batch recommender: alternating least squares (`pyspark.ml`) on what is in Kafka, judged on ratings it has not seen.

It trains on the first part of the stream by event time, predicts the rest, and writes the predictions to topic `predictions`,
each with its rating's timestamp, so that the scoreboard knows which rating was meant:

    ray-pipeline run --users 300 --movies 200 --rate 10000 --ratings 50000 --state-dir dense
    ray-pipeline broker --state-dir dense                            # the broker of a run that has ended; prints HOST:PORT
    python examples/spark_als.py --bootstrap-servers HOST:PORT
    ray-pipeline scoreboard --state-dir dense

ALS itself knows no biases. So means of users and movies are taken out first, drawn towards 0 where there are few ratings, and ALS
learns what is left over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pyspark.ml.recommendation import ALS
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from spark_compat.jars import spark_connector_jars
from spark_compat.jvm import export_java, find_java

RATING = "userId INT, movieId INT, rating DOUBLE, timestamp LONG"
FEW = 5.0  # how many ratings of mean 0 are assumed for everybody


def main(
    bootstrap_servers: Annotated[str, typer.Option(help="brokers, HOST:PORT")],
    train_share: Annotated[float, typer.Option(help="share of the ratings to train on, the earliest ones")] = 0.8,
    model: Annotated[str, typer.Option(help="name on the scoreboard")] = "spark-als",
    rank: Annotated[int, typer.Option(help="number of factors")] = 20,
    regularisation: Annotated[float, typer.Option(help="pull of the factors towards 0")] = 0.05,
    iterations: Annotated[int, typer.Option(help="rounds of least squares")] = 10,
    ratings_topic: Annotated[str, typer.Option(help="topic to learn from")] = "ratings",
    predictions_topic: Annotated[str, typer.Option(help="topic to write to")] = "predictions",
    master: Annotated[str, typer.Option(help="where Spark runs")] = "local[2]",
    client_properties: Annotated[
        Path | None,
        typer.Option(help="file of name=value lines, such as security.protocol=SSL: more of Kafka's Java client"),
    ] = None,
) -> None:
    """Train on the first part of what the topic holds now, predict the rest."""
    spark = start_spark(master)
    more = read_properties(client_properties) if client_properties else {}
    kafka = {
        **{f"kafka.{name}": value for name, value in more.items()},
        "kafka.bootstrap.servers": bootstrap_servers,
        "kafka.isolation.level": "read_committed",
    }
    try:
        ratings = read_ratings(spark, {**kafka, "subscribe": ratings_topic}).cache()
        (cut,) = ratings.approxQuantile("timestamp", [train_share], 0.001)
        train = ratings.where(F.col("timestamp") < cut)
        held_out = ratings.where(F.col("timestamp") >= cut)

        biases = Biases(train)
        residuals = biases.beside(train).withColumn("residual", F.col("rating") - F.col("baseline")).cache()
        als = ALS(
            rank=rank,
            maxIter=iterations,
            regParam=regularisation,
            userCol="userId",
            itemCol="movieId",
            ratingCol="residual",
            numUserBlocks=2,
            numItemBlocks=2,
            seed=1,
        )
        fitted = als.fit(residuals)
        # ALS says NaN of users and movies it has not met: of them only the biases are known
        taste = F.nanvl(F.col("prediction").cast("double"), F.lit(0.0))
        stars = F.greatest(F.lit(0.5), F.least(F.lit(5.0), F.col("baseline") + taste))
        predicted = fitted.transform(biases.beside(held_out)).withColumn("prediction", stars).cache()

        fields = ("userId", "movieId", "prediction", "timestamp", F.lit(model).alias("model"))
        records = predicted.select(F.lit(model).alias("key"), F.to_json(F.struct(*fields)).alias("value"))
        records.write.format("kafka").options(**kafka, topic=predictions_topic).save()

        rmse = F.sqrt(F.avg((F.col("rating") - F.col("prediction")) ** 2))
        n, error = predicted.select(F.count("*"), rmse).first()  # type: ignore[misc]
        print(f"{train.count():,} ratings learned, {n:,} predicted, RMSE {error:.4f}")
    finally:
        spark.stop()


class Biases:
    """Mean of all ratings, and by how much each movie and then each user differs from it."""

    def __init__(self, train: DataFrame) -> None:
        self.mean = train.agg(F.avg("rating")).first()[0]  # type: ignore[index]
        over_mean = train.withColumn("left", F.col("rating") - self.mean)
        self.movies = damped_mean(over_mean, "movieId", "movie_bias")
        over_movie = over_mean.join(F.broadcast(self.movies), "movieId").withColumn("left", F.expr("left - movie_bias"))
        self.users = damped_mean(over_movie, "userId", "user_bias")

    def beside(self, ratings: DataFrame) -> DataFrame:
        """Ratings with a column ``baseline``; of unknown users and movies nothing but the mean is known."""
        known = ratings.join(F.broadcast(self.movies), "movieId", "left").join(
            F.broadcast(self.users), "userId", "left"
        )
        baseline = F.lit(self.mean) + F.coalesce("movie_bias", F.lit(0.0)) + F.coalesce("user_bias", F.lit(0.0))
        return known.withColumn("baseline", baseline)


def damped_mean(rows: DataFrame, by: str, name: str) -> DataFrame:
    """Mean of ``left`` by a column, drawn towards 0 where there are few rows."""
    return rows.groupBy(by).agg((F.sum("left") / (F.count("*") + FEW)).alias(name)).cache()


def read_ratings(spark: SparkSession, options: dict[str, Any]) -> DataFrame:
    """What the topic holds now; records that are no ratings fall out."""
    raw = spark.read.format("kafka").options(**options).load()
    return raw.select(F.from_json(F.col("value").cast("string"), RATING).alias("r")).select("r.*").dropna()


def read_properties(file: Path) -> dict[str, str]:
    """Settings of a Kafka client, as Kafka's own tools take them: name=value, a line each."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, value in pairs}


def start_spark(master: str) -> SparkSession:
    """Spark on this machine, with the Kafka connector that belongs to it."""
    export_java(find_java())
    builder: Any = SparkSession.builder
    session = builder.appName("spark-als").master(master)
    for name, value in {
        "spark.jars": ",".join(str(jar) for jar in spark_connector_jars()),
        "spark.sql.shuffle.partitions": "2",
        "spark.sql.adaptive.enabled": "false",  # data this small need no second thought
        # the first compiler alone: a short run on few cores gains nothing from the second; and room for ALS's deep lineage
        "spark.driver.extraJavaOptions": "-XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Xss16m",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
    }.items():
        session = session.config(name, value)
    found: SparkSession = session.getOrCreate()
    return found


if __name__ == "__main__":
    typer.run(main)
