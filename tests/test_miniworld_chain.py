"""The example's whole chain at a tiny size: render, train encoders, cache features, train both stages, save, load,
ask, measure."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "miniworld"))

import ask
import branches
import decoder
import dictionary
import encoders
import evaluate
import make_data
import train as train_command
from filelock import FileLock
from language import QA, caption, questions
from model_file import export_model, load_model
from pictures import make_pictures
from small_model import make_model, make_processor
from world import generator

from transformers_videollama import VideoLlamaForConditionalGeneration
from transformers_videollama.training import cache_features, run

MINIWORLD = Path(ask.__file__).parent
SCALE = 4
NUM_CLIPS = 8
SEED = 3
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (  # SmolLM2's own
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a "
    "helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|im_start|>assistant\n' }}{% endif %}"
)


def make_decoder(folder: Path) -> None:
    """
    A tiny LLaMA that has learnt to answer from a caption in front of the question, so that soft tokens can steer it.
    """
    texts = []
    for index, scene in enumerate(make_data.sample_scenes("train", 60, SEED + 1)):
        rng = generator(SEED + 1, "train", index, "decoder")
        for item in questions(scene, rng):
            user = f"<|im_start|>user\n{caption(scene, rng)} {item.question}<|im_end|>\n"
            texts.append(f"{user}<|im_start|>assistant\n{item.answer}<|im_end|>\n")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet)
    )
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIAL_TOKENS, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names, pad_token=SPECIAL_TOKENS[2])
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_llama(len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(600):
        batch = tokenizer([texts[i] for i in rng.integers(len(texts), size=16)], padding=True, return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def tiny_llama(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def train(stage: str, model: Path, data: Path, features: Path, steps: int, *more: object) -> tuple[Path, list[float]]:
    """Runs a stage of the example with the real training code; returns its folder and its losses."""
    output = data.parent / stage
    config = data.parent / f"{stage}.yaml"
    config.write_text((MINIWORLD / "stages" / f"{stage}.yaml").read_text().replace("<data>", str(data)))
    settings: dict[str, object] = {
        "model": model,
        "feature_cache": features,
        "output_dir": output,
        "max_steps": steps,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "min_learning_rate": 3e-4,
        "warmup_steps": 5,
        "bf16": False,
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "merge": True,
    }
    arguments = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    trainer = run.main([str(config), *arguments, *map(str, more)])
    return output, [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The chain, run once: its folders, and the losses of every station."""
    work = tmp_path_factory.mktemp("miniworld")
    cache, data, base, features = work / "cache", work / "data", work / "base", work / "features"
    make_decoder(cache / "smollm2-135m-instruct")
    make_data.make_data(data, "train", NUM_CLIPS, SEED, processes=1)

    processor = make_processor(cache / "smollm2-135m-instruct")
    model = make_model(cache / "smollm2-135m-instruct", seed=0, scale=SCALE)
    clips = encoders.read_clips(data, processor, work / "encoders", SEED, workers=0)
    losses: dict[str, list[float]] = {"encoders": []}

    def recorded(function: Callable[..., torch.Tensor], name: str) -> Callable[..., torch.Tensor]:
        def call(*arguments: Any, **targets: Any) -> torch.Tensor:
            loss = function(*arguments, **targets)
            losses[name].append(loss.item())
            return loss

        return call

    def start_branch(name: str, *arguments: Any) -> None:
        losses.setdefault(name, [])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(branches.WordLoss, "forward", recorded(branches.WordLoss.forward, name))
            branches_start_branch(name, *arguments)

    def fit(name: str, parameters: Any, loss_at: Callable[[int], torch.Tensor], *arguments: Any) -> None:
        losses[name] = []
        loss_at = recorded(loss_at, name)
        encoders.fit(name, parameters, loss_at, *arguments)
        for step in range(5):  # the first batches again: from batch to batch the loss differs more than it falls
            loss_at(step)

    branches_start_branch = branches.start_branch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "frame_loss", recorded(encoders.frame_loss, "encoders"))
        pictures = make_pictures(work / "encoders", 64, processor, seed=0, processes=1)
        encoders.train_frame_encoder(
            model, processor, clips, pictures, work / "encoders", steps=40, batch_size=16, seed=0
        )
    model.save_pretrained(base)
    processor.save_pretrained(base)

    flags = {"model": base, "feature_cache": features, "media": data / "clips", "dataloader_num_workers": 0}
    arguments = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    cache_features.main([*arguments, "--kinds", "frames", "clips"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dictionary, "LEARNING_RATE", 1e-2)
        patch.setattr(dictionary, "fit", fit)
        dictionaries = dictionary.train_dictionaries(base, data, work / "dictionaries", 40, 8, seed=0)
        patch.setattr(branches, "start_branch", start_branch)
        patch.setattr(branches, "LEARNING_RATE", 3e-3)
        branches.start_branches(
            base, work / "started", data, features, work / "branches", dictionaries, 60, 8, 0, num_validation=1
        )
    stage1, losses["stage 1"] = train("video_stage1", work / "started", data, features, 40)
    # One clip, to be known by heart
    conversations = data / "train-conversations.jsonl"
    messages = json.loads(conversations.read_text().splitlines()[0])["messages"][:2]
    conversations.write_text((json.dumps({"messages": messages}) + "\n") * 8)
    stage2, losses["stage 2"] = train("video_stage2", work / "started", data, features, 100, "--trained_part", stage1)
    export_model(stage2 / "merged", work / "model")
    both, losses["both branches"] = train("both_branches", stage2 / "merged", data, features, 40)
    return {
        "cache": cache, "data": data, "losses": losses, "model": work / "model", "base": base, "stage 2": stage2,
        "both": both,
    }  # fmt: skip


def test_loss_falls_at_every_station(chain):
    stations = dict(chain["losses"])
    rearranged = stations.pop("video branch, rearranged")  # of which eight clips are too few to learn
    assert len(rearranged) == round(60 * branches.REARRANGED_STEPS) and np.isfinite(rearranged).all()
    dictionaries = {name for name in stations if name.endswith("dictionary")}  # trained for 12 and for 28 steps
    assert len(dictionaries) == 2
    for name, losses in stations.items():
        assert np.mean(losses[-5:]) < (0.8 if name in dictionaries else 0.7) * np.mean(losses[:5]), name


def test_the_last_station_trains_both_branches_and_nothing_else(chain):
    before, after = (
        VideoLlamaForConditionalGeneration.from_pretrained(chain[stage] / "merged").state_dict()
        for stage in ("stage 2", "both")
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[1] for name in changed} == {"video_branch", "audio_branch"}


def test_words_add_the_same_for_each_thing_as_many_soft_tokens_later():
    words_per_object, tokens, width = 2, 8, 3
    book = dictionary.Dictionary(1 + 3 * words_per_object, 5, tokens, width, words_per_object)
    torch.nn.init.normal_(book.shared)
    head, *things = book.parts.unflatten(2, (tokens, width)).split([1, *[words_per_object] * 3])
    assert not head.any() and things[0].all()
    for earlier, later in zip(things, things[1:], strict=False):
        assert torch.equal(earlier[:, :, :-words_per_object], later[:, :, words_per_object:])
    words = torch.tensor([[0, 1, 2, 3, 4, 0, 1]])
    assert torch.allclose(book(words)[0], sum(part[word] for part, word in zip(book.parts, words[0], strict=True))
                          .view(tokens, width), atol=1e-6)  # fmt: skip


def test_a_memorised_clip_is_answered(chain):
    model, processor = load_model(chain["cache"], chain["model"], torch.float32)
    for line in (chain["data"] / "train-conversations.jsonl").read_text().splitlines()[:1]:
        user, assistant = json.loads(line)["messages"]
        (clip,) = (entry["path"] for entry in user["content"] if entry["type"] == "video")
        (question,) = (entry["text"] for entry in user["content"] if entry["type"] == "text")
        # As in training, which shows videos without their sound
        chat = [{"role": "user", "content": [{"type": "video", "path": str(chain["data"] / clip)},
                                             {"type": "text", "text": question}]}]  # fmt: skip
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
            load_audio_from_video=False,
        )  # fmt: skip
        outputs = model.generate(**inputs, max_new_tokens=20, do_sample=False)
        (answer,) = processor.post_process_image_text_to_text(outputs[:, inputs["input_ids"].shape[1] :])
        assert answer == assistant["content"][0]["text"]


