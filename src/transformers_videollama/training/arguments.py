"""What a training run can be told, as dataclasses for `HfArgumentParser`: the model, the data and the training itself.

`parse_arguments` reads them from a YAML file and the command line, of which the latter wins.
"""

import argparse
import datetime
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils import logging

from ..trained_part import PARTS

logger = logging.get_logger(__name__)

BRANCHES = ("video", "audio")
TEXT_FORMATS = ("caption", "chat")
SAMPLINGS = ("headtail", "uniform")
DATASET_KEYS = ("format", "annotations", "media_root", "weight")


@dataclass
class ModelArguments:
    """Which model is trained, from where, and what of it."""

    model: str = field(
        default="",
        metadata={"help": "Folder or Hub id of the model with the frozen parts, as `from_pretrained` takes it."},
    )
    branch: str = field(
        default="video",
        metadata={
            "help": "The branch that is trained, everything else being frozen: `audio` has frames go through "
            "ImageBind.",
            "choices": list(BRANCHES),
        },
    )
    trainable: list[str] | None = field(
        default=None,
        metadata={
            "help": "The parts that are trained, in place of the branch alone: `qformer` comes with its query tokens, "
            "`language_model` with its head.",
            "choices": list(PARTS),
        },
    )
    trained_part: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub id of a trained part to start from: for stage 2, the output of stage 1. By "
            "default, or with `none`, the model's own weights."
        },
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Number format of the frozen parts, such as `bfloat16`. By default that of the computation: "
            "`bfloat16` with `--bf16`, `float16` with `--fp16`, otherwise `float32`. What is trained is kept in "
            "float32."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention implementation, such as `sdpa` or `flash_attention_2`."}
    )
    lora_r: int = field(
        default=0, metadata={"help": "Rank of a LoRA adapter on the decoder, trained beside the branch; 0 for none."}
    )
    lora_alpha: int = field(default=16, metadata={"help": "The adapter's scale is `lora_alpha / lora_r`."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input, between 0 and 1."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["q_proj", "v_proj"],
        metadata={"help": "Last names of the decoder's linear layers that get an adapter."},
    )
    merge: bool = field(
        default=False,
        metadata={"help": "After training, also write the whole model, adapter merged, to `<output_dir>/merged`."},
    )

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError(
                "Give the model to train as `--model <folder or Hub id>` or as `model:` in the YAML file."
            )
        if self.trained_part in ("none", ""):  # on the command line, where a YAML file names one
            self.trained_part = None
        _check_choice("branch", self.branch, BRANCHES)
        if self.dtype is not None and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"`dtype` must be a number format such as bfloat16 or float32, but is {self.dtype!r}.")
        if self.trainable is None:
            self.trainable = [f"{self.branch}_branch"]
        elif isinstance(self.trainable, str):
            self.trainable = [self.trainable]
        if not self.trainable:
            raise ValueError(f"`trainable` is empty: name parts among {', '.join(PARTS)}, or leave it out.")
        for part in self.trainable:
            _check_choice("trainable", part, PARTS)
        if self.lora_r and "language_model" in self.trainable:
            raise ValueError(
                "`trainable` has `language_model`, and `lora_r` adds an adapter to it: train the decoder in one of "
                "the two ways."
            )


@dataclass
class DataArguments:
    """What the model is trained on, and how a sample is made of it."""

    datasets: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={
            "help": "The data sets, a list in YAML or JSON of entries with `format`, `annotations`, `media_root` "
            "(optional) and `weight` (share of the samples, for all data sets or for none: without, each sample is "
            "drawn once an epoch)."
        },
    )
    eval_datasets: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={
            "help": "Data sets to evaluate the loss on, in the form of `datasets`; `eval_strategy` says when, "
            "`do_eval` for once at the end. Whole pictures and frames at equal distances are shown, in a fixed order."
        },
    )
    text_format: str = field(
        default="caption",
        metadata={"help": "`caption` for stage 1, `chat` for stage 2.", "choices": list(TEXT_FORMATS)},
    )
    sampling: str = field(
        default="uniform",
        metadata={
            "help": "Which frames of a video are shown: `headtail` draws half from either half of it (published "
            "stage 1), `uniform` takes them at equal distances (stage 2).",
            "choices": list(SAMPLINGS),
        },
    )
    num_frames: int = field(default=8, metadata={"help": "Frames of a video."})
    random_resized_crop: bool = field(
        default=True, metadata={"help": "Crop each clip at random, as published. Has no effect with `feature_cache`."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a text. By default as published: 32 for captions, 512 for conversations."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read annotations as they are needed instead of loading them. Needs `--max_steps`."},
    )
    feature_cache: str | None = field(
        default=None,
        metadata={"help": "Folder written by `cache_features.py`: its features are read in place of the media."},
    )
    max_bad_fraction: float = field(
        default=0.1,
        metadata={"help": "Share of unreadable samples past which the run stops; up to it they are replaced."},
    )
    bad_samples_log: str | None = field(
        default=None,
        metadata={"help": "File that names unreadable samples. By default `<output_dir>/bad_samples.jsonl`."},
    )

    def __post_init__(self) -> None:
        self.datasets = check_datasets(read_json("datasets", self.datasets))
        self.eval_datasets = read_json("eval_datasets", self.eval_datasets)
        if self.eval_datasets is not None:
            self.eval_datasets = check_datasets(self.eval_datasets, "eval_datasets")
        _check_choice("text_format", self.text_format, TEXT_FORMATS)
        _check_choice("sampling", self.sampling, SAMPLINGS)
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"`max_bad_fraction` must lie between 0 and 1, but is {self.max_bad_fraction}.")
        if self.max_length is None:
            self.max_length = 32 if self.text_format == "caption" else 512


