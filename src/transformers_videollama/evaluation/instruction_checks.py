"""Checks whether a response follows the verifiable instructions of IFEval (arXiv 2311.07911).

Each is a function of the response and of the instruction's arguments, by the name that IFEval gives it. Left out are
those that need a model of language: the response's language and its number of sentences. Of the two about the case of
English text only the case is checked; words in capitals are told by letters, not by a tokenizer.
"""

import json
import re
from collections.abc import Callable
from typing import Any


def is_followed(name: str, arguments: dict[str, Any], response: str) -> bool | None:
    """
    Whether a response follows an instruction; an empty one follows none. None: there is no check for it.

    Args:
        name (`str`): IFEval's name of the instruction, such as `"punctuation:no_comma"`.
        arguments (`dict`): Its arguments, as in `kwargs` of the file.
        response (`str`): What was answered.

    Raises:
        ValueError: an argument is missing.
    """
    if name not in CHECKS:
        return None
    given = {key: value for key, value in arguments.items() if value is not None}
    try:
        return bool(response.strip()) and CHECKS[name](response, **given)
    except TypeError as error:
        raise ValueError(f"The instruction {name} does not go with the arguments {given}: {error}.") from error


def _compare(number: int, relation: str, limit: int) -> bool:
    return number < limit if relation == "less than" else number >= limit


def _existence(response: str, keywords: list[str]) -> bool:
    return all(keyword.lower() in response.lower() for keyword in keywords)


def _frequency(response: str, keyword: str, frequency: int, relation: str = "at least") -> bool:
    return _compare(response.lower().count(keyword.lower()), relation, frequency)


def _forbidden(response: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str = "at least") -> bool:
    return _compare(response.lower().count(letter.lower()), let_relation, let_frequency)


def _paragraphs(response: str, num_paragraphs: int) -> bool:
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", response)]
    inner = parts[1:-1]
    return all(inner) and len([part for part in parts if part]) == num_paragraphs


def _words(response: str, num_words: int, relation: str = "at least") -> bool:
    return _compare(len(re.findall(r"\w+", response)), relation, num_words)


def _first_word(response: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [part.strip() for part in response.split("\n\n")]
    if len([part for part in parts if part]) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    words = parts[nth_paragraph - 1].split()
    found = re.split(r"[.,?!'\"]", words[0].lstrip("'\""))[0].lower() if words else ""
    return bool(words) and found == first_word.lower()


def _placeholders(response: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", response)) >= num_placeholders


def _postscript(response: str, postscript_marker: str) -> bool:
    marks = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(marks.get(postscript_marker, re.escape(postscript_marker.lower())), response.lower()))


def _bullets(response: str, num_bullets: int) -> bool:
    stars = re.findall(r"^\s*\*[^\*].*$", response, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", response, re.MULTILINE)) == num_bullets


def _constrained(response: str) -> bool:
    return any(option in response for option in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


def _highlights(response: str, num_highlights: int) -> bool:
    found = re.findall(r"\*[^\n\*]*\*", response) + re.findall(r"\*\*[^\n\*]*\*\*", response)
    return len([part for part in found if part.strip("*").strip()]) >= num_highlights


def _sections(response: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", response)) - 1 >= num_sections


def _json(response: str) -> bool:
    text = re.sub(r"^```(json)?", "", response.strip(), flags=re.IGNORECASE).removesuffix("```").strip()
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _title(response: str) -> bool:
    return any(found.strip("<>").strip() for found in re.findall(r"<<[^\n]+>>", response))


def _two_responses(response: str) -> bool:
    parts = [part.strip() for part in response.split("******")]
    kept = [part for part in parts if part]
    return all(parts[1:-1]) and len(kept) == 2 and kept[0] != kept[1]


def _repeat(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _capital_words(response: str, capital_frequency: int, capital_relation: str = "at least") -> bool:
    words = re.findall(r"[\w'’-]+", response)
    return _compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


CHECKS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter_frequency,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": str.isupper,
    "change_case:english_lowercase": str.islower,
    "punctuation:no_comma": lambda response: "," not in response,
}
"""The checks by the names of the instructions."""
