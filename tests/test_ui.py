"""`videollama ui` as a process of its own, used by people with a real browser."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from media_files import tone, write_media
from serve_parts import Reference, make_readable, until, write_files

from transformers_videollama import VideoLlamaConfig, VideoLlamaForConditionalGeneration

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.xdist_group("ui"),  # the tests share a server, which the last one ends
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH: apt-get install chromium"),
]
NUM_TOKENS = 16
BOT = "#chat [data-testid=bot]"


class Site:
    """A server process; its temporary files go to a folder of their own."""

    def __init__(self, folder: Path, *arguments: str):
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "transformers_videollama", "ui", "--port", "0", "--device", "cpu", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1"},
            )

    def wait(self) -> None:
        until(lambda: "The page is at" in self.log.read_text() or self.process.poll() is not None)
        found = re.search(r"^The page is at (http://127\.0\.0\.1:\d+)$", self.log.read_text(), re.MULTILINE)
        assert found is not None, self.log.read_text()
        self.url = found[1]

    def uploads(self) -> list[str]:
        """The names of all uploaded files that are still there."""
        return sorted(path.name for path in self.temporary.glob("videollama-ui-*/uploads/*/*"))


class Visitor:
    """Somebody with a browser window of their own."""

    def __init__(self, browser: Any, site: Site):
        self.context = browser.new_context(
            viewport={"width": 1280, "height": 1000}, permissions=["camera", "microphone"]
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.requests: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(site.url)
        self.page.locator("#ask").wait_for()

    def upload(self, path: Path, where: str = "#video") -> None:
        self.page.locator(f"{where} input[type=file]").set_input_files(str(path))

    def wait_for_frames(self) -> None:
        self.page.locator("#view .frames img").first.wait_for()

    def ask(self, question: str, number: int) -> str:
        """The answer, which is the chat's answer of this number."""
        self.page.locator("#question textarea").fill(question)
        self.page.locator("#ask").click()
        self.page.locator(BOT).nth(number - 1).wait_for()
        self.wait_for_end()
        return str(self.page.locator(BOT).nth(number - 1).inner_text()).strip()

    def wait_for_end(self) -> None:
        self.page.locator("#stop").wait_for(state="hidden")
        self.page.locator("#ask").wait_for()

    def notice(self) -> str:
        self.page.locator("#notice [role=alert]").wait_for()
        return str(self.page.locator("#notice [role=alert]").inner_text())

    def set(self, label: str, value: float) -> None:
        """Sets a setting of answers."""
        field = self.page.get_by_label(f"number input for {label}")
        if not field.is_visible():
            self.page.locator("#sampling > button").click()
        field.fill(str(value))
        field.press("Tab")


@pytest.fixture(scope="module")
def model_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_readable(tiny_folder, tmp_path_factory.mktemp("models") / "readable")
    config = VideoLlamaConfig.from_pretrained(folder)
    config.text_config.max_position_embeddings = 4096  # a long answer of a slow decoder: there is time to stop it
    config.text_config.num_hidden_layers = 24
    torch.manual_seed(0)
    model = VideoLlamaForConditionalGeneration.from_pretrained(folder, config=config)  # new layers are drawn
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def site(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    limits = ["--max-file-mb", "2", "--max-media-seconds", "6", "--max-new-tokens", str(NUM_TOKENS)]
    site = Site(tmp_path_factory.mktemp("site"), "--model", str(model_folder), *limits)
    try:
        site.wait()
        yield site
    finally:
        site.process.kill()
        site.process.wait()


@pytest.fixture(scope="module")
def browser(site: Site) -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"],
        )
        yield browser
        browser.close()


@pytest.fixture
def visitor(browser: Any, site: Site) -> Iterator[Visitor]:
    visitor = Visitor(browser, site)
    yield visitor
    visitor.context.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_files(tmp_path_factory.mktemp("media") / "files")
    (folder / "broken.png").write_bytes(b"no picture at all")
    (folder / "large.mp4").write_bytes(bytes(3 * 2**20))
    return folder


def question(text: str, *media: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*media, {"type": "text", "text": text}]}


