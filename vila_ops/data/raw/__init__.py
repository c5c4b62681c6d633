"""Raw files: what they are called, hashed and scanned as, and the containers that records lie in."""
