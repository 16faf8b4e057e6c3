"""`videollama serve` as a process of its own, asked by the `openai` client about media of a real HTTP server."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from serve_parts import MediaHost, Reference, data_url, make_readable, until, write_files

from transformers_videollama.cli import main
from transformers_videollama.cli.serve import allowed_hosts
from transformers_videollama.serving.chat_request import read_chat_request
from transformers_videollama.serving.errors import RequestError
from transformers_videollama.serving.fetching import FetchRules
from transformers_videollama.serving.preparation import Preparation

pytestmark = pytest.mark.xdist_group("serve")  # the tests share their servers, and the last one ends one
KEY = "a secret"
MAX_QUEUE = 5


class Server:
    """A server process. What it prints goes to a file; its temporary files go to a folder."""

    def __init__(self, folder: Path, *arguments: str, **environment: str):
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.log = folder / "log"
        command = [sys.executable, "-m", "transformers_videollama", "serve", "--port", "0", "--device", "cpu"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1", **environment},
            )

    def wait(self) -> None:
        """Until it listens."""
        until(lambda: "/v1" in self.log.read_text() or self.process.poll() is not None)
        found = re.search(r"^(\S+) is served at (http://127\.0\.0\.1:(\d+)/v1)$", self.log.read_text(), re.MULTILINE)
        assert found is not None, self.log.read_text()
        self.name, self.url, self.port = found[1], found[2], int(found[3])

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**{"base_url": self.url, "api_key": KEY, "max_retries": 0, "timeout": 300, **options})

    def health(self) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            response = connection.getresponse()
            return response.status, json.loads(response.read())

    def send(self, **request: Any) -> http.client.HTTPConnection:
        """Sends a request of which the answer is not waited for."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
        connection.request("POST", "/v1/chat/completions", json.dumps({"model": self.name, **request}), headers)
        return connection

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def model_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_readable(tiny_folder, tmp_path_factory.mktemp("models") / "readable")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("media") / "files")


@pytest.fixture(scope="module")
def host(files: Path) -> Iterator[MediaHost]:
    with MediaHost(files) as host:
        yield host


