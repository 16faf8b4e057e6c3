"""The layout of the page, and which event calls what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client.utils import is_http_url_like

from .events import PageEvents

THEME = gr.themes.Soft(font=("system-ui", "sans-serif"), font_mono=("ui-monospace", "monospace"))
CSS = """
/* would fetch FFmpeg from elsewhere */
#video button[aria-label="Trim video to selection"], #video button[aria-label="Reset video to initial value"] {
    display: none;
}
#video video, #picture img { max-height: 300px; }
#video .wrap:has(> .unplayable) > :not(.unplayable) { display: none; }
#video .unplayable { padding: 48px 16px 16px; text-align: center; }
.frames { display: grid; grid-template-columns: repeat(auto-fill, minmax(84px, 1fr)); gap: 6px; }
.frames figure, .spectrogram figure { margin: 0; }
.frames img, .spectrogram img { width: 100%; border-radius: 4px; display: block; }
.frames figure:only-child { max-width: 224px; }
.spectrogram { margin-top: 10px; }
.spectrogram img { height: 96px; }
.frames figcaption, .spectrogram figcaption, .silent {
    font-size: 12px; opacity: 0.75; text-align: center; margin: 2px 0 0;
}
#notice [role=alert] {
    padding: 10px 14px; border-radius: 8px; border: 1px solid #d97706; background: #fef3c7; color: #78350f;
}
"""
# Gradio calls it an error where the browser cannot play a file, which the model may see nevertheless
HEAD = """
<script>
document.addEventListener("error", (event) => {
    const player = event.target instanceof HTMLVideoElement && event.target.closest("#video .wrap");
    if (!player) return;
    event.stopPropagation();
    if (player.querySelector(".unplayable")) return;
    const note = document.createElement("p");
    note.className = "unplayable";
    note.textContent = "Your browser cannot play this file. Below is what the model is given.";
    player.append(note);
}, true);
</script>
"""
_DAY = 24 * 60 * 60


async def _take_upload(take: Callable[[Any], Awaitable[str | None]], path: str | Path | None) -> str | None:
    """Gradio's method `take`, which would fetch any address that an event names, too, however large the file."""
    if path is not None and is_http_url_like(str(path)):
        raise gr.Error("Files are uploaded, not fetched from an address.")
    return await take(path)


def make_page(
    events: PageEvents,
    examples: list[tuple[Path, str]],
    *,
    title: str,
    limits: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    listens: bool,
) -> gr.Blocks:
    """
    The page.

    Args:
        events ([`PageEvents`]): What it does.
        examples (`list[tuple[Path, str]]`): Videos to click on, with a question about each.
        title (`str`): The model's name.
        limits (`str`): Which uploads are taken, in words.
        max_new_tokens (`int`): The most tokens of an answer, at first.
        temperature (`float`): The temperature, at first.
        top_p (`float`): Of the likeliest tokens that have this probability together, at first.
        listens (`bool`): Whether videos are heard, at first.

    Returns:
        `gr.Blocks`
    """
    with gr.Blocks(title=f"Video-LLaMA: {title}", analytics_enabled=False, delete_cache=(3600, _DAY)) as page:
        gr.Markdown(f"# Video-LLaMA\nAsk about what is seen and heard in a video. Model: `{title}`. {limits}")
        with gr.Row():
            with gr.Column(scale=5, min_width=340):
                with gr.Tabs() as tabs:
                    with gr.Tab("Video", id="video"):
                        video = gr.Video(
                            label="Video",
                            sources=["upload", "webcam"],
                            webcam_options=gr.WebcamOptions(mirror=False),
                            buttons=[],
                            elem_id="video",
                        )
                    with gr.Tab("Picture", id="picture"):
                        picture = gr.Image(
                            label="Picture",
                            sources=["upload", "webcam"],
                            webcam_options=gr.WebcamOptions(mirror=False),
                            type="filepath",
                            buttons=[],
                            elem_id="picture",
                        )
                # Pillow's own error for a broken file would name a path of this machine
                picture.preprocess = lambda payload: payload and payload.path
                listen = gr.Checkbox(
                    listens and events.hears, label="Listen to the sound", visible=events.hears, elem_id="listen"
                )
                gr.Markdown("### What the model is given")
                view = gr.HTML(elem_id="view")
            with gr.Column(scale=6, min_width=340):
                notice = gr.HTML(elem_id="notice")
                chatbot = gr.Chatbot(
                    label="Chat",
                    height=430,
                    render_markdown=False,
                    feedback_options=None,
                    buttons=["copy"],
                    placeholder="Upload a video or a picture and ask about it.",
                    elem_id="chat",
                )
                question = gr.Textbox(
                    label="Question",
                    placeholder="What is happening in the video?",
                    max_length=2000,
                    elem_id="question",
                )
                with gr.Row():
                    ask = gr.Button("Ask", variant="primary", elem_id="ask")
                    stop = gr.Button("Stop", variant="stop", visible=False, elem_id="stop")
                    forget = gr.Button("New chat", elem_id="new-chat")
                with gr.Accordion("Sampling", open=False, elem_id="sampling"):
                    settings = [
                        gr.Slider(0, 2, temperature, step=0.1, label="Temperature", info="0: the likeliest answer"),
                        gr.Slider(0.05, 1, top_p, step=0.05, label="Top p", info="with a temperature"),
                        gr.Slider(
                            1, 10, 1, step=1, label="Beams", info="with more than one the answer comes in one piece"
                        ),
                        gr.Slider(
                            1, max(1024, max_new_tokens), max_new_tokens, step=1, label="Most tokens of an answer"
                        ),
                    ]
        if examples:
            gr.Examples(
                [[str(path), text] for path, text in examples], [video, question], label="Examples", elem_id="examples"
            )

        options: dict[str, Any] = {"api_visibility": "private"}
        media = [video, picture, view, notice, chatbot]
        # Two at a time, beside the model
        opening = {"concurrency_limit": 2, "concurrency_id": "media", "show_progress_on": view, **options}
        video.change(events.open_video, video, media, **opening)
        picture.change(events.open_picture, picture, media, **opening)
        video.change(lambda path: gr.skip() if path is None else gr.Tabs(selected="video"), video, tabs, **options)
        begun = [question, notice, chatbot, ask, stop]
        ended = [chatbot, notice, ask, stop]
        quick = {"concurrency_limit": None, "show_progress": "hidden", **options}
        # The model is one: whose turn it is not sees how many are before
        answering = {"concurrency_limit": 1, "concurrency_id": "model", "show_progress": "minimal", **options}
        answering["show_progress_on"] = chatbot
        for event in (ask.click, question.submit):
            event(events.begin, question, begun, **quick).then(
                events.answer, [listen, *settings], [question, *ended], **answering
            )
        stop.click(events.stop, None, None, queue=False, **options)
        for event in (forget.click, chatbot.clear):
            event(events.forget_chat, None, ended, **quick)
        page.unload(events.leave)
    for block in page.blocks.values():
        take = partial(_take_upload, block.async_move_resource_to_block_cache)
        block.async_move_resource_to_block_cache = take
    return page.queue(max_size=64)
