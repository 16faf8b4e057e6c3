"""What happens on the page: a medium is opened, a question is asked, an answer is stopped, a chat begins anew.

Each method answers one event with the new values of the components that it names.
"""

from __future__ import annotations

import base64
import html
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from ..conversation import Conversation, prompt_ids
from ..media import MediaError, time_limit
from ..serving.errors import RequestError
from ..serving.media_limits import check_media
from .answering import Answerer
from .pictures import sampled_frames, seen_image, spectrogram
from .visitors import Medium, Turn, Visitor, Visitors

if TYPE_CHECKING:
    from PIL import Image

    from ..modeling_video_llama import VideoLlamaForConditionalGeneration
    from ..processing_video_llama import VideoLlamaProcessor

logger = logging.getLogger(__name__)
DECODING_SECONDS = 120
"""The longest that a medium may take to be decoded, which is done again when it is asked about."""
_SPECTROGRAM_SIZE = (1024, 128)  # pixels


class PageEvents:
    """
    What the page does, for all visitors.

    Args:
        model ([`VideoLlamaForConditionalGeneration`]): The model.
        processor ([`VideoLlamaProcessor`]): Its processor.
        visitors ([`Visitors`]): Who has the page open.
        max_seconds (`float`): The longest video.
        system_prompt (`str`, *optional*): What comes before the first question of each chat.
        num_frames (`int`, *optional*): Frames of a video; by default what the model was made for.
    """

    def __init__(
        self,
        model: VideoLlamaForConditionalGeneration,
        processor: VideoLlamaProcessor,
        visitors: Visitors,
        max_seconds: float,
        system_prompt: str | None = None,
        num_frames: int | None = None,
    ):
        self.model = model
        self.processor = processor
        self.visitors = visitors
        self.max_seconds = max_seconds
        self.system_prompt = system_prompt
        self.num_frames = num_frames
        self._answerer = Answerer()

    @property
    def hears(self) -> bool:
        """Whether the model has an audio branch."""
        return self.model.config.audio_config is not None

    # -----------------------------------------------------------------------------------------------------------------
    # Media

    def open_video(self, path: str | None, request: gr.Request) -> tuple[Any, ...]:
        """For a new video: `[video, picture, view, notice, chatbot]`."""
        values = self._open("video", path, request)
        return values if path is None else (values[0], None, *values[1:])

    def open_picture(self, path: str | None, request: gr.Request) -> tuple[Any, ...]:
        """For a new picture: `[video, picture, view, notice, chatbot]`."""
        values = self._open("image", path, request)
        return values if path is None else (None, *values)

    def _open(self, kind: str, path: str | None, request: gr.Request) -> tuple[Any, ...]:
        """Of the component with the medium, of the view, the notice and the chatbot; all five where it was removed."""
        visitor = self.visitors[str(request.session_hash)]
        if path is None:
            if visitor.medium is None or visitor.medium.kind != kind:  # the other one was opened in its place
                return (gr.skip(),) * 5
            self.visitors.give(visitor, None)
            return gr.skip(), gr.skip(), "", "", []
        medium = Medium(kind, Path(path))
        if visitor.medium == medium:
            return (gr.skip(),) * 4
        try:
            with time_limit(DECODING_SECONDS):
                check_media(kind, medium.path, self.max_seconds)
                view = self._view(medium)
        except (RequestError, ValueError, OSError) as error:  # a MediaError is a ValueError
            self.visitors.give(visitor, None)
            self.visitors.remove(medium.path)
            return None, "", show_notice(_without_folder(error, medium)), []
        self.visitors.give(visitor, medium)
        return gr.skip(), view, "", []

    def _view(self, medium: Medium) -> str:
        """What the model is given, as HTML that holds its pictures."""
        if medium.kind == "image":
            return (
                f'<div class="frames">{_figure(seen_image(self.processor, medium.path), "as the model sees it")}</div>'
            )
        frames = "".join(
            _figure(frame, f"{time:.1f} s")
            for frame, time in sampled_frames(self.processor, medium.path, self.num_frames)
        )
        sound = spectrogram(self.processor, medium.path, *_SPECTROGRAM_SIZE) if self.hears else None
        if not self.hears:
            below = ""
        elif sound is None:
            below = '<p class="silent">The video has no sound.</p>'
        else:
            picture, seconds = sound
            below = (
                f'<div class="spectrogram">{_figure(picture, f"sound, 0 to {seconds:.1f} s; low pitches below")}</div>'
            )
        return f'<div class="frames">{frames}</div>{below}'

    # -----------------------------------------------------------------------------------------------------------------
    # Chat

    def begin(self, question: str, request: gr.Request) -> tuple[Any, ...]:
        """Takes a question: `[question, notice, chatbot, ask, stop]`."""
        visitor = self.visitors[str(request.session_hash)]
        question = question.strip()
        if visitor.pending is not None or not question:
            return (gr.skip(),) * 5
        if visitor.medium is None:
            notice = show_notice("Upload a video or a picture first, or click on an example.")
            return gr.skip(), notice, gr.skip(), gr.skip(), gr.skip()
        visitor.pending = Turn(question)
        visitor.turns.append(visitor.pending)
        return "", "", visitor.messages(), gr.update(visible=False), gr.update(visible=True)

    def answer(
        self,
        listens: bool,
        temperature: float,
        top_p: float,
        num_beams: float,
        max_new_tokens: float,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Answers the question that was taken, piece by piece: `[question, chatbot, notice, ask, stop]`."""
        visitor = self.visitors[str(request.session_hash)]
        turn, medium = visitor.pending, visitor.medium
        if turn is None or medium is None:
            yield gr.skip(), gr.skip(), gr.skip(), *_buttons(visitor)
            return
        notice = ""
        try:
            options: dict[str, Any] = {"max_new_tokens": int(max_new_tokens), "do_sample": temperature > 0}
            if temperature > 0:
                options |= {"temperature": temperature, "top_p": top_p}
            if num_beams > 1:
                options["num_beams"] = int(num_beams)
            media = self._prepare_chat(visitor, listens, turn.question, options["max_new_tokens"])
            chat = visitor.chat
            for text in self._answerer.ask(chat, turn.question, media, turn.is_stopped, **options):
                if visitor.pending is not turn:
                    break
                turn.answer = text
                yield gr.skip(), visitor.messages(), gr.skip(), gr.skip(), gr.skip()
        except (MediaError, RequestError, ValueError) as error:
            notice = show_notice(_without_folder(error, medium))
        except Exception:
            if visitor.pending is turn:
                logger.exception("A question could not be answered")
            notice = show_notice("The server failed at this question. Its log says why.")
        finally:
            turn.is_stopped.set()  # nobody waits for it any longer
            is_awaited = visitor.pending is turn
            if is_awaited:
                visitor.pending = None
        if not is_awaited:  # a new chat has begun, the medium was removed, or whoever asked has left
            yield gr.skip(), visitor.messages(), gr.skip(), *_buttons(visitor)
            return
        refused = gr.skip()
        if turn.answer == "" and turn in visitor.turns:
            visitor.turns.remove(turn)
            refused = turn.question  # to be asked again
        yield refused, visitor.messages(), notice, *_buttons(visitor)

    def _prepare_chat(
        self, visitor: Visitor, listens: bool, question: str, max_new_tokens: int
    ) -> list[dict[str, Any]]:
        """Makes the chat fit to be asked, and returns the media that are new in it."""
        assert visitor.medium is not None
        if visitor.chat is None or visitor.listens != listens:
            options: dict[str, Any] = {} if listens else {"load_audio_from_video": False}
            if self.num_frames is not None:
                options["processor_kwargs"] = {"num_frames": self.num_frames}
            chat = Conversation(self.model, self.processor, self.system_prompt, **options)
            if visitor.chat is not None:
                chat.messages = visitor.chat.messages
            visitor.chat, visitor.listens = chat, listens
        chat = visitor.chat
        media = [] if any(message["role"] == "user" for message in chat.messages) else [visitor.medium.entry()]
        asked = {"role": "user", "content": [*media, {"type": "text", "text": question}]}
        options = {"add_generation_prompt": True, **chat.processor_kwargs}
        num_tokens = len(prompt_ids(self.processor, [*chat.messages, asked], **options))
        context_length = self.model.config.text_config.max_position_embeddings
        if num_tokens + max_new_tokens > context_length:
            raise ValueError(
                f"The chat has {num_tokens} tokens and the answer may have {max_new_tokens}, but the model was made "
                f"for {context_length} in all. Begin a new chat, or lower the length of answers."
            )
        return media

    def stop(self, request: gr.Request) -> None:
        """Ends the answer that is under way."""
        visitor = self.visitors[str(request.session_hash)]
        if visitor.pending is not None:
            visitor.pending.is_stopped.set()

    def forget_chat(self, request: gr.Request) -> tuple[Any, ...]:
        """Begins a new chat about the same medium: `[chatbot, notice, ask, stop]`."""
        self.visitors[str(request.session_hash)].forget_chat()
        return [], "", gr.update(visible=True), gr.update(visible=False)

    # -----------------------------------------------------------------------------------------------------------------
    # The end

    def leave(self, request: gr.Request) -> None:
        """Forgets a visitor who has closed the page."""
        self.visitors.leave(str(request.session_hash))

    def close(self) -> None:
        """Forgets all visitors and stops answering."""
        self.visitors.close()
        self._answerer.close()


def _buttons(visitor: Visitor) -> tuple[Any, Any]:
    """To ask while nothing is answered, or to stop the answer."""
    is_free = visitor.pending is None
    return gr.update(visible=is_free), gr.update(visible=not is_free)


def show_notice(text: str) -> str:
    """A message to the visitor, as HTML."""
    return f'<div role="alert">{html.escape(text)}</div>'


def _without_folder(error: Exception, medium: Medium) -> str:
    """An error's message, with the name that the visitor knows the file by."""
    return str(error).replace(str(medium.path), medium.path.name)


def _figure(picture: Image.Image, caption: str) -> str:
    """A picture in HTML itself, so that no file of it is left."""
    data = io.BytesIO()
    picture.save(data, format="PNG")
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'
