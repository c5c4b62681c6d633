"""The router that `local_process` starts.

`python -m vila_ops.serve.backends.local_router NAME RESOURCES_JSON HOST PORT`
"""

import logging
import sys

import uvicorn

from vila_ops.config import Resources
from vila_ops.serve.backends.http_protocol import options
from vila_ops.serve.backends.local_process import LocalProcess
from vila_ops.serve.router.app import Router


def main() -> None:
    """Listen at the address of the service."""
    name, resources, host, port = sys.argv[1:]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    backend = LocalProcess(name, Resources.model_validate_json(resources))
    router = Router(backend.register, backend.stop)
    uvicorn.run(router, host=host, port=int(port), timeout_graceful_shutdown=5, proxy_headers=False, **options())


if __name__ == "__main__":
    main()
