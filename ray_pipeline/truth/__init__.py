"""What must be: regenerated ratings, expected windows, verdicts, scores. Pure: no Ray, Spark or Kafka."""