def test_shipped_file_leaves_the_decoder_out_and_training_left_it_alone(chain):
    shipped = load_file(chain["model"] / "model.safetensors")
    assert not any(name.startswith(("model.language_model.", "lm_head.")) for name in shipped)
    model, _ = load_model(chain["cache"], chain["model"], torch.float32)
    bare = AutoModelForCausalLM.from_pretrained(chain["cache"] / "smollm2-135m-instruct", dtype=torch.float32)
    for name, tensor in bare.model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], tensor)


def test_first_command_asks_a_new_clip_and_a_file(chain, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = ["--model", str(chain["model"]), "--cache", str(chain["cache"])]
    ask.main(["--seed", "1", *folders])
    printed = capsys.readouterr().out
    assert printed.count("\nQ: ") == printed.count("\nA: ") == printed.count("(in truth: ") == 4
    assert (tmp_path / "miniworld.mp4").stat().st_size and (tmp_path / "miniworld.png").stat().st_size
    ask.main(["miniworld.mp4", "What do you see?", "What do you hear?", *folders])
    assert capsys.readouterr().out.count("\nQ: What do you ") == 2
    assert not list(tmp_path.glob("*.part"))


def test_evaluation_goes_on_and_asks_what_a_user_would(chain, tmp_path, capsys):
    options = ["--questions", "2", "--model", str(chain["model"]), "--cache", str(chain["cache"]), "--processes", "1"]
    options += ["--work", str(tmp_path), "--output", str(tmp_path / "evaluation.json"), "--batch-size", "8"]
    rows = evaluate.main(options)
    # Of two questions a family not every part of one has any
    assert set(evaluate.FAMILIES) <= set(rows) <= {*evaluate.FAMILIES, *evaluate.SUBSETS}
    assert all(row["questions"] >= 1 and set(row) >= {"whole", "no video", "chance"} for row in rows.values())
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["verdicts"]["text alone: the bare decoder's tokens"]
    assert "| object | 2 |" in capsys.readouterr().out

    # Interrupted in the middle of a line: what is missing is asked again, and nothing else
    (answers,) = tmp_path.glob("seed-1/answers-*.jsonl")
    lines = answers.read_text().splitlines()
    answers.write_text("\n".join([*lines[:10], lines[10][:20]]))
    evaluate.main(options)
    resumed = answers.read_text().splitlines()
    assert resumed[:10] == lines[:10]

    def asked_in(lines: list[str]) -> list[tuple[str, int, str]]:
        return sorted((row["condition"], row["clip"], row["question"]) for row in map(json.loads, lines))

    assert asked_in(resumed) == asked_in(lines)

    # The prompt made for cached features is that of the file
    model, processor = load_model(chain["cache"], chain["model"])
    asked = evaluate.Model(model, processor, tmp_path / "seed-1")
    for question in evaluate.choose_questions(2, 1)[:4]:
        asked.encode(question.clip)
        path = str(tmp_path / "seed-1" / make_data.clip_name("test", question.clip))
        text = {"type": "text", "text": question.item.question}
        chat = [{"role": "user", "content": [{"type": "video", "path": path}, text]}]
        ids = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)
        assert asked.prompt(question.item.question, True, question.clip in asked.sounds) == ids[0]
        frames = asked.frames[question.clip]
        shuffled = asked.shown_frames(question.clip, "shuffled", 1)
        assert sorted(map(str, shuffled.float().tolist())) == sorted(map(str, frames.float().tolist()))
        assert (asked.shown_frames(question.clip, "first frame", 1) == frames[0]).all()


