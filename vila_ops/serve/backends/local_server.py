"""The server that `local_process` starts: `python -m vila_ops.serve.backends.local_server SPEC_JSON HOST PORT`."""

import logging
import sys

import uvicorn

from vila_ops import logs
from vila_ops.serve.app.load import load_app
from vila_ops.serve.backends.http_protocol import options
from vila_ops.serve.spec import Spec


def main() -> None:
    """Load the weights, then listen: a port that answers is ready."""
    text, host, port = sys.argv[1:]
    logs.configure(sys.stderr, text="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    spec = Spec.model_validate_json(text)
    app = load_app(spec, spec.device, replica={})
    uvicorn.run(app, host=host, port=int(port), timeout_graceful_shutdown=5, **options())


if __name__ == "__main__":
    main()
