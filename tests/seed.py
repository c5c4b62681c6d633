"""The seed of every test that draws what it does: moments of a kill, flipped bits, faults."""

import os

SEED = int(os.environ.get("VILA_SEED", "0"))
"""0 for `make test`, so that it does the same each time; `make faults` draws one. A failure tells it."""