def test_a_video_is_shown_and_asked_about_in_several_turns(
    visitor: Visitor, site: Site, files: Path, model_folder: Path
) -> None:
    page = visitor.page
    visitor.upload(files / "clip.mp4")
    visitor.wait_for_frames()
    times = page.locator("#view .frames figcaption").all_inner_texts()
    assert len(times) == page.locator("#view .frames img").count() > 1
    seconds = [float(re.fullmatch(r"([\d.]+) s", time)[1]) for time in times]  # type: ignore[index]
    assert seconds == sorted(seconds)
    assert re.search(r"sound, 0 to \d", page.locator("#view .spectrogram").inner_text())
    assert page.locator("#video video").evaluate("video => video.src").startswith(site.url)
    page.evaluate(
        f"""() => {{ window.seen = [];
        new MutationObserver(() => {{ const bot = document.querySelector({json.dumps(BOT)});
            if (bot) window.seen.push(bot.innerText.trim()); }})
        .observe(document.body, {{subtree: true, childList: true, characterData: true}}); }}"""
    )
    first = visitor.ask("What is it?", 1)
    seen = sorted({text for text in page.evaluate("window.seen") if text}, key=len)
    assert len(seen) > 2 and all(first.startswith(text) for text in seen)  # it came piece by piece
    second = visitor.ask("And then?", 2)
    reference = Reference(model_folder)
    chat = [question("What is it?", {"type": "video", "path": str(files / "clip.mp4")})]
    assert first == reference.answer(chat, NUM_TOKENS)[0]
    chat += [{"role": "assistant", "content": [{"type": "text", "text": first}]}, question("And then?")]
    assert second == reference.answer(chat, NUM_TOKENS)[0]
    assert page.locator("#chat [data-testid=user]").count() == 2
    assert all(url.startswith((site.url, "data:", "blob:")) for url in visitor.requests)

    page.locator("#listen input").uncheck()
    page.locator("#new-chat").click()
    page.locator(BOT).first.wait_for(state="detached")
    deaf = visitor.ask("What is it?", 1)
    silent = reference.processor.apply_chat_template(
        chat[:1],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        load_audio_from_video=False,
    )
    output = reference.model.generate(**silent, max_new_tokens=NUM_TOKENS, do_sample=False)[0]
    text = reference.processor.post_process_image_text_to_text(output[silent["input_ids"].shape[1] :])
    assert deaf == text


def test_an_answer_is_stopped_and_settings_count(visitor: Visitor, files: Path) -> None:
    visitor.upload(files / "clip_silent.mp4")
    visitor.wait_for_frames()
    assert "no sound" in visitor.page.locator("#view").inner_text()
    visitor.set("Most tokens of an answer", 1024)
    visitor.page.evaluate(  # as soon as there is some text, from within the page: nothing comes between
        f"""() => {{ window.stopped = false;
        new MutationObserver((_, observer) => {{
            if (!(document.querySelector({json.dumps(BOT)})?.innerText.trim().length > 10)) return;
            observer.disconnect(); document.querySelector("#stop").click(); window.stopped = true; }})
        .observe(document.body, {{subtree: true, childList: true, characterData: true}}); }}"""
    )
    visitor.page.locator("#question textarea").fill("Tell me a story.")
    visitor.page.locator("#question textarea").press("Enter")
    visitor.page.wait_for_function("window.stopped")
    visitor.wait_for_end()
    stopped = visitor.page.locator(BOT).inner_text().strip()
    assert 10 < len(stopped) < 900
    visitor.set("Most tokens of an answer", 5)
    visitor.set("Beams", 3)
    assert 0 < len(visitor.ask("Why?", 2)) <= 5
    visitor.set("Beams", 1)
    visitor.set("Temperature", 1.5)
    assert 0 < len(visitor.ask("Why?", 3)) <= 5


def test_a_picture_in_place_of_a_video(visitor: Visitor, site: Site, files: Path) -> None:
    visitor.upload(files / "clip.mp4")
    visitor.wait_for_frames()
    visitor.page.get_by_role("tab", name="Picture").click()
    visitor.upload(files / "picture.png", "#picture")
    visitor.page.get_by_text("as the model sees it").wait_for()
    assert visitor.ask("What is it?", 1)
    until(lambda: site.uploads() == ["picture.png"])


