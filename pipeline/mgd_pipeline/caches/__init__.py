"""Teacher caches: one format, written shard by shard, read record by record."""
