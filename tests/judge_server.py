"""A judge behind OpenAI's protocol, in a process of its own, for the tests of the evaluation.

    python judge_server.py LOG

Prints its port, and writes what it is asked to LOG, a line of JSON for each request. It says yes with 4 to answers
about things that are "shown" and no with 1 to others; it fails at its first request, and does not say anything
readable to a question that is "unreadable". Questions that are "forbidden" are refused, and so is any temperature for
the model "thinker".
"""

import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock


class Handler(BaseHTTPRequestHandler):
    log = Path(sys.argv[1])
    lock = Lock()

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.lock, self.log.open("a") as file:
            is_first = file.tell() == 0
            file.write(json.dumps({"path": self.path, "key": self.headers["Authorization"], **request}) + "\n")
        if is_first:
            self.send_error(500)
            return
        question = request["messages"][-1]["content"]
        if request["model"] == "thinker" and "temperature" in request:
            self.send(400, {"error": {"message": "temperature: only the default is supported"}})
            return
        if "forbidden" in question:
            self.send(400, {"error": {"message": "content_filter"}})
            return
        reply = "{'pred': 'yes', 'score': 4}" if "shown" in question else "Here it is: {'pred': 'No', 'score': 1}."
        if "unreadable" in question:
            reply = "__import__('os').system('true')"
        message = {"role": "assistant", "content": reply}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.send(200, {"id": "1", "object": "chat.completion", "created": 0, "model": "judge-1", "choices": [choice]})

    def send(self, status: int, content: dict) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
