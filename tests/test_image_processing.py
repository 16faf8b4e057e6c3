"""Images are resized by PIL, bicubic, whatever their shape, also by a processor that was saved and loaded."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from transformers_videollama import VideoLlamaImageProcessor

MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])


@pytest.mark.parametrize("size", [(640, 480), (33, 517), (224, 224), (1, 1)])
def test_images_are_resized_as_published(tiny_folder: Path, size: tuple[int, int]) -> None:
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    resized = torch.tensor(np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC)))
    expected = ((resized / 255 - MEAN) / STD).permute(2, 0, 1)
    loaded = AutoImageProcessor.from_pretrained(tiny_folder)
    part = AutoProcessor.from_pretrained(tiny_folder).image_processor
    for processor in (VideoLlamaImageProcessor(), loaded, part):
        assert isinstance(processor, VideoLlamaImageProcessor)
        pixel_values = processor(image, return_tensors="pt").pixel_values
        torch.testing.assert_close(pixel_values, expected[None], rtol=0, atol=1e-5)
