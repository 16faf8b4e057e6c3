"""`main`: a training run from a YAML file and the command line, from loading the model to saving what was trained.

`examples/training/train.py` calls it, under `python`, `torchrun` or `accelerate launch`.
"""

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from transformers.utils import cached_file, logging

from ..modeling_video_llama import VideoLlamaForConditionalGeneration
from ..processing_video_llama import VideoLlamaProcessor
from ..trained_part import load_trained_part
from .arguments import DataArguments, ModelArguments, VideoLlamaTrainingArguments, parse_arguments
from .checkpoints import find_last_checkpoint
from .collator import VideoLlamaDataCollator
from .feature_cache import FeatureCache
from .mixture import Source, TrainDataset, TrainIterableDataset
from .samples import SampleBuilder
from .trainer import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    VideoLlamaTrainer,
    has_adapter,
    load_adapter_weights,
)

logger = logging.get_logger(__name__)

LAST = ("last", "true")


def main(argv: Sequence[str] | None = None) -> VideoLlamaTrainer:
    """
    Trains a branch as the arguments say, saves it to `output_dir` and, with `do_eval`, evaluates it.

    Args:
        argv (`Sequence[str]`, *optional*): The arguments (see [`parse_arguments`]); those of the process by default.

    Returns:
        [`VideoLlamaTrainer`]: the trainer, whose `state.log_history` holds the losses.
    """
    model_args, data_args, args = parse_arguments(sys.argv[1:] if argv is None else argv)
    checkpoint = find_checkpoint(args)
    if args.should_save:  # before anything that takes time, should it be impossible
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)

    processor = VideoLlamaProcessor.from_pretrained(model_args.model)
    model = load_model(model_args, args, on_frames=data_args.feature_cache is None)
    dataset, collator = load_data(data_args, model_args.branch, args, processor, model)
    trainer = VideoLlamaTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        eval_dataset=load_eval_data(data_args, model_args.branch, args, processor),
        data_collator=collator,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if args.do_eval:
        trainer.save_metrics("eval", trainer.evaluate(), combined=False)
    trainer.save_state()
    if model_args.merge and trainer.is_world_process_zero():
        merged = Path(args.output_dir) / "merged"
        save_merged(args.output_dir, merged, model.config._name_or_path, processor, model_args.trained_part)
    trainer.accelerator.wait_for_everyone()
    return trainer


def find_checkpoint(args: VideoLlamaTrainingArguments) -> str | None:
    """
    The checkpoint to resume from, if any.

    With `--resume_from_checkpoint last` (or `True`) a folder without a complete checkpoint starts from the beginning,
    so that the same command starts a run and continues it.

    Raises:
        ValueError: if `output_dir` is a file, or holds files already and the run is not to be resumed.
    """
    output_dir = Path(args.output_dir)
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"`output_dir` is {output_dir}, which is a file: give a folder, which is made if need be.")
    wanted = args.resume_from_checkpoint
    if wanted is not None and str(wanted).lower() not in LAST:
        found: str | None = str(wanted) if str(wanted).lower() != "false" else None
    elif wanted is not None:
        last = find_last_checkpoint(output_dir)
        found = None if last is None else str(last)
        if last is None:
            logger.warning(f"{output_dir} holds no complete checkpoint: the training starts from the beginning.")
        args.distributed_state.wait_for_everyone()
        return found
    else:
        found = None
    if found is None and output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(
            f"{output_dir} is not empty. Continue its run with `--resume_from_checkpoint last`, or give another "
            "`--output_dir`."
        )
    # No process may write before all have looked
    args.distributed_state.wait_for_everyone()
    return found


