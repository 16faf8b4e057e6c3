"""Images to `pixel_values`: PIL's bicubic resize to 224 x 224, aspect ignored, then CLIP's mean and deviation.

BLIP's image processor on PIL does just this. It has a name of its own here because the library loads BLIP's on
torchvision, whose bicubic resize differs from PIL's by a grey level in some pixels.
"""

from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil


class VideoLlamaImageProcessor(BlipImageProcessorPil):
    """
    Prepares images as the published system does.

    Called with an image or a list of images (PIL images, arrays, tensors, paths or URLs), it returns `pixel_values`,
    float32 of shape `(num_images, 3, 224, 224)`. See [`BlipImageProcessorPil`] for the arguments.
    """

    _auto_class = "AutoImageProcessor"

    size = {"height": 224, "width": 224}


__all__ = ["VideoLlamaImageProcessor"]
