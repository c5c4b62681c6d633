"""`python -m vila_ops` is `vila-ops`."""

from vila_ops.cli import main

main()
