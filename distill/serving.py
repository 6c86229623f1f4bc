"""A bundle behind HTTP on this machine, without torch: what ``distill serve`` starts.

Values of rows are contents, never paths: who asks reads no file of this machine. Rows that come while the graph runs
wait, and are answered together by its next run.
"""

# no `from __future__ import annotations`: FastAPI reads the annotations of functions that are made here
import asyncio
import base64
import binascii
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, create_model

from distill.contracts import UserError
from distill.formats import SERIES, TABULAR, TEXT, BadInput
from distill.predict import Predictor

HOSTS = ("127.0.0.1", "localhost")
"""Names by which it is asked: a page elsewhere whose name is made to lead here is refused, as are its own requests."""

Feeds = dict[str, NDArray[Any]]
Scope = dict[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Limits(NamedTuple):
    """What one request may ask for, and all together.

    Attributes:
        body_bytes: of a request.
        rows: of a request.
        waiting: rows that may wait beside those of a request; where more do, it is told to come again.
        batch: rows that are joined for a run of the graph; a request with more has runs of its own.
    """

    body_bytes: int = 16 * 2**20
    rows: int = 64
    waiting: int = 256
    batch: int = 64


class BusyError(RuntimeError):
    """More rows wait than may."""


class Batcher:
    """Joins the rows of requests that wait at the same time.

    Args:
        predictor: which decodes rows, two requests at a time, and whose graph runs.
        limits: ``batch`` and ``waiting``.

    Attributes:
        waiting: rows without an answer yet.
    """

    def __init__(self, predictor: Predictor, limits: Limits) -> None:
        self._predictor, self._limits = predictor, limits
        self._queue: asyncio.Queue[tuple[Feeds, int, asyncio.Future[Feeds]]] = asyncio.Queue()
        self._decoding, self._running = ThreadPoolExecutor(2), ThreadPoolExecutor(1)
        self.waiting = 0

    async def run(self, rows: Sequence[Mapping[str, Any]]) -> Feeds:
        """Return the graph's outputs for B rows.

        Raises:
            BusyError: too many rows wait.
            UserError: a row cannot be read, or the model refuses it.
        """
        if self.waiting > self._limits.waiting:
            raise BusyError(f"{self.waiting} rows wait; ask again in a moment")
        loop = asyncio.get_running_loop()
        self.waiting += len(rows)
        try:
            feeds = await loop.run_in_executor(self._decoding, self._predictor.feeds, rows)
            future: asyncio.Future[Feeds] = loop.create_future()
            self._queue.put_nowait((feeds, len(rows), future))
            return await future
        finally:
            self.waiting -= len(rows)

    async def work(self) -> None:
        """Answer what comes, until cancelled; what fails together is tried again one by one."""
        kept: list[Any] = []
        while True:
            jobs = kept or [await self._queue.get()]
            kept = []
            while not self._queue.empty() and not kept:
                job = self._queue.get_nowait()
                fits = sum(rows for _, rows, _ in jobs) + job[1] <= self._limits.batch
                (jobs if fits else kept).append(job)
            jobs = [job for job in jobs if not job[2].done()]  # who asked may have gone
            if not await self._answer(jobs, last=len(jobs) == 1):
                for job in jobs:
                    await self._answer([job], last=True)

    async def _answer(self, jobs: Sequence[tuple[Feeds, int, asyncio.Future[Feeds]]], *, last: bool) -> bool:
        """Run the graph and settle the jobs; where it fails, settle them only if this was the last try."""
        if not jobs:
            return True
        loop = asyncio.get_running_loop()
        try:
            parts = await loop.run_in_executor(self._running, self._run_together, jobs)
        except Exception as error:  # whatever the runtime raises belongs to who asked; the next ones get answers
            for _, _, future in jobs if last else ():
                if not future.done():
                    future.set_exception(error)
            return last
        for (_, _, future), part in zip(jobs, parts, strict=True):
            if not future.done():
                future.set_result(part)
        return True

    def _run_together(self, jobs: Sequence[tuple[Feeds, int, Any]]) -> list[Feeds]:
        tokenizer, most = self._predictor.preprocessor.tokenizer, self._limits.batch
        feeds = join_feeds([feeds for feeds, _, _ in jobs], tokenizer.pad_id if tokenizer else 0)
        total = sum(rows for _, rows, _ in jobs)
        runs = [
            self._predictor.run({name: values[start : start + most] for name, values in feeds.items()})
            for start in range(0, total, most)
        ]
        outputs = {name: np.concatenate([run[name] for run in runs]) for name in runs[0]}
        ends = np.cumsum([rows for _, rows, _ in jobs])
        return [
            {name: values[end - rows : end] for name, values in outputs.items()}
            for (_, rows, _), end in zip(jobs, ends, strict=True)
        ]


def join_feeds(parts: Sequence[Mapping[str, NDArray[Any]]], pad_id: int) -> Feeds:
    """Put rows of inputs one after the other; shorter texts are filled with padding, which the mask leaves out."""
    joined = {}
    for name in parts[0]:
        arrays = [part[name] for part in parts]
        if name in (TEXT, f"{TEXT}_mask"):
            longest = max(array.shape[1] for array in arrays)
            fill = pad_id if name == TEXT else False
            arrays = [np.pad(array, ((0, 0), (0, longest - array.shape[1])), constant_values=fill) for array in arrays]
        joined[name] = np.concatenate(arrays)
    return joined


def make_app(predictor: Predictor, limits: Limits | None = None) -> FastAPI:
    """Return the application: ``/health``, ``/model``, ``/predict``, ``/predict/form``, ``/embed``, ``/openapi.json``.

    Args:
        predictor: a loaded bundle.
        limits: of requests.
    """
    limits = limits or Limits()
    batcher, info = Batcher(predictor, limits), predictor.info
    reads = [*predictor.preprocessor.formats, *([TEXT] if predictor.preprocessor.tokenizer else [])]
    Rows: Any = rows_model(reads, limits.rows)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = asyncio.create_task(batcher.work())
        yield
        worker.cancel()

    app = FastAPI(
        title=str(info["name"]), version=str(info["version"]), lifespan=lifespan, docs_url=None, redoc_url=None
    )  # pages of documentation would load scripts from elsewhere
    app.add_middleware(Guard, most=limits.body_bytes)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(HOSTS))
    app.add_exception_handler(UserError, _refused)
    app.add_exception_handler(BusyError, _busy)
    app.add_exception_handler(RequestValidationError, _malformed)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        """Whether rows are answered, and how many wait."""
        return {"status": "ok", "model": info["name"], "waiting": batcher.waiting}

    @app.get("/model")
    async def model() -> dict[str, Any]:
        """What the bundle reads and says."""
        return _described(predictor, reads)

    def need_tasks() -> None:
        if not predictor.tasks:
            raise UserError(f"{info['name']} gives embeddings and has no classes to predict; ask /embed")

    @app.post("/predict", dependencies=[Depends(need_tasks)])
    async def predict(asked: Rows) -> dict[str, Any]:
        """Answer the tasks for rows; files are given as base64."""
        given: Any = asked
        return {"predictions": predictor.answers(_finite(await batcher.run(contents(given.rows))), given.top_k)}

    @app.post("/predict/form", dependencies=[Depends(need_tasks)], openapi_extra=_form_schema(reads))
    async def predict_form(request: Request, top_k: Annotated[int, Field(ge=1)] = 3) -> dict[str, Any]:
        """Answer the tasks for one row: a form whose fields are named like modalities, files as they are."""
        async with request.form(max_files=len(reads), max_fields=len(reads)) as form:
            row = {name: await _form_value(name, form.get(name)) for name in reads if name in form}
            unknown = [name for name in form if name not in reads]
        if unknown:
            raise HTTPException(422, f"{info['name']} reads no {unknown[0]}; it reads {', '.join(reads)}")
        return predictor.answers(_finite(await batcher.run([row])), top_k)[0]

    @app.post("/embed")
    async def embed(asked: Rows) -> dict[str, Any]:
        """Give the embeddings of rows."""
        given: Any = asked
        found = predictor.embeddings(_finite(await batcher.run(contents(given.rows))))
        return {"embeddings": {name: values.tolist() for name, values in found.items()}}

    return app


