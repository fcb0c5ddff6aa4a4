"""What the topics say, kept ready to be asked: store, rates, latency, health. Pure: no Kafka, Ray or HTTP."""
