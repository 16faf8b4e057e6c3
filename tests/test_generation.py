"""What `generate` promises with media in the prompt: each result equals one that is computed in a simpler way."""

import copy
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
import transformers
from tiny_model import (
    NUM_AUDIO_TOKENS,
    NUM_VIDEO_TOKENS,
    VOCAB_SIZE,
    batch,
    images,
    prompt,
    sounds,
    tiny_model,
    videos,
)
from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM, StaticCache

from transformers_videollama.generation_video_llama import CACHE_NAME
from transformers_videollama.modeling_video_llama import VideoLlamaForConditionalGeneration


@pytest.fixture(scope="module")
def model() -> VideoLlamaForConditionalGeneration:
    return tiny_model()


# Prompts with every mixture of media, and the media that each needs
PROMPTS = [
    (prompt(4, "video", 3), {"pixel_values_videos": videos(1)}),
    (prompt(2, "video", 1, "audio", 2, "video", 5), {"pixel_values_videos": videos(2, seed=5), "input_features": sounds(1)}),
    (prompt(9), {}),
    (prompt(1, "image", 2, "image", "audio", 1), {"pixel_values": images(2), "input_features": sounds(1, seed=6)}),
]  # fmt: skip


def all_prompts() -> dict[str, torch.Tensor]:
    """`PROMPTS` as one batch."""
    media: dict[str, list[torch.Tensor]] = {}
    for _, inputs in PROMPTS:
        for name, medium in inputs.items():
            media.setdefault(name, []).append(medium)
    return {**batch(*(ids for ids, _ in PROMPTS)), **{name: torch.cat(parts) for name, parts in media.items()}}