def test_a_recording_of_the_camera(browser: Any, site: Site) -> None:
    for seconds in (1, 3, 5):  # the browser of a busy machine may have recorded nothing after a second
        visitor = Visitor(browser, site)
        camera = visitor.page.locator("#video")
        camera.get_by_label("Capture from camera").click()
        camera.get_by_text("Click to Access Webcam").click()
        camera.get_by_text("Record", exact=True).click()
        camera.get_by_text("Stop", exact=True).wait_for()
        visitor.page.wait_for_timeout(1000 * seconds)
        camera.get_by_text("Stop", exact=True).click()
        visitor.page.locator("#view .frames img, #notice [role=alert]").first.wait_for()
        if visitor.page.locator("#view .frames img").count():
            break
        assert "sample.webm cannot be read" in visitor.notice()
        visitor.context.close()
    else:
        pytest.fail("The browser recorded nothing")
    assert visitor.ask("What is it?", 1)
    visitor.context.close()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("broken.mp4", "broken.mp4 cannot be read: it is no media file of a known kind"),
        ("broken.png", "broken.png is no image of a known kind"),
        ("damaged.png", "damaged.png cannot be read as an image: broken PNG file"),
        ("long.mp4", "longer than the 6 seconds"),
    ],
)
def test_what_cannot_be_used_is_said(name: str, message: str, visitor: Visitor, site: Site, files: Path) -> None:
    if name.endswith("png"):
        visitor.page.get_by_role("tab", name="Picture").click()
    visitor.upload(files / name, "#picture" if name.endswith("png") else "#video")
    assert message in visitor.notice() and "/" not in visitor.notice()
    until(lambda: site.uploads() == [])
    visitor.page.get_by_role("tab", name="Video").click()
    visitor.upload(files / "clip.mp4")
    visitor.wait_for_frames()
    assert visitor.ask("What is it?", 1)


def test_a_chat_that_no_longer_fits(visitor: Visitor, files: Path) -> None:
    visitor.upload(files / "clip_silent.mp4")
    visitor.wait_for_frames()
    visitor.set("Most tokens of an answer", 5)
    long_question = "zq" * 950  # a token for each letter
    assert visitor.ask(long_question, 1)
    visitor.set("Most tokens of an answer", 1024)
    visitor.page.locator("#question textarea").fill(long_question)
    visitor.page.locator("#ask").click()
    message = r"The chat has \d+ tokens and the answer may have 1024, but the model was made for 4096 in all\. Begin"
    assert re.match(message, visitor.notice())
    visitor.wait_for_end()
    assert visitor.page.locator("#chat [data-testid=user]").count() == visitor.page.locator(BOT).count() == 1
    assert visitor.page.locator("#question textarea").input_value() == long_question
    visitor.set("Most tokens of an answer", 5)
    assert visitor.ask("Why?", 2)
    assert visitor.page.locator("#notice [role=alert]").count() == 0
    visitor.page.locator("#new-chat").click()
    visitor.page.locator(BOT).first.wait_for(state="detached")
    assert visitor.ask(long_question, 1)


def test_a_file_that_the_browser_cannot_play(visitor: Visitor, files: Path, tmp_path: Path) -> None:
    """But the model can see it: it is no error."""
    visitor.upload(write_media(tmp_path / "clip.avi", codec="mpeg4", audio=tone(2), audio_codec="libmp3lame"))
    visitor.wait_for_frames()
    visitor.page.get_by_text("Your browser cannot play this file").wait_for()
    assert not visitor.page.locator("#video video").is_visible()
    assert visitor.page.get_by_text("not playable").count() == 0
    assert visitor.ask("What is it?", 1)
    visitor.page.locator("#video").get_by_label("Clear").click()
    visitor.page.locator("#view .frames").wait_for(state="detached")
    visitor.upload(files / "clip.mp4")
    visitor.wait_for_frames()
    assert visitor.page.locator("#video video").is_visible() and visitor.page.locator(".unplayable").count() == 0


@pytest.mark.parametrize("seconds", [0, 0.5])
def test_a_video_that_is_removed_while_an_answer_is_awaited(visitor: Visitor, files: Path, seconds: float) -> None:
    visitor.upload(files / "clip.mp4")
    visitor.wait_for_frames()
    visitor.set("Most tokens of an answer", 1024)
    visitor.page.locator("#question textarea").fill("Tell me a story.")
    visitor.page.locator("#ask").click()
    time.sleep(seconds)
    visitor.page.locator("#video").get_by_label("Clear").click()
    visitor.page.locator("#view .frames").wait_for(state="detached")
    visitor.wait_for_end()
    assert visitor.page.locator(BOT).count() == visitor.page.locator("#notice [role=alert]").count() == 0
    visitor.upload(files / "clip_silent.mp4")
    visitor.wait_for_frames()
    visitor.set("Most tokens of an answer", 16)
    assert visitor.ask("What is it?", 1)


