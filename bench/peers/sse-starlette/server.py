"""Starlette with sse-starlette, served by uvicorn with uvloop and httptools, told by asyncpg.

As in sse-starlette's example of a message stream with a queue per client
(examples/ in its repository), and as in asyncpg's documentation of ``Connection.add_listener``. A
full queue closes the stream, so that memory is bounded.

    python server.py PORT

    GET  /all, /own/NAME     a stream
    POST /all, /own/NAME     the body goes to those streams as the data of one event

BENCH_DSN and BENCH_CHANNEL name the database and the channel to listen to: the payloads are those
of sse_server's trigger, so that all contenders are told by the same NOTIFY.
"""

import asyncio
import contextlib
import itertools
import json
import os
import sys
from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import asyncpg
import uvicorn
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

Queue = asyncio.Queue[tuple[str, str] | None]

MOST_QUEUED = 100

queues: defaultdict[str, set[Queue]] = defaultdict(set)
ids = itertools.count(1)


async def events(topic: str) -> AsyncIterator[ServerSentEvent]:
    queue: Queue = asyncio.Queue(MOST_QUEUED)
    queues[topic].add(queue)
    try:
        while (item := await queue.get()) is not None:
            id, data = item
            yield ServerSentEvent(data, event="notification", id=id)
    finally:
        queues[topic].discard(queue)
        if not queues[topic]:
            del queues[topic]


async def subscribe(request: Request) -> EventSourceResponse:
    return EventSourceResponse(events(request.url.path))


def send(topic: str, id: str, data: str) -> None:
    for queue in list(queues.get(topic, ())):
        if queue.full():
            queue.get_nowait()
            queue.put_nowait(None)
        else:
            queue.put_nowait((id, data))


async def publish(request: Request) -> Response:
    data = (await request.body()).decode()
    send(request.url.path, str(next(ids)), data)
    return Response(status_code=204)


def told(connection: object, pid: int, channel: str, payload: object) -> None:
    message = json.loads(str(payload))
    if message["t"] != "notification":
        return
    for id, user, created_ms in message["r"]:
        data = {
            "id": id,
            "created_at": datetime.fromtimestamp(created_ms / 1000, UTC).isoformat(),
            "event_type": message["e"],
            "message": message["m"],
            "link": message["l"],
        }
        topic = "/all" if user == "everybody" else f"/own/{user}"
        if topic in queues:
            send(topic, str(id), json.dumps(data))


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    dsn = os.environ.get("BENCH_DSN")
    if dsn is None:
        yield
        return
    connection = await asyncpg.connect(dsn)
    await connection.add_listener(os.environ["BENCH_CHANNEL"], told)
    try:
        yield
    finally:
        await connection.close()


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route(path, endpoint, methods=[method])
        for path in ("/all", "/own/{name}")
        for endpoint, method in ((subscribe, "GET"), (publish, "POST"))
    ],
)


if __name__ == "__main__":
    uvicorn.run(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        backlog=4096,
        log_level="error",
        access_log=False,
    )