def _described(predictor: Predictor, reads: Sequence[str]) -> dict[str, Any]:
    tasks = {name: {"kind": task.kind, "names": list(task.names)} for name, task in predictor.tasks.items()}
    kept = ("name", "runtime", "runtime_version", "inputs", "outputs", "info")
    return {name: predictor.info[name] for name in kept} | {"reads": list(reads), "tasks": tasks}


def rows_model(reads: Sequence[str], most: int) -> type[BaseModel]:
    """Return the schema of requests: ``rows`` of optional modalities, and ``top_k``."""
    kinds: dict[str, Any] = {
        TEXT: str,
        TABULAR: dict[str, float | str | bool | None],
        SERIES: str | list[float] | list[list[float]],
    }
    fields: Any = {name: (kinds.get(name, str) | None, None) for name in reads}
    row = create_model("Row", __config__=ConfigDict(extra="forbid"), **fields)
    listed = Annotated[list[row], Field(min_length=1, max_length=most)]
    top: Any = (Annotated[int, Field(ge=1)], 3)
    return create_model("Rows", __config__=ConfigDict(extra="forbid"), rows=(listed, ...), top_k=top)


def contents(rows: Sequence[BaseModel]) -> list[dict[str, Any]]:
    """Return rows with the bytes of files in place of their base64.

    Raises:
        BadInput: a value is no base64.
    """
    return [
        {name: _content(number, name, value) for name, value in row.model_dump(exclude_none=True).items()}
        for number, row in enumerate(rows)
    ]