def answer(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The new tokens of what `generate` returned."""
    return output[:, inputs["input_ids"].shape[1] :]


@contextmanager
def count_calls(model: VideoLlamaForConditionalGeneration):
    """Counts the calls of the encoders, and the frames or clips that they are given."""
    counter = Counter()
    hooks = []
    for name in ("vision_tower", "audio_tower"):

        def count(module: torch.nn.Module, args: tuple, name: str = name) -> None:
            counter[name] += 1
            counter[f"{name} inputs"] += len(args[0])

        hooks.append(getattr(model.model, name).register_forward_pre_hook(count))
    yield counter
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("ids, media", PROMPTS)
def test_greedy_search_is_the_argmax_of_a_forward_without_cache(model, ids, media):
    inputs = batch(ids)
    tokens = inputs["input_ids"]
    with torch.no_grad():
        for _ in range(6):
            logits = model(input_ids=tokens, **media, use_cache=False).logits
            tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(model.generate(**inputs, **media, max_new_tokens=6), tokens)


@pytest.mark.parametrize("use_cache", [True, False])
def test_media_decide_the_answer(model, use_cache):
    inputs = batch(prompt(4, "video", 3))
    answers = {
        tuple(model.generate(**inputs, pixel_values_videos=videos(1, seed=seed), use_cache=use_cache)[0].tolist())
        for seed in range(4)
    }
    assert len(answers) == 4


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "cache_implementation": "static"},
        {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=str,
)
def test_a_batch_with_any_media_gives_what_its_prompts_give_alone(model, options):
    inputs = all_prompts()
    together = answer(model.generate(**inputs, **options), inputs)
    alone = []
    for ids, media in PROMPTS:
        single = batch(ids)
        alone.append(answer(model.generate(**single, **media, **options), single))
    assert torch.equal(together, torch.cat(alone))


def test_logits_of_a_batch_with_any_media_are_those_of_its_prompts(model):
    with torch.no_grad():
        together = model(**all_prompts()).logits
        for row, (ids, media) in zip(together, PROMPTS, strict=True):
            alone = model(**batch(ids), **media).logits[0]
            torch.testing.assert_close(row[-len(ids) :], alone, atol=1e-5, rtol=1e-5)


def test_a_static_cache_gives_what_a_dynamic_one_gives(model):
    inputs = all_prompts()
    static = model.generate(**inputs, cache_implementation="static")
    assert torch.equal(static, model.generate(**inputs, cache_implementation="dynamic"))


@pytest.mark.parametrize("chunk_size", [3, 7, 100])
def test_chunked_prefill_changes_nothing(model, chunk_size):
    inputs = all_prompts()
    if not hasattr(transformers.generation.utils, "_slice_mm_encoder_output"):
        # Older versions of the library do not give each chunk its soft tokens
        with pytest.raises(ValueError, match="prefill_chunk_size"):
            model.generate(**inputs, prefill_chunk_size=chunk_size)
        return
    with count_calls(model) as calls:
        chunked = model.generate(**inputs, prefill_chunk_size=chunk_size)
    assert calls["vision_tower"] == 2 and calls["audio_tower"] == 1
    assert torch.equal(chunked, model.generate(**inputs))


def test_chunked_prefill_of_text(model):
    inputs = batch(prompt(9), prompt(5, seed=1))
    assert torch.equal(model.generate(**inputs, prefill_chunk_size=4), model.generate(**inputs))


def test_prompt_lookup_decoding_changes_nothing(model):
    ids, media = PROMPTS[1]
    inputs = {**batch(ids), **media}
    with count_calls(model) as calls:
        looked_up = model.generate(**inputs, prompt_lookup_num_tokens=3, max_new_tokens=20)
    assert torch.equal(looked_up, model.generate(**inputs, max_new_tokens=20))
    assert calls["vision_tower"] == calls["audio_tower"] == 1


def test_prompt_lookup_decoding_finds_no_placeholders(model):
    inputs = {
        **batch(torch.cat([torch.tensor([5]), prompt("video"), torch.tensor([5])])),
        "pixel_values_videos": videos(1),
    }
    options = {"repetition_penalty": 1.1, "max_new_tokens": 20}  # a logits processor looks at the candidates
    looked_up = model.generate(**inputs, prompt_lookup_num_tokens=3, max_matching_ngram_size=1, **options)
    assert torch.equal(looked_up, model.generate(**inputs, **options))


@pytest.mark.parametrize("assistant", [lambda: tiny_model(), lambda: tiny_model(max_frames=8)], ids=["same", "other"])
def test_assisted_decoding_changes_nothing(model, assistant):
    ids, media = PROMPTS[1]
    inputs = {**batch(ids), **media}
    assisted = model.generate(**inputs, assistant_model=assistant(), max_new_tokens=20)
    assert torch.equal(assisted, model.generate(**inputs, max_new_tokens=20))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_media_are_encoded_once_a_call(model, options):
    with count_calls(model) as calls:
        model.generate(**all_prompts(), **options)
    # Images and videos each make one call; three videos of three frames, two images and two sounds of two clips
    assert calls == {"vision_tower": 2, "vision_tower inputs": 11, "audio_tower": 1, "audio_tower inputs": 4}


@pytest.mark.parametrize("pass_media_again", [True, False])
def test_a_second_question_reuses_the_cache_of_the_first(model, pass_media_again):
    ids, media = PROMPTS[1]
    first = batch(ids)
    cache = DynamicCache(config=model.config)
    answered = model.generate(**first, **media, past_key_values=cache)
    second = batch(torch.cat([answered[0], prompt(5, seed=9)]))
    expected = model.generate(**second, **media)
    with count_calls(model) as calls:
        reused = model.generate(**second, **(media if pass_media_again else {}), past_key_values=cache)
    assert not calls
    assert torch.equal(reused, expected)


def test_one_cache_answers_several_questions(model):
    ids, media = PROMPTS[0]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**batch(ids), **media, past_key_values=cache)
    for seed in range(2):
        question = batch(torch.cat([ids, prompt(4, seed=seed)]))
        with count_calls(model) as calls:
            reused = model.generate(**question, past_key_values=copy.deepcopy(cache))
        assert not calls
        assert torch.equal(reused, model.generate(**question, **media))


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_has_either_of_the_librarys_names(model, name):
    ids, media = PROMPTS[0]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(**batch(ids), **media).logits
        model(**batch(ids[:-1]), **media, **{name: cache})
        outputs = model(input_ids=ids[None, -1:], attention_mask=torch.ones(1, len(ids)), **{name: cache})
    torch.testing.assert_close(outputs.logits[:, -1], whole[:, -1])
    assert outputs[CACHE_NAME] is cache and cache.get_seq_length() == len(ids)


def test_a_second_question_about_another_video_encodes_that_one_only(model):
    first, second = videos(1, seed=7), videos(1, seed=8)
    ids = prompt(4, "video", 3)
    cache = DynamicCache(config=model.config)
    answered = model.generate(**batch(ids), pixel_values_videos=first, past_key_values=cache)
    inputs = batch(torch.cat([answered[0], prompt(2, "video", 2, seed=1)]))
    both = torch.cat([first, second])
    with count_calls(model) as calls:
        reused = model.generate(**inputs, pixel_values_videos=both, past_key_values=cache)
    assert calls["vision_tower inputs"] == second.shape[1]
    assert torch.equal(reused, model.generate(**inputs, pixel_values_videos=both))


@pytest.mark.parametrize("new_ids_only", [True, False])
def test_a_second_question_may_come_with_its_own_video_alone(model, new_ids_only):
    first, second = videos(1, seed=7), videos(1, seed=8)
    cache = DynamicCache(config=model.config)
    answered = model.generate(**batch(prompt(4, "video", 3)), pixel_values_videos=first, past_key_values=cache)
    inputs = batch(torch.cat([answered[0], prompt(2, "video", 2, seed=1)]))
    expected = answer(model.generate(**inputs, pixel_values_videos=torch.cat([first, second])), inputs)
    if new_ids_only:
        inputs["input_ids"] = inputs["input_ids"][:, cache.get_seq_length() :]
    reused = answer(model.generate(**inputs, pixel_values_videos=second, past_key_values=cache), inputs)
    assert torch.equal(reused, expected)


def test_second_questions_of_a_batch_reuse_its_cache(model):
    inputs = all_prompts()
    media = {name: medium for name, medium in inputs.items() if name not in ("input_ids", "attention_mask")}
    cache = DynamicCache(config=model.config)
    answered = model.generate(**inputs, past_key_values=cache)
    question = prompt(5, seed=9).expand(len(PROMPTS), -1)
    new_tokens = answered.shape[1] - inputs["input_ids"].shape[1] + question.shape[1]
    second = {
        "input_ids": torch.cat([answered, question], dim=1),
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, new_tokens), value=1),
    }
    with count_calls(model) as calls:
        reused = model.generate(**second, **media, past_key_values=cache)
    assert not calls
    assert torch.equal(reused, model.generate(**second, **media))


def test_a_text_only_assistant_is_refused(model):
    ids, media = PROMPTS[0]
    assistant = LlamaForCausalLM(model.config.text_config)
    with pytest.raises(ValueError, match="assistant"):
        model.generate(**batch(ids), **media, assistant_model=assistant)


# Where a dimension is missing, `generate` may find the number of placeholders wrong first
WRONG_SHAPE = "must be of shape|placeholder tokens"


@pytest.mark.parametrize(
    "frames, mask",
    [
        (videos(1), torch.ones(2, 3)),
        (videos(1), torch.ones(1, 5)),
        (videos(1), torch.ones(3)),
        (videos(1)[0], None),
        (videos(1, 0), None),
        (videos(1)[..., :4], None),
        (torch.randn(1, 3, 3, 12, 12), None),
        (torch.randn(1, 3, 1, 8, 8), None),
    ],
)
def test_videos_of_a_wrong_shape_are_refused(model, frames, mask):
    ids = batch(prompt(3, "video"))
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=WRONG_SHAPE):
            call(**ids, pixel_values_videos=frames, padding_mask_videos=mask)
    ids = batch(prompt(3, "audio"))
    with pytest.raises(ValueError, match=WRONG_SHAPE):
        model(**ids, audio_pixel_values_videos=frames, audio_padding_mask_videos=mask)


@pytest.mark.parametrize("clips", [sounds(1)[0], sounds(1, 0), sounds(1)[..., :-1], sounds(1).unsqueeze(2)])
def test_sounds_of_a_wrong_shape_are_refused(model, clips):
    with pytest.raises(ValueError, match=WRONG_SHAPE):
        model.generate(**batch(prompt(3, "audio")), input_features=clips)


@pytest.mark.parametrize("pixels", [images(1)[0], images(1)[..., :4], images(1).unsqueeze(1)])
def test_images_of_a_wrong_shape_are_refused(model, pixels):
    with pytest.raises(ValueError, match=WRONG_SHAPE):
        model.generate(**batch(prompt(3, "image")), pixel_values=pixels)


def test_media_are_given_once(model):
    encoded = {"video": model.get_video_features(videos(1))}
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="mm_encoder_outputs"):
            call(**batch(prompt(3, "video")), pixel_values_videos=videos(1), mm_encoder_outputs=encoded)


def test_encoded_media_take_the_place_of_media(model):
    inputs = batch(prompt(3, "video"))
    encoded = {"video": model.get_video_features(videos(1))}
    for options in ({}, {"num_beams": 2}):
        expected = model.generate(**inputs, pixel_values_videos=videos(1), **options)
        with count_calls(model) as calls:
            assert torch.equal(model.generate(**inputs, mm_encoder_outputs=encoded, **options), expected)
        assert not calls
        outputs = model(**inputs, mm_encoder_outputs=encoded)
        assert outputs.video_outputs is encoded["video"] and outputs.image_outputs is None
        assert torch.equal(outputs.video_hidden_states, encoded["video"].pooler_output)


def test_an_embedded_prompt(model):
    ids = prompt(7)
    embedded = model.get_input_embeddings()(ids)[None]
    expected = answer(model.generate(**batch(ids)), batch(ids))
    assert torch.equal(model.generate(inputs_embeds=embedded), expected)


def test_text_alone_is_the_bare_decoder(model):
    decoder = LlamaForCausalLM(model.config.text_config).eval()
    decoder.model.load_state_dict(model.model.language_model.state_dict())
    decoder.lm_head.load_state_dict(model.lm_head.state_dict())
    decoder.generation_config = model.generation_config
    inputs = batch(prompt(7), prompt(4, seed=1))
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, decoder(**inputs).logits)
    for options in ({}, {"num_beams": 3}, {"repetition_penalty": 1.3}):
        assert torch.equal(model.generate(**inputs, **options), decoder.generate(**inputs, **options))


@pytest.mark.parametrize("ids", [prompt(3, "video", 2), prompt("video", 4), prompt("video")], ids=len)
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.5},
        {"bad_words_ids": [[5, 6]]},
        {"sequence_bias": [[[5], 1.0]]},
        {"do_sample": True, "typical_p": 0.9, "min_p": 0.1, "temperature": 0.7},
        {"guidance_scale": 1.5},
    ],
    ids=str,
)
def test_logits_processors_meet_placeholders_past_the_vocabulary(model, ids, options):
    inputs = batch(ids)
    output = model.generate(**inputs, pixel_values_videos=videos(1), **options)
    assert answer(output, inputs).max() < VOCAB_SIZE


@pytest.mark.parametrize("ids", [prompt(6, "video", 4), prompt("video", 4)], ids=len)
def test_repetition_penalty_does_not_see_placeholders(model, ids):
    processors = model._get_logits_processor(GenerationConfig(repetition_penalty=1.5), len(ids))
    scores = torch.linspace(-1, 1, VOCAB_SIZE)[None]
    text = ids[ids < VOCAB_SIZE]
    assert torch.equal(processors(ids[None], scores), processors(text[None], scores))


class TestStopStrings:
    """Answers end at the strings of the prompt's family, which are known by their tokens."""

    def test_a_string_ends_an_answer_of_a_batch(self, model):
        inputs = all_prompts()
        free = answer(model.generate(**inputs, max_new_tokens=10), inputs)
        stop = free[0, 3:5].tolist()
        config = copy.deepcopy(model.generation_config)
        # Without an end token the library does not pad what ended
        config.eos_token_id = next(token for token in range(VOCAB_SIZE) if token not in free)
        config.max_new_tokens = 10
        config.stop_strings, config.stop_string_token_ids = ["###"], {"###": [[96, 97, 98], stop]}
        stopped = answer(model.generate(**inputs, generation_config=config), inputs)
        for stopped_row, free_row in zip(stopped, free, strict=True):
            ends = [i + 2 for i in range(len(free_row) - 1) if free_row[i : i + 2].tolist() == stop]
            length = min(ends, default=len(free_row))
            assert torch.equal(stopped_row[:length], free_row[:length])
            assert not stopped_row[length:].any()

    def test_they_are_the_models_own_default(self, model, tmp_path):
        inputs = batch(prompt(5))
        free = answer(model.generate(**inputs), inputs)[0]
        model = copy.deepcopy(model)
        model.generation_config = GenerationConfig(
            max_new_tokens=8,
            pad_token_id=0,
            stop_strings=["###", "\n###"],
            stop_string_token_ids={"###": [free[2:3].tolist()], "\n###": [[98, 98]]},
        )
        model.save_pretrained(tmp_path)
        model = VideoLlamaForConditionalGeneration.from_pretrained(tmp_path)
        for options in ({}, {"max_new_tokens": 5}, {"generation_config": GenerationConfig(max_new_tokens=5)}):
            stopped = answer(model.generate(**inputs, **options), inputs)[0]
            assert torch.equal(stopped, free[: free.tolist().index(int(free[2])) + 1]), options

    def test_strings_of_unknown_tokens_need_a_tokenizer(self, model):
        with pytest.raises(ValueError, match="tokenizer"):
            model.generate(**batch(prompt(5)), stop_strings=["unknown"])


@pytest.mark.parametrize(
    "ids, media, counts",
    [
        (prompt(3, "video"), {"pixel_values_videos": videos(2)}, (NUM_VIDEO_TOKENS, 2 * NUM_VIDEO_TOKENS)),
        (prompt(3, "video", "video"), {"pixel_values_videos": videos(1)}, (2 * NUM_VIDEO_TOKENS, NUM_VIDEO_TOKENS)),
        (prompt(3, "video")[:-1], {"pixel_values_videos": videos(1)}, (NUM_VIDEO_TOKENS - 1, NUM_VIDEO_TOKENS)),
        (prompt(3, "image"), {"pixel_values": images(2)}, (NUM_VIDEO_TOKENS, 2 * NUM_VIDEO_TOKENS)),
        (prompt(3, "audio"), {"input_features": sounds(3)}, (NUM_AUDIO_TOKENS, 3 * NUM_AUDIO_TOKENS)),
        (prompt(3), {"input_features": sounds(1)}, (0, NUM_AUDIO_TOKENS)),
        (prompt(3, "audio"), {}, (NUM_AUDIO_TOKENS, 0)),
    ],
)
def test_a_wrong_number_of_placeholders_is_an_error_that_names_both_counts(model, ids, media, counts):
    expected = r"\b{}\b.*placeholder.*\b{}\b".format(*counts)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=expected):
            call(**batch(ids), **media)