@pytest.fixture(scope="module")
def servers(model_folder: Path, files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """One that is allowed everything, and one as it is by default."""
    folder = tmp_path_factory.mktemp("servers")
    limits = f"--max-queue {MAX_QUEUE} --max-file-mb 1 --max-body-mb 2 --max-media-seconds 6 --max-files 3".split()
    allowed = ["--allow-private-addresses", "--allow-local-files", str(files)]
    patience = ["--fetch-timeout", "200", "--batch-window", "0.2"]
    model = ["--model", str(model_folder), "--max-new-tokens", "12"]
    other = ["--served-model-name", "me/another", "--system-prompt", "Be brief.", "--allowed-host", "*.example.org"]
    servers = [
        Server(folder / "open", *model, *allowed, *limits, *patience, VIDEOLLAMA_API_KEY=KEY),
        Server(folder / "closed", *model, *other),
    ]
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.end()


@pytest.fixture
def server(servers: list[Server]) -> Server:
    return servers[0]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def reference(model_folder: Path, servers: list[Server]) -> Reference:
    return Reference(model_folder)


def user(*parts: Any) -> dict[str, Any]:
    """A message of texts and other parts."""
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def url_part(kind: str, url: str) -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def file_entry(kind: str, path: Path) -> dict[str, Any]:
    """The same as the model's own messages say it."""
    return {"type": kind, "path": str(path)}


def test_models_and_health(servers: list[Server]) -> None:
    for server, name in zip(servers, ("readable", "me/another"), strict=True):
        client = server.client()
        assert server.name == name and [model.id for model in client.models.list()] == [name]
        assert client.models.retrieve(name).object == "model"
        with pytest.raises(openai.NotFoundError, match="no model 'gpt-4o'"):
            client.models.retrieve("gpt-4o")
        assert server.health() == (200, {"status": "ok", "waiting": 0, "running": 0})


@pytest.mark.parametrize(
    ("kind", "name", "way"),
    [
        ("video", "clip.mp4", "http"),
        ("video", "clip_silent.mp4", "data"),
        ("video", "clip.mp4", "path"),
        ("video", "clip.mp4", "file"),
        ("image", "picture.png", "http"),
        ("image", "picture.png", "data"),
        ("audio", "tone.wav", "http"),
        ("audio", "tone.wav", "input"),
        ("audio", "tone.mp3", "input"),
    ],
)
def test_media(
    kind: str, name: str, way: str, server: Server, host: MediaHost, files: Path, reference: Reference
) -> None:
    path = files / name
    if way == "input":
        data = data_url(path, "").partition(",")[2]
        part = {"type": "input_audio", "input_audio": {"data": data, "format": path.suffix[1:]}}
    else:
        urls = {"http": f"{host.url}/{name}", "path": name, "file": f"file://{path}"}
        part = url_part(kind, urls.get(way) or data_url(path, f"{kind}/{path.suffix[1:]}"))
    answer = server.client().chat.completions.create(model=server.name, messages=[user(part, "What is it?")])
    expected, num_tokens = reference.answer([user(file_entry(kind, path), "What is it?")])
    assert answer.choices[0].message.content == expected and answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length" and answer.model == server.name
    assert answer.usage is not None and answer.usage.prompt_tokens == num_tokens
    assert answer.usage.completion_tokens == 12 and answer.usage.total_tokens == num_tokens + 12


def test_several_turns_and_a_system_prompt(servers: list[Server], files: Path, reference: Reference) -> None:
    clip = url_part("video", data_url(files / "clip.mp4", "video/mp4"))
    is_sanitized = hasattr(reference.processor.tokenizer, "_mark_chat_inputs")  # not in older versions of transformers
    last = "And <video> then?" if is_sanitized else "And then?"
    turns = [{"role": "assistant", "content": "A dog."}, {"role": "user", "content": last}]
    system = {"role": "developer", "content": "Be brief."}
    seen = [{**system, "role": "system"}, user(file_entry("video", files / "clip.mp4"), "What?"), *turns]
    inputs = reference.processor.apply_chat_template(
        seen,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=is_sanitized,
    )
    output = reference.model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = reference.processor.post_process_image_text_to_text(output)[0]
    for server, given in zip(servers, ([system], []), strict=True):  # the other server has it by itself
        messages: Any = [*given, user(clip, "What?"), *turns]
        answer = server.client().chat.completions.create(model=server.name, messages=messages)
        assert answer.choices[0].message.content == expected


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "top_p": 0.9, "seed": 3}, {"stop": ["e", "a"]}])
def test_a_stream_is_the_answer(options: dict[str, Any], client: openai.OpenAI, host: MediaHost) -> None:
    request: dict[str, Any] = {
        "model": "readable",
        "messages": [user(url_part("video", f"{host.url}/clip.mp4"), "What happens?")],
        "max_completion_tokens": 40,
        **options,
    }
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    *body, last = chunks
    assert not last.choices and last.usage == whole.usage and all(chunk.usage is None for chunk in body)
    assert len({chunk.id for chunk in chunks}) == 1 and body[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in body]
    assert "".join(pieces) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in body]
    assert reasons == [None] * (len(body) - 1) + [whole.choices[0].finish_reason]
    if options.get("stop"):
        assert whole.choices[0].finish_reason == "stop" and not set("ea") & set("".join(pieces))
        assert whole.usage.completion_tokens < 40
    else:
        assert whole.choices[0].finish_reason == "length" and sum(map(bool, pieces)) > 10
    without_usage = client.chat.completions.create(**request, stream=True)
    assert all(chunk.choices and chunk.usage is None for chunk in without_usage)


