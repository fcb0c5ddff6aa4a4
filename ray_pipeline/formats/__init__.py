"""How a rating is written into a record's value: the contract's JSON, other names, padding, Avro or Protobuf with a schema registry."""