@dataclass
class VideoLlamaTrainingArguments(TrainingArguments):
    """
    The library's [`TrainingArguments`] with the published optimiser as defaults, and the two learning rates that the
    library has no name for. `lr_scheduler_type="cosine"`, the default, is the published schedule
    ([`~training.optimization.published_learning_rate`]); any other is the library's.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The peak learning rate."})
    min_learning_rate: float | None = field(
        default=None, metadata={"help": "What the published cosine ends at. By default 0.8 of the peak, as published."}
    )
    warmup_start_learning_rate: float = field(
        default=1e-6, metadata={"help": "What the published warm-up starts at, over `warmup_steps` steps."}
    )
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "`cosine` is the published schedule; others are the library's."}
    )
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay of tensors of two or more dimensions."})
    max_grad_norm: float = field(
        default=0.0, metadata={"help": "Norm at which gradients are clipped; 0, as published, for never."}
    )
    compile_decoder: bool = field(
        default=False,
        metadata={
            "help": "Compile the decoder's layers, once for all of them and for all lengths: on a GPU faster, most of "
            "all with `feature_cache`."
        },
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Leave losses that are no number out of the log. Off, unlike the library's, because it waits for "
            "the GPU at every step, and hides that a run has failed."
        },
    )
    accelerator_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "Settings of `accelerate`, in JSON or a file of it. By default `non_blocking`, unlike the "
            "library's: batches are copied to the GPU while it computes, from the memory that "
            "`dataloader_pin_memory` pins."
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: samples have no columns."})
    hub_strategy: str = field(default="end", metadata={"help": "When the trained part is pushed to the Hub."})

    def __post_init__(self) -> None:
        is_default = self.accelerator_config is None
        super().__post_init__()
        if is_default:
            self.accelerator_config.non_blocking = self.dataloader_pin_memory
        if self.min_learning_rate is None:
            self.min_learning_rate = 0.8 * self.learning_rate
        if self.lr_scheduler_type == "cosine" and self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"`min_learning_rate` is {self.min_learning_rate:g}, above the peak, `learning_rate`, of "
                f"{self.learning_rate:g}: the rate would rise all the time. Give both, or neither."
            )
        if 0 < self.max_steps <= self.warmup_steps:
            logger.warning(
                f"The warm-up takes `warmup_steps`, {self.warmup_steps:g}, but the training ends after `max_steps`, "
                f"{self.max_steps}: the learning rate never reaches its peak."
            )


def check_datasets(datasets: Any, field_name: str = "datasets") -> list[dict[str, Any]]:
    """
    Checks the list of data sets that `field_name` holds.

    Raises:
        ValueError: naming the entry and what is wrong with it.
    """
    example = '[{"format": "chat", "annotations": "train.jsonl", "media_root": "clips", "weight": 1}]'
    if not isinstance(datasets, list) or not datasets:
        raise ValueError(
            f"`{field_name}` must be a list of at least one data set, such as {example}, but is {datasets!r}."
        )
    for number, entry in enumerate(datasets):
        if not isinstance(entry, dict) or not {"format", "annotations"} <= set(entry):
            raise ValueError(
                f"`{field_name}[{number}]` needs `format` and `annotations`, as in {example}, but is {entry!r}."
            )
        unknown = sorted(set(entry) - set(DATASET_KEYS))
        if unknown:
            raise ValueError(
                f"`{field_name}[{number}]` has {', '.join(unknown)}, which is unknown: choose from "
                f"{', '.join(DATASET_KEYS)}."
            )
        for name in ("annotations", "media_root"):
            texts = entry.get(name)
            texts = texts if isinstance(texts, list) and texts and name == "annotations" else [texts]
            if not all(isinstance(text, str) or (text is None and name == "media_root") for text in texts):
                raise ValueError(f"`{field_name}[{number}]` has {name} {entry[name]!r}: it must be a path in quotes.")
        weight = entry.get("weight")
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if weight is not None and not (is_number and weight > 0):
            raise ValueError(f"`{field_name}[{number}]` has weight {weight!r}: it must be a number above 0.")
    return datasets


def parse_arguments(
    argv: Sequence[str],
) -> tuple[ModelArguments, DataArguments, VideoLlamaTrainingArguments]:
    """
    Reads `[config.yaml] [--field value …]`: every field of the three classes can stand in either place, and the
    command line wins.

    Raises:
        ValueError: for a file that is no mapping, for keys that are unknown, and for values that do not fit, alone or
            together.
        OSError: if the file cannot be read.
        SystemExit: from `argparse`, for unknown flags.
    """
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, VideoLlamaTrainingArguments),
        prog="train.py",
        description="Trains a branch of Video-LLaMA. Every flag can stand in the YAML file as well, without its "
        "dashes.",
        allow_abbrev=False,
        formatter_class=argparse.HelpFormatter,
    )
    actions: dict[str, argparse.Action] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)
        action.default = argparse.SUPPRESS  # only what was given on the command line may override the file
    parser.add_argument("config", nargs="?", metavar="config.yaml", default=None, help="YAML file with the flags")
    given = vars(parser.parse_args(list(argv)))
    config = given.pop("config")
    values = read_yaml(config, actions) if config is not None else {}
    _check_is_filled_in(config, {name: value for name, value in values.items() if name not in given})
    model, data, training = parser.parse_dict({**values, **given})
    _check_evaluation(data, training)
    encoders = [part for part in model.trainable if part in ("vision_tower", "qformer")]
    if encoders and data.feature_cache is not None:
        raise ValueError(
            f"`trainable` has `{encoders[0]}`, whose work `feature_cache` holds already: train it without the cache."
        )
    return model, data, training


def _check_evaluation(data: DataArguments, training: VideoLlamaTrainingArguments) -> None:
    """Refuses what would evaluate nothing, or fail at the first evaluation, hours after the start."""
    during = training.eval_strategy != "no"
    chooses = {
        "load_best_model_at_end": training.load_best_model_at_end,
        "save_strategy: best": training.save_strategy == "best",
    }
    evaluates = {
        "eval_strategy": during,
        "do_eval": training.do_eval,
        "eval_on_start": training.eval_on_start,
        **chooses,
    }
    wanted = [name for name, is_set in evaluates.items() if is_set]
    if data.eval_datasets is None and wanted:
        raise ValueError(
            f"`{wanted[0]}` needs data to evaluate on: give them as `eval_datasets`, in the form of `datasets`."
        )
    if not during and any(chooses.values()):
        name = next(name for name, is_set in chooses.items() if is_set)
        raise ValueError(
            f"`{name}` needs evaluations to choose by: say when with `eval_strategy`, `steps` or `epoch`."
        )
    if training.metric_for_best_model not in (None, "loss", "eval_loss"):
        raise ValueError(
            f"`metric_for_best_model` is {training.metric_for_best_model!r}, but the loss alone is measured: "
            "`eval_loss`."
        )
    if data.eval_datasets is not None and not wanted:
        logger.warning("`eval_datasets` are not used: set `eval_strategy`, or `do_eval` to evaluate once at the end.")


def read_yaml(
    path: str | os.PathLike, actions: dict[str, argparse.Action], ignore_unknown: bool = False
) -> dict[str, Any]:
    """
    The values that a YAML file gives to flags, each as the command line would read it.

    Args:
        path (`str` or `os.PathLike`): The file.
        actions (`dict[str, argparse.Action]`): The flags by the names of their fields.
        ignore_unknown (`bool`, *optional*, defaults to `False`): Whether names of no flag are left out, not refused.

    Raises:
        ValueError: for a file that is no mapping, for unknown names, and for values that do not fit.
        OSError: if the file cannot be read.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold `name: value` lines, but holds {type(values).__name__}.")
    unknown = sorted(str(name) for name in values if name not in actions)
    if unknown and not ignore_unknown:
        raise ValueError(f"{path} sets {', '.join(unknown)}, which is unknown: `train.py --help` lists all names.")
    values = {name: value for name, value in values.items() if name in actions}
    for name, value in values.items():
        try:
            values[name] = _as_on_command_line(value, actions[name])
        except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
            raise ValueError(f"{path}: `{name}` cannot be {value!r}: {error}") from error
    return values


