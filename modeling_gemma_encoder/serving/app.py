"""The HTTP application: routes of Text Embeddings Inference, Jina and Cohere, over a backend.

A backend scores texts: an `Engine` in this process, or `replicas.Replicas` on a Ray cluster.
"""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from . import protocol
from .description import Description
from .engine import Cut, Scored, Texts
from .errors import Empty, RequestError, TooLarge, Unhealthy, Unscorable, WrongType
from .gate import Gate, answer_to
from .metrics import Metrics

ERRORS = {
    status: {"model": protocol.ErrorResponse, "description": text}
    for status, text in {
        400: "No texts, or no JSON",
        401: "Without the token of this server",
        408: "The body did not arrive in time",
        413: "Too many texts, tokens or bytes",
        415: "Not `application/json` by its `Content-Type`",
        422: "Not what the interface asks for, or no tokens",
        424: "Not what this model does",
        429: "Too much waits; `Retry-After` says for how long",
        504: "Not answered in time",
    }.items()
}


class Backend(Protocol):
    """Score texts, wherever the model is."""

    async def score(self, texts: Texts, cut: Cut, seconds: float | None) -> Scored: ...

    async def healthy(self) -> bool: ...

    async def queue_size(self) -> int: ...


class Gone(Exception):
    """Say that the client has closed the connection."""


class Service:
    """Answer requests with the scores of a backend."""

    def __init__(self, backend: Backend, description: Description, metrics: Metrics):
        self.backend, self.about, self.metrics = backend, description, metrics

    async def rerank(self, request: Request, response: Response, body: protocol.RerankRequest) -> list[protocol.Rank]:
        """Return the texts' places and scores, the best first."""
        self.check_ranker()
        pairs = [(body.query, text) for text in body.texts]
        scored = await self.score(request, response, pairs, self.cut_of(body), "batch")
        scores = self.about.relevance(scored.logits, body.raw_scores)
        order = np.argsort(-scores, kind="stable").tolist()
        return [
            protocol.Rank(index=place, score=scores[place], text=body.texts[place] if body.return_text else None)
            for place in order
        ]

    async def rerank_documents(
        self, request: Request, response: Response, body: protocol.DocumentsRequest, version: str = "1"
    ) -> protocol.DocumentsResponse:
        """Return the documents' places and scores, the best first, `top_n` of them. `version` is of
        Cohere's interface."""
        self.check_ranker()
        texts = body.texts
        cut = Cut(self.about.auto_truncate, per_document=body.max_tokens_per_doc)
        scored = await self.score(request, response, [(body.question, text) for text in texts], cut, "batch")
        scores = self.about.relevance(scored.logits, raw=False)
        results = [
            protocol.DocumentRank(
                index=place,
                relevance_score=scores[place],
                document=protocol.TextDocument(text=texts[place]) if body.return_documents else None,
            )
            for place in np.argsort(-scores, kind="stable").tolist()[: body.top_n]
        ]
        usage = {"prompt_tokens": scored.tokens, "total_tokens": scored.tokens}
        meta = {"api_version": {"version": version}, "tokens": {"input_tokens": scored.tokens}}
        return protocol.DocumentsResponse(
            id=str(uuid.uuid4()), model=self.about.model_id, results=results, usage=usage, meta=meta
        )

    async def predict(self, request: Request, response: Response, body: protocol.PredictRequest) -> list:
        """Return each text's labels and scores, the best first."""
        method = "batch" if body.is_batch else "single"
        parameters = body.parameters or protocol.Parameters()
        scored = await self.score(request, response, body.sequences, self.cut_of(body), method)
        shares = self.about.shares(scored.logits, body.raw_scores, parameters.function_to_apply)
        predictions = [self.about.predictions(row)[: parameters.top_k] for row in shares]
        return predictions if body.is_batch or body.parameters is not None else predictions[0]

    async def score(self, request: Request, response: Response, texts: Texts, cut: Cut, method: str) -> Scored:
        """Return the logits of a request's texts, unless it has too many or its client goes away."""
        begin = time.monotonic()
        self.metrics.count.labels(method).inc()
        if not texts:
            raise Empty("There are no texts.")
        if len(texts) > self.about.max_client_batch_size:
            raise TooLarge(
                f"A request may have {self.about.max_client_batch_size:,} texts; this one has {len(texts):,}."
            )
        seconds = self.about.request_seconds
        scored = await while_connected(request, self.backend.score(texts, cut, seconds))
        durations = {
            "duration": time.monotonic() - begin,
            "tokenization_duration": scored.tokenizing,
            "queue_duration": scored.queue,
            "inference_duration": scored.inference,
        }
        self.metrics.answered(method, **durations)
        response.headers.update(cost_headers(texts, scored, durations, self.about.device))
        return scored

    def cut_of(self, body: protocol.Truncating) -> Cut:
        """Return what happens to texts with too many tokens."""
        truncate = self.about.auto_truncate if body.truncate is None else body.truncate
        return Cut(truncate, body.truncation_direction)

    def check_ranker(self) -> None:
        """Raise Unscorable if the model is a classifier."""
        if not self.about.ranks:
            raise Unscorable("This model is a classifier, which reranks nothing: use /predict.")


def cost_headers(texts: Texts, scored: Scored, durations: dict[str, float], device: str) -> dict[str, str]:
    """Return the headers in which TEI says what a request cost, times in milliseconds."""
    times = {f"x-{name.removesuffix('_duration')}-time": value for name, value in durations.items()}
    times["x-total-time"] = times.pop("x-duration-time")
    characters = sum(len(text) for pair in texts for text in pair if text is not None)
    counts = {"x-compute-type": device, "x-compute-characters": characters, "x-compute-tokens": scored.tokens}
    return {name: str(value) for name, value in counts.items()} | {
        name: str(round(1000 * value)) for name, value in times.items()
    }