def test_the_client_s_stream_helper(client: openai.OpenAI) -> None:
    request: Any = {"model": "readable", "messages": [user("Hm?")], "max_tokens": 100, "stop": ["a", "e", "i", "o"]}
    with client.chat.completions.stream(**request) as stream:
        final = stream.get_final_completion()
    whole = client.chat.completions.create(**request)
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_requests_that_come_together_are_answered_together(
    server: Server, host: MediaHost, files: Path, reference: Reference
) -> None:
    host.hold()
    names = ["clip.mp4", "clip_silent.mp4", "clip.mp4", "clip_silent.mp4"]
    asked = [f"What{' is' * number}?" for number in range(len(names))]
    client = server.client()

    def ask(number: int) -> Any:
        is_streamed = number % 2 == 1
        answer = client.chat.completions.create(
            model="readable",
            messages=[user(url_part("video", f"{host.url}/held/{names[number]}"), asked[number])],
            max_tokens=10 + number,
            stream=is_streamed,
        )
        if not is_streamed:
            return answer.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)

    log_before = len(server.log.read_text())
    with ThreadPoolExecutor(len(names)) as threads:
        answers = [threads.submit(ask, number) for number in range(len(names))]
        until(lambda: server.health()[1]["waiting"] == len(names))
        host.release()
        for number, answer in enumerate(answers):
            messages = [user(file_entry("video", files / names[number]), asked[number])]
            assert answer.result() == reference.answer(messages, 10 + number)[0]
    sizes = re.findall(r"answered a batch of (\d+)", server.log.read_text()[log_before:])
    assert max(map(int, sizes)) > 1 and sum(map(int, sizes)) == len(names)


def test_a_full_queue_and_a_place_that_is_left(server: Server, client: openai.OpenAI, host: MediaHost) -> None:
    host.hold()
    request = {"messages": [user(url_part("video", f"{host.url}/held/clip.mp4"), "What?")]}
    waiting = [server.send(**request, stream=number == 0) for number in range(MAX_QUEUE)]
    until(lambda: server.health()[1]["waiting"] == MAX_QUEUE)
    with pytest.raises(openai.RateLimitError, match="5 requests are waiting") as refused:
        client.chat.completions.create(model="readable", messages=[user("Hm?")])  # type: ignore[list-item]
    assert int(refused.value.response.headers["Retry-After"]) >= 1 and refused.value.code == "queue_full"
    assert refused.value.type == "rate_limit_error"

    waiting.pop().close()
    until(lambda: server.health()[1]["waiting"] == MAX_QUEUE - 1)
    waiting.append(server.send(messages=[user("Hm?")]))
    host.release()
    responses = [connection.getresponse() for connection in waiting]
    assert [response.status for response in responses] == [200] * MAX_QUEUE
    assert responses[0].read().decode().endswith("data: [DONE]\n\n")
    for response in responses[1:]:
        assert json.loads(response.read())["choices"][0]["message"]["content"]


def test_who_leaves_a_stream_frees_its_place(server: Server, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="readable",
        messages=[user("Hm?")],
        max_tokens=400,
        stream=True,  # type: ignore[list-item]
    )
    for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    stream.close()
    until(lambda: server.health()[1] == {"status": "ok", "waiting": 0, "running": 0})


