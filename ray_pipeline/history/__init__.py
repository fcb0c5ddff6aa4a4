"""History at cluster scale: the ratings of shards made by a Spark job, to Parquet or in place of the actors."""