def _as_on_command_line(value: Any, action: argparse.Action) -> Any:
    """
    What YAML takes for something else than the command line would: `1e-4` for text, because it has no point, `2024` or
    `2024-05-01` for no text, `no` for false. Numbers are not taken for other kinds of numbers.
    """
    kind: Any = action.type
    if value is False and action.dest.endswith("_strategy"):
        value = "no"
    if isinstance(value, datetime.date) or (kind is str and type(value) in (int, float)):
        value = str(value)
    if isinstance(value, str) and callable(kind):
        value = kind(value)
        return [value] if action.nargs == "+" else value
    if kind in (int, float) and value is not None and type(value) not in (int, kind):
        raise ValueError(f"it must be {'a whole number' if kind is int else 'a number'}.")
    return value


def _check_is_filled_in(config: str | None, values: dict[str, Any]) -> None:
    """Refuses what an example leaves to be filled in, which would be taken for the name of a file or repository."""
    for name, value in values.items():
        if re.search(r"<[^<>]+>", json.dumps(value, default=str)):
            raise ValueError(f"{config}: `{name}` is still to be filled in, there or by `--{name}`: it is {value!r}.")


def read_json(name: str, value: Any) -> Any:
    """A value that the command line gives in JSON, a file as what it is; `ValueError` names the flag."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise ValueError(f"`--{name}` must be a JSON list, but is {value!r} ({error}).") from error


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but is {value!r}.")
