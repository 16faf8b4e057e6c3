"""The trainer trains the chosen branch and nothing else, and its memory and batch settings change no result."""

import copy
import itertools
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import tiny_model
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import eval_losses, losses, make_arguments, make_dataset, make_model, make_trainer
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerCallback

from transformers_videollama import VideoLlamaForConditionalGeneration, from_trained_part, load_trained_part
from transformers_videollama.training.arguments import ModelArguments
from transformers_videollama.training.checkpoints import find_damage, list_checkpoints
from transformers_videollama.training.collator import VideoLlamaDataCollator
from transformers_videollama.training.run import add_adapter
from transformers_videollama.training.trainer import VideoLlamaTrainer, _Throughput

BRANCH = "model.video_branch."


@pytest.fixture
def model() -> VideoLlamaForConditionalGeneration:
    """Without dropout, so that runs can be compared."""
    model = tiny_model()
    model.set_trainable("video")
    return model


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def first_gradients(trainer: VideoLlamaTrainer) -> dict[str, torch.Tensor]:
    """What the optimizer gets at the first step."""
    found: dict[str, torch.Tensor] = {}
    optimizer = trainer.create_optimizer()
    step = optimizer.step

    def note(*args: Any, **kwargs: Any) -> Any:
        found.update(found or gradients(trainer.model))
        return step(*args, **kwargs)

    optimizer.step = note
    trainer.train()
    return found


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys() and first
    largest = max(gradient.norm() for gradient in second.values())
    for name in first:
        # A key's bias adds the same to all scores of a query: its true gradient is zero, and both sides hold rounding.
        scale = largest if name.endswith("key.bias") else second[name].norm()
        assert (first[name] - second[name]).norm() <= 1e-4 * scale, name


@pytest.mark.parametrize("branch", ["video", "audio"])
def test_only_the_branch_is_trained(branch: str, model: VideoLlamaForConditionalGeneration, tmp_path: Path) -> None:
    model.set_trainable(branch)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    dataset = make_dataset(tmp_path / "data")
    trainer = make_trainer(tmp_path / "run", model=model, max_steps=2)
    if branch == "audio":
        collator = trainer.data_collator

        def heard(samples: list[dict[str, Any]]) -> dict[str, Any]:
            """Texts that sound in place of pictures, with two tokens left where a video has four."""
            batch = collator(samples)
            video, audio = model.config.video_token_id, model.config.audio_token_id
            is_video = batch["input_ids"] == video
            batch["input_ids"][is_video] = torch.tensor([audio, audio, 5, 6]).repeat(len(samples))
            batch["audio_pixel_values_videos"] = batch.pop("pixel_values_videos")
            batch["audio_padding_mask_videos"] = batch.pop("padding_mask_videos", None)
            return {name: value for name, value in batch.items() if value is not None}

        trainer.data_collator = heard
    trainer.train()
    assert len(dataset) == 10
    prefix = f"model.{branch}_branch."
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    # Keys' biases shift all scores of a query alike: they have no gradient but that of rounding
    assert {name for name in before if name.startswith(prefix) and "key.bias" not in name} <= changed
    assert all(name.startswith(prefix) for name in changed)
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if not name.startswith(prefix))
    state = trainer.optimizer.state_dict()["state"]
    assert len(state) == sum(name.startswith(prefix) for name in before)
    model.train()
    for name, module in model.named_modules():
        if name.startswith(prefix):
            assert module.training
        elif name.startswith(("model.vision_tower", "model.qformer", "model.audio_", "model.language_model")):
            assert not module.training or name.startswith(f"model.{branch}_branch")


def test_a_model_may_be_made_by_the_trainer_and_arguments_stand_where_the_library_has_them(tmp_path: Path) -> None:
    def make() -> VideoLlamaForConditionalGeneration:
        model = tiny_model()  # it seeds the generator, so nothing else may draw: no dropout, no random order
        model.set_trainable("video")
        return model

    given = make_trainer(tmp_path / "given", model=make(), train_sampling_strategy="sequential")
    given.train()
    made = VideoLlamaTrainer(None, given.args, given.data_collator, given.train_dataset, model_init=make)
    made.train()
    assert losses(made) == losses(given)
    with pytest.raises(TypeError, match="must be `VideoLlamaTrainingArguments`.* but are `TrainingArguments`"):
        VideoLlamaTrainer(make_model(), TrainingArguments(str(tmp_path), use_cpu=True))


