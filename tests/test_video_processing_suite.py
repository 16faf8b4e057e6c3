"""The library's common tests of video processors (`VideoProcessingTestMixin`) on the package's own."""

import unittest

from library_suites import VideoProcessingTestMixin, prepare_video_inputs
from transformers.video_utils import VideoMetadata

import transformers_videollama  # noqa: F401  (registers the processor with AutoVideoProcessor)
from transformers_videollama.video_processing_video_llama import VideoLlamaVideoProcessor


class VideoProcessingTester:
    """Gives the suite a processor, and videos of unlike sizes."""

    batch_size = 5
    num_frames = 6
    num_channels = 3
    size = {"height": 20, "width": 24}

    def prepare_video_processor_dict(self) -> dict:
        return {"size": self.size, "num_frames": 8, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.5, 0.2]}

    def expected_output_video_shape(self, videos: list) -> list[int]:
        return [self.num_frames, self.num_channels, self.size["height"], self.size["width"]]

    def prepare_video_inputs(self, equal_resolution: bool = False, return_tensors: str = "pil") -> list:
        return prepare_video_inputs(
            batch_size=self.batch_size,
            num_frames=self.num_frames,
            num_channels=self.num_channels,
            min_resolution=30,
            max_resolution=80,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )


class VideoLlamaVideoProcessingTest(VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = VideoLlamaVideoProcessor

    def setUp(self):
        super().setUp()
        self.video_processor_tester = VideoProcessingTester()

    @property
    def video_processor_dict(self) -> dict:
        return self.video_processor_tester.prepare_video_processor_dict()

    def test_video_processor_from_dict_with_kwargs(self):
        # The suite expects an edge to resize to and a crop, where this model has a height and a width.
        processor = self.fast_video_processing_class.from_dict(self.video_processor_dict)
        self.assertEqual(processor.size, {"height": 20, "width": 24})
        self.assertEqual(processor.num_frames, 8)
        changed = {"size": {"height": 42, "width": 42}, "num_frames": 4}
        processor = self.fast_video_processing_class.from_dict(self.video_processor_dict, **changed)
        self.assertEqual(processor.size, {"height": 42, "width": 42})
        self.assertEqual(processor.num_frames, 4)

    def test_call_sample_frames(self):
        # The suite expects an error for a video of fewer frames than asked for, where the published model takes those
        # that there are; and all frames if there is no sampling, where this model's are brought to their number.
        self.video_processor_tester.num_frames = 8
        videos = self.video_processor_tester.prepare_video_inputs(return_tensors="torch")
        processor = self.fast_video_processing_class(**self.video_processor_dict)

        def num_frames(**kwargs) -> int:
            metadata = kwargs.pop("video_metadata", None)
            alone = processor(videos[0], return_tensors="pt", video_metadata=metadata and metadata[:1], **kwargs)
            together = processor(videos, return_tensors="pt", video_metadata=metadata, **kwargs)
            self.assertEqual(alone[self.input_name].shape[1], together[self.input_name].shape[1])
            return alone[self.input_name].shape[1]

        self.assertEqual(num_frames(num_frames=3), 3)
        self.assertEqual(num_frames(num_frames=10), 8)
        self.assertEqual(num_frames(num_frames=3, do_sample_frames=False), 3)
        self.assertEqual(num_frames(num_frames=10, do_sample_frames=False), 10)
        with self.assertRaises(ValueError):
            processor.sample_frames(metadata=VideoMetadata(total_num_frames=8), fps=3)
        for metadata in ({"duration": 2.0, "total_num_frames": 8, "fps": 4}, VideoMetadata(8, fps=4, duration=2.0)):
            self.assertEqual(num_frames(fps=3, video_metadata=[[metadata]] * len(videos)), 6)
