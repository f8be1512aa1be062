"""aiohttp with aiohttp-sse and a queue per client: the usual example, grown up.

As in aiohttp-sse's own chat example (examples/chat.py in its repository): every stream has an
`asyncio.Queue`, and its handler waits for the queue and sends. A full queue closes the stream, so
that memory is bounded.

    python server.py PORT

    GET  /all, /own/NAME     a stream
    POST /all, /own/NAME     the body goes to those streams as the data of one event
"""

import asyncio
import itertools
import sys
from collections import defaultdict

from aiohttp import web
from aiohttp_sse import sse_response

Queue = asyncio.Queue[tuple[str, str] | None]

MOST_QUEUED = 100

queues: defaultdict[str, set[Queue]] = defaultdict(set)
ids = itertools.count(1)


async def subscribe(request: web.Request) -> web.StreamResponse:
    async with sse_response(request) as response:
        queue: Queue = asyncio.Queue(MOST_QUEUED)
        queues[request.path].add(queue)
        try:
            while response.is_connected():
                item = await queue.get()
                if item is None:
                    break
                id, data = item
                await response.send(data, id=id, event="notification")
        finally:
            queues[request.path].discard(queue)
            if not queues[request.path]:
                del queues[request.path]
    return response


async def publish(request: web.Request) -> web.Response:
    data = await request.text()
    item = str(next(ids)), data
    for queue in list(queues.get(request.path, ())):
        if queue.full():
            queue.get_nowait()
            queue.put_nowait(None)
        else:
            queue.put_nowait(item)
    return web.Response(status=204)


def main() -> None:
    app = web.Application()
    for path in ("/all", "/own/{name}"):
        app.router.add_get(path, subscribe)
        app.router.add_post(path, publish)
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(sys.argv[1]),
        backlog=4096,
        access_log=None,
        print=None,
        handler_cancellation=True,
    )


if __name__ == "__main__":
    main()
