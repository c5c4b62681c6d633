"""The HTTP routes of an endpoint: OpenAI's chat API. The same app runs under uvicorn and Ray Serve."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import psutil
from fastapi import FastAPI, Request
from fastapi.middleware import Middleware
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from vila_ops import __version__
from vila_ops.generate.engine import Engine
from vila_ops.serve.app.admission import Admission, Uploads
from vila_ops.serve.app.audit import AuditLog
from vila_ops.serve.app.chat import Chat, model_not_found
from vila_ops.serve.app.decoder import DecoderSettings
from vila_ops.serve.app.errors import ApiError, ClientGone
from vila_ops.serve.app.guard import Caller, Guard, audit_log
from vila_ops.serve.app.media import Media
from vila_ops.serve.app.metrics import Metrics
from vila_ops.serve.app.samples import MAX_BODY_BYTES, Feedback, SampleStore, parse_feedback
from vila_ops.serve.app.schema import ChatRequest
from vila_ops.serve.page.files import PATHS, page_file
from vila_ops.serve.spec import Spec

Json = dict[str, Any]


def create_app(spec: Spec, engine: Engine, *, replica: Json) -> FastAPI:
    """The app of one replica; /health shows `replica`. The app closes the engine when it shuts down."""
    name = str(replica.get("replica_id", replica.get("pid", "")))
    metrics = Metrics(model=spec.version.name, version=spec.version.version, replica=name)
    host = str(replica.get("host", "local"))
    audit = audit_log(spec.capacity, spec.version, service=spec.service.name, host=host)
    media = Media(_decoder_settings(spec, engine), spec.capacity.limits, spec.capacity.remote_images)
    samples = None if spec.capacity.samples is None else SampleStore(spec.capacity.samples, spec.version)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()
        await media.close()
        if samples is not None:
            samples.close()

    app = FastAPI(
        title=spec.service.name,
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        middleware=_middleware(spec, audit, metrics),
    )
    app.state.metrics = metrics
    for kind, handler in ((ApiError, _api_error), (HTTPException, _http_error), (ClientGone, _client_gone)):
        app.add_exception_handler(kind, handler)
    admission = Admission(spec.capacity.limits, metrics, max_batch=spec.capacity.max_batch)
    _add_chat(app, Chat(spec, engine, media, metrics, admission, samples))
    if samples is not None:
        uploads = Uploads(spec.capacity.limits, metrics, max_body_bytes=MAX_BODY_BYTES)
        _add_feedback(app, samples, admission, uploads)
    _add_models(app, spec)
    _add_state(app, spec, metrics, replica)
    _add_page(app)
    return app


def _add_chat(app: FastAPI, chat: Chat) -> None:
    body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}}, "required": True}

    @app.post("/v1/chat/completions", openapi_extra={"requestBody": body})
    async def completions(request: Request) -> Response:
        return await chat.respond(request, _caller(request))

    @app.api_route("/v1/responses", methods=["GET", "POST"], include_in_schema=False)
    async def responses() -> None:
        text = (
            "this endpoint has no Responses API; use /v1/chat/completions (in @ai-sdk/openai: openai.chat(model), in "
            "the official clients: client.chat.completions.create)"
        )
        raise ApiError(404, text, code="not_found")


def _add_feedback(app: FastAPI, samples: SampleStore, admission: Admission, uploads: Uploads) -> None:
    body = {"content": {"application/json": {"schema": Feedback.model_json_schema()}}, "required": True}

    @app.post("/v1/feedback", openapi_extra={"requestBody": body})
    async def feedback(request: Request) -> Json:
        caller = _caller(request)
        admission.count(caller.key)
        given = parse_feedback(await uploads.read(request))
        kept = await asyncio.to_thread(samples.rate, given, key=caller.key.id if caller.key else None)
        return {"id": given.id, "object": "feedback", "request_kept": kept}


def _add_models(app: FastAPI, spec: Spec) -> None:
    version = spec.version
    card = {
        "id": version.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "vila-ops",
        "version": version.version,
        "digest": version.checkpoint.digest,
        "identity": spec.identity(),
    }

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Json:
        if name != version.name:
            raise model_not_found(name, spec)
        return card


def _add_state(app: FastAPI, spec: Spec, metrics: Metrics, replica: Json) -> None:
    @app.get("/health")
    async def health(request: Request) -> Json:
        if not _caller(request).trusted:
            return {"status": "ok"}
        return {"status": "ok", "model": spec.version.checkpoint.digest, "replica": replica}

    limit = spec.capacity.max_memory_bytes

    @app.get("/ready")
    async def ready() -> Json:
        if limit is not None and psutil.Process().memory_info().rss > limit:
            raise ApiError(503, "this replica needs more memory than it may", code="out_of_memory")
        return {"status": "ready"}  # the app is made when the weights are loaded

    @app.get("/version")
    async def version() -> Json:
        served = {"model": spec.version.name, "model_version": spec.version.version}
        return {"version": __version__, **served, "precision": spec.service.precision, "identity": spec.identity()}

    @app.get("/metrics")
    async def shown() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/openapi.json", include_in_schema=False)
    async def schema() -> Json:
        return _openapi(app)


def _add_page(app: FastAPI) -> None:
    for path in PATHS:
        app.add_api_route(path, partial(page_file, path), include_in_schema=False)


def _openapi(app: FastAPI) -> Json:
    """The OpenAPI schema, with that of chat requests."""
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    chat = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    components |= {**chat.pop("$defs"), "ChatRequest": chat}
    return schema


def _middleware(spec: Spec, audit: AuditLog | None, metrics: Metrics) -> Sequence[Middleware]:
    guard = Middleware(Guard, capacity=spec.capacity, audit=audit, metrics=metrics)
    origins = spec.capacity.access.origins
    if not origins:
        return [guard]
    headers = ["authorization", "content-type", "x-request-id"]
    cors = Middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=headers)
    return [cors, guard]


def _decoder_settings(spec: Spec, engine: Engine) -> DecoderSettings:
    fit = engine.image_aspect_ratio
    return DecoderSettings(
        size=engine.image_size,
        fit=fit.kind,
        mean=fit.mean,
        max_pixels=spec.service.max_image_pixels,
        formats=spec.capacity.limits.image_formats,
    )


def _caller(request: Request) -> Caller:
    caller: Caller = request.scope["state"]["caller"]
    return caller


async def _api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


async def _http_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    body = ApiError(error.status_code, str(error.detail)).body()
    return JSONResponse(body, status_code=error.status_code, headers=error.headers)


async def _client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; the status is for the log and the metrics
