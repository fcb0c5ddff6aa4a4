"""Spark on Ray: Java, jars, versions, sessions. Knows nothing of ratings."""