async def while_connected(request: Request, work: Awaitable[Scored]) -> Scored:
    """Await the work, and cancel it if the client closes the connection."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = task, watch = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        task.cancel()
        watch.cancel()


def create_app(service: Service, limits: dict, lifespan_end=lambda: None) -> FastAPI:
    """
    Return the application.

    Args:
        limits: Arguments of `Gate`.
        lifespan_end: Called when the server has answered its last request.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI):
        yield
        await asyncio.to_thread(lifespan_end)

    about, metrics = service.about, service.metrics
    app = FastAPI(title=f"Gemma Encoder: {about.model_id}", version=about.version, lifespan=lifespan, redoc_url=None)
    app.add_middleware(Gate, metrics=metrics, **limits)
    add_error_handlers(app, metrics)
    add_scoring_routes(app, service)

    @app.get("/health", responses={503: {"model": protocol.ErrorResponse}})
    async def health() -> Response:
        """Say whether the model can score."""
        if not await service.backend.healthy():
            raise Unhealthy("The model does not score.")
        return Response()

    @app.get("/info")
    async def info() -> dict:
        """Describe the model, what its scores are, and the limits of requests."""
        return about.info(limits)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        """Return counts and times in Prometheus' text format."""
        metrics.queue_size.set(await service.backend.queue_size())
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return app


def add_scoring_routes(app: FastAPI, service: Service) -> None:
    """Add the routes that return scores."""
    documents, ranks = protocol.DocumentsResponse, list[protocol.Rank]
    predictions = list[protocol.Prediction] | list[list[protocol.Prediction]]
    options = {"responses": ERRORS, "response_model_exclude_none": True}

    @app.post("/rerank", response_model=ranks | documents, **options)
    async def rerank(request: Request, response: Response, body: protocol.EitherRequest):
        """Rerank `texts` as Text Embeddings Inference does, or `documents` as Jina and Cohere do."""
        if isinstance(body, protocol.DocumentsRequest):
            return await service.rerank_documents(request, response, body)
        return await service.rerank(request, response, body)

    @app.post("/v1/rerank", response_model=documents, **options)
    async def rerank_documents(request: Request, response: Response, body: protocol.DocumentsRequest):
        """Rerank documents as Jina and Cohere do."""
        return await service.rerank_documents(request, response, body)

    @app.post("/v2/rerank", response_model=documents, **options)
    async def rerank_v2(request: Request, response: Response, body: protocol.DocumentsRequest):
        """Rerank documents as Cohere's second version does, which returns no documents."""
        body = body.model_copy(update={"return_documents": False})
        return await service.rerank_documents(request, response, body, version="2")

    @app.post("/predict", response_model=predictions, **options)
    @app.post("/", response_model=predictions, include_in_schema=False, **options)
    async def predict(request: Request, response: Response, body: protocol.PredictRequest):
        """Return the scores of labels as Text Embeddings Inference does, or, where the body has
        `parameters`, as the Inference API."""
        return await service.predict(request, response, body)


def add_error_handlers(app: FastAPI, metrics: Metrics) -> None:
    """Answer every error with the body that TEI gives, and with the fields where others look."""

    @app.exception_handler(RequestError)
    async def refuse(_request: Request, error: RequestError) -> JSONResponse:
        metrics.failure.labels(error.kind).inc()
        status, headers, content = answer_to(error)
        return JSONResponse(content, status, headers)

    @app.exception_handler(RequestValidationError)
    async def explain(request: Request, error: RequestValidationError) -> JSONResponse:
        wrong = RequestError(in_words(error.errors()))
        wrong.kind = "validation"
        wrong.status = 400 if error.errors()[0]["type"] == "json_invalid" else 422
        if "json" not in request.headers.get("content-type", ""):
            wrong = WrongType("Send JSON, with the header `Content-Type: application/json`.")
        return await refuse(request, wrong)

    @app.exception_handler(HTTPException)
    async def repeat(request: Request, error: HTTPException) -> JSONResponse:
        wrong = RequestError(str(error.detail))
        wrong.kind, wrong.status = "validation", error.status_code
        return await refuse(request, wrong)

    @app.exception_handler(Exception)
    async def apologize(request: Request, error: Exception) -> JSONResponse:
        return await refuse(request, RequestError(f"{type(error).__name__}; the server's log has more."))

    @app.exception_handler(Gone)
    async def end(_request: Request, _error: Gone) -> Response:
        metrics.failure.labels("disconnected").inc()
        return Response(status_code=499)  # as nginx logs it; nobody reads it


def in_words(errors: Sequence[dict], most: int = 3) -> str:
    """Return what is wrong with a body, the field before each error."""
    parts = []
    for error in errors[:most]:
        if error["type"] == "json_invalid":
            return f"This is no JSON: {error['ctx']['error']} at character {error['loc'][-1]}."
        # Without "body", and without the names of classes and of the forms of `/rerank`.
        names = [part for part in error["loc"][1:] if part not in ("str", "TextDocument") and "[" not in str(part)]
        names = names[1:] if len(names) > 1 and names[0] in protocol.FORMS else names
        path = ".".join(map(str, names))
        parts.append(f"`{path}`: {error['msg'].removeprefix('Value error, ')}" if path else error["msg"])
    more = f"; and {len(errors) - most} more" if len(errors) > most else ""
    return "; ".join(dict.fromkeys(parts)) + more
