"""The library's common model tests (`ModelTesterMixin` and its neighbours) on every model class of the package."""

import unittest
from typing import Any
from unittest.mock import patch

import torch
from library_suites import (
    ConfigTester,
    GenerationTesterMixin,
    ModelTesterMixin,
    TensorParallelTesterMixin,
    TrainingTesterMixin,
    floats_tensor,
    ids_tensor,
)
from tiny_model import IMAGE_SIZE, MEL_SHAPE, NUM_AUDIO_TOKENS, NUM_VIDEO_TOKENS, VOCAB_SIZE, tiny_config
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES

from transformers_videollama.configuration_video_llama import VideoLlamaConfig
from transformers_videollama.modeling_video_llama import (
    VideoLlamaForConditionalGeneration,
    VideoLlamaModel,
)
from transformers_videollama.modeling_video_llama_branches import VideoLlamaQFormerModel
from transformers_videollama.modeling_video_llama_towers import (
    VideoLlamaAudioModel,
    VideoLlamaAudioVisionModel,
    VideoLlamaVisionModel,
)

NUM_FRAMES = 3
NUM_CLIPS = 2


class KnownToTheLibrary:
    """Names the package's classes in the library's own tables, where the suites look up what a class is for."""

    # Otherwise skipped, because the suite takes a file without a year of copyright for an old one.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        super().setUp()
        base_classes = (VideoLlamaModel, *TOWERS)
        for table, names in (
            (MODEL_MAPPING_NAMES, {f"video_llama_{i}": c.__name__ for i, c in enumerate(base_classes)}),
            (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, {"video_llama": "VideoLlamaForConditionalGeneration"}),
        ):
            patched = patch.dict(table, names)
            patched.start()
            self.addCleanup(patched.stop)


class VideoLlamaModelTester:
    """Gives the suites a tiny model, and a batch in which every prompt has an image, a video and a sound."""

    causal_lm_class = VideoLlamaForConditionalGeneration
    batch_size = 7
    num_text_tokens = 7
    seq_length = num_text_tokens + 2 * NUM_VIDEO_TOKENS + NUM_AUDIO_TOKENS
    is_training = True

    def __init__(self, parent: unittest.TestCase):
        self.parent = parent
        self.placeholders = {}  # those of `tiny_config`, past the vocabulary
        text_config = self.get_config().text_config
        self.hidden_size = text_config.hidden_size
        self.num_hidden_layers = text_config.num_hidden_layers
        self.num_attention_heads = text_config.num_attention_heads

    def get_config(self) -> VideoLlamaConfig:
        # Two of the suites look for the vocabulary's size at the top
        return tiny_config(**self.placeholders, vocab_size=VOCAB_SIZE, audio_vision_config=None)

    def prepare_config_and_inputs_for_common(self) -> tuple[VideoLlamaConfig, dict[str, Any]]:
        config = self.get_config()
        media = [config.image_token_id] * NUM_VIDEO_TOKENS + [config.video_token_id] * NUM_VIDEO_TOKENS
        media += [config.audio_token_id] * NUM_AUDIO_TOKENS
        text = ids_tensor([self.batch_size, self.num_text_tokens], config.text_config.vocab_size - 6) + 6
        media = torch.tensor([media]).expand(self.batch_size, -1)
        input_ids = torch.cat([text[:, :2], media, text[:, 2:]], dim=1)
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": floats_tensor([self.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE]),
            "pixel_values_videos": floats_tensor([self.batch_size, NUM_FRAMES, 3, IMAGE_SIZE, IMAGE_SIZE]),
            "input_features": floats_tensor([self.batch_size, NUM_CLIPS, *MEL_SHAPE]),
        }


