"""`VideoLlamaTrainer`: the library's `Trainer` for a branch of Video-LLaMA, with the published optimiser and schedule.

It differs from the library's where only a small part of a large model is trained: the optimizer and the checkpoints
hold the trained part alone, a checkpoint is complete or not there (`checkpoints.py`), and resuming gives the same
losses as not having stopped, for streamed data as well. Evaluating changes nothing of the training, and a batch may
hold any media or none, on every process another.
"""

import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, send_to_device
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_callback import ProgressCallback, TrainerCallback, TrainerState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import HubStrategy, has_length
from transformers.utils import PushInProgress, logging

from ..files import give_usual_permissions
from ..model_card import make_model_card
from ..trained_part import DESCRIPTION_NAME, PARTS, WEIGHTS_NAME, load_trained_part, save_trained_part
from ..walk import walk_modules
from .arguments import VideoLlamaTrainingArguments
from .checkpoints import (
    find_damage,
    find_last_checkpoint,
    finish_checkpoint,
    partial_folder,
    remove_leftovers,
    rotate_checkpoints,
    set_aside_later_checkpoints,
    start_checkpoint,
)
from .mixture import TrainDataset
from .optimization import get_decay_parameter_names, get_published_schedule

logger = logging.get_logger(__name__)

TRAINER_STATE_NAME = "trainer_state.json"
OPTIMIZER_NAME = "optimizer.pt"
SCHEDULER_NAME = "scheduler.pt"
ADAPTER_NAME = "default"  # what `peft` calls an adapter that was given no name
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
ADAPTER_CONFIG_NAME = "adapter_config.json"
_NOT_UPLOADED = ("bad_samples.jsonl", "training_args.bin")


