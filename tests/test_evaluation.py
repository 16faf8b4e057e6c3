"""What an evaluation consists of: readers of published files, how answers are read, scores and their intervals."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transformers_videollama.evaluation.benchmarks import BENCHMARKS, Sources
from transformers_videollama.evaluation.caption_files import read_captions
from transformers_videollama.evaluation.caption_metrics import score_captions
from transformers_videollama.evaluation.instruction_checks import is_followed
from transformers_videollama.evaluation.instructions import loosened
from transformers_videollama.evaluation.items import Item, Medium
from transformers_videollama.evaluation.judge import read_verdict
from transformers_videollama.evaluation.media_files import MediaFiles
from transformers_videollama.evaluation.mvbench import chosen_option, question_text, score_mvbench
from transformers_videollama.evaluation.object_probe import COCO_OBJECTS, find_objects, make_probe
from transformers_videollama.evaluation.output_folder import Answers, keep_settings
from transformers_videollama.evaluation.pope import read_yes_no, score_pope
from transformers_videollama.evaluation.published import PUBLISHED
from transformers_videollama.evaluation.qa_metrics import score_answers
from transformers_videollama.evaluation.scores import Score, mean, share
from transformers_videollama.media import MediaError


def write(path: Path, content: Any) -> Path:
    """A file of text, of JSON, or of JSON Lines if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read(benchmark: str, *files: Path, **sources: Any) -> list[Item]:
    return BENCHMARKS[benchmark].read(Sources(files, **sources))


def by_name(scores: list[Score]) -> dict[str, Score]:
    return {f"{score.group}: {score.name}" if score.group else score.name: score for score in scores}


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_msvd_qa_knows_both_names_of_a_video(tmp_path: Path) -> None:
    rows = [{"answer": "cat", "id": 30933, "question": "what plays?", "video_id": 1301}]
    file = write(tmp_path / "test_qa.json", rows)
    mapping = write(tmp_path / "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid1300\nabc_def_1_20 vid1301\n")
    (item,) = read("msvd-qa", file, mapping=mapping)
    assert (item.id, item.question, item.references, item.group) == ("30933", "what plays?", ("cat",), "what")
    assert item.medium == Medium(("vid1301", "abc_def_1_20"))
    assert read("msvd-qa", file)[0].medium == Medium(("vid1301",))


def test_msrvtt_qa(tmp_path: Path) -> None:
    rows = [{"answer": "couch", "category_id": 14, "id": 158581, "question": "who sits?", "video_id": 7010}]
    (item,) = read("msrvtt-qa", write(tmp_path / "test_qa.json", rows))
    assert item.medium == Medium(("video7010",)) and item.group == "who"


@pytest.mark.parametrize("names", [["test_q.json"], ["test_q.json", "test_a.json"]])
def test_activitynet_qa_joins_questions_and_answers(names: list[str], tmp_path: Path) -> None:
    questions = [{"video_name": "1QIUV7WYKXg", "question": "is it warm?", "question_id": "v_1QIUV7WYKXg_3"}]
    answers = [{"answer": "yes", "type": 3, "question_id": "v_1QIUV7WYKXg_3"}]
    write(tmp_path / "test_q.json", questions), write(tmp_path / "test_a.json", answers)
    (item,) = read("activitynet-qa", *(tmp_path / name for name in names))
    assert item.references == ("yes",) and item.group == "yes or no"
    assert item.medium == Medium(("v_1QIUV7WYKXg", "1QIUV7WYKXg"))


def test_tgif_qa_as_a_table(tmp_path: Path) -> None:
    table = "gif_name\tquestion\tanswer\tvid_id\tkey\ntumblr_nk\twhat is in hand?\tphone\tFRAMEQA1\t7\n"
    (item,) = read("tgif-qa", write(tmp_path / "Test_frameqa_question.csv", table))
    assert item.medium == Medium(("tumblr_nk",)) and item.references == ("phone",)
    typed = table.replace("\tkey", "\tkey\ttype").replace("\t7\n", "\t7\t0\n")
    (item,) = read("tgif-qa", write(tmp_path / "typed.csv", typed))
    assert item.group == "what"  # the numbers are not those of ActivityNet-QA