class VideoLlamaModelTest(
    KnownToTheLibrary,
    ModelTesterMixin,
    GenerationTesterMixin,
    TensorParallelTesterMixin,
    TrainingTesterMixin,
    unittest.TestCase,
):
    all_model_classes = (VideoLlamaModel, VideoLlamaForConditionalGeneration)
    model_tester = None
    additional_model_inputs = ["pixel_values", "pixel_values_videos", "input_features"]
    _is_composite = True
    # Soft tokens are a Q-Former's output, whose width is not that of the sound encoder; see test_modeling.py.
    skip_test_audio_features_output_shape = True

    def setUp(self):
        super().setUp()
        self.model_tester = VideoLlamaModelTester(self)
        self.config_tester = ConfigTester(self, config_class=VideoLlamaConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def use_placeholders_in_vocabulary(self):
        self.model_tester.placeholders = {"image_token_id": 3, "video_token_id": 4, "audio_token_id": 5}

    def test_resize_tokens_embeddings(self):
        # The suite clamps the prompt to the vocabulary, placeholders included.
        self.use_placeholders_in_vocabulary()
        super().test_resize_tokens_embeddings()

    def test_resize_embeddings_untied(self):
        # As above.
        self.use_placeholders_in_vocabulary()
        super().test_resize_embeddings_untied()

    def test_inputs_embeds(self):
        # The suite embeds the whole prompt, placeholders included.
        self.use_placeholders_in_vocabulary()
        super().test_inputs_embeds()

    def test_inputs_embeds_matches_input_ids(self):
        # As above.
        self.use_placeholders_in_vocabulary()
        super().test_inputs_embeds_matches_input_ids()

    def check_training_gradient_checkpointing(self, **kwargs):
        # The suite watches the first layer of the model, a frame encoder's: the encoders are never trained and stay in
        # eval mode, where nothing is checkpointed, unless they are made to follow.
        with patch.object(VideoLlamaModel, "train", torch.nn.Module.train):
            super().check_training_gradient_checkpointing(**kwargs)


class TowerTester:
    """Gives the suites one tower of the tiny model and inputs for it."""

    is_training = True
    batch_size = 7

    def __init__(self, parent: unittest.TestCase, config_name: str, inputs: dict[str, list[int]]):
        self.parent = parent
        self.config_name = config_name
        self.inputs = inputs
        config = self.get_config()
        self.hidden_size = config.hidden_size
        self.num_hidden_layers = config.num_hidden_layers
        self.num_attention_heads = config.num_attention_heads
        self.seq_length = 1 + config.num_patches

    def get_config(self):
        return getattr(tiny_config(), self.config_name)

    def prepare_config_and_inputs_for_common(self):
        inputs = {name: floats_tensor([self.batch_size, *shape]) for name, shape in self.inputs.items()}
        return self.get_config(), inputs


class TowerTestMixin(KnownToTheLibrary, ModelTesterMixin):
    """What the towers share: no tokens, so no embeddings to resize."""

    test_resize_embeddings = False
    config_name: str
    inputs: dict[str, list[int]]

    def setUp(self):
        super().setUp()
        self.model_tester = TowerTester(self, self.config_name, self.inputs)

    def test_model_get_set_embeddings(self):
        # The suite expects a table of tokens. A tower embeds patches, with a convolution.
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertIs(model.get_input_embeddings(), model.embeddings)
            self.assertIsNone(model.get_output_embeddings())


class VideoLlamaVisionModelTest(TowerTestMixin, unittest.TestCase):
    all_model_classes = (VideoLlamaVisionModel,)
    config_name = "vision_config"
    inputs = {"pixel_values": [3, IMAGE_SIZE, IMAGE_SIZE]}


class VideoLlamaAudioModelTest(TowerTestMixin, unittest.TestCase):
    all_model_classes = (VideoLlamaAudioModel,)
    config_name = "audio_config"
    inputs = {"input_features": list(MEL_SHAPE)}

    def setUp(self):
        super().setUp()
        self.model_tester.key_length = self.model_tester.seq_length + 1  # the learned key


class VideoLlamaAudioVisionModelTest(TowerTestMixin, unittest.TestCase):
    all_model_classes = (VideoLlamaAudioVisionModel,)
    config_name = "audio_vision_config"
    inputs = {"pixel_values": [3, IMAGE_SIZE, IMAGE_SIZE]}


TOWERS = (VideoLlamaVisionModel, VideoLlamaAudioModel, VideoLlamaAudioVisionModel, VideoLlamaQFormerModel)
