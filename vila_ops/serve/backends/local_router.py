"""The router that `local_process` starts.

`python -m vila_ops.serve.backends.local_router NAME RESOURCES_JSON HOST PORT`
"""

import logging
import sys

import uvicorn

from vila_ops import logs
from vila_ops.config import Resources
from vila_ops.serve.backends.http_protocol import options
from vila_ops.serve.backends.local_process import LocalProcess
from vila_ops.serve.router.app import Router
from vila_ops.serve.router.upstream import HttpUpstream

IDLE_SECONDS = 20
"""How long an idle connection is kept: longer than the official clients keep theirs (5 s, as uvicorn does by default),
so that none sends a request on a connection that is just being closed."""


def main() -> None:
    """Listen at the address of the service."""
    name, resources, host, port = sys.argv[1:]
    logs.configure(sys.stderr, text="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    backend = LocalProcess(name, Resources.model_validate_json(resources))
    router = Router(backend.register, backend.stop, backend.metrics, HttpUpstream())
    uvicorn.run(
        router,
        host=host,
        port=int(port),
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=5,
        **options(),
    )


if __name__ == "__main__":
    main()