def test_mvbench_reads_tasks_with_and_without_bounds(tmp_path: Path) -> None:
    row = {"video": "a.mp4", "question": "What?", "candidates": ["Sit.", "Run."], "answer": "Run."}
    write(tmp_path / "action_sequence.json", [{**row, "start": 1.5, "end": 4}])
    write(tmp_path / "object_shuffle.json", [{**row, "start": 1.5, "end": 4}])
    write(tmp_path / "episodic_reasoning.json", [{**row, "video": "folder", "start": 0, "end": 9.0, "subtitle": ""}])
    items = {item.group: item for item in read("mvbench", tmp_path)}
    assert items["action sequence"].medium == Medium(("star/Charades_v1_480/a.mp4", "a.mp4"), "video", 1.5, 4.0)
    assert items["object shuffle"].medium == Medium(("perception/videos/a.mp4", "a.mp4"))
    assert items["episodic reasoning"].medium.names[0] == "tvqa/frames_fps3_hq/folder"
    assert question_text(items["object shuffle"]).startswith("Question: What?\nOptions:\n(A) Sit.\n(B) Run.\n")


def test_captions_of_msrvtt_and_msvd(tmp_path: Path) -> None:
    videos = [{"video_id": "video1", "split": "train"}, {"video_id": "video2", "split": "test"}]
    sentences = [{"video_id": f"video{n}", "caption": c} for n, c in ((1, "a"), (2, "b"), (2, "c"))]
    msrvtt = write(tmp_path / "videodatainfo_2016.json", {"videos": videos, "sentences": sentences})
    assert read_captions([msrvtt]) == {"video2": ["b", "c"]}
    assert set(read_captions([msrvtt], "all")) == {"video1", "video2"}
    with pytest.raises(ValueError, match="no captions of the split 'val'; there are test, train"):
        read_captions([msrvtt], "val")

    text = write(tmp_path / "AllVideoDescriptions.txt", "# head\n\na_1_2 A cat runs.\na_1_2 a cat\nb_b_3_4 a dog\n")
    assert read_captions([text]) == {"a_1_2": ["A cat runs.", "a cat"], "b_b_3_4": ["a dog"]}
    mapping = write(tmp_path / "youtube_mapping.txt", "a_1_2 vid1\nb_b_3_4 vid1970\n")
    (item,) = read("msvd-caption", text, mapping=mapping)
    assert item.medium == Medium(("b_b_3_4", "vid1970")) and item.references == ("a dog",)
    head = "VideoID,Start,End,WorkerID,Source,AnnotationTime,Language,Description\n"
    rows = 'a,1,2,1,clean,9,English,"A cat, running"\na,1,2,1,clean,9,German,Eine Katze\n'
    assert read_captions([write(tmp_path / "video_corpus.csv", head + rows)]) == {"a_1_2": ["A cat, running"]}


def test_pope_is_about_pictures_and_videos(tmp_path: Path) -> None:
    rows = [{"question_id": 1, "image": "COCO_val2014_1.jpg", "text": "Is there a dog in the image?", "label": "no"}]
    items = read("pope", write(tmp_path / "coco_pope_popular.jsonl", rows))
    assert items[0].group == "popular" and items[0].medium == Medium(("COCO_val2014_1.jpg",), "image")
    videos = write(tmp_path / "random.jsonl", [{"question_id": 1, "video": "a", "text": "Is …?", "label": "yes"}])
    assert read("pope", videos)[0].medium == Medium(("a",), "video")


