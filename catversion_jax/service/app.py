"""The service over HTTP: its routes, their description, and its page. What they do is in service.py."""

import asyncio
import base64
import io
import tempfile
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, FastAPI, Form, Header, Query, Request, Response, Security
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from catversion_jax import __version__
from catversion_jax.methods import concept_file
from catversion_jax.sampling.export import FOLDERS, check_exportable, write_concepts
from catversion_jax.service.guard import Guard
from catversion_jax.service.photo_check import checked_photos
from catversion_jax.service.problems import MEDIA_TYPE, Problem, handle_problems
from catversion_jax.service.requests import (
    DONE,
    ENDED,
    FAILED,
    CheckAnswer,
    ConceptAnswer,
    ConceptForm,
    ConceptPage,
    Id,
    PhotosForm,
    PictureAnswer,
    PicturePage,
    PicturesAnswer,
    PicturesRequest,
    SecretAnswer,
    ServiceAnswer,
)
from catversion_jax.service.service import ConceptService, page_of

PAGE = Path(__file__).parent / "page"
POLL = 0.1  # seconds between two looks at what is waited for
QUIET = 15.0
"""Seconds after which a stream of events says that it is still there, so that no proxy closes it."""
MOST_WAIT = 600.0
REMOVAL = 60.0
"""Seconds that a removal is waited for: the worker may be in the middle of a turn."""
HEAVY = anyio.CapacityLimiter(4)
"""How many requests may decode photos or pack files at one time: each takes memory, and a thread."""

T = TypeVar("T")
router = APIRouter(prefix="/v1")
Multipart = Form(media_type="multipart/form-data")
IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=200, description="A retry with the same key gives the same ids."),
]
Before = Annotated[str | None, Query(pattern=r"^[0-9]{1,15}$", description="`next` of the page before.")]
Number = Annotated[int, PathParameter(ge=0, le=10**9)]
PageSize = Annotated[int, Query(ge=1, le=200)]


def service_of(request: Request) -> ConceptService:
    return request.app.state.service


def owner_of_request(request: Request) -> str:
    return request.state.owner


async def heavy(work: Callable[..., T], *arguments: Any) -> T:
    """Does work of which not much may be done at once, in a thread."""
    return await anyio.to_thread.run_sync(work, *arguments, limiter=HEAVY)


Here = Annotated[ConceptService, Depends(service_of)]
Owner = Annotated[str, Depends(owner_of_request)]


@router.post("/concepts", status_code=202)
async def post_concept(
    service: Here, owner: Owner, form: Annotated[ConceptForm, Multipart], idempotency_key: IdempotencyKey = None
) -> ConceptAnswer:
    """Accepts a concept to learn: photos, and the word for what they show."""
    entry = await heavy(service.add_concept, owner, form, idempotency_key)
    return await run_in_threadpool(service.concept_answer, entry)


@router.get("/concepts")
def list_concepts(service: Here, owner: Owner, after: Before = None, limit: PageSize = 50) -> ConceptPage:
    """Lists concepts, the newest first."""
    found = service.store.owned("concepts", owner, None if after is None else int(after), limit + 1)
    entries, following = page_of(found, limit)
    return ConceptPage(concepts=list(map(service.concept_answer, entries)), next=following)


@router.get("/concepts/{concept_id}")
def get_concept(service: Here, owner: Owner, concept_id: Id) -> ConceptAnswer:
    """Says how a concept is doing."""
    return service.concept_answer(service.concept_entry(owner, concept_id))


@router.delete("/concepts/{concept_id}", status_code=204)
async def delete_concept(service: Here, owner: Owner, concept_id: Id) -> None:
    """Cancels a concept, and removes its photos, what was learned from them, and the pictures that show it."""
    await run_in_threadpool(service.ask_to_remove, owner, concept_id)
    until = time.monotonic() + REMOVAL
    while not await run_in_threadpool(service.is_removed, concept_id):
        if service.draining or time.monotonic() > until:
            raise Problem(503, f"concept {concept_id}: will be removed, and is not yet")
        await asyncio.sleep(POLL / 2)


@router.get("/concepts/{concept_id}/events", response_class=StreamingResponse)
async def get_events(service: Here, owner: Owner, concept_id: Id) -> StreamingResponse:
    """Sends how a concept is doing whenever that changes, as server-sent events, until its previews are there."""
    await run_in_threadpool(service.concept_entry, owner, concept_id)
    return StreamingResponse(events(service, owner, concept_id), media_type="text/event-stream")