def test_beams_with_a_wrong_number_of_placeholders(model):
    with pytest.raises(ValueError, match=rf"\b{NUM_VIDEO_TOKENS}\b.*placeholder.*\b{2 * NUM_VIDEO_TOKENS}\b"):
        model.generate(**batch(prompt(3, "video")), pixel_values_videos=videos(2), num_beams=2)


class TestCompile:
    """Nothing on the way of media or tokens breaks the graph."""

    @pytest.fixture(autouse=True)
    def forget_graphs(self):
        torch.compiler.reset()
        yield
        torch.compiler.reset()

    @staticmethod
    def compile(function: Callable) -> Callable:
        # The graph is what is tested, not the machine code that is made of it
        return torch.compile(function, fullgraph=True, backend="eager")

    @torch.no_grad()
    @pytest.mark.parametrize(
        "getter, inputs",
        [
            ("get_image_features", {"pixel_values": images(2)}),
            ("get_video_features", {"pixel_values_videos": videos(2)}),
            (
                "get_video_features",
                {"pixel_values_videos": videos(2), "padding_mask_videos": torch.tensor([[1, 1, 0], [1, 1, 1]])},
            ),
            ("get_audio_features", {"input_features": sounds(2)}),
            ("get_audio_features", {"pixel_values_videos": videos(2)}),
        ],
    )
    def test_feature_getters(self, model, getter, inputs):
        getter = getattr(model, getter)
        expected = getter(**inputs).pooler_output
        torch.testing.assert_close(self.compile(getter)(**inputs).pooler_output, expected)

    @torch.no_grad()
    def test_prefill(self, model):
        inputs = all_prompts()
        torch.testing.assert_close(self.compile(model)(**inputs).logits, model(**inputs).logits)

    @torch.no_grad()
    def test_decoding_step_with_a_static_cache(self, model):
        inputs = all_prompts()
        caches = [StaticCache(config=model.config, max_cache_len=64) for _ in range(2)]
        logits = [model(**inputs, past_key_values=cache).logits[:, -1:] for cache in caches]
        step = self.compile(model)
        mask = inputs["attention_mask"]
        for _ in range(3):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            tokens = logits[0].argmax(-1)
            logits = [
                forward(input_ids=tokens, attention_mask=mask, past_key_values=cache).logits
                for forward, cache in zip((step, model), caches, strict=True)
            ]
            torch.testing.assert_close(*logits)

    def test_generate(self, model):
        inputs = all_prompts()
        expected = model.generate(**inputs)
        model = copy.deepcopy(model)
        model.forward = self.compile(model.forward)
        assert torch.equal(model.generate(**inputs, cache_implementation="static"), expected)


