"""Raw files of sources: names, digests, scans, and readers of the containers of records."""