@pytest.mark.parametrize(
    "benchmark, name, content, message",
    [
        ("msrvtt-qa", "test_qa.json", "[{", "test_qa.json is no JSON"),
        ("msrvtt-qa", "test_qa.json", [], "there is no question in it"),
        ("msrvtt-qa", "test_qa.json", [{"question": "Who?", "video_id": 1}], "there is no answer to the question '0'"),
        ("msrvtt-qa", "test_qa.json", [{"question": "?", "answer": "a"}], "entry 0: expected a field 'video_id' or"),
        ("tgif-qa", "Test_action_question.csv", "gif_name\tquestion\ta1\tanswer\nx\tWhat?\ty\t0\n", "multiple choice"),
        ("mvbench", "a.json", [{"video": "a", "question": "?", "candidates": ["b"], "answer": "c"}], "none of the"),
        ("pope", "a.jsonl", [{"question_id": 1, "image": "a", "text": "?", "label": "maybe"}], "'yes' or 'no'"),
        ("msvd-caption", "a.txt", "one two\n", "a.txt:1: expected `<video>_<start>_<end> caption`"),
        ("instructions", "a.jsonl", [{"key": 1, "instruction_id_list": ["x"]}], "1 instructions, but arguments of 0"),
    ],
)
def test_wrong_files_are_named(benchmark: str, name: str, content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        read(benchmark, write(tmp_path / name, content))
    assert message in str(raised.value) and name in str(raised.value)


def test_an_object_probe_is_made_of_questions(tmp_path: Path) -> None:
    asked = [("a", "what does the man hold?", "cat"), ("b", "who is it?", "woman"), ("c", "where?", "bed")]
    table = "gif_name\tquestion\tanswer\n" + "".join("\t".join(row) + "\n" for row in asked)
    rows = [{"video_id": v, "question": q, "answer": a, "id": n} for n, (v, q, a) in enumerate(asked)]
    (tmp_path / "frameqa.csv").write_text(table)
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    probes = [read("object-probe", tmp_path / name) for name in ("frameqa.csv", "questions.jsonl", "questions.json")]
    assert probes[0] == probes[1] == probes[2] and probes[0]


def test_media_are_found_wherever_they_are(tmp_path: Path) -> None:
    for name in ("a/x.mp4", "b/x.avi", "b/deep/v_1.5_b.webm", "frames/clip/00001.jpg", "n.txt"):
        write(tmp_path / "media" / name, "")
    write(tmp_path / "outside.mp4", "")
    files = MediaFiles(tmp_path / "media")
    found = {name: files.find([name]).relative_to(files.root).as_posix() for name in ("a/x", "v_1.5_b", "clip")}
    assert found == {"a/x": "a/x.mp4", "v_1.5_b": "b/deep/v_1.5_b.webm", "clip": "frames/clip"}
    assert files.find(["no", "b/x.mp4"]).name == "x.avi"  # the ending may be another one
    with pytest.raises(MediaError, match="x may be a/x.mp4 or b/x.avi"):
        files.find(["x"])
    write(tmp_path / "media" / "thumb" / "v.mkv", ""), write(tmp_path / "media" / "thumb" / "v.jpg", "")
    files = MediaFiles(tmp_path / "media")
    assert (files.find(["v"]).name, files.find(["v"], "image").name) == ("v.mkv", "v.jpg")
    for name in ("n", "../outside", str(tmp_path / "outside.mp4")):
        with pytest.raises(MediaError, match="There is no"):
            files.find([name])


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize(
    "reply, verdict",
    [
        ("{'pred': 'yes', 'score': 4}", (True, 4.0)),
        ('```json\n{"pred": "No", "score": 0}\n```', (False, 0.0)),
        ("Sure! {'pred': 'yes', 'score': 4.8}", (True, 4.8)),
        ("{'pred': 'yes', 'score': '3'}", (True, 3.0)),
        ("{'pred': 'yes', 'score': 6}", None),
        ("{'pred': 'maybe', 'score': 3}", None),
        ("{'pred': 'yes', 'score': True}", None),
        ("{'pred': 'yes', 'score': __import__('os').getpid()}", None),
        ("yes, 4", None),
        (
            "<think>As in {'pred': 'yes', 'score': 4}?" + " Hm." * 9000 + "</think>{'pred': 'no', 'score': 0}",
            (False, 0.0),
        ),
    ],
)
def test_a_verdict_is_read_and_never_executed(reply: str, verdict: tuple[bool, float] | None) -> None:
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    "answer, option",
    [
        ("B) Run.", "Run."),
        ("(b)", "Run."),
        ("A", "Sit."),
        ("They run.", "Run."),
        ("A man may run.", "Run."),
        ("A\nbecause they run", "Sit."),
        ("D", None),
        ("sit or run", None),
        ("", None),
    ],
)
def test_which_option_an_answer_chooses(answer: str, option: str | None) -> None:
    assert chosen_option(answer, Item("1", "?", candidates=("Sit.", "Run."))) == option


@pytest.mark.parametrize(
    "answer, candidates, option",
    [
        ("I do not know", ("Yes", "No"), None),
        ("It moved 13 times", ("3", "5", "7"), None),
        ("It moved 3 times", ("3", "5", "7"), "3"),
        ("not sure", ("yes", "sure", "not sure"), "not sure"),
        ("It is C++.", ("C++", "C"), "C++"),
    ],
)
def test_an_option_is_repeated_as_whole_words(answer: str, candidates: tuple[str, ...], option: str | None) -> None:
    assert chosen_option(answer, Item("1", "?", candidates=candidates)) == option


def test_yes_and_no_are_read_as_by_pope() -> None:
    answers = ("Yes, there is.", "No. Yes!", "There is not a dog", "A dog.", "")
    assert [read_yes_no(answer) for answer in answers] == [
        ("yes", True),
        ("no", True),
        ("no", True),
        ("yes", False),
        ("yes", False),
    ]