def test_adapters_that_no_checkpoint_would_hold_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"])
    model = make_model()
    model.add_adapter(config, adapter_name="mine")
    with pytest.raises(ValueError, match="adapter 'mine' is trainable.* without a name"):
        VideoLlamaTrainer(model)
    with pytest.raises(ValueError, match=r"a `PeftModel` around the model.*add_adapter"):
        VideoLlamaTrainer(get_peft_model(make_model(), config))


def test_batches_without_token_ids_are_counted() -> None:
    throughput = _Throughput()
    throughput.add({"inputs_embeds": torch.zeros(2, 5, 8)})
    throughput.add({"inputs_embeds": torch.zeros(1, 4, 8), "attention_mask": torch.tensor([[1, 1, 1, 0]])})
    assert throughput.samples == 3 and throughput.tokens == 13


def test_predictions_are_logits_whatever_media_a_batch_has(
    model: VideoLlamaForConditionalGeneration, tmp_path: Path
) -> None:
    seen = []
    trainer = make_trainer(tmp_path / "run", model=model, num_eval_rows=3, per_device_eval_batch_size=1)
    trainer.compute_metrics = lambda prediction: seen.append(prediction) or {}
    text = {name: trainer.eval_dataset[1][name] for name in ("input_ids", "labels")}
    text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] >= 64, 5)
    image = dict(text, input_ids=trainer.eval_dataset[1]["input_ids"].clone())
    image["input_ids"][image["input_ids"] == model.config.video_token_id] = model.config.image_token_id
    image["pixel_values"] = [trainer.eval_dataset[1]["pixel_values_videos"][0][0]]
    trainer.evaluate(OwnData([trainer.eval_dataset[0], text, image]))
    longest = max(len(sample["input_ids"]) for sample in (trainer.eval_dataset[0], text, image))
    assert seen[0].predictions.shape == (3, longest, model.config.text_config.vocab_size)


def test_untrainable_and_unsavable_models_are_refused(tmp_path: Path) -> None:
    model = make_model()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="set_trainable"):
        make_trainer(tmp_path, model=model)
    model.set_trainable(["video_branch", "audio_tower"])
    with pytest.raises(ValueError, match=r"model\.audio_tower.*checkpoints hold"):
        make_trainer(tmp_path, model=model)


def test_other_parts_than_a_branch_train_and_are_saved(tmp_path: Path) -> None:
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trained = model.set_trainable(["video_branch", "vision_tower", "qformer", "language_model"])
    trainer = make_trainer(tmp_path / "run", model=model, max_steps=2)
    trainer.train()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed <= set(trained)
    for name in (
        "model.query_tokens",
        "lm_head.weight",
        "model.vision_tower",
        "model.qformer",
        "model.language_model",
    ):
        assert any(parameter.startswith(name) for parameter in changed), name
    trainer.save_model()
    other = tiny_model()
    assert load_trained_part(other, tmp_path / "run") == [
        "video_branch", "vision_tower", "qformer", "language_model"
    ]  # fmt: skip
    for name, parameter in model.named_parameters():
        assert torch.equal(other.get_parameter(name), parameter), name


