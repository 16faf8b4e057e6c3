"""Small training runs for tests of the trainer: a tiny model, data without media files, and processes that can be
killed."""

import json
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import IMAGE_SIZE, prompt, tiny_config
from transformers.trainer_callback import TrainerCallback

from transformers_videollama import VideoLlamaForConditionalGeneration
from transformers_videollama.configuration_video_llama import VideoLlamaVideoQFormerConfig
from transformers_videollama.training.arguments import VideoLlamaTrainingArguments
from transformers_videollama.training.collator import VideoLlamaDataCollator
from transformers_videollama.training.mixture import Source, TrainDataset, TrainIterableDataset
from transformers_videollama.training.trainer import VideoLlamaTrainer

NUM_PROMPT_TOKENS = 5  # one token and the four of a video


def make_model(**kwargs: Any) -> VideoLlamaForConditionalGeneration:
    """A tiny model whose video branch is trainable and has dropout."""
    config = tiny_config(**kwargs)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config.video_qformer_config = VideoLlamaVideoQFormerConfig(**{**config.video_qformer_config.to_dict(), **dropout})
    config.initializer_range = config.video_qformer_config.initializer_range = 0.3
    torch.manual_seed(0)
    model = VideoLlamaForConditionalGeneration(config)
    model.set_trainable("video")
    return model


def make_sample(row: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """A sample of which the row's text says the length, and whose video is drawn anew in every epoch."""
    number = int(row["messages"][0]["content"][0]["text"])
    input_ids = prompt(1, "video", 2 + number % 5, seed=number)
    labels = input_ids.clone()
    labels[:NUM_PROMPT_TOKENS] = -100
    frames = torch.randn(1 + number % 3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return {"input_ids": input_ids, "labels": labels, "pixel_values_videos": [frames]}


def make_dataset(folder: Path, num_rows: int = 10, streaming: bool = False) -> TrainDataset | TrainIterableDataset:
    """The samples of an annotation file of `num_rows` rows, which is written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{num_rows}.jsonl"
    if not path.exists():
        answer = {"role": "assistant", "content": "an answer"}
        lines = [{"messages": [{"role": "user", "content": str(number)}, answer]} for number in range(num_rows)]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sources = [Source("chat", str(path))]
    if streaming:
        return TrainIterableDataset(sources, make_sample, repeat=True)
    return TrainDataset(sources, make_sample)


def make_arguments(output_dir: Path, **kwargs: Any) -> VideoLlamaTrainingArguments:
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return VideoLlamaTrainingArguments(output_dir=str(output_dir), **{**settings, **kwargs})


def make_trainer(
    output_dir: Path,
    streaming: bool = False,
    num_rows: int = 10,
    model: Any = None,
    data: Path | None = None,
    num_eval_rows: int = 0,
    **kwargs: Any,
) -> VideoLlamaTrainer:
    """A trainer of the tiny model; `data` is the folder of its annotations, and `kwargs` are training arguments."""
    data = data or output_dir.parent / "data"
    return VideoLlamaTrainer(
        model=make_model() if model is None else model,
        args=make_arguments(output_dir, **kwargs),
        train_dataset=make_dataset(data, num_rows, streaming),
        eval_dataset=make_dataset(data, num_eval_rows) if num_eval_rows else None,
        data_collator=VideoLlamaDataCollator(pad_token_id=0),
    )


def losses(trainer: VideoLlamaTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def eval_losses(trainer: VideoLlamaTrainer) -> list[float]:
    return [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]


def train_to_the_end(output_dir: Path, data: Path, streaming: bool, num_workers: int) -> None:
    """
    Runs in a process of its own: trains in twelve steps, from the newest checkpoint on, saving at every second step,
    and writes the losses to `losses.json` at the end.
    """
    trainer = make_trainer(
        output_dir,
        streaming,
        data=data,
        max_steps=12,
        gradient_accumulation_steps=2,
        dataloader_num_workers=num_workers,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
    )
    trainer.add_callback(_WriteStep(output_dir))
    resume = output_dir.is_dir() and any(path.name.startswith("checkpoint-") for path in output_dir.iterdir())
    trainer.train(resume_from_checkpoint="last" if resume else None)
    trainer.save_model()
    (output_dir / "losses.json").write_text(json.dumps(losses(trainer)))


class _WriteStep(TrainerCallback):
    """Tells other processes how far this one is."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "step"

    def on_step_end(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
        self.file.write_text(str(state.global_step))


def start_process(function: Callable[..., None], *args: Any) -> Any:
    """
    Starts a process that runs `function(*args)` and shares nothing with this one, but has its imports done already.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    # The server that forks the processes is told nothing of this one's `sys.path`
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()
    process = context.Process(target=_run_in_process, args=(function, *args))
    process.start()
    return process


def _run_in_process(function: Callable[..., None], *args: Any) -> None:
    multiprocessing.set_start_method("fork", force=True)  # for data loader workers, as in any other process
    torch.set_num_threads(1)
    function(*args)