class TestFrames:
    """Videos of different lengths."""

    @torch.no_grad()
    @pytest.mark.parametrize("lengths", [(3, 5), (6, 1, 4), (7, 9, 3)], ids=str)
    def test_padding_changes_nothing(self, model, lengths):
        """Up to the published positions and, interpolated, beyond them."""
        model = tiny_model(interpolate_frame_positions=True)
        alone = [videos(1, length, seed=length) for length in lengths]
        together = torch.randn(len(lengths), max(lengths), *alone[0].shape[2:])
        mask = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
        for i, length in enumerate(lengths):
            together[i, :length] = alone[i]
            mask[i, :length] = 1
        batched = model.get_video_features(together, mask).pooler_output
        for i, video in enumerate(alone):
            expected = model.get_video_features(video).pooler_output
            torch.testing.assert_close(batched[i : i + 1], expected, atol=1e-5, rtol=1e-5)
        padded = model.get_video_features(together, mask.bool()).pooler_output
        torch.testing.assert_close(padded, batched)
        prompts = batch(*(prompt(3, "video", 2) for _ in lengths))
        answers = model.generate(**prompts, pixel_values_videos=together, padding_mask_videos=mask)
        for row, video in zip(answers, alone, strict=True):
            assert torch.equal(model.generate(**batch(prompt(3, "video", 2)), pixel_values_videos=video)[0], row)

    @torch.no_grad()
    def test_padding_of_frames_for_the_audio_branch_changes_nothing(self, model):
        together = videos(2, 4)
        mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
        batched = model.get_audio_features(pixel_values_videos=together, padding_mask_videos=mask).pooler_output
        alone = model.get_audio_features(pixel_values_videos=together[:1, :2]).pooler_output
        torch.testing.assert_close(batched[:1], alone, atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_beams_with_padding(self, model):
        mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
        frames = videos(2, 4)
        inputs = batch(prompt(3, "video", 2), prompt(5, "video", seed=1))
        beams = model.generate(**inputs, pixel_values_videos=frames, padding_mask_videos=mask, num_beams=2)
        alone = batch(prompt(3, "video", 2))
        expected = model.generate(**alone, pixel_values_videos=frames[:1, :2], num_beams=2)
        assert torch.equal(answer(beams, inputs)[:1], answer(expected, alone))

    def test_more_frames_than_positions_are_refused(self, model):
        assert model.config.max_frames == 6
        for call in (model, model.generate):
            with pytest.raises(ValueError, match="7 frames.*6.*interpolate_frame_positions"):
                call(**batch(prompt(3, "video")), pixel_values_videos=videos(1, 7))

    @torch.no_grad()
    def test_interpolation_leaves_short_videos_alone(self, model):
        stretching = tiny_model(interpolate_frame_positions=True)
        for num_frames in (1, 6):
            inputs = videos(2, num_frames)
            expected = model.get_video_features(inputs).pooler_output
            assert torch.equal(stretching.get_video_features(inputs).pooler_output, expected)

    @torch.no_grad()
    @pytest.mark.parametrize("chunk_size", [1, 4])
    def test_chunks_of_frames_change_nothing(self, model, chunk_size):
        chunked = tiny_model(frame_chunk_size=chunk_size)
        for getter, inputs in (("get_video_features", videos(2, 5)), ("get_audio_features", sounds(2, 3))):
            expected = getattr(model, getter)(inputs, output_hidden_states=True)
            with count_calls(chunked) as calls:
                outputs = getattr(chunked, getter)(inputs, output_hidden_states=True)
            num_inputs = inputs.shape[0] * inputs.shape[1]
            assert sorted(calls.values()) == sorted((num_inputs, -(-num_inputs // chunk_size)))
            torch.testing.assert_close(outputs.pooler_output, expected.pooler_output, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(outputs.hidden_states, expected.hidden_states, atol=1e-5, rtol=1e-5)


def test_more_clips_than_positions_are_refused(model):
    assert model.config.audio_config.max_source_positions == 4
    with pytest.raises(ValueError, match="5 clips.*4"):
        model.generate(**batch(prompt(3, "audio")), input_features=sounds(1, 5))


def test_sounds_of_a_model_that_does_not_hear_are_refused():
    deaf = tiny_model(audio_config=None, audio_vision_config=None)
    with pytest.raises(ValueError, match="audio_config"):
        deaf.generate(**batch(prompt(3, "audio")), input_features=sounds(1))