def test_samples_of_one_length_are_grouped_without_reading_their_media(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", num_rows=1000, train_sampling_strategy="group_by_length")
    sampler = trainer.get_train_dataloader().batch_sampler.sampler
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert trainer.train_dataset._samples.counts.sum() == 0
    assert orders[0] == orders[2] != orders[1] and sorted(orders[0]) == list(range(1000))
    # The texts are numbers of one to three digits. The library sorts them in ten heaps, each with two borders at most;
    # of batches drawn at random 95 would be mixed.
    batches = list(zip(orders[1][::2], orders[1][1::2], strict=True))
    assert sum(len(str(first)) != len(str(second)) for first, second in batches) <= 20
    # In the library's order few batches of one and two digits lie in ten runs; at random nearly each is a run
    is_short = [len(str(first)) < 3 for first, _ in batches[1:]]
    assert sum(short and not before for short, before in itertools.pairwise(is_short)) > 30


def test_texts_without_media_train_beside_others(model: VideoLlamaForConditionalGeneration, tmp_path: Path) -> None:
    def train(only_texts: bool, num_rows: int, **settings: Any) -> dict[str, torch.Tensor]:
        trainer = make_trainer(tmp_path / "run", model=model, num_rows=num_rows, max_steps=1, **settings)
        collator = trainer.data_collator

        def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
            """In every second batch the words of a text in place of a video."""
            collate.calls += 1
            batch = collator(samples)
            if only_texts or collate.calls % 2:
                batch["input_ids"][batch["input_ids"] == model.config.video_token_id] = 5
                batch = {name: value for name, value in batch.items() if "videos" not in name}
            return batch

        collate.calls = 0
        trainer.data_collator = collate
        return first_gradients(trainer)

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = train(only_texts=True, num_rows=2)
    assert found.keys() == trained and not any(gradient.any() for gradient in found.values())
    found = train(only_texts=False, num_rows=4, gradient_accumulation_steps=2)
    assert found.keys() == trained and any(gradient.any() for gradient in found.values())


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
def test_evaluating_changes_nothing_of_the_training(streaming: bool, tmp_path: Path) -> None:
    settings = {"streaming": streaming, "max_steps": 6, "gradient_accumulation_steps": 2}
    plain = make_trainer(tmp_path / "plain", **settings)
    plain.train()
    evaluations = {"num_eval_rows": 5, "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    evaluated = make_trainer(
        tmp_path / "evaluated", **settings, **evaluations, dataloader_num_workers=0, per_device_eval_batch_size=2
    )
    evaluated.train()
    assert losses(evaluated) == losses(plain)
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(evaluated.model.get_parameter(name), parameter)
    found = eval_losses(evaluated)
    assert len(found) == 7 and len(set(found)) == 7
    assert evaluated.evaluate()["eval_loss"] == found[-1]  # the same samples, without dropout


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    # Of a loss that falls the largest is the first
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = make_trainer(tmp_path / "run", num_eval_rows=4, save_total_limit=1, **steps, **best)
    trainer.train()
    found = eval_losses(trainer)
    step = 1 + found.index(max(found))
    assert step < len(found)
    checkpoint = tmp_path / "run" / f"checkpoint-{step}"
    assert trainer.state.best_model_checkpoint == str(checkpoint)
    assert list_checkpoints(tmp_path / "run") == [checkpoint] and find_damage(checkpoint) is None
    for name, tensor in load_file(checkpoint / "trained_part.safetensors").items():
        assert torch.equal(trainer.model.get_parameter(f"model.{name}"), tensor)
    assert trainer.evaluate()["eval_loss"] == max(found)


def test_accumulated_batches_weigh_every_label_alike(tmp_path: Path) -> None:
    found = {}
    for name, settings in {
        "one batch": {"per_device_train_batch_size": 4},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    }.items():
        model = tiny_model()
        model.set_trainable("video")
        trainer = make_trainer(tmp_path / "run", model=model, num_rows=8, max_steps=2, **settings)
        found[name] = first_gradients(trainer), losses(trainer)
    assert_close(found["one batch"][0], found["accumulated"][0])
    assert found["accumulated"][1] == pytest.approx(found["one batch"][1], rel=1e-5)


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_padding_changes_no_loss_wherever_it_is(padding_side: str, tmp_path: Path) -> None:
    found = {}
    for size in (1, 4):
        model = tiny_model()
        model.set_trainable("video")
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = make_trainer(tmp_path / "run", model=model, num_rows=8, max_steps=2, **settings)
        trainer.data_collator = VideoLlamaDataCollator(pad_token_id=0, padding_side=padding_side)
        masks = []
        model.model.language_model.register_forward_pre_hook(
            lambda _, args, kwargs, masks=masks: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        trainer.train()
        assert all((mask is None) == (padding_side == "right") for mask in masks)
        found[size] = losses(trainer)
    assert found[4] == pytest.approx(found[1], rel=1e-5)


class Reads(TorchDispatchMode):
    """Notes operations whose result the host reads, for which it waits until a GPU has done all that was queued."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "masked_scatter_backward") or any(
            mask is not None and mask.dtype == torch.bool for mask in masks
        ):
            self.noted.append(name)
        return function(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device_between_the_loss_and_the_next_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", max_steps=4, logging_steps=10, per_device_train_batch_size=3)
    reads = Reads()
    backward = trainer.accelerator.backward

    def note_from_here(*args: Any, **kwargs: Any) -> None:
        reads.__enter__()
        backward(*args, **kwargs)

    class Stop(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            reads.__exit__(None, None, None)

    trainer.accelerator.backward = note_from_here
    trainer.add_callback(Stop())
    trainer.train()
    assert not reads.noted
    with reads:
        assert torch.ones(3)[torch.tensor([True, False, True])].sum().item() == 2
    assert reads.noted == ["index", "_local_scalar_dense"]


def test_batches_are_copied_beside_the_computation_unless_told_otherwise(tmp_path: Path) -> None:
    def non_blocking(**settings: Any) -> bool:
        return make_arguments(tmp_path, **settings).accelerator_config.non_blocking

    assert non_blocking(use_cpu=False) and not non_blocking(use_cpu=True)
    assert not non_blocking(use_cpu=False, dataloader_pin_memory=False)
    assert not non_blocking(use_cpu=False, accelerator_config={"non_blocking": False})


def test_a_loss_that_is_no_number_is_in_the_log(model: VideoLlamaForConditionalGeneration, tmp_path: Path) -> None:
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    trainer = make_trainer(tmp_path / "run", model=model, max_steps=2)
    trainer.train()
    assert all(math.isnan(loss) for loss in losses(trainer)) and len(losses(trainer)) == 2


def test_smoothed_labels_are_those_of_the_next_token(
    model: VideoLlamaForConditionalGeneration, tmp_path: Path
) -> None:
    settings = {"max_steps": 1, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 3}
    trainer = make_trainer(tmp_path / "run", model=model, num_rows=3, label_smoothing_factor=0.1, **settings)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1
    )
    trainer.train()
    assert losses(trainer) == [pytest.approx(expected.item(), rel=1e-5)]


class OwnData(torch.utils.data.Dataset):
    """Samples made elsewhere, whose items are read by number."""

    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.samples[index]


def test_samples_of_ones_own_are_grouped_by_the_length_of_their_text(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path / "run", num_rows=100, num_eval_rows=7, train_sampling_strategy="group_by_length", max_steps=3
    )
    samples = [trainer.train_dataset[index] for index in range(100)]
    trainer.train_dataset = OwnData(samples)
    trainer.processing_class = SimpleNamespace(model_input_names=["pixel_values"], save_pretrained=None)
    order = list(trainer.get_train_dataloader().batch_sampler.sampler)
    lengths = [len(samples[index]["input_ids"]) for index in order]
    assert sorted(order) == list(range(100))
    # Lengths of five kinds in ten heaps: few pairs are mixed, of pairs at random 40 were
    assert sum(first != second for first, second in zip(lengths[::2], lengths[1::2], strict=True)) <= 40 / 3
    # Evaluation goes on in its own order, and reads nothing for lengths
    assert list(trainer.get_eval_dataloader().batch_sampler.sampler) == list(range(7))
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_the_log_has_the_norm_of_all_gradients(max_grad_norm: float, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", max_steps=1, max_grad_norm=max_grad_norm)
    used = torch.cat([gradient.flatten() for gradient in first_gradients(trainer).values()]).norm().item()
    (norm,) = [line["grad_norm"] for line in trainer.state.log_history if "loss" in line]
    assert norm > 1  # of more than it is clipped to
    assert used == pytest.approx(max_grad_norm or norm, rel=1e-4)


def test_gradient_checkpointing_recomputes_the_decoder_and_changes_no_gradient(tmp_path: Path) -> None:
    found = {}
    for checkpointing in (False, True):
        model = tiny_model()
        model.set_trainable("video")
        calls = []
        model.model.language_model.layers[0].self_attn.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        trainer = make_trainer(tmp_path / "run", model=model, max_steps=1, gradient_checkpointing=checkpointing)
        found[checkpointing] = first_gradients(trainer)
        assert len(calls) == (2 if checkpointing else 1)
    assert_close(found[False], found[True])


@pytest.mark.skipif(shutil.which("c++") is None, reason="without a C++ compiler nothing is compiled on a CPU")
def test_a_compiled_decoder_has_one_graph_and_changes_no_loss(
    model: VideoLlamaForConditionalGeneration, tmp_path: Path
) -> None:
    expected = make_trainer(tmp_path / "plain", model=copy.deepcopy(model), max_steps=6)
    expected.train()
    torch._dynamo.reset()
    counters.clear()
    trainer = make_trainer(tmp_path / "compiled", model=model, max_steps=6, compile_decoder=True)
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(expected), abs=1e-4)
    assert counters["stats"]["unique_graphs"] == 1  # of all layers, and of batches of several lengths


def test_bf16_keeps_what_is_trained_in_float32(tmp_path: Path) -> None:
    found = {}
    for bf16 in (False, True):
        model = tiny_model().to(torch.bfloat16 if bf16 else torch.float32)
        model.set_trainable("video")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        trainer = make_trainer(tmp_path / str(bf16), model=model, max_steps=2, bf16=bf16, learning_rate=1e-4)
        trainer.train()
        found[bf16] = losses(trainer)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        if bf16:
            assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
        states = trainer.optimizer.state_dict()["state"].values()
        assert all(value.dtype == torch.float32 for state in states for value in state.values())
    assert found[True] == pytest.approx(found[False], rel=0.03)
    assert found[True] != found[False]


def test_the_log_has_the_throughput_and_goes_to_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(tmp_path / "run", max_steps=3, report_to="tensorboard")
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 3
    assert all(line["samples_per_second"] > 0 and line["tokens_per_second"] > 0 for line in lines)
    (file,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(trainer))
    assert events.Scalars("train/tokens_per_second")


def test_the_progress_bar_has_the_throughput(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path / "run", max_steps=2, disable_tqdm=False).train()
    error = capfd.readouterr().err
    assert "2/2" in error and "samples/s" in error and "tokens/s" in error


def test_a_checkpoint_holds_the_trained_part_and_not_the_frozen_ones(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert {f"model.{name}" for name in load_file(checkpoint / "trained_part.safetensors")} == trained
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert set(saved["state"]) == trained
    assert {path.name for path in checkpoint.iterdir()} == {
        "complete.json",
        "optimizer.pt",
        "rng_state.pth",
        "scheduler.pt",
        "trained_part.json",
        "trained_part.safetensors",
        "trainer_state.json",
    }
    number = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    size = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert 3 * 4 * number < size < 3 * 4 * number + 200_000  # the weights and two averages of them, in float32


@pytest.fixture
def saved_model(tmp_path: Path) -> Iterator[Path]:
    tiny_model().save_pretrained(tmp_path / "base")
    yield tmp_path / "base"


def load_with_adapter(folder: Path) -> VideoLlamaForConditionalGeneration:
    model = VideoLlamaForConditionalGeneration.from_pretrained(folder)
    model.set_trainable("video")
    add_adapter(model, ModelArguments(model=str(folder), lora_r=2, lora_dropout=0.1))
    return model


def test_an_adapter_trains_in_the_decoder_alone_and_resumes(saved_model: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    def run(resume: Path | None = None) -> VideoLlamaTrainer:
        model = load_with_adapter(saved_model)
        settings = {"save_strategy": "steps", "save_steps": 2}
        trainer = make_trainer(tmp_path / "run", model=model, max_steps=4, gradient_accumulation_steps=2, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    trainer = run()
    model = trainer.model
    names = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith(BRANCH)}
    layers = {name.split(".lora_")[0] for name in names}
    assert layers == {
        f"model.language_model.layers.{layer}.self_attn.{which}" for layer in (0, 1) for which in ("q_proj", "v_proj")
    }
    trainer.save_model()
    resumed = run(tmp_path / "run" / "checkpoint-2")
    assert losses(resumed) == losses(trainer)
    assert all(torch.equal(model.get_parameter(name), resumed.model.get_parameter(name)) for name in names)

    batch = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    with torch.no_grad():
        expected = model.eval()(**batch).loss
        plain = from_trained_part(tmp_path / "run")
        assert not torch.equal(plain(**batch).loss, expected)
        plain.load_adapter(str(tmp_path / "run"))
        assert torch.equal(plain(**batch).loss, expected)
        wrapped = PeftModel.from_pretrained(from_trained_part(tmp_path / "run"), str(tmp_path / "run"))
        assert torch.equal(wrapped(**batch).loss, expected)


def test_an_adapter_of_another_shape_is_refused(saved_model: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", model=load_with_adapter(saved_model), max_steps=1)
    trainer.train()
    trainer._save_checkpoint(trainer.model, None)
    for settings, message in (
        ({"lora_r": 2, "lora_target_modules": ["k_proj"]}, r"k_proj\.lora_A\.weight is missing there and of shape"),
        ({"lora_r": 3}, r"q_proj\.lora_A\.weight is of shape \(2, \d+\) there and of shape \(3, \d+\) here"),
    ):
        model = VideoLlamaForConditionalGeneration.from_pretrained(saved_model)
        model.set_trainable("video")
        add_adapter(model, ModelArguments(model="m", **settings))
        trainer = make_trainer(tmp_path / "run", model=model, max_steps=2)
        with pytest.raises(ValueError, match=f"adapter in .*checkpoint-1 does not fit.*{message}"):
            trainer.train(resume_from_checkpoint="last")


def test_an_adapter_is_not_begun_in_the_middle_of_a_run(saved_model: Path, tmp_path: Path) -> None:
    model = VideoLlamaForConditionalGeneration.from_pretrained(saved_model)
    model.set_trainable("video")
    make_trainer(tmp_path / "run", model=model, max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer = make_trainer(tmp_path / "run", model=load_with_adapter(saved_model), max_steps=2)
    with pytest.raises(ValueError, match="checkpoint-1 holds no adapter .* use no `lora_r`"):
        trainer.train(resume_from_checkpoint="last")
