"""The library's common tests of processors (`ProcessorTesterMixin`) on the package's own."""

import tempfile
import unittest
from pathlib import Path
from unittest.mock import patch

import numpy as np
from library_suites import ProcessorTesterMixin, test_processing_common
from media_files import tone, write_media
from PIL import Image
from transformers import AutoTokenizer

import transformers_videollama  # noqa: F401  (registers the processor's parts with the Auto classes)
from transformers_videollama.feature_extraction_video_llama import VideoLlamaFeatureExtractor
from transformers_videollama.image_processing_video_llama import VideoLlamaImageProcessor
from transformers_videollama.processing_video_llama import VideoLlamaProcessor
from transformers_videollama.video_processing_video_llama import VideoLlamaVideoProcessor

TOKENIZER = Path(__file__).parent / "reference" / "tiny" / "llama"


def write_files(folder: Path) -> None:
    """Stand-ins for the files that the suite takes from the Hub, under their names."""
    for name in ("coco_sample.png", "australia.jpg"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(folder / name)
    write_media(folder / "tiny_video_320x240.mp4", num_frames=11, fps=30)
    for name in ("big_buck_bunny_320x240_10s.mp4", "sample_demo_1_320x240.mp4"):
        write_media(folder / name, audio=tone(2.0))
    for name, codec in (("glass-breaking-151256.mp3", "mp3"), ("f2641_0_throatclearing.wav", "pcm_s16le")):
        write_media(folder / name, num_frames=0, audio=tone(2.0), audio_codec=codec)


class VideoLlamaProcessorTest(ProcessorTesterMixin, unittest.TestCase):
    processor_class = VideoLlamaProcessor

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        write_files(Path(folder.name))

        def local_path(url: str) -> str:
            return str(Path(folder.name) / Path(url).name)

        data = test_processing_common.MODALITY_INPUT_DATA
        for patched in (
            patch.dict(data, {modality: [local_path(url) for url in urls] for modality, urls in data.items()}),
            patch.object(test_processing_common, "url_to_local_path", local_path),
        ):
            patched.start()
            cls.addClassCleanup(patched.stop)

    @classmethod
    def _setup_tokenizer(cls):
        return AutoTokenizer.from_pretrained(TOKENIZER)

    @classmethod
    def _setup_image_processor(cls):
        return VideoLlamaImageProcessor(size={"height": 30, "width": 30})

    @classmethod
    def _setup_video_processor(cls):
        return VideoLlamaVideoProcessor(size={"height": 30, "width": 30})

    @classmethod
    def _setup_feature_extractor(cls):
        return VideoLlamaFeatureExtractor()

    @staticmethod
    def prepare_processor_dict():
        return {"chat_template": "vicuna", "num_image_tokens": 5, "num_video_tokens": 5, "num_audio_tokens": 3}

    def prepare_videos_inputs(self, batch_size=None):
        # Fewer frames than the model's, which fills them up: then all of `model_input_names` are there.
        video = np.random.default_rng(0).integers(0, 255, (5, 3, 30, 40), dtype=np.uint8)
        return video if batch_size is None else [video] * batch_size

    @property
    def video_sampling_expectations(self):
        # Of a video of 11 frames. Without sampling too it is brought to the model's number of frames.
        return [
            {"num_frames": 3, "fps": None, "expected_dim": 1, "output_length": 3},
            {"num_frames": None, "fps": 10, "expected_dim": 1, "output_length": 3},
            {"do_sample_frames": False, "fps": 10, "expected_dim": 1, "output_length": 8},
            {"do_sample_frames": False, "expected_dim": 1, "output_length": 8},
            {"expected_dim": 1, "output_length": 8},
        ]

    def test_apply_chat_template_video_frame_sampling(self):
        # The suite's last check is that frames given as images cannot be sampled. Here they can.
        with self.assertRaisesRegex(AssertionError, "ValueError not raised"):
            super().test_apply_chat_template_video_frame_sampling()
