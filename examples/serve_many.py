"""Answers many readers at once: `python examples/serve_many.py`, then `curl -N "ADDRESS/?q=Name+a+bird"` as often as
you like. Server-sent events over asyncio and the standard library; the texts share their passes through the model.
"""

from __future__ import annotations

import asyncio
import json
import sys
from urllib.parse import parse_qs, urlsplit

import mtp_spec

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
lm = mtp_spec.load(max_batch=16)  # later visitors wait for their turn


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Writes one visitor's text, piece by piece."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()  # the visitor left before asking
        return
    question = parse_qs(urlsplit(head.split()[1].decode()).query).get("q", ["Tell me a story"])[0]
    text = lm.submit([{"role": "user", "content": question}], max_new_tokens=200)
    try:
        writer.write(HEAD)
        async for event in text:
            writer.write(f"data: {json.dumps({'text': event.text, 'source': event.source})}\n\n".encode())
            await writer.drain()
        writer.write(f"event: end\ndata: {json.dumps({'seed': (await text).seed})}\n\n".encode())
    except ConnectionError:
        pass  # the visitor has left
    finally:
        text.cancel()  # what nobody reads costs nothing further
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


asyncio.run(main())