def _content(number: int, name: str, value: Any) -> Any:
    if name == TEXT or not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadInput(f"row {number}: {name} is no base64 ({error}); give the file's content so") from error


async def _form_value(name: str, value: Any) -> Any:
    """What a field of a form holds: a file's bytes, a text, or the JSON of a record."""
    if not isinstance(value, str):
        return await value.read() or None  # a browser sends an empty file where none was chosen
    if name == TABULAR:
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{name} is no JSON: {type(error).__name__}") from error
    return value if name == TEXT else str(value).encode()


def _form_schema(reads: Sequence[str]) -> dict[str, Any]:
    fields = {
        name: {"type": "string"} if name in (TEXT, TABULAR) else {"type": "string", "format": "binary"}
        for name in reads
    }
    schema = {"type": "object", "properties": fields}
    return {"requestBody": {"content": {"multipart/form-data": {"schema": schema}}}}


async def _refused(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": " ".join(str(error).split())}, 422)


async def _malformed(request: Request, error: Exception) -> JSONResponse:
    """What is wrong, without what was sent: it may be large, and no JSON."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]).encode("utf-8", "replace").decode()
    return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)


def _finite(outputs: Feeds) -> Feeds:
    """Refuse to tell what is no number as if it were an answer."""
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise HTTPException(500, f"the model's output {name!r} is not finite")
    return outputs


async def _busy(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, 503, {"Retry-After": "1"})


class Guard:
    """Refuses requests of pages elsewhere, and those whose body is too large, whether they say so before or not.

    Args:
        app: what is asked.
        most: bytes.
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        origin = urlsplit(headers.get(b"origin", b"").decode("latin-1")).hostname
        if b"origin" in headers and origin not in HOSTS:
            await JSONResponse({"detail": "pages of other places may not ask"}, 403)(scope, receive, send)
            return
        told = int(headers.get(b"content-length", b"0"))
        if told > self.most:
            await JSONResponse({"detail": self._too_large}, 413)(scope, receive, send)
            return
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.most:
                raise HTTPException(413, self._too_large)
            return message

        await self.app(scope, limited, send)

    @property
    def _too_large(self) -> str:
        return f"the request is larger than {self.most} bytes; send fewer rows or smaller files"
