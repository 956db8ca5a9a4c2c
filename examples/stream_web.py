"""A web page that shows a text while it is written: `python examples/stream_web.py`, then open the address it prints.

Server-sent events over the standard library's server. Words that were drafted are green, the target's own black.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from urllib.parse import parse_qs, urlsplit

import mtp_spec

PAGE = """<!doctype html><meta charset="utf-8"><title>mtp_spec</title>
<form><input name="q" size="40" value="Tell me a story about a fox"> <button>Write</button></form><p></p>
<script>
const form = document.querySelector("form"), text = document.querySelector("p");
form.onsubmit = submitted => {
  submitted.preventDefault();
  text.replaceChildren();
  const events = new EventSource("/stream?q=" + encodeURIComponent(form.q.value));
  events.onmessage = message => {
    const token = JSON.parse(message.data), part = document.createElement("span");
    part.textContent = token.text;
    part.style.color = token.source === "target" ? "black" : "green";
    text.append(part);
  };
  events.addEventListener("end", () => events.close());
};
</script>"""
lm = mtp_spec.load()
writing = Lock()  # texts side by side would only slow each other down


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        address = urlsplit(self.path)
        streams = address.path == "/stream"
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream" if streams else "text/html; charset=utf-8")
        self.end_headers()
        if not streams:
            self.wfile.write(PAGE.encode())
            return
        question = parse_qs(address.query).get("q", ["Tell me a story"])[0]
        with writing, suppress(ConnectionError):  # the reader may leave, and a text that nobody reads is not written on
            stream = lm.stream([{"role": "user", "content": question}], max_new_tokens=200)
            for event in stream:
                self.wfile.write(f"data: {json.dumps({'text': event.text, 'source': event.source})}\n\n".encode())
            self.wfile.write(f"event: end\ndata: {json.dumps({'seed': stream.result.seed})}\n\n".encode())


server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 8000), Handler)
print(f"http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