def test_one_command_trains_it_all_and_goes_on_where_it_stopped(chain, tmp_path, capsys):
    work, output = tmp_path / "work", tmp_path / "model"
    shutil.copytree(chain["cache"] / "smollm2-135m-instruct", work / "smollm2-135m-instruct")
    sizes = {"clips": 20, "pictures": 16, "frame-batch-size": 4, "sound-batch-size": 4, "branch-batch-size": 4}
    sizes |= {f"{name}-steps": 2 for name in ("frame", "sound", "dictionary", "branch", "stage")}
    arguments = [str(part) for name, value in sizes.items() for part in (f"--{name}", value)]
    arguments += ["--work", str(work), "--output", str(output), "--processes", "1"]
    train_command.main(arguments)
    assert "sounds whose nearest frames are right" in capsys.readouterr().out
    expected = load_file(output / "model.safetensors")
    for stage in ("video_stage1", "video_stage2", "audio_stage2", "both_branches"):
        state = json.loads((work / stage / "checkpoint-2" / "trainer_state.json").read_text())
        assert state["global_step"] == 2
    for folder in (work / "both_branches", output):
        shutil.rmtree(folder)
    train_command.main(arguments)
    found = load_file(output / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    with FileLock(work / ".lock"), pytest.raises(SystemExit):
        train_command.main(arguments)
    assert "another run is training" in capsys.readouterr().err


def test_questions_are_balanced_and_more_of_them_keep_those_of_fewer():
    few, more = evaluate.choose_questions(4, 1), evaluate.choose_questions(6, 1)
    assert set(few) <= set(more)
    assert len({(question.clip, question.item.family) for question in more}) == len(more)
    for family in evaluate.FAMILIES:
        said = [question.item.canonical for question in more if question.item.family == family]
        assert len(said) == 6
        if family in evaluate.YES_NO_FAMILIES:
            assert said.count("Yes.") == said.count("No.") == 3


def test_scoring():
    kinds = ("A bell.", "A drum.", "Nothing.")
    item = QA("hear", "What do you hear?", "A drum.", "A drum.", True, kinds)
    assert evaluate.named_option("I hear a drum!", item) == evaluate.named_option("drum", item) == "A drum."
    assert evaluate.named_option("A drum and a bell.", item) is None
    assert evaluate.named_option("A drummer.", item) is None
    moves = ("Left.", "It circles.", "It turns red.")
    item = QA("motion", "…", "The bee circles.", "It circles.", False, moves)
    assert evaluate.named_option("The bee circles.", item) == "It circles."
    assert evaluate.named_option("The bee turns red.", item) == "It turns red."
    # Wilson's interval, as tables have it
    assert evaluate.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert evaluate.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_decoder_is_unpacked_from_gguf(tmp_path):
    config = tiny_llama(96)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    gguf_names = {name: short for short, name in decoder.LLAMA_NAMES.items()}
    for name, tensor in model.model.state_dict().items():
        layer, _, rest = name.removeprefix("layers.").partition(".") if name.startswith("layers.") else ("", "", name)
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:  # as llama.cpp writes them
            array = array.reshape(-1, 2, config.head_dim // 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        short = gguf_names[rest.removesuffix(".weight")]
        writer.add_tensor(f"blk.{layer}.{short}.weight" if layer else f"{short}.weight", np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    (tmp_path / "unpacked").mkdir()
    decoder.unpack_weights(tmp_path / "tiny.gguf", tmp_path / "unpacked")
    unpacked = AutoModelForCausalLM.from_pretrained(tmp_path / "unpacked")
    expected = model.to(torch.bfloat16).state_dict()
    assert unpacked.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in unpacked.state_dict().items())
    assert unpacked.config.num_key_value_heads == 2 and unpacked.config.tie_word_embeddings