async def events(service: ConceptService, owner: str, concept_id: str) -> AsyncIterator[str]:
    """Yields the events of a concept."""
    last, said = "", time.monotonic()
    while not service.draining:
        try:
            entry = await run_in_threadpool(service.concept_entry, owner, concept_id)
        except Problem:
            yield "event: removed\ndata: {}\n\n"
            return
        text = (await run_in_threadpool(service.concept_answer, entry)).model_dump_json()
        if text != last:
            last, said = text, time.monotonic()
            yield f"event: concept\ndata: {text}\n\n"
        elif time.monotonic() - said > QUIET:
            said = time.monotonic()
            yield ": still here\n\n"
        if entry.status in ENDED and (entry.status != DONE or entry.previewed):
            return
        await asyncio.sleep(2 * POLL)


@router.get("/concepts/{concept_id}/concept.safetensors", response_class=FileResponse)
def get_concept_file(service: Here, owner: Owner, concept_id: Id) -> FileResponse:
    """Sends what was learned, as `catversion generate` and `Concept.load` take it."""
    service.check_done(owner, concept_id)
    path = service.store.concept_file(concept_id)
    return FileResponse(path, media_type="application/octet-stream", filename=concept_file.FILE_NAME)


@router.get("/concepts/{concept_id}/export.zip", response_class=Response)
async def get_export(service: Here, owner: Owner, concept_id: Id) -> Response:
    """Sends the concept for diffusers and ComfyUI, with the code that uses it there."""
    headers = {"Content-Disposition": 'attachment; filename="export.zip"'}
    packed = await heavy(packed_export, service, owner, concept_id)
    return Response(packed, media_type="application/zip", headers=headers)


def packed_export(service: ConceptService, owner: str, concept_id: str) -> bytes:
    """Returns a concept's export as a zip file."""
    concept = service.concept_to_draw(owner, concept_id)
    check_exportable(concept, f"concept {concept_id}")
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as name, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        folder = Path(name)
        for inside in FOLDERS:
            (folder / inside).mkdir(parents=True)
        write_concepts(folder, [concept])
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(path, path.relative_to(folder))
    return packed.getvalue()


@router.get("/concepts/{concept_id}/photos/{number}", response_class=FileResponse)
def get_photo(service: Here, owner: Owner, concept_id: Id, number: Number) -> FileResponse:
    """Sends a photo as training sees it: cropped, with what its mask leaves out dimmed."""
    folder = service.store.concept_folder(service.concept_entry(owner, concept_id).id)
    return image_file(folder / "seen" / f"{number:03}.png", f"photo {number}")


@router.get("/concepts/{concept_id}/previews/{step}/{number}", response_class=FileResponse)
def get_preview(service: Here, owner: Owner, concept_id: Id, step: Number, number: Number) -> FileResponse:
    """Sends an image of one of the concept's prompts, as it was after a step."""
    folder = service.store.concept_folder(service.concept_entry(owner, concept_id).id)
    return image_file(folder / "previews" / f"{step:06}-{number:03}.png", f"preview {number} of step {step}")


def image_file(path: Path, what: str) -> FileResponse:
    if not path.is_file():
        raise Problem(404, f"{what}: not found")
    return FileResponse(path, media_type="image/png")


@router.post("/checks")
async def post_check(service: Here, form: Annotated[PhotosForm, Multipart]) -> CheckAnswer:
    """Shows photos as training would see them, with warnings; nothing is kept."""
    return await heavy(checked_photos, service, form)


@router.post("/pictures", status_code=202, responses={200: {"model": PicturesAnswer}})
async def post_pictures(
    request: Request, service: Here, owner: Owner, asked: PicturesRequest, idempotency_key: IdempotencyKey = None
) -> Response:
    """Accepts pictures to draw; with `wait`, answers when they have ended: with the PNG itself if one is accepted."""
    ids = await run_in_threadpool(service.add_pictures, owner, asked, idempotency_key)

    def answers() -> list[PictureAnswer]:
        return [service.picture_answer(service.picture_entry(owner, picture_id)) for picture_id in ids]

    found = await run_in_threadpool(answers)
    if not asked.wait:
        return JSONResponse(PicturesAnswer(pictures=found).model_dump(), 202)
    until = time.monotonic() + MOST_WAIT
    while not all(picture.status in ENDED for picture in found):
        if service.draining or time.monotonic() > until or await request.is_disconnected():
            return JSONResponse(PicturesAnswer(pictures=found).model_dump(), 202)
        await asyncio.sleep(POLL)
        found = await run_in_threadpool(answers)
    return await run_in_threadpool(with_pngs, service, found, request.headers.get("accept", ""))