def test_who_waits_sees_how_many_are_before(browser: Any, site: Site, files: Path) -> None:
    one, other = Visitor(browser, site), Visitor(browser, site)
    for visitor in (one, other):
        visitor.upload(files / "clip_silent.mp4")
        visitor.wait_for_frames()
    one.set("Most tokens of an answer", 1024)
    one.page.locator("#question textarea").fill("Tell me a story.")
    one.page.locator("#ask").click()
    one.page.locator(BOT).wait_for()
    other.page.locator("#question textarea").fill("What is it?")
    other.page.locator("#ask").click()
    other.page.get_by_text("queue: 1/1").first.wait_for()  # beside whatever waits
    one.page.evaluate("document.querySelector('#stop')?.click()")  # unless the answer has ended
    for visitor in (one, other):
        visitor.wait_for_end()
        assert visitor.page.locator(BOT).inner_text().strip()
        visitor.context.close()


def test_other_hosts_are_not_answered(site: Site) -> None:
    """Which a page in a browser could give this machine's address, and which Gradio would answer."""
    for host, status in (("localhost:7860", 200), ("127.0.0.1", 200), ("page.example.org", 400)):
        connection = http.client.HTTPConnection(site.url.removeprefix("http://"), timeout=300)
        with contextlib.closing(connection):
            connection.request("GET", "/config", headers={"Host": host})
            assert connection.getresponse().status == status, host


def test_a_file_that_is_too_large_is_refused(visitor: Visitor, site: Site, files: Path) -> None:
    visitor.upload(files / "large.mp4")
    visitor.page.get_by_text("exceed the maximum allowed size of 2.0 MB").wait_for()
    assert site.uploads() == []


def test_two_visitors_do_not_see_each_others_media(browser: Any, site: Site, files: Path) -> None:
    one, other = Visitor(browser, site), Visitor(browser, site)
    one.upload(files / "clip.mp4")
    one.wait_for_frames()
    address = str(one.page.locator("#video video").evaluate("video => video.src"))
    one.ask("What is it?", 1)
    other.page.reload()
    other.page.locator("#question textarea").fill("What is it?")
    other.page.locator("#ask").click()
    assert "Upload a video or a picture first" in other.notice()
    assert other.page.locator(BOT).count() == other.page.locator("#view img").count() == 0
    # Addresses that can be guessed
    (uploads,) = site.temporary.glob("videollama-ui-*/uploads")
    for path in (uploads, uploads.parent, "/etc/passwd", "http://127.0.0.1/", uploads / "clip.mp4"):
        assert other.context.request.get(f"{site.url}/gradio_api/file={path}").status in (403, 404), path
    # The same file is there as long as one of them has it
    other.upload(files / "clip.mp4")
    other.wait_for_frames()
    other.context.close()
    assert one.ask("And then?", 2)
    assert one.context.request.get(address).status == 200
    one.context.close()
    until(lambda: site.uploads() == [])


def test_an_example(visitor: Visitor, site: Site) -> None:
    examples = visitor.page.locator("#examples tbody tr, #examples .gallery-item")
    assert examples.count() == 3
    examples.first.click()
    visitor.wait_for_frames()
    asked = visitor.page.locator("#question textarea").input_value()
    assert asked.endswith("?") and visitor.ask(asked, 1)
    assert site.uploads() == []


def test_everything_is_removed_at_the_end(site: Site, browser: Any, files: Path) -> None:
    """The last test: it ends the server, while an answer is under way and another one waits."""
    for visitor in (Visitor(browser, site), Visitor(browser, site)):
        visitor.upload(files / "clip.mp4")
        visitor.wait_for_frames()
        visitor.set("Most tokens of an answer", 1024)
        visitor.page.locator("#question textarea").fill("Tell me a story.")
        visitor.page.locator("#ask").click()
        visitor.page.locator("#chat [data-testid=user]").wait_for()
    assert site.uploads() == ["clip.mp4"]
    site.process.send_signal(signal.SIGTERM)
    assert site.process.wait(60) == 0
    assert not list(site.temporary.glob("videollama-ui-*"))
    assert "Traceback" not in site.log.read_text(), site.log.read_text()
