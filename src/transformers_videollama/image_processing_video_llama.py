"""Images to `pixel_values`: PIL's bicubic resize to 224 x 224, aspect ignored, then CLIP's mean and deviation.

BLIP's image processor on PIL does just this. It has a name of its own here because the library loads BLIP's on
torchvision, whose bicubic resize differs from PIL's by a grey level in some pixels.
"""

from typing import Any

import numpy as np
import torch
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.utils import logging

logger = logging.get_logger(__name__)


class VideoLlamaImageProcessor(BlipImageProcessorPil):
    """
    Prepares images as the published system does.

    Called with an image or a list of images (PIL images, arrays, tensors, paths or URLs), it returns `pixel_values`,
    float32 of shape `(num_images, 3, 224, 224)`. See [`BlipImageProcessorPil`] for the arguments.
    """

    _auto_class = "AutoImageProcessor"

    size = {"height": 224, "width": 224}

    def _preprocess(self, images: list[np.ndarray], *args: Any, **kwargs: Any) -> Any:
        for image in images:
            check_pixel_values(image, kwargs.get("do_rescale"))
        return super()._preprocess(images, *args, **kwargs)


def check_pixel_values(pixels: np.ndarray | torch.Tensor, do_rescale: bool | None) -> None:
    """
    Warns of pixels that seem to have been divided by 255 already, where they are about to be.

    Raises:
        ValueError: if a pixel is no finite number.
    """
    if isinstance(pixels, np.ndarray):
        if pixels.dtype.kind not in "fb":
            return
        pixels = torch.from_numpy(np.ascontiguousarray(pixels))
    if not pixels.is_floating_point() and pixels.dtype != torch.bool:
        return
    if not pixels.isfinite().all():
        raise ValueError(f"Pixels of the shape {tuple(pixels.shape)} hold values that are not finite.")
    if do_rescale and pixels.numel() and 0 < pixels.max() <= 1:
        logger.warning_once(
            "Pixels between 0 and 1 are about to be divided by 255: pass `do_rescale=False`, in a chat as "
            "`processor_kwargs`, or give pixels between 0 and 255."
        )


__all__ = ["VideoLlamaImageProcessor", "check_pixel_values"]
