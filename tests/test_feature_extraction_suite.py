"""The library's common tests of feature extractors (`SequenceFeatureExtractionTestMixin`) on the package's own."""

import unittest

import numpy as np
from library_suites import SequenceFeatureExtractionTestMixin

from transformers_videollama.feature_extraction_video_llama import VideoLlamaFeatureExtractor


class FeatureExtractionTester:
    """Gives the suite an extractor, and sequences of vectors of unlike lengths to pad and to cut."""

    batch_size = 7
    feature_size = 24
    min_seq_length = 40
    seq_length_diff = 20
    max_seq_length = min_seq_length + (batch_size - 1) * seq_length_diff

    def prepare_feat_extract_dict(self) -> dict:
        # The suite's checks are of padding on the right
        padding = {"padding_value": 0.0, "padding_side": "right"}
        return {"feature_size": self.feature_size, "sampling_rate": 8000, "num_clips": 3, **padding}

    def prepare_inputs_for_common(self, equal_length: bool = False, numpify: bool = False) -> list:
        lengths = range(self.min_seq_length, self.max_seq_length + 1, self.seq_length_diff)
        if equal_length:
            lengths = [self.max_seq_length] * self.batch_size
        sequences = [np.random.default_rng(length).random((length, self.feature_size)) for length in lengths]
        return sequences if numpify else [sequence.tolist() for sequence in sequences]


class VideoLlamaFeatureExtractionTest(SequenceFeatureExtractionTestMixin, unittest.TestCase):
    feature_extraction_class = VideoLlamaFeatureExtractor

    def setUp(self):
        self.feat_extract_tester = FeatureExtractionTester()
