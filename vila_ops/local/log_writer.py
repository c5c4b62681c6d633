"""Writes its standard input into a log of bounded size: what stands behind the output of each server.

It is run as a file and imports the standard library alone, so that it starts in 30 ms and takes 10 MB. It ends with its
input, which is when the last process that writes there has ended.
"""

import logging
import os
import signal
import sys
from logging.handlers import RotatingFileHandler

KEPT = 4
"""Earlier files of a log, NAME.log.1 to NAME.log.4, that are kept beside it."""
MOST_BYTES = 2**14
"""A longer line is cut into several."""


def main() -> None:
    """Arguments: the log, and the bytes at which the next file begins."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # what a server writes while it ends belongs to its log
    os.umask(0o077)
    logging.raiseExceptions = False  # a full disk costs lines: a server must not wait for it
    path, most = sys.argv[1], int(sys.argv[2])
    with open(0, encoding="latin-1", newline="\n") as lines:  # which has a character for each byte
        log = RotatingFileHandler(path, maxBytes=most, backupCount=KEPT, encoding="latin-1")
        for line in iter(lambda: lines.readline(MOST_BYTES), ""):
            log.emit(logging.makeLogRecord({"msg": line.removesuffix("\n")}))


if __name__ == "__main__":
    main()