class VideoLlamaTrainer(Trainer):
    """
    Trains what [`VideoLlamaForConditionalGeneration.set_trainable`] chose, and a LoRA adapter if the model has one.

    Takes the arguments of [`Trainer`]; `args` are [`VideoLlamaTrainingArguments`] and `processing_class` the model's
    processor. What `model_init` gives must have been told what to train, too.

    Raises:
        TypeError: if `args` are others.
        ValueError: if nothing is trainable, or parts of which a checkpoint would hold nothing.
    """

    args: VideoLlamaTrainingArguments
    push_in_progress: Any
    optimizer: Any
    lr_scheduler: Any
    label_smoother: Any

    def __init__(self, model: Any = None, args: Any = None, *others: Any, **kwargs: Any):
        if args is None:
            args = VideoLlamaTrainingArguments(output_dir="tmp_trainer")  # as the library
        if not isinstance(args, VideoLlamaTrainingArguments):
            raise TypeError(
                f"`args` must be `VideoLlamaTrainingArguments`, which have the published schedule, but are "
                f"`{type(args).__name__}`: make them with the same arguments."
            )
        if model is not None:
            self._check_trainable(model)
        super().__init__(model, args, *others, **kwargs)
        if model is not None:
            self._prepare_model(model)
        if self.label_smoother is not None:  # the library shifts labels for its own language models alone
            self.label_smoother = partial(self.label_smoother, shift_labels=True)
        self._throughput = _Throughput()
        self._num_batches_done = 0  # of a stream, before the checkpoint that is resumed from
        self._chosen_checkpoint: Path | None = None  # to resume from, where it is not the last one
        self.add_callback(_DataEpochCallback(self))
        if any(isinstance(callback, ProgressCallback) for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(_ThroughputProgressCallback)

    def call_model_init(self, trial: Any = None) -> Any:
        """The library's; the model is prepared as one that is given."""
        model = super().call_model_init(trial)
        self._check_trainable(model)
        self._prepare_model(model)
        return model

    def _prepare_model(self, model: Any) -> None:
        if self.is_fsdp_enabled:
            self._choose_sharding(model)
        if not self.is_deepspeed_enabled:  # outside of a part's own call DeepSpeed has taken its parameters away
            _let_all_parts_take_part(model)
        if self.args.compile_decoder:
            for layer in model.model.language_model.layers:
                layer.compile(dynamic=True)

    @staticmethod
    def _check_trainable(model: Any) -> None:
        if hasattr(model, "get_base_model"):
            raise ValueError(
                f"This is a `{type(model).__name__}` around the model: give the model itself, with an adapter added "
                "by `model.add_adapter(lora_config)`."
            )
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        if not names:
            raise ValueError("Nothing in this model is trainable: choose a branch with `model.set_trainable`.")
        prefixes = (*(f"model.{part}." for part in PARTS), "model.query_tokens", "lm_head.")
        others = [name for name in names if not name.startswith(prefixes) and ".lora_" not in name]
        if others:
            raise ValueError(
                f"{others[0]} and {len(others) - 1} more tensors are trainable, but checkpoints hold "
                f"{', '.join(PARTS)} and an adapter only: choose what is trained with `model.set_trainable`."
            )
        adapters = {name.split(".lora_")[1].split(".")[1] for name in names if ".lora_" in name} - {ADAPTER_NAME}
        if adapters:
            raise ValueError(
                f"The adapter {adapters.pop()!r} is trainable, but checkpoints hold the one named {ADAPTER_NAME!r}: "
                "add it by `model.add_adapter(lora_config)`, without a name."
            )

    # Sharding

    def create_accelerator_and_postprocess(self) -> None:
        """As the library's, and FSDP shards on CPUs as well, where `accelerate` would pass over it without a word."""
        state = PartialState()
        wants_fsdp = self.args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if wants_fsdp and state.distributed_type == DistributedType.MULTI_CPU:
            # Up to its version 1.15 `accelerate` makes `FSDP` of the types of accelerators alone, and no argument of
            # `Accelerator` says otherwise. `state` is the one state of the process, which `Accelerator` reads.
            state.distributed_type = DistributedType.MULTI_GPU
        super().create_accelerator_and_postprocess()

    def _choose_sharding(self, model: Any) -> None:
        """
        What FSDP shards, unless its configuration says so, and in which number formats.

        A shard is put together by all processes at once, so each must run the same units, equally often and in the
        same order. Media differ: a batch may have images, videos, both or none, and more frames than another. Hence
        only the decoder's layers are units, and what is trained belongs to the model as a whole, which is put together
        at its call; the frozen encoders are not sharded.
        """
        plugin = self.accelerator.state.fsdp_plugin
        decoder = model.model.language_model
        if plugin.transformer_cls_names_to_wrap is None:
            names = {type(module).__name__ for module in decoder.modules()}
            plugin.transformer_cls_names_to_wrap = sorted(names & set(model._no_split_modules))
        if plugin.ignored_modules is None:
            sharded = {id(parameter) for part in (decoder, model.lm_head) for parameter in part.parameters()}
            whole = [p for p in model.parameters() if not p.requires_grad and id(p) not in sharded]
            plugin.ignored_modules = [nn.ParameterList(whole).to(self.accelerator.device)]
        if plugin.fsdp_version == 2 and plugin.mixed_precision_policy is not None:
            # `accelerate` would also sum gradients, and round the loss, in the format of the computation
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                param_dtype=plugin.mixed_precision_policy.param_dtype, reduce_dtype=torch.float32
            )

    # Optimiser

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """See [`~training.optimization.get_decay_parameter_names`]."""
        return get_decay_parameter_names(model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The library's optimizer on the trainable parameters, and on nothing else."""
        if self.optimizer is None:
            optimizer: Any = super().create_optimizer(model)
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            trained = {id(p) for p in (self.model if model is None else model).parameters() if p.requires_grad}
            assert held == trained, "The optimizer must hold the trainable parameters and nothing else."
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """The published schedule, or the library's if `lr_scheduler_type` is another than `"cosine"`."""
        if self.lr_scheduler is None and self.args.lr_scheduler_type == "cosine":
            self.lr_scheduler = get_published_schedule(
                self.optimizer if optimizer is None else optimizer,
                num_training_steps,
                self.args.get_warmup_steps(num_training_steps),
                self.args.min_learning_rate,
                self.args.warmup_start_learning_rate,
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return super()._clip_grad_norm(self._what_has_gradients(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(self._what_has_gradients(model), grad_norm=grad_norm)

    def _what_has_gradients(self, model: Any) -> Any:
        """In place of the model, for the norm of its gradients, which take time to find among all parameters."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # which have ways of their own to know the model
            return model
        trained = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        return SimpleNamespace(parameters=lambda: trained)

    # Data

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """
        The library's. To group samples by length, it would decode all media first, and draw another order when the run
        is resumed. A group is what all processes train on in one step.
        """
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not has_length(dataset):
            return super()._get_train_sampler(train_dataset)
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return _LengthGroupedSampler(batch_size, self._text_lengths(dataset), seed)

    def _text_lengths(self, dataset: Any) -> list[int]:
        """Of every sample. One's own data are read once for them, unless they have a column of lengths."""
        if isinstance(dataset, TrainDataset):
            return dataset.text_lengths()
        if self.args.length_column_name in getattr(dataset, "column_names", ()):
            return list(dataset[self.args.length_column_name])
        return [len(sample["input_ids"]) for sample in dataset]

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """The library's without grouping by length, for which it would read all media once more."""
        strategy = self.args.train_sampling_strategy
        try:
            self.args.train_sampling_strategy = "sequential"
            return super()._get_eval_sampler(eval_dataset)
        finally:
            self.args.train_sampling_strategy = strategy

    def get_train_dataloader(self) -> DataLoader:
        """
        The library's loader for data sets with a length. A stream shares its samples out to processes and workers
        itself, so it is not wrapped again, which would decode every sample in every process.
        """
        if not isinstance(self.train_dataset, IterableDataset):
            return super().get_train_dataloader()
        args = self.args
        batches = DataLoader(
            self.train_dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return DataLoader(_Stream(batches, self._num_batches_done), batch_size=None)

    # Evaluation

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """
        The library's, after which the training goes on as if there had been none: with the same random numbers, of
        which the data loader draws one, and without its time in the training's throughput.
        """
        start = time.perf_counter()
        # On the CPU alone: on the device only dropout draws, and there is none in evaluation
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(*args, **kwargs)
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                # What a backward pass would have done: what is trained is whole otherwise, rounded for the computation
                module.reshard()
        self._throughput.start += time.perf_counter() - start
        return output

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """The library's step, which for the loss alone computes no logits."""
        if prediction_loss_only:
            inputs = {**inputs, "skip_logits": True}
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)

    def _load_best_model(self) -> None:
        """Puts the best checkpoint's trained part, and its adapter, onto the model, as resuming does."""
        best = self.state.best_model_checkpoint
        logger.info(
            f"The best checkpoint is loaded: {best}, of {self.args.metric_for_best_model} {self.state.best_metric}."
        )
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(self.model_wrapped, best, load_module_strict=False)
        else:
            self._load_from_checkpoint(best)

    # Loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """The library's step, whose samples and tokens are counted, and whose place in a stream is noted."""
        position = inputs.pop("position", None)
        if position is not None:
            self.train_dataset.update_position(position)
        self._throughput.add(inputs)
        inputs = send_to_device(inputs, self.args.device, self.accelerator.non_blocking)  # those of a stream
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """
        The model's loss, in training computed at the labelled positions alone. The library counts the labels of all
        accumulated batches and processes, and the model divides by that number, so that every label weighs the same.

        Padding on the right is not told to the decoder: no token looks ahead, so that none sees it, and attention
        without a mask is faster.
        """
        if model.training:
            _enable_checkpointing_in_eval_mode(model)
            inputs = {**inputs, "skip_logits": True}
        if getattr(self.data_collator, "padding_side", None) == "right":
            inputs = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the library's estimate is of a model all of which is trained."""
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        Adds `samples_per_second` and `tokens_per_second`, over all processes since the last line, to lines with a
        loss.
        """
        if "loss" in logs:
            logs |= self._throughput.read(self.accelerator)
        super().log(logs, start_time)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | os.PathLike | bool | None = None, **kwargs: Any) -> Any:
        """
        See [`Trainer.train`].

        Args:
            resume_from_checkpoint (`str`, `os.PathLike` or `bool`, *optional*):
                `True` or `"last"` for the newest complete checkpoint in `args.output_dir`, or a checkpoint's folder.

        Raises:
            ValueError: if there is no such checkpoint, if it is damaged, or if it holds the model alone.
        """
        output_dir = Path(self.args.output_dir)
        self._chosen_checkpoint = None
        if self.args.should_save:
            remove_leftovers(output_dir)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint in (True, "last"):
            checkpoint = find_last_checkpoint(output_dir)
            if checkpoint is None:
                raise ValueError(f"{output_dir} holds no complete checkpoint to resume from.")
        elif resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
            damage = find_damage(checkpoint) if checkpoint.is_dir() else "there is no such folder"
            if damage is not None:
                raise ValueError(f"Cannot resume from {checkpoint}: {damage}. Resume from another, or from `last`.")
            self._chosen_checkpoint = checkpoint
        else:
            checkpoint = None
        if checkpoint is not None and not (checkpoint / SCHEDULER_NAME).is_file():
            raise ValueError(
                f"Cannot resume from {checkpoint}: it was saved with `save_only_model`, without the optimizer. Start "
                f"another run from what it trained with `--trained_part {checkpoint}`."
            )
        self._num_batches_done = 0
        if isinstance(self.train_dataset, IterableDataset) and hasattr(self.train_dataset, "load_position"):
            self.train_dataset.load_position(None if checkpoint is None else self._read_position(checkpoint))
        return super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial))
        checkpoint = output_dir / f"checkpoint-{self.state.global_step}"
        partial = partial_folder(checkpoint)
        if self.args.should_save:
            start_checkpoint(checkpoint)
        self.accelerator.wait_for_everyone()
        self.save_model(str(partial), _internal_call=True)
        if not self.args.save_only_model:
            self._save_optimizer_and_scheduler(str(partial))
            self._save_scaler(str(partial))
            self._save_rng_state(str(partial))
            if hasattr(self.train_dataset, "position"):
                position = json.dumps(self.train_dataset.position())
                self._position_file(partial).write_text(position + "\n", encoding="utf-8")
        if self.state.best_global_step:
            best = output_dir / f"checkpoint-{self.state.best_global_step}"
            if best == checkpoint or best.is_dir():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            self.state.stateful_callbacks["TrainerControl"] = self.control.state()
            self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            finish_checkpoint(checkpoint)
            best = self.state.best_model_checkpoint
            keep = {checkpoint} | ({Path(best)} if best is not None else set())
            rotate_checkpoints(output_dir, self.args.save_total_limit, keep)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _position_file(self, checkpoint: Path) -> Path:
        return checkpoint / f"data_position_{self.args.process_index}.json"

    def _read_position(self, checkpoint: Path) -> Any:
        """Where a checkpoint's run was in the stream, or `None` if the data are to be read from their beginning."""
        if self.args.ignore_data_skip:
            return None
        path = self._position_file(checkpoint)
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} has no {path.name}: its run did not stream its data, or in fewer processes. Resume as "
                "it ran, or read the data from their beginning with `--ignore_data_skip`."
            )
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        self._num_batches_done = state.global_step * self.args.gradient_accumulation_steps
        return json.loads(path.read_text(encoding="utf-8"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target: Any = self.accelerator.unwrap_model(self.model if model is None else model)
        load_trained_part(target, resume_from_checkpoint)
        if has_adapter(target):
            load_adapter_weights(target, resume_from_checkpoint)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> Any:
        if self.is_deepspeed_enabled:
            for parameter in self.model.parameters():
                if parameter.dim() == 0:  # a frozen scale: DeepSpeed cannot send what has no dimension
                    parameter.data = parameter.data.reshape(1)
        if not self.is_deepspeed_enabled or resume_from_checkpoint is None:
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        else:
            # The library would look for the frozen parameters in DeepSpeed's checkpoint, too
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
            deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        if self._chosen_checkpoint is not None and self.args.should_save:  # it fits, and the training goes on from it
            set_aside_later_checkpoints(Path(self.args.output_dir), self._chosen_checkpoint)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """The library's, unless all steps are done: it looks for that after a step, and would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """
        By parameter names and with whole tensors, so that a run may be resumed with another sharding. With DeepSpeed
        its own files, which need as many processes as wrote them.
        """
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
            if self.args.should_save:
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)
            return
        names = self._parameter_names()
        optimizer = self.optimizer
        state = {
            names[id(parameter)]: {key: _whole(value) for key, value in optimizer.state[parameter].items()}
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        groups = [
            {**group, "params": [names[id(parameter)] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ]
        if self.args.should_save:
            torch.save({"state": state, "param_groups": groups}, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_deepspeed_enabled or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        saved = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        names = self._parameter_names()
        state, groups, index = {}, [], 0
        for group, saved_group in zip(self.optimizer.param_groups, saved["param_groups"], strict=True):
            if sorted(saved_group["params"]) != sorted(names[id(parameter)] for parameter in group["params"]):
                raise ValueError(f"{checkpoint} is of a run that trained other parameters than this one.")
            indices = range(index, index + len(group["params"]))
            for index, parameter in zip(indices, group["params"], strict=True):
                values = saved["state"][names[id(parameter)]]
                state[index] = {key: _like(value, parameter) for key, value in values.items()}
            groups.append({**saved_group, "params": list(indices)})
            index = indices.stop
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _parameter_names(self) -> dict[int, str]:
        model: Any = self.accelerator.unwrap_model(self.model)
        return {id(parameter): name for name, parameter in model.named_parameters()}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Saves the trained part, the adapter if there is one, and the processor, in the form that
        [`from_trained_part`](trained_part.from_trained_part) loads; the frozen parts are not saved.

        Args:
            output_dir (`str`, *optional*): The folder; `args.output_dir` by default.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        # Of a sharded model every process has a part, so all of them have to take part in putting it together
        tensors = {name: _whole(tensor) for name, tensor in model.named_parameters() if tensor.requires_grad}
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            parts = _trained_parts(model)
            if parts:
                save_trained_part(model, folder, parts, state_dict=tensors)
            if has_adapter(model):
                save_adapter(model, folder, tensors)
            if folder == Path(self.args.output_dir):
                if self.processing_class is not None:
                    self.processing_class.save_pretrained(folder)
                self.create_model_card()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Upload trained part", revision=self.args.hub_revision)

    # Hub

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes the trained part's model card to `args.output_dir`, unless there is one."""
        path = Path(self.args.output_dir) / "README.md"
        if not self.is_world_process_zero() or path.exists():
            return
        model: Any = self.accelerator.unwrap_model(self.model)
        base_model = model.config._name_or_path
        card = make_model_card(
            model.config,
            self.hub_model_id or Path(self.args.output_dir).name,
            trained_parts=_trained_parts(model),
            base_model=None if os.path.isdir(base_model) else base_model or None,
            adapter=has_adapter(model),
        )
        card.save(path)

    def push_to_hub(
        self,
        commit_message: str | None = "Upload trained part",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        See [`Trainer.push_to_hub`]. Of `args.output_dir` what was trained, the processor, the model card and the logs
        are uploaded: no merged model, no checkpoints and no names of media.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token or self.args.hub_token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return self._upload(commit_message, not blocking, token, revision)

    def _upload(
        self, commit_message: str | None, run_as_future: bool, token: str | None = None, revision: str | None = None
    ) -> Any:
        folder = Path(self.args.output_dir)
        paths = [path for path in [*folder.glob("*"), *folder.glob("runs/**/*")] if path.is_file()]
        operations = [
            CommitOperationAdd(path.relative_to(folder).as_posix(), _without_local_base(path))
            for path in sorted(paths)
            if path.name not in _NOT_UPLOADED and not path.name.startswith((".", "_"))
        ]
        return HfApi(token=token or self.args.hub_token).create_commit(
            self.hub_model_id,
            operations,
            commit_message=commit_message or "Upload trained part",
            revision=revision or self.args.hub_revision,
            run_as_future=run_as_future,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if not self.args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.is_done():
            return
        folder = Path(self.args.output_dir)
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        for name in (WEIGHTS_NAME, DESCRIPTION_NAME, ADAPTER_WEIGHTS_NAME, ADAPTER_CONFIG_NAME):
            if (Path(checkpoint_folder) / name).is_file():
                shutil.copy(Path(checkpoint_folder) / name, folder / name)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        self.create_model_card()
        message = f"Training in progress, step {self.state.global_step}"
        jobs = [self._upload(message, run_as_future=True)]
        if self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = self.args.hub_strategy == HubStrategy.CHECKPOINT
            jobs.append(
                HfApi(token=self.args.hub_token).upload_folder(
                    repo_id=self.hub_model_id,
                    folder_path=checkpoint_folder,
                    path_in_repo="last-checkpoint" if is_last else Path(checkpoint_folder).name,
                    commit_message=f"{message}, checkpoint",
                    run_as_future=True,
                    revision=self.args.hub_revision,
                )
            )
        if self.push_in_progress is None or self.push_in_progress.is_done():
            self.push_in_progress = PushInProgress(jobs)
        else:
            self.push_in_progress.jobs.extend(jobs)


class _LengthGroupedSampler(LengthGroupedSampler):
    """
    The library's, whose order of an epoch depends on the seed and the epoch alone, and whose batches come in random
    order. The library's come from long to short, fifty at a time: what only long texts hold is forgotten between.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        indices = list(super().__iter__())
        batches = [indices[start : start + self.batch_size] for start in range(0, len(indices), self.batch_size)]
        # The first holds the longest text, by which a lack of memory is found at once; the last may be smaller
        middle = (torch.randperm(max(len(batches) - 2, 0), generator=self.generator) + 1).tolist()
        batches[1:-1] = [batches[number] for number in middle]
        return itertools.chain.from_iterable(batches)


class _Stream(IterableDataset):
    """The batches of a stream that goes on from a checkpoint, after place-holders for those before it, which the
    library passes over one by one: it knows no other way to resume."""

    def __init__(self, batches: DataLoader, num_batches_done: int) -> None:
        self.batches = batches
        self.num_batches_done = num_batches_done

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        yield from itertools.repeat(None, self.num_batches_done)
        yield from self.batches


class _Throughput:
    """Counts samples and tokens, without waiting for the device until they are read."""

    def __init__(self) -> None:
        self.samples = 0
        self.tokens: torch.Tensor | int = 0
        self.start = time.perf_counter()

    def add(self, inputs: dict[str, Any]) -> None:
        prompt = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
        self.samples += prompt.shape[0]
        mask = inputs.get("attention_mask")
        self.tokens = self.tokens + (prompt.shape[0] * prompt.shape[1] if mask is None else mask.sum())

    def read(self, accelerator: Any) -> dict[str, float]:
        """Samples and tokens a second since the last call, of all processes."""
        counts = torch.tensor([float(self.samples), float(self.tokens)], device=accelerator.device)
        samples, tokens = accelerator.reduce(counts, reduction="sum").tolist()
        seconds = time.perf_counter() - self.start
        self.__init__()  # type: ignore[misc]
        return {"samples_per_second": round(samples / seconds, 3), "tokens_per_second": round(tokens / seconds, 1)}


class _DataEpochCallback(TrainerCallback):
    """
    Tells the data which epoch begins, as each draws other frames and crops, and starts the clock of the throughput.
    """

    def __init__(self, trainer: VideoLlamaTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer._throughput = _Throughput()

    def on_epoch_begin(self, args: Any, state: Any, *_: Any, **kwargs: Any) -> None:
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(int(state.epoch or 0))


class _ThroughputProgressCallback(ProgressCallback):
    """The library's progress bar, with the loss and the throughput on it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().on_log(args, state, control, logs=dict(logs or {}), **kwargs)
        if self.training_bar is not None and logs and "samples_per_second" in logs:
            self.training_bar.set_postfix_str(
                f"loss {logs['loss']:.4g}, {logs['samples_per_second']:.3g} samples/s, "
                f"{logs['tokens_per_second']:.4g} tokens/s"
            )


def _enable_checkpointing_in_eval_mode(model: nn.Module) -> None:
    """
    Frozen layers stay in eval mode, in which the library checkpoints nothing, although the gradient passes through the
    decoder's. This marks the layers themselves as training, but not what they consist of, so that no dropout is
    applied.
    """
    for module in walk_modules(model):
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
            module.training = True


def has_adapter(model: Any) -> bool:
    """Whether a LoRA adapter was added to this model."""
    return getattr(model, "_hf_peft_config_loaded", False)


def save_adapter(model: Any, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """
    Saves the model's adapter in `peft`'s form, which `model.load_adapter` and `PeftModel.from_pretrained` read.

    Args:
        model (`VideoLlamaForConditionalGeneration`): The model.
        folder (`Path`): The folder.
        tensors (`dict[str, torch.Tensor]`): The adapter's, by their names in the model.
    """
    state = model.get_adapter_state_dict(ADAPTER_NAME, state_dict=tensors)
    tensors = {f"base_model.model.{name}": tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
    give_usual_permissions(folder / ADAPTER_WEIGHTS_NAME)
    model.peft_config[ADAPTER_NAME].save_pretrained(folder)


def load_adapter_weights(model: Any, folder: str | os.PathLike) -> None:
    """Loads the weights of a saved adapter onto the one that the model has."""
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    if not (Path(folder) / ADAPTER_WEIGHTS_NAME).is_file():
        raise ValueError(f"{folder} holds no adapter for the one that the model has: use no `lora_r`, as its run did.")
    prefix = "base_model.model."
    weights = load_peft_weights(str(folder), device="cpu")
    weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    held = {name: tensor.shape for name, tensor in model.get_adapter_state_dict(ADAPTER_NAME).items()}
    found = {name: tensor.shape for name, tensor in weights.items()}
    wrong = sorted(name for name in held.keys() | found.keys() if held.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"The adapter in {folder} does not fit this model's: {wrong[0]} is {_shape(found.get(wrong[0]))} there "
            f"and {_shape(held.get(wrong[0]))} here. Use the `lora_…` arguments that it was trained with."
        )
    set_peft_model_state_dict(model, weights, adapter_name=ADAPTER_NAME)


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else f"of shape {tuple(shape)}"


def _without_local_base(path: Path) -> Path | bytes:
    """A file for others to have, who have not the folder that it may name as the model with the frozen parts."""
    if path.name not in (DESCRIPTION_NAME, ADAPTER_CONFIG_NAME):
        return path
    description = json.loads(path.read_text(encoding="utf-8"))
    key = "base_model" if path.name == DESCRIPTION_NAME else "base_model_name_or_path"
    if description[key] is not None and os.path.isdir(description[key]):
        logger.warning(
            f"{path.name} names {description[key]} as the model with the frozen parts, which others do not have, and "
            "is uploaded without it: train with a model of the Hub, or have others name theirs as `base_model=…`."
        )
        description[key] = None
    return (json.dumps(description, indent=2) + "\n").encode()


def _whole(value: Any) -> Any:
    """A tensor that may be sharded over processes, put together on the CPU; anything else as it is."""
    if hasattr(value, "ds_id") or hasattr(value, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        value = safe_get_full_fp32_param(value)
    elif isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value


def _like(value: Any, parameter: torch.Tensor) -> Any:
    """A state of the optimizer sharded as its parameter is. Numbers, such as the count of steps, are not."""
    if isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def _trained_parts(model: Any) -> list[str]:
    """The parts that are trained themselves, which the decoder with an adapter is not."""
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and ".lora_" not in name]
    return [part for part in PARTS if any(name.startswith(f"model.{part}.") for name in names)]


class _TakePart(torch.autograd.Function):
    """The first argument as it is; all others, parameters, get gradients of zero."""

    @staticmethod
    def forward(ctx: Any, inputs_embeds: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.parameters = [(parameter.shape, (parameter.dtype, parameter.device)) for parameter in parameters]
        return inputs_embeds.clone()  # no view, of which a compiled decoder would make another graph

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (gradient,) = gradients
        # One number for all of a format and device, because on a GPU every tensor made takes time
        zeros = {key: torch.zeros((), dtype=key[0], device=key[1]) for _, key in ctx.parameters}
        return gradient, *(zeros[key].expand(shape) for shape, key in ctx.parameters)


def _let_all_parts_take_part(model: Any) -> None:
    """
    Has every trained parameter get a gradient at every step, of zero where a batch has no media for its part: without
    one a text alone could not be trained on, and processes that share gradients would wait for each other for ever.
    They are tied to what the decoder reads, so that the gradient passes through the decoder on every process as well.
    """
    base = model.model
    parts = [part for name, part in base.named_children() if name != "language_model"]
    trained = [part for part in parts if any(parameter.requires_grad for parameter in part.parameters())]

    def take_part(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not (base.training and torch.is_grad_enabled()):
            return None
        # Asked for at every call, because FSDP puts other tensors in their places
        parameters = [*base.parameters(recurse=False), *(p for part in trained for p in part.parameters())]
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        return args, {**kwargs, "inputs_embeds": _TakePart.apply(kwargs["inputs_embeds"], *parameters)}

    if trained:
        base.language_model.register_forward_pre_hook(take_part, with_kwargs=True)
