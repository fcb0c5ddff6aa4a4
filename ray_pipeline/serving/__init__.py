"""What users see: HTTP API, dashboard, and the feed that keeps both fresh. Reads Kafka only, and can run alone."""