def with_pngs(service: ConceptService, found: list[PictureAnswer], accepted: str) -> Response:
    """Returns pictures that have ended: one alone as a PNG, if that is what is accepted."""
    if len(found) == 1 and "image/png" in accepted:
        if found[0].status == FAILED:
            raise Problem(422, found[0].error or "the picture failed")
        return image_file(service.store.picture_file(found[0].id), f"picture {found[0].id}")
    for picture in found:
        with suppress(FileNotFoundError):  # of one that was removed since
            if picture.status == DONE:
                picture.png = base64.b64encode(service.store.picture_file(picture.id).read_bytes()).decode()
    return JSONResponse(PicturesAnswer(pictures=found).model_dump())


@router.get("/pictures")
def list_pictures(service: Here, owner: Owner, after: Before = None, limit: PageSize = 50) -> PicturePage:
    """Lists pictures, the newest first."""
    found = service.store.owned("pictures", owner, None if after is None else int(after), limit + 1)
    entries, following = page_of(found, limit)
    return PicturePage(pictures=list(map(service.picture_answer, entries)), next=following)


@router.get("/pictures/{picture_id}.png", response_class=FileResponse)
def get_png(service: Here, owner: Owner, picture_id: Id) -> FileResponse:
    """Sends a picture; its PNG says how it was made."""
    return image_file(service.store.picture_file(service.picture_entry(owner, picture_id).id), f"picture {picture_id}")


@router.get("/pictures/{picture_id}")
def get_picture(service: Here, owner: Owner, picture_id: Id) -> PictureAnswer:
    """Says how a picture is doing."""
    return service.picture_answer(service.picture_entry(owner, picture_id))


@router.delete("/pictures/{picture_id}", status_code=204)
def delete_picture(service: Here, owner: Owner, picture_id: Id) -> None:
    """Removes a picture, drawn or not."""
    service.remove_picture(owner, picture_id)


@router.get("/webhook_secret")
def get_webhook_secret(service: Here, owner: Owner) -> SecretAnswer:
    """Tells the key that this token's webhooks are signed with."""
    return SecretAnswer(secret=service.webhook_secret(owner))


@router.get("/service")
def get_service(service: Here) -> ServiceAnswer:
    """Says what this service has, and its limits."""
    return service.service_answer()


def make_app(service: ConceptService, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]]) -> FastAPI:
    """Returns the app of a service."""
    problem = {"description": "A problem, in one line (RFC 9457)", "content": {MEDIA_TYPE: {}}}
    app = FastAPIOffline(
        redoc_url=None,
        title="catversion",
        version=__version__,
        lifespan=lifespan,
        responses=dict.fromkeys(("4XX", "5XX"), problem),
        separate_input_output_schemas=False,
    )
    app.state.service = service
    app.include_router(router, dependencies=[Security(HTTPBearer(auto_error=False))])
    add_plain_routes(app, service)
    handle_problems(app)
    app.add_middleware(Timed, seconds=service.metrics.requests)
    app.add_middleware(Guard, limits=service.limits, names=service.rules.names, draining=lambda: service.draining)
    return app


def add_plain_routes(app: FastAPI, service: ConceptService) -> None:
    """Adds the page, and what orchestrators and Prometheus ask."""
    for path, file in (("/", "index.html"), ("/page.js", "page.js"), ("/page.css", "page.css")):
        app.get(path, include_in_schema=False)(lambda file=file: FileResponse(PAGE / file))

    @app.get("/healthz", response_class=PlainTextResponse, tags=["health"])
    async def healthz() -> str:
        """Says that the server lives."""
        if service.worker.failure:
            raise Problem(500, "the worker has ended; the server's log says why")
        return "ok"

    @app.get("/readyz", response_class=PlainTextResponse, tags=["health"])
    async def readyz() -> str:
        """Says that everything is compiled, and that the disk takes what is written."""
        if not service.worker.ready.is_set() or service.draining:
            raise Problem(503, "stopping" if service.draining else "loading and compiling")
        if service.worker.problem:
            raise Problem(503, "the disk refuses what is written; the server's log says more")
        return "ready"

    @app.get("/metrics", response_class=PlainTextResponse, tags=["health"])
    def metrics() -> Response:
        """Tells Prometheus the service's numbers."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


class Timed:
    """An ASGI middleware that notes how long each answer takes."""

    def __init__(self, app: ASGIApp, seconds: Histogram):
        self._app, self._seconds = app, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, status = time.monotonic(), "none"

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            # The route as it is declared: paths have ids, of which there are too many.
            if (route := getattr(scope.get("route"), "path", None)) is not None:
                self._seconds.labels(scope["method"], route, status).observe(time.monotonic() - begun)
