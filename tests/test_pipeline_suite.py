"""The library's common tests of pipelines (`PipelineTesterMixin`) on the package's model.

The suite loads model and processor and runs batches. What a task's examples are and what comes of them it leaves to
files that are not in the source distribution; the classes below stand in for them.
"""

import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from library_suites import PipelineTesterMixin, test_pipeline_mixin
from PIL import Image
from transformers import Pipeline, PreTrainedModel, ProcessorMixin, pipeline

import transformers_videollama  # noqa: F401  (registers model and processor with the Auto classes)
from transformers_videollama.modeling_video_llama import VideoLlamaForConditionalGeneration

SYNTH = Path(__file__).parent / "reference" / "synth"


def chat(medium: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [medium, {"type": "text", "text": "What is this?"}]}]


class AnyToAnyPipelineTests:
    """Chats about videos and sounds, and prompts with a video beside them."""

    task = "any-to-any"

    def get_test_pipeline(
        self, model: PreTrainedModel, tokenizer: Any, processor: ProcessorMixin, dtype: str, **parts: Any
    ) -> tuple[Pipeline, list]:
        pipe = pipeline(self.task, model=model, processor=processor, dtype=dtype, max_new_tokens=4, do_sample=False)
        return pipe, self.examples()

    def examples(self) -> list:
        texts = ("<Video><video></Video> What is this?", "What happens? <video>")
        return [{"text": text, "videos": str(SYNTH / "clip_silent.mp4")} for text in texts]

    def chats(self) -> list:
        media = [{"type": "video", "path": str(SYNTH / f"{name}.mp4")} for name in ("clip", "clip_silent")]
        media.append({"type": "audio", "path": str(SYNTH / "clip.mp4")})
        return [chat(medium) for medium in media]

    def run_pipeline_test(self, pipe: Pipeline, examples: list) -> None:
        for answer in (pipe(question, return_full_text=False)[0] for question in examples):
            assert set(answer) == {"input_text", "generated_text"}
            assert isinstance(answer["generated_text"], str)
        answers = pipe(self.chats(), return_full_text=False)
        assert [answer[0]["input_text"] for answer in answers] == self.chats()


class ImageTextToTextPipelineTests(AnyToAnyPipelineTests):
    """Chats about images."""

    task = "image-text-to-text"

    def examples(self) -> list:
        return self.chats()

    def chats(self) -> list:
        return [chat({"type": "image", "image": Image.new("RGB", size, "green")}) for size in ((40, 30), (224, 224))]


@pytest.fixture(scope="class")
def listed_model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Puts the converted reference model where the suite looks for a class's model."""
    name = VideoLlamaForConditionalGeneration.__name__
    folder = tmp_path_factory.mktemp("models")
    (folder / "video_llama").mkdir()
    (folder / "video_llama" / name).symlink_to(tiny_folder, target_is_directory=True)
    parts = {"tokenizer_classes": ["AutoTokenizer"], "processor_classes": []}
    mapping = test_pipeline_mixin.pipeline_test_mapping
    tests = {"any-to-any": AnyToAnyPipelineTests, "image-text-to-text": ImageTextToTextPipelineTests}
    if isinstance(mapping["any-to-any"]["test"], str):
        tests = {task: f"{tests_class.__module__}.{tests_class.__name__}" for task, tests_class in tests.items()}
    with (
        patch.object(test_pipeline_mixin, "TRANSFORMERS_TINY_MODEL_PATH", str(folder)),
        patch.dict(test_pipeline_mixin.tiny_model_summary, {name: parts}),
        patch.dict(test_pipeline_mixin.PROCESSOR_MAPPING_NAMES, {"video_llama": "AutoProcessor"}),
        patch.dict(mapping, {task: {"test": tests_class} for task, tests_class in tests.items()}),
    ):
        yield


@pytest.mark.usefixtures("listed_model")
class VideoLlamaPipelineTest(PipelineTesterMixin, unittest.TestCase):
    pipeline_model_mapping = {
        "any-to-any": VideoLlamaForConditionalGeneration,
        "image-text-to-text": VideoLlamaForConditionalGeneration,
    }


for name in dir(PipelineTesterMixin):
    if name.startswith("test_") and not name.startswith(
        ("test_pipeline_any_to_any", "test_pipeline_image_text_to_text")
    ):
        setattr(VideoLlamaPipelineTest, name, None)  # a task of other models