GOOD = {"messages": [user("Hm?")]}
HALF_A_CHARACTER = rb'{"model": "readable", "messages": [{"role": "user", "content": "\ud800"}]}'


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"model": "gpt-4o"}, 404, "no model 'gpt-4o' here, only 'readable'"),
        ({"messages": []}, 400, "`messages` must be a list with at least one message"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "`messages[0]` must be an object with a `role`"),
        ({"messages": [{"role": "user"}]}, 400, "`messages[0].content` must be a string or a list of parts"),
        ({"messages": [user({"type": "file", "file": {}})]}, 400, "`messages[0].content[0].type` must be one of text"),
        ({"messages": [user({"type": "image_url", "image_url": {}})]}, 400, "image_url` must be an object"),
        ({"messages": [user({"type": "input_audio", "input_audio": {"data": "", "format": "ogg"}})]}, 400, "wav or mp3"),
        ({"messages": [{**user(url_part("image", "data:,")), "role": "system"}]}, 400, "only the user's messages"),
        ({"messages": [user("a"), {"role": "system", "content": "b"}]}, 400, "expected user or assistant"),
        ({"n": 2}, 400, "`n` is 2, which this server cannot do: give 1 or leave it out"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "`tools` is"),
        ({"response_format": {"type": "json_object"}}, 400, "`response_format` is"),
        ({"temperature": 3}, 400, "`temperature` must be a number from 0 to 2, but is 3"),
        ({"top_p": "high"}, 400, "`top_p` must be a number from 0 to 1"),
        ({"max_tokens": 0}, 400, "`max_tokens` must be a whole number of 1 or more"),
        ({"max_tokens": 5000}, 400, "the model was made for 512 in all"),
        ({"stop": ["a"] * 5}, 400, "`stop` must be a string or a list of at most 4"),
        ({"stop": 0}, 400, "`stop` must be a string or a list of at most 4"),
        ({"stream": "yes"}, 400, "`stream` must be true or false"),
        ({"stream_options": {"include_usage": True}}, 400, "goes with `stream: true`"),
        ({"top_k": 5}, 400, "Unknown field `top_k`"),
        ({"messages": [user(*[url_part("image", "data:,")] * 4)]}, 400, "4 files, but 3 are taken"),
        ({"messages": [user(url_part("video", "absent.mp4"))]}, 400, "absent.mp4 is no file in the folder"),
        ({"messages": [user(url_part("video", "HOST/absent.mp4"))]}, 400, "its server answers 404"),
        ({"messages": [user(url_part("video", "HOST/endless"))]}, 413, "larger than the 1000000 bytes"),
        ({"messages": [user(url_part("video", "HOST/long.mp4"))]}, 413, "longer than the 6 seconds"),
        ({"messages": [user(url_part("video", "HOST/picture.png"))]}, 400, "The video of http"),
        ({"messages": [user(url_part("image", "data:image/png;base64,aGVsbG8="))]}, 400, "The image of data:image/png"),
        ({"messages": [user(url_part("image", "data:image/png;base64,a?b"))]}, 400, "data:image/png;base64,a?b… does not hold valid base64"),
        ({"messages": [user(url_part("image", "HOST/damaged.png"))]}, 400, "damaged.png cannot be read as an image: broken PNG"),
        ({"messages": [user(url_part("image", "HOST/cut.jpg"))]}, 400, "cut.jpg cannot be read as an image: image file is truncated"),
        ({"messages": [user(url_part("video", "HOST/broken.mp4"))]}, 400, "broken.mp4 cannot be read: it is no media file"),
        ({"messages": [user(url_part("audio", "HOST/broken.wav"))]}, 400, "broken.wav cannot be read: it is no media file"),
        ({"messages": [user(url_part("image", "data:,%21PS-Adobe-3.0 EPSF-3.0%0A%25%25BoundingBox: 0 0 9 9"))]}, 400, "no image of a known kind"),
        ({"messages": [user(url_part("image", f"data:,{'x' * 3_000_000}"))]}, 413, "The request has more than"),
        ({"messages": [user("word " * 400)]}, 400, "the model was made for 512 in all"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_errors(
    request_: dict[str, Any], status: int, message: str, stream: bool, client: openai.OpenAI, host: MediaHost
) -> None:
    body = json.loads(
        json.dumps({"model": "readable", **GOOD, "stream": stream, **request_}).replace("HOST", host.url)
    )
    if stream and "stream" in str(request_):
        return
    with pytest.raises(openai.APIStatusError) as raised:
        client.post("/chat/completions", body=body, cast_to=object)
    error = raised.value
    assert error.status_code == status and message in error.message, error
    assert set(error.response.json()["error"]) == {"message", "type", "param", "code"}
    assert "/tmp" not in error.message and "videollama-serve-" not in error.message


def test_other_errors(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError, match="key is wrong or missing"):
        server.client(api_key="another").chat.completions.create(model="readable", messages=GOOD["messages"])
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="another").models.list()
    key = {"Authorization": f"Bearer {KEY}"}
    for method, path, headers, body, status in [
        ("POST", "/v1/chat/completions", {"Content-Type": "application/json"}, b"{", 400),
        ("POST", "/v1/chat/completions", {"Content-Type": "application/json"}, b"[]", 400),
        ("POST", "/v1/chat/completions", {"Content-Type": "application/json"}, HALF_A_CHARACTER, 400),
        ("POST", "/v1/chat/completions", {"Content-Type": "application/json"}, b"[" * 10**5, 400),
        ("POST", "/v1/chat/completions", {"Content-Type": "text/plain"}, b"{}", 400),
        ("GET", "/v1/chat/completions", {}, None, 405),
        ("POST", "/v1/nothing", {}, None, 404),
    ]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
        with contextlib.closing(connection):
            connection.request(method, path, body, {**headers, **key})
            response = connection.getresponse()
            assert response.status == status, path
            assert json.loads(response.read())["error"]["message"]


