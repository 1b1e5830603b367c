"""The output schema, shard and part files, what is committed, gathering."""
