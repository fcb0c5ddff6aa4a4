"""Ratings to a file or a pipe in place of Kafka, in one process: the same ratings, without Ray, Java and a broker."""
