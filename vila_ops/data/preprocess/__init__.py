"""The task `prepare`: units of raw records become sealed shards, and shards become a dataset."""