def load_model(
    model_args: ModelArguments, args: VideoLlamaTrainingArguments, on_frames: bool = True
) -> VideoLlamaForConditionalGeneration:
    """
    The model, with the chosen parts trainable in float32, as exact as they are stored, and all others frozen.

    Args:
        model_args ([`ModelArguments`]): What to load.
        args ([`VideoLlamaTrainingArguments`]): Of which the number format.
        on_frames (`bool`, *optional*, defaults to `True`):
            Whether the branch will see frames, not features of a cache: for the audio branch these need ImageBind's
            vision tower.
    """
    # DeepSpeed shards the model once it is complete: of a sharded one nothing can be cast or loaded. The trainer sets
    # this again
    unset_hf_deepspeed_config()
    computation = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    with _in_float32(model_args.trainable):
        model = VideoLlamaForConditionalGeneration.from_pretrained(
            model_args.model,
            dtype=getattr(torch, model_args.dtype or computation),
            attn_implementation=model_args.attn_implementation,
        )
    if model_args.branch == "audio" and on_frames and model.model.audio_vision_tower is None:
        model.load_audio_vision_tower()
    model.set_trainable(model_args.trainable)
    if model_args.lora_r:
        add_adapter(model, model_args)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if model_args.trained_part is not None:
        _load_earlier(model, model_args)
    return model


def _load_earlier(model: VideoLlamaForConditionalGeneration, model_args: ModelArguments) -> None:
    """
    Loads what an earlier run trained, its adapter included.

    Raises:
        ValueError: it has an adapter, and the model is to have none.
    """
    name = str(model_args.trained_part)
    trained = model_args.trainable or []
    others = [part for part in load_trained_part(model, name) if part not in trained]
    if others:
        logger.warning(
            f"{name} holds {', '.join(others)}, too, which this run does not train: the output has what it trains "
            "alone, and belongs on top of it. `--merge true` writes the whole."
        )
    # Of a repository without one, not even its connection is worth an error
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    adapter = cached_file(name, ADAPTER_CONFIG_NAME, **quiet)
    if adapter is None:
        return
    if not has_adapter(model):
        raise ValueError(
            f"{name} holds an adapter beside its branches: give `--lora_r` and the other `--lora_…` that it was "
            "trained with. To go on without it, copy the trained part alone to another folder."
        )
    cached_file(name, ADAPTER_WEIGHTS_NAME)
    load_adapter_weights(model, Path(adapter).parent)


@contextmanager
def _in_float32(parts: Sequence[str]) -> Iterator[None]:
    """
    Within it `from_pretrained` loads these parts in float32, whatever number format is asked for: weights that are
    trained would otherwise be rounded before they are made float32 again.
    """
    outside = {"qformer": r"^model\.query_tokens$", "language_model": r"^lm_head\."}  # but of the part
    patterns = [rf"^model\.{part}\." for part in parts] + [outside[part] for part in parts if part in outside]
    model_class = VideoLlamaForConditionalGeneration
    model_class._keep_in_fp32_modules_strict = patterns
    try:
        yield
    finally:
        del model_class._keep_in_fp32_modules_strict


def add_adapter(model: VideoLlamaForConditionalGeneration, model_args: ModelArguments) -> None:
    """Adds a LoRA adapter to the decoder's layers of the given names, and to nothing else."""
    from peft import LoraConfig

    names = "|".join(model_args.lora_target_modules)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.add_adapter(
        LoraConfig(
            r=model_args.lora_r,
            lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout,
            target_modules=rf"model\.language_model\..*\.({names})",
            base_model_name_or_path=model.config._name_or_path,
        )
    )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained or ".lora_" in name)


