"""An online recommender: matrix factorisation with biases, by stochastic gradient descent, on the live topic of ratings.

It tests, then trains: each rating is predicted before it is learned from ("prequential" evaluation), and the prediction goes to
topic `predictions`, where the scoreboard compares it with the truth:

    ray-pipeline run --rate 2000                                     # in one terminal
    python examples/online_mf.py --bootstrap-servers HOST:PORT       # in another; `run` prints the brokers
    ray-pipeline scoreboard                                          # how good is it, and how good can it get?

The model is prediction = mean + user bias + movie bias + p(user) · q(movie), as in Koren, Bell and Volinsky, "Matrix Factorization
Techniques for Recommender Systems" (2009), with a step that shrinks as more is known of a user or movie.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from confluent_kafka import Consumer, KafkaException, Producer


class Table:
    """One bias and one vector for each id that has come by; grows as ids come."""

    def __init__(self, rank: int, rng: np.random.Generator) -> None:
        self._rows: dict[int, int] = {}
        self._rng = rng
        self.bias = np.zeros(1024)
        self.seen = np.zeros(1024)
        self.vector = rng.normal(0, 0.1, (1024, rank))

    def row(self, identity: int) -> int:
        """The row of an id; a new one starts with no bias and a small random vector."""
        row = self._rows.setdefault(identity, len(self._rows))
        if row == len(self.bias):
            self.bias = np.concatenate([self.bias, np.zeros(row)])
            self.seen = np.concatenate([self.seen, np.zeros(row)])
            self.vector = np.concatenate([self.vector, self._rng.normal(0, 0.1, self.vector.shape)])
        return row


class OnlineFactorisation:
    """Learns from one rating at a time."""

    def __init__(self, rank: int, step: float, pull: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.users, self.movies = Table(rank, rng), Table(rank, rng)
        self.step, self.pull = step, pull
        self.mean, self.count = 3.5, 0

    def predict_then_learn(self, user_id: int, movie_id: int, rating: float) -> float:
        """The prediction, made before the rating is looked at."""
        users, movies = self.users, self.movies
        u, m = users.row(user_id), movies.row(movie_id)
        p, q = users.vector[u], movies.vector[m]
        predicted = self.mean + users.bias[u] + movies.bias[m] + p @ q
        error = rating - predicted
        # the mean and the biases are means of what is left over, drawn towards 0 while little is known
        self.count += 1
        self.mean += error / (self.count + 20)
        users.seen[u] += 1
        movies.seen[m] += 1
        users.bias[u] += error / (users.seen[u] + 8)
        movies.bias[m] += error / (movies.seen[m] + 8)
        # the gradient of the squared error, with a pull towards 0
        change = self.step * (error * q - self.pull * p)
        q += self.step * (error * p - self.pull * q)
        p += change
        return float(np.clip(predicted, 0.5, 5.0))


def main(
    bootstrap_servers: Annotated[str, typer.Option(help="brokers, HOST:PORT")],
    ratings: Annotated[int | None, typer.Option(help="stop after so many ratings; default: never")] = None,
    seconds: Annotated[float | None, typer.Option(help="stop after so many seconds; default: never")] = None,
    model: Annotated[str, typer.Option(help="name on the scoreboard")] = "online-mf",
    rank: Annotated[int, typer.Option(help="length of the vectors")] = 20,
    step: Annotated[float, typer.Option(help="step of the descent")] = 0.05,
    pull: Annotated[float, typer.Option(help="pull of the vectors towards 0")] = 0.02,
    ratings_topic: Annotated[str, typer.Option(help="topic to learn from")] = "ratings",
    predictions_topic: Annotated[str, typer.Option(help="topic to write to")] = "predictions",
    client_properties: Annotated[
        Path | None,
        typer.Option(help="file of name=value lines, such as security.protocol=SSL: more settings of librdkafka"),
    ] = None,
) -> None:
    """Predict every rating of the topic from its beginning, and learn from it."""
    kafka = {
        **(read_properties(client_properties) if client_properties else {}),
        "bootstrap.servers": bootstrap_servers,
    }
    consumer = Consumer(
        {
            **kafka,
            "group.id": f"example-{model}-{time.time_ns()}",  # what was learned is not kept, so begin at the beginning
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",  # ratings come in transactions
        }
    )
    producer = Producer({**kafka, "linger.ms": 20, "compression.type": "lz4"})
    learner = OnlineFactorisation(rank, step, pull, seed=1)
    began, done, squares = time.monotonic(), 0, 0.0
    consumer.subscribe([ratings_topic])
    try:
        while (ratings is None or done < ratings) and (seconds is None or time.monotonic() - began < seconds):
            for message in consumer.consume(1000 if ratings is None else min(1000, ratings - done), timeout=0.5):
                if message.error():
                    raise KafkaException(message.error())
                rating = json.loads(message.value())
                predicted = learner.predict_then_learn(rating["userId"], rating["movieId"], rating["rating"])
                record = {
                    "userId": rating["userId"],
                    "movieId": rating["movieId"],
                    "prediction": round(predicted, 4),
                    "timestamp": rating["timestamp"],  # with user and movie it names the rating that was predicted
                    "model": model,
                }
                produce(producer, predictions_topic, model, json.dumps(record))
                done += 1
                squares += (rating["rating"] - predicted) ** 2
            producer.poll(0)
    except KeyboardInterrupt:
        pass
    finally:
        consumer.close()
        producer.flush()
    if done:
        print(f"{done:,} ratings predicted, RMSE {(squares / done) ** 0.5:.4f}, {time.monotonic() - began:.1f} s")


def read_properties(file: Path) -> dict[str, str]:
    """Settings of a Kafka client, as kcat takes them: name=value, a line each."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    pairs = (line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {name.strip(): value.strip() for name, value in pairs}


def produce(producer: Producer, topic: str, key: str, value: str) -> None:
    """Queue a record; wait for room when the broker is slower than we are."""
    while True:
        try:
            producer.produce(topic, key=key, value=value)
            return
        except BufferError:
            producer.poll(0.1)


if __name__ == "__main__":
    typer.run(main)
