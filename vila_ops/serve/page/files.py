"""The files of the chat page, as the endpoint sends them."""

from functools import cache
from pathlib import Path

from starlette.responses import Response

PATHS = {"/": "index.html", "/page/chat.css": "chat.css"} | {
    f"/page/{name}": name for name in ("chat.js", "api.js", "snippets.js", "images.js")
}
"""Path of a route -> file of this folder. They hold nothing of the model and are sent without a key."""
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
HEADERS = {
    # Everything comes from this endpoint, no script or style is inline, and no text can become HTML.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


@cache
def page_file(path: str) -> Response:
    """The response with the file of a path of `PATHS`."""
    file = Path(__file__).with_name(PATHS[path])
    return Response(file.read_bytes(), headers=HEADERS, media_type=MEDIA_TYPES[file.suffix])