def load_data(
    data_args: DataArguments,
    branch: str,
    args: VideoLlamaTrainingArguments,
    processor: VideoLlamaProcessor,
    model: VideoLlamaForConditionalGeneration,
) -> tuple[Any, Any]:
    """
    The data sets, mixed by their weights, and the collator.

    Raises:
        ValueError: if the feature cache was made by other encoders or settings; if the data are streamed and
            `max_steps` does not say when to stop.
    """
    builder = _make_builder(data_args, branch, processor, data_args.sampling, data_args.random_resized_crop)
    if data_args.feature_cache is not None:
        cache = FeatureCache(data_args.feature_cache)
        cache.check_processor(processor, data_args.num_frames, data_args.sampling)
        cache.check_model(model)
        if data_args.random_resized_crop:
            logger.warning("The feature cache is of whole frames: nothing is cropped, despite `random_resized_crop`.")
    seed = args.seed if args.data_seed is None else args.data_seed
    settings = _mixture_settings(data_args, data_args.datasets, args, seed)
    dataset: TrainDataset | TrainIterableDataset
    if data_args.streaming:
        if args.max_steps <= 0:
            raise ValueError("A stream has no end: say with `--max_steps` how many steps to train for.")
        dataset = TrainIterableDataset(
            builder=builder, **settings, rank=args.process_index, world_size=args.world_size, repeat=True
        )
    else:
        with args.main_process_first(desc="reading the annotations"):
            dataset = TrainDataset(builder=builder, **settings)
    return dataset, VideoLlamaDataCollator(processor.tokenizer.pad_token_id)


def load_eval_data(
    data_args: DataArguments,
    branch: str,
    args: VideoLlamaTrainingArguments,
    processor: VideoLlamaProcessor,
) -> TrainDataset | None:
    """
    The data sets to evaluate on, or `None` if there are none. Each evaluation, of runs with other seeds as well, sees
    the same samples in the same order: whole pictures, and frames at equal distances or those of the feature cache,
    which [`load_data`] has checked.
    """
    if data_args.eval_datasets is None:
        return None
    builder = _make_builder(data_args, branch, processor, sampling="uniform", random_resized_crop=False)
    with args.main_process_first(desc="reading the annotations to evaluate on"):
        return TrainDataset(builder=builder, **_mixture_settings(data_args, data_args.eval_datasets, args, seed=0))


def _make_builder(
    data_args: DataArguments, branch: str, processor: VideoLlamaProcessor, sampling: str, random_resized_crop: bool
) -> SampleBuilder:
    return SampleBuilder(
        processor,
        branch=branch,
        text_format=data_args.text_format,
        sampling=sampling,
        num_frames=data_args.num_frames,
        random_resized_crop=random_resized_crop,
        max_length=data_args.max_length,
        feature_cache=None if data_args.feature_cache is None else FeatureCache(data_args.feature_cache),
    )


def _mixture_settings(
    data_args: DataArguments, datasets: Any, args: VideoLlamaTrainingArguments, seed: int
) -> dict[str, Any]:
    log_file = data_args.bad_samples_log or Path(args.output_dir) / "bad_samples.jsonl"
    if args.should_save:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
    return {
        "sources": [Source(**entry) for entry in datasets],
        "seed": seed,
        "max_bad_fraction": data_args.max_bad_fraction,
        "log_file": log_file,
    }


def save_merged(
    trained_part: str | os.PathLike,
    folder: Path,
    base_model: str,
    processor: VideoLlamaProcessor,
    earlier: str | None = None,
) -> None:
    """
    Writes the whole model with the trained part in it, the adapter merged into the decoder if there is one, so that
    `from_pretrained` loads it as any other.

    Args:
        trained_part (`str` or `os.PathLike`): The folder with the trained part and the adapter.
        folder (`Path`): Where to.
        base_model (`str`): The model with the frozen parts, whose number format is kept.
        processor ([`VideoLlamaProcessor`]): Saved with it.
        earlier (`str`, *optional*): The trained part that the training began with, which may hold other parts.
    """
    model: Any = VideoLlamaForConditionalGeneration.from_pretrained(base_model, dtype="auto")
    for part in (earlier, trained_part):
        if part is not None:
            load_trained_part(model, part)
    if (Path(trained_part) / ADAPTER_CONFIG_NAME).is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(trained_part)).merge_and_unload()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    tower = Path(base_model) / "audio_vision_tower"  # without which the audio branch could not be trained any further
    if tower.is_dir() and model.config.audio_vision_config is None:
        shutil.copytree(tower, folder / tower.name, dirs_exist_ok=True)
