"""How `prepare` works: units of raw records become sealed shards, and these a dataset."""
