"""Asks the trained small model about a video: a new clip of the miniature world, or a file.

    python examples/miniworld/ask.py [FILE [QUESTION …]] [--seed 7]

Without a file it renders a clip of the test split, which shows a combination that the model never saw in training,
saves it as `miniworld.mp4`, and says what the true answers are. Either way `miniworld.png` shows what the model is
given: the sampled frames with their times, and the log-mel spectrogram of the sound.
"""

import argparse
import random
import sys
from pathlib import Path

import torch
from decoder import CACHE
from drawing import draw
from language import QA, a, caption, questions
from make_data import write_clip
from model_file import MODEL, load_model
from PIL import Image, ImageDraw
from sounds import make_sound
from transformers.utils.logging import disable_progress_bar
from world import Scene, generator, sample_scene

from transformers_videollama import VideoLlamaForConditionalGeneration, VideoLlamaProcessor
from transformers_videollama.media import MediaError, has_audio, open_media
from transformers_videollama.ui.pictures import sampled_frames, spectrogram

CLIP, SHEET = Path("miniworld.mp4"), Path("miniworld.png")
MAX_NEW_TOKENS = 32
# The families of questions asked of a new clip, in each place the first that fits the scene
ASKED = (("object", "count"), ("motion", "order", "event"), ("hear",), ("match", "hear_presence"))
SIGHT_QUESTIONS = ["What do you see?", "How many objects are there?"]
SOUND_QUESTIONS = ["What do you hear?", "Does the sound belong to what you see?"]
SILENT_QUESTIONS = ["What happens?", "What appears first?"]
SIDE, GAP = 128, 8  # pixels of a frame on the sheet, and between two


def new_clip(path: Path, seed: int) -> tuple[Scene, list[QA]]:
    """
    Renders a test clip that shows something and has a sound track; returns its scene and four questions about it.
    """
    index = 0
    while True:
        scene = sample_scene(generator(seed, "test", index, "scene"), "test")
        if scene.objects and scene.audio_track:
            break
        index += 1
    frames = draw(scene, generator(seed, "test", index, "picture"))
    write_clip(path, frames, make_sound(scene, generator(seed, "test", index, "sound")))
    possible = questions(scene, generator(seed, "test", index, "ask"))
    chosen = []
    for families in ASKED:
        fitting = [item for family in families for item in possible if item.family == family]
        chosen.append(fitting[0])
    return scene, chosen


def describe(scene: Scene, seed: int) -> str:
    """What a scene shows and sounds like, in words."""
    when = {"throughout": "throughout", "start": "at the start", "end": "at the end"}
    sound = f"{a(scene.sound)} is heard {when[scene.moment]}" if scene.sound else "nothing is heard"
    return f"{caption(scene, generator(seed, 'test', 0, 'caption'))}; {sound}"


def answer(
    model: VideoLlamaForConditionalGeneration, processor: VideoLlamaProcessor, video: str, asked: list[str]
) -> list[str]:
    """The model's answers to questions about a video file, each asked in a chat of its own."""
    chats = [
        [{"role": "user", "content": [{"type": "video", "path": video}, {"type": "text", "text": question}]}]
        for question in asked
    ]
    inputs = processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(model.dtype)
    outputs = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return processor.post_process_image_text_to_text(outputs[:, inputs["input_ids"].shape[1] :])


def contact_sheet(processor: VideoLlamaProcessor, video: str) -> Image.Image:
    """
    What the model is given of a video file: its frames in a row over the windows of its sound, unheard parts black.
    """
    frames = sampled_frames(processor, video)
    width = len(frames) * (SIDE + GAP) + GAP
    sound = spectrogram(processor, video, width - 2 * GAP, SIDE)
    sheet = Image.new("RGB", (width, SIDE + 4 * GAP + (SIDE + 4 * GAP if sound else 0)))
    pen = ImageDraw.Draw(sheet)
    for column, (frame, time) in enumerate(frames):
        left = GAP + column * (SIDE + GAP)
        sheet.paste(frame.resize((SIDE, SIDE), Image.Resampling.NEAREST), (left, GAP))
        pen.text((left, SIDE + 2 * GAP), f"{time:.1f} s")
    if sound:
        picture, seconds = sound
        top = SIDE + 5 * GAP
        sheet.paste(picture, (GAP, top))
        num_bins = processor.feature_extractor.feature_size
        pen.text((GAP, top + SIDE + GAP), f"sound, 0 to {seconds:.1f} s; {num_bins} mel bins")
    return sheet


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", help="a video; without, a clip is made")
    parser.add_argument("questions", nargs="*", help="what to ask about the video, in place of four questions")
    parser.add_argument("--seed", type=int, help="of the clip that is made; without, each time another one")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder that `train.py` wrote")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder where the decoder is unpacked once")
    options = parser.parse_args(argv)
    disable_progress_bar()
    torch.set_num_threads(1)  # more gain nothing at this size, and cost much where other programs are running

    truths: list[str | None]
    if options.file is None:
        seed = random.randrange(10**6) if options.seed is None else options.seed
        scene, items = new_clip(CLIP, seed)
        print(f"A new clip, {CLIP} (--seed {seed}). In truth: {describe(scene, seed)}.")
        video, asked, truths = str(CLIP), [item.question for item in items], [item.answer for item in items]
    else:
        video = options.file
        with open_media(video) as media:
            heard = has_audio(media)
        asked = options.questions or [*SIGHT_QUESTIONS, *(SOUND_QUESTIONS if heard else SILENT_QUESTIONS)]
        truths = [None] * len(asked)
        print("The small model knows nothing but the miniature world: of other videos it sees little.")
    temporary = SHEET.with_name(f"{SHEET.name}.part")
    model, processor = load_model(options.cache, options.model)
    contact_sheet(processor, video).save(temporary, format="png")
    temporary.replace(SHEET)
    for question, said, truth in zip(asked, answer(model, processor, video, asked), truths, strict=True):
        print(f"\nQ: {question}\nA: {said}" + (f"   (in truth: {truth})" if truth else ""))
    print(f"\nWhat the model was given: {SHEET}")


if __name__ == "__main__":
    try:
        main()
    except MediaError as error:
        sys.exit(str(error))
