"""The words of captioned data: how published captions are cleaned, and what asks for an image's description.

`annotations` cleans the captions of WebVid and LLaVA-CC3M while it reads them; `samples` draws the request for a
captioned image that is shown in a conversation.
"""

import re

IMAGE_REQUESTS: tuple[str, ...] = (
    "Describe this image in detail.",
    "Take a look at this image and describe what you notice.",
    "Please provide a detailed description of the picture.",
    "Could you describe the contents of this image for me?",
)
"""The questions of MiniGPT-4's second stage, one of which is drawn for each showing of a captioned image."""

MAX_CAPTION_WORDS = 50


def clean_caption(caption: str) -> str:
    """
    A caption as the published system trains on it: lower case, each of `. ! " ( ) * # : ; ~` a space, runs of two and
    more blanks one space, no blanks around, at most 50 words.

    Args:
        caption: any text.

    Returns:
        The cleaned text, which is empty if nothing but the characters above was in it.
    """
    caption = re.sub(r"[.!\"()*#:;~]", " ", caption.lower())
    caption = re.sub(r"\s{2,}", " ", caption).strip()
    return " ".join(caption.split(" ")[:MAX_CAPTION_WORDS])