def test_what_is_refused_unless_it_is_allowed(servers: list[Server], host: MediaHost, files: Path) -> None:
    closed = servers[1]
    host.requests.clear()
    for url in (
        f"{host.url}/clip.mp4",
        f"http://localhost:{host.port}/clip.mp4",
        f"http://0x7f.1:{host.port}/clip.mp4",
        f"http://[::ffff:127.0.0.1]:{host.port}/clip.mp4",
        "http://169.254.169.254/latest/meta-data",
        str(files / "clip.mp4"),
        f"file://{files}/clip.mp4",
        "ftp://example.org/clip.mp4",
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            closed.client().chat.completions.create(
                model=closed.name,
                messages=[user(url_part("video", url), "What?")],  # type: ignore[list-item]
            )
        assert refused.value.code == "media_not_allowed", url
    assert not host.requests


def test_decoding_that_takes_too_long(reference: Reference, files: Path) -> None:
    rules = FetchRules(10**6, 30, local_folder=files)
    limits = {"num_threads": 1, "max_files": 1, "max_seconds": 6, "context_length": 512}
    preparation = Preparation(reference.processor, rules, **limits, max_decoding_seconds=0)
    for kind, name in (("video", "clip_silent.mp4"), ("audio", "tone.wav")):
        chat = read_chat_request({"model": "readable", "messages": [user(url_part(kind, name), "What?")]})
        with pytest.raises(
            RequestError, match=f"The {kind} of {name} takes longer to be decoded than the 0"
        ) as raised:
            preparation.submit(chat, lambda: False).result()
        assert raised.value.status == 400 and raised.value.code == "invalid_media"
    preparation.close()


def test_only_known_hosts_are_answered(servers: list[Server]) -> None:
    """A page in a browser can give its own name the address of this machine; its requests then name that host."""
    for server, host, status in [
        (servers[0], "127.0.0.1", 200),
        (servers[0], "localhost:8000", 200),
        (servers[0], "[::1]:8000", 200),
        (servers[0], "page.example.org", 400),
        (servers[0], "localhost.example.org:8000", 400),
        (servers[1], "page.example.org", 200),
        (servers[1], "example.net", 400),
        (servers[1], "LocalHost", 200),
    ]:
        for path in ("/health", "/v1/models"):
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
            with contextlib.closing(connection):
                connection.request("GET", path, headers={"Host": host, "Authorization": f"Bearer {KEY}"})
                assert connection.getresponse().status == status, (host, path)


def test_which_hosts_are_known() -> None:
    assert allowed_hosts("0.0.0.0", []) == ["*"]
    assert {"localhost", "192.168.0.2", "gpu"} < set(allowed_hosts("192.168.0.2", ["gpu"]))
    assert "*" not in allowed_hosts("0.0.0.0", ["gpu"]) and "*" not in allowed_hosts("::1", [])


@pytest.mark.parametrize("name", ["http://gpu", "gpu:8000", "a.*", ""])
def test_what_is_no_host(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--allowed-host", name])
    assert "must be a host without scheme and port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--allow-local-files", "/absent"], "/absent is no folder"),
        (["--port", "PORT"], "Cannot listen at 127.0.0.1, port"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", *(str(server.port) if argument == "PORT" else argument for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("videollama serve: error: ") and message in error and error.count("\n") == 1


def test_what_is_under_way_is_finished_at_a_signal(server: Server, client: openai.OpenAI, host: MediaHost) -> None:
    """The last test: it ends the server."""
    host.hold()
    under_way = server.send(messages=[user(url_part("video", f"{host.url}/held/clip.mp4"), "What?")])
    until(lambda: server.health()[1]["waiting"] == 1)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.health()[0] == 503)
    with pytest.raises(openai.InternalServerError, match="shutting down") as refused:
        client.chat.completions.create(model="readable", messages=[user("Hm?")])  # type: ignore[list-item]
    assert refused.value.status_code == 503
    host.release()
    response = under_way.getresponse()
    assert response.status == 200 and json.loads(response.read())["choices"][0]["message"]["content"]
    assert server.process.wait(300) == 0
    assert not list(server.temporary.iterdir())
    assert "Traceback" not in server.log.read_text()
