"""Windows over the ratings: what they are, the Spark job that counts them, and a reference that shares nothing with it."""
