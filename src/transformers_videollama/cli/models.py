"""Which model a command uses, on which device and in which number format; and how it generates."""

import argparse
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import UsageError

if TYPE_CHECKING:
    from ..modeling_video_llama import VideoLlamaForConditionalGeneration
    from ..processing_video_llama import VideoLlamaProcessor

MINIWORLD = Path(__file__).resolve().parents[3] / "examples" / "miniworld"
"""The small trained model and what assembles it, in a clone of the repository."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        help="folder or Hub id (default: the small trained model of the repository, which knows its world only)",
    )
    group.add_argument("--revision", help="branch, tag or commit of a Hub id")
    group.add_argument(
        "--trained-part", metavar="FOLDER", help="trained branches to load onto the model; folder or Hub id"
    )
    group.add_argument("--adapter", metavar="FOLDER", help="LoRA adapter of the decoder; folder or Hub id")
    group.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: a GPU if there is one)")
    group.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="number format of the weights (default: that of the checkpoint)",
    )
    group.add_argument("--attn-implementation", help="such as sdpa or flash_attention_2")
    bits = group.add_mutually_exclusive_group()
    bits.add_argument("--load-in-4bit", action="store_true", help="decoder in 4 bits (pip install bitsandbytes)")
    bits.add_argument("--load-in-8bit", action="store_true", help="decoder in 8 bits (pip install bitsandbytes)")


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("answers")
    group.add_argument("--max-new-tokens", type=positive, default=256, help="(default: %(default)s)")
    group.add_argument(
        "--temperature",
        type=not_negative,
        default=0.0,
        help="above 0 answers are drawn at random (default: %(default)s)",
    )
    group.add_argument("--top-p", type=_share, default=0.9, help="with a temperature (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of what is drawn at random (default: %(default)s)")
    media = parser.add_argument_group("media")
    media.add_argument("--num-frames", type=positive, help="frames of a video (default: what the model was made for)")
    media.add_argument("--no-audio", action="store_true", help="do not listen to the sound of videos")
    media.add_argument("--system-prompt", help="what comes before the first question")


def load_model(args: argparse.Namespace) -> "tuple[VideoLlamaForConditionalGeneration, VideoLlamaProcessor]":
    """
    The model of the arguments of [`add_model_arguments`], ready to answer, and its processor.

    Raises:
        UsageError: if none was named and the small one is not there, or if it is another kind of model.
        OSError: if there is no such folder or Hub id.
    """
    from transformers.utils import logging

    from ..modeling_video_llama import VideoLlamaForConditionalGeneration
    from ..processing_video_llama import VideoLlamaProcessor

    logging.disable_progress_bar()
    name, options = find_model(args.model)
    hub_options = {} if args.revision is None else {"revision": args.revision}
    check_model(name, **hub_options)
    processor = VideoLlamaProcessor.from_pretrained(name, **hub_options)
    options |= hub_options | weight_options(args)
    model = VideoLlamaForConditionalGeneration.from_pretrained(name, **options)
    if args.trained_part is not None:
        from ..trained_part import load_trained_part

        load_trained_part(model, args.trained_part)
    if args.adapter is not None:
        model.load_adapter(args.adapter)
    return model.eval(), processor


def weight_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments of [`add_model_arguments`] are for `from_pretrained`: device and number format of weights."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = args.device or accelerator or "cpu"
    try:
        is_there = torch.device(device).type in ("cpu", accelerator and accelerator.type)
    except RuntimeError:  # no device's name
        is_there = False
    if not is_there:
        raise UsageError(f"--device {device}: PyTorch sees {accelerator or 'no GPU'} here.")
    options: dict[str, Any] = {
        "dtype": "auto" if args.dtype == "auto" else getattr(torch, args.dtype),
        "device_map": device,
    }
    if args.load_in_4bit or args.load_in_8bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=args.load_in_4bit,
            load_in_8bit=args.load_in_8bit,
            bnb_4bit_compute_dtype=torch.bfloat16 if args.dtype == "auto" else getattr(torch, args.dtype),
        )
    if args.attn_implementation is not None:
        options["attn_implementation"] = args.attn_implementation
    return options


def find_model(name: str | None) -> tuple[str, dict[str, Any]]:
    """A model's name for `from_pretrained`, and what else that needs: of the small model its decoder's folder."""
    if name is not None:
        return name, {}
    if not (MINIWORLD / "model" / "config.json").is_file():
        raise UsageError(
            "No model was named, and the small trained one is in a clone of the repository only: name a converted "
            "folder or a Hub id."
        )
    sys.path.insert(0, str(MINIWORLD))
    from decoder import CACHE, find_decoder

    return str(MINIWORLD / "model"), {"text_model": find_decoder(CACHE)}


def check_model(name: str, **hub_options: Any) -> None:
    """Raises a [`UsageError`] for another kind of model, which `from_pretrained` would not, and for branches alone."""
    from transformers import PreTrainedConfig

    from ..configuration_video_llama import VideoLlamaConfig

    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith(".")):
        raise UsageError(f"There is no folder {name}.")
    if (Path(name) / "trained_part.json").is_file() and not (Path(name) / "config.json").is_file():
        raise UsageError(f"{name} holds trained branches alone: give it as --trained-part, and as --model their base.")
    found = PreTrainedConfig.get_config_dict(name, **hub_options)[0].get("model_type")
    if found != VideoLlamaConfig.model_type:
        raise UsageError(f"{name} is a model of the type {found}; expected {VideoLlamaConfig.model_type}.")


def generate_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments of [`add_generation_arguments`] are for `generate`."""
    options: dict[str, Any] = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        options |= {"temperature": args.temperature, "top_p": args.top_p}
    return options


def processor_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments of [`add_generation_arguments`] are for the processor."""
    options: dict[str, Any] = {}
    if args.num_frames is not None:
        options["processor_kwargs"] = {"num_frames": args.num_frames}
    if args.no_audio:
        options["load_audio_from_video"] = False
    return options


def not_negative(text: str) -> float:
    """A number of 0 or more, as `argparse` reads it."""
    number = float(text)
    if not 0 <= number < math.inf:  # nor nan
        raise argparse.ArgumentTypeError(f"must be 0 or more, but is {number}")
    return number


def _share(text: str) -> float:
    """A number above 0 and up to 1, as `argparse` reads it."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, but is {number}")
    return number


def not_negative_integer(text: str) -> int:
    """A whole number of 0 or more, as `argparse` reads it."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, but is {number}")
    return number


def positive(text: str) -> int:
    """A number of 1 or more, as `argparse` reads it."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, but is {number}")
    return number