@pytest.mark.parametrize(
    "name, arguments, followed, broken",
    [
        ("keywords:existence", {"keywords": ["sun", "Sky"]}, "The Sun in the sky", "The sun"),
        ("keywords:frequency", {"keyword": "a", "frequency": 2, "relation": "less than"}, "a b", "a a"),
        ("keywords:forbidden_words", {"forbidden_words": ["rain"]}, "It is raining", "The rain."),
        ("keywords:letter_frequency", {"letter": "O", "let_frequency": 2, "let_relation": "at least"}, "oO", "o"),
        ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n***\nb"),
        ("length_constraints:number_words", {"num_words": 2, "relation": "at least"}, "two words", "one"),
        (
            "length_constraints:nth_paragraph_first_word",
            {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Then"},
            "First.\n\n'Then, it' was",
            "Then\n\nwas",
        ),
        ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] [b]", "[a]"),
        ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "x\nP. P.S. y", "P.S. y"),
        ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n**b**"),
        ("detectable_format:constrained_response", {}, "Well. My answer is no.", "no"),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "a *b* c", "a ** c"),
        ("detectable_format:multiple_sections", {"section_spliter": "Part", "num_sections": 2}, "Part 1 a Part 2 b", "a"),
        ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a}"),
        ("detectable_format:title", {}, "<<A title>>\ntext", "<<>>"),
        ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
        ("combination:repeat_prompt", {"prompt_to_repeat": "Say it"}, "say it: it", "it"),
        ("startend:end_checker", {"end_phrase": "Bye."}, 'So. bye."', "Bye"),
        ("startend:quotation", {}, '"a"', '"'),
        ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A BIG b", "A b"),
        ("change_case:english_capital", {}, "ALL, 1", "All"),
        ("change_case:english_lowercase", {}, "all, 1", "All"),
        ("punctuation:no_comma", {}, "a b", "a, b"),
    ],
)  # fmt: skip
def test_instructions_are_checked(name: str, arguments: dict[str, Any], followed: str, broken: str) -> None:
    assert is_followed(name, {**arguments, "other": None}, followed) is True
    assert is_followed(name, arguments, broken) is False and is_followed(name, arguments, " ") is False


def test_unknown_instructions_are_not_judged_and_wrong_ones_are_named() -> None:
    assert is_followed("language:response_language", {"language": "de"}, "Hallo") is None
    with pytest.raises(ValueError, match="length_constraints:number_words does not go with"):
        is_followed("length_constraints:number_words", {"words": 2}, "a")
    assert "kept" in loosened("Sure!\n*kept*\nBye!")


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def test_intervals() -> None:
    assert share("a", [True] * 8 + [False] * 2) == Score(
        "a", 80.0, pytest.approx(49.02, abs=0.01), pytest.approx(94.33, abs=0.01), 10
    )  # Wilson (1927)
    values = np.random.default_rng(0).normal(3, 1, 400)
    measured = mean("b", values, seed=1)
    assert measured == mean("b", values, seed=1) != mean("b", values, seed=2)
    half = 1.96 * values.std() / 20
    assert [measured.low, measured.high] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.02)
    assert mean("c", [], 0).value is None and share("d", []).value is None and mean("e", [2.0], 0).low == 2.0


def test_answers_are_compared_without_a_judge() -> None:
    items = [
        Item(str(i), "what?", references=(reference,), group="what") for i, reference in enumerate(["cat", "two dogs"])
    ]
    scores = by_name(score_answers(items, [{"answer": "The cat!"}, {"answer": "I see two dogs running"}], 0))
    assert scores["exact match"].value == 50 and scores["what: contains the answer"].value == 100
    assert scores["ROUGE-L"].value == pytest.approx((100 + 100 * 2 * 2 / (2 + 5)) / 2)


def test_mvbench_averages_over_tasks() -> None:
    def item(index: int, group: str) -> Item:
        return Item(str(index), "?", references=("x",), candidates=("x", "y"), group=group)

    items = [item(0, "a"), item(1, "a"), item(2, "a"), item(3, "b")]
    answers = ["(A)", "(A)", "(A)", "(B)"]
    likelihoods = [[-1.0, -2.0], [-3.0, -2.0], [-1.0, -2.0], [-1.0, -2.0]]
    records = [{"answer": a, "likelihoods": pair} for a, pair in zip(answers, likelihoods, strict=True)]
    scores = by_name(score_mvbench(items, records, 0))
    assert scores["average of tasks: by generation"].value == 50
    assert scores["average of tasks: by likelihood"].value == pytest.approx(100 * (2 / 3 + 1) / 2)
    assert scores["a: by generation"].value == 100 and scores["no option named"].value == 0


