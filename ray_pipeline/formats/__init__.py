"""How a rating is written into a record's value: the contract's JSON, other field names, padding, Avro with a schema registry."""