def test_pope_scores() -> None:
    items = [
        Item(str(i), "?", references=(label,), group="random") for i, label in enumerate(["yes", "yes", "no", "no"])
    ]
    records = [{"answer": answer} for answer in ("Yes.", "No.", "Yes.", "a cat")]
    scores = by_name(score_pope(items, records, 0))
    values = {name.partition(": ")[2]: score.value for name, score in scores.items()}
    assert values == {
        "accuracy": 25,
        "precision": pytest.approx(100 / 3),
        "recall": 50,
        "F1": pytest.approx(40),
        "yes ratio": 75,
        "neither yes nor no": 25,
    }
    assert scores["random: F1"].low <= 40 <= scores["random: F1"].high


def test_an_object_probe_asks_about_what_is_shown_and_what_is_not() -> None:
    assert find_objects(["Two men eat hot dogs", "a knife"], COCO_OBJECTS) == {"person", "hot dog", "knife"}
    texts = {"v1": ["a man and a dog", "a person"], "v2": ["a man rides a horse"], "v3": ["a dog"], "v4": ["nothing"]}
    rows = make_probe(texts, COCO_OBJECTS, seed=0)
    assert rows == make_probe(texts, COCO_OBJECTS, seed=0) != make_probe(texts, COCO_OBJECTS, seed=1)
    for video in ("v1", "v2", "v3"):
        shown = find_objects(texts[video], COCO_OBJECTS)
        for row in (row for row in rows if row["video"] == video):
            (asked,) = find_objects([row["text"]], COCO_OBJECTS)
            assert (asked in shown) == (row["label"] == "yes")
    labels = [row["label"] for row in rows]
    assert labels.count("yes") == labels.count("no") and not any(row["video"] == "v4" for row in rows)
    asked = {
        sampling: [row["text"] for row in rows if row["video"] == "v3" and row["sampling"] == sampling][-1]
        for sampling in ("popular", "adversarial")
    }
    assert set(asked.values()) == {"Is there a person in the video?"}  # twice in the data, once beside a dog


def test_caption_scores_are_those_of_the_library() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    from transformers_videollama.evaluation.caption_metrics import _java

    captions = {
        "1": "A man rides a horse.",
        "2": "two dogs run\nin the park",
        "3": "",
        "4": "a cat sleeps on the sofa",
    }
    references = {
        "1": ["a man rides a horse", "someone is riding a horse"],
        "2": ["dogs are running", "two dogs play in a park"],
        "3": ["a bird flies"],
        "4": ["a kitten is asleep on a couch"],
    }
    scores = by_name(score_captions(captions, references, seed=0))
    found = {"1": ["a man rides a horse"], "2": ["two dogs run in the park"], "3": [""], "4": [captions["4"]]}
    with _java():
        meteor = Meteor()
    expected = dict(
        zip([f"BLEU-{n}" for n in (1, 2, 3, 4)], Bleu(4).compute_score(references, found, 0)[0], strict=True)
    )
    for name, metric in (("METEOR", meteor), ("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        expected[name] = metric.compute_score(references, found)[0]
    assert {name: score.value for name, score in scores.items()} == pytest.approx(
        {name: 100 * value for name, value in expected.items()}
    )
    assert all(score.low <= score.value <= score.high and score.count == 4 for score in scores.values())


def test_published_scores_belong_to_benchmarks() -> None:
    assert set(PUBLISHED) <= set(BENCHMARKS)
    tasks = [v for k, v in PUBLISHED["mvbench"][0].scores.items() if not k.startswith("average")]
    assert len(tasks) == 20 and np.mean(tasks) == pytest.approx(34.1, abs=0.05)


def test_answers_may_hold_any_character(tmp_path: Path) -> None:
    answer = "one\u2028two\x85three\nfour"
    Answers(tmp_path / "answers.jsonl").append([{"id": "1", "answer": answer}, {"id": "2", "error": "no"}])
    assert Answers(tmp_path / "answers.jsonl").records["1"]["answer"] == answer
    assert set(Answers(tmp_path / "answers.jsonl", retry_errors=True).records) == {"1"}


def test_a_folder_is_for_one_set_of_settings(tmp_path: Path) -> None:
    keep_settings(tmp_path / "run", {"seed": 0, "model": "a"})
    keep_settings(tmp_path / "run", {"weights": "f00"})
    with pytest.raises(ValueError, match='other settings: model was "a" and is "b"'):
        keep_settings(tmp_path / "run", {"seed": 0, "model": "b"})
    write(tmp_path / "other" / "thesis.txt", "")
    with pytest.raises(ValueError, match="no folder of an evaluation, and not empty"):
        keep_settings(tmp_path / "other", {"seed": 0})
