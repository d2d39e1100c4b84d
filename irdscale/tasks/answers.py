"""Generated answers: their ends, and their agreement with expected answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from irdscale.tasks.answer_places import added_tokens

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MARK = "####"


def end_tokens(own: int | list[int] | None) -> set[int]:
    """End-of-sequence tokens of a model's generation settings, which hold one, several or none."""
    return {own} if isinstance(own, int) else set(own or ())


class AnswerEnds:
    """The ends of answers that a model generates to the prompts of a split.

    `tokens` end an answer: the end-of-sequence token, the special tokens that end a turn in the chat template, and the
    special tokens among the model's own end-of-sequence tokens. Text by which the template ends a turn also ends an
    answer, unless an expected answer contains it.

    Args:
        split: samples of sft.
        own: end-of-sequence tokens of the model's generation settings.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, split: Dataset, own: int | list[int] | None) -> None:
        self.tokenizer = tokenizer
        self._added, self._specials = added_tokens(tokenizer), [t for t in tokenizer.all_special_tokens if t]
        self._openings, self._answers = list(split["opening"]), list(split["answer"])
        turns: set[int] = set()
        texts: set[str] = set()
        for end in {end for ends in split["ends"] for end in ends}:
            token, text = self._parts(end)
            if token is not None:
                turns.add(token)
            if text:
                texts.add(text)
        others = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
        settings = end_tokens(own)
        # Tokens of ordinary text end answers only if there are no others.
        others |= settings & self._added if turns or others else settings
        self.tokens: list[int] = sorted(turns | (others - _tokens_of_answers(split, turns or others)))
        self._ends = set(self.tokens)
        self._texts = sorted(text for text in texts if not any(text in answer.strip() for answer in self._answers))

    def _parts(self, end: str) -> tuple[int | None, str]:
        """The first special token of an end, if any, and the text before it; white space counts if it breaks a line."""
        tokens = self.tokenizer(end, add_special_tokens=False, verbose=False)["input_ids"]
        token = next((each for each in tokens if each in self._added and self._is_text(each)), None)
        if token is None:
            return None, end.strip() or ("\n" if "\n" in end else "")
        return token, end.partition(str(self.tokenizer.convert_ids_to_tokens(token)))[0].strip()

    def _is_text(self, token: int) -> bool:
        """Whether an added token is neither white space nor the unknown token."""
        return token != self.tokenizer.unk_token_id and bool(str(self.tokenizer.decode([token])).strip())

    def answer(self, place: int, tokens: list[int]) -> str:
        """Text of the answer in the tokens generated for the sample at `place`."""
        tokens = tokens[: next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))]
        expected, opening = self._answers[place], self._openings[place]
        # Special tokens belong to an answer only if the expected answer contains some.
        skip = not any(special in expected for special in self._specials)
        if opening.strip():
            head = self.tokenizer(opening.rstrip(), add_special_tokens=False, verbose=False)["input_ids"]
            if head and head[-1] in self._added and head[-1] in tokens:
                # The text before the answer, such as a thought, may be longer than the template's.
                tokens = tokens[len(tokens) - tokens[::-1].index(head[-1]) :]
            else:
                start = str(self.tokenizer.decode(head, skip_special_tokens=skip)).strip()
                text = str(self.tokenizer.decode(tokens, skip_special_tokens=skip)).strip()
                return self._until_end(text.removeprefix(start).strip())
        return self._until_end(str(self.tokenizer.decode(tokens, skip_special_tokens=skip)).strip())

    def _until_end(self, text: str) -> str:
        for end in self._texts:
            text = text.partition(end)[0]
        return text


def _tokens_of_answers(split: Dataset, turns: set[int]) -> set[int]:
    """All tokens inside the answers of a split."""
    found: set[int] = set()
    for tokens, prompt in zip(split["input_ids"], split["prompt_length"], strict=True):
        stop = next((i for i in range(prompt, len(tokens)) if tokens[i] in turns), len(tokens))
        found.update(tokens[prompt:stop])
    return found


# Digits, with or without commas between thousands.
_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)"
_EXPONENT = r"(?:[eE][-+]?\d{1,3})?"
# A fraction, with or without an integer before it; or a decimal number.
_PLAIN = re.compile(rf"(?:({_DIGITS}) )?(\d+/\d+)|((?:{_DIGITS}(?:\.\d+)?|\.\d+){_EXPONENT})")
_CURRENCY = "$€£¥₹"
# Text that looks like a number, from its first digit to its last: 3/4, 4:30, 1.5e3, 3x4, 10-3; with a sign and a
# currency before it, and a percent sign after it. Digits inside a word (H2O, GPT-3) do not match.
_RUN = re.compile(
    rf"(?<![\w.])(?<!\w[-–])(?P<sign>[-+]?)(?P<unit>[{_CURRENCY}]?)(?P<inner>[-+]?)"
    r"(?P<digits>(?:\d+ (?=\d+/\d))?\.?\d(?:[\w.,/:^*×+–-]*[\d¹²³¼-¾⅐-⅞])?)(?P<percent> ?%)?"
)
# Characters allowed around a number that is the full answer.
_BESIDE = re.compile(rf"[\s.*`'\"{_CURRENCY}]*")

# A number and its unit: a currency, a percent sign, or none.
_Number = tuple[Fraction, str]


def same_answer(found: str, expected: str) -> bool:
    """Whether two answers agree: as numbers if the expected one is a number, else word by word.

    An answer is the text after `####`, as in GSM8K, up to the line break, or the full text without `####`. A number may
    have commas between thousands, an exponent, a sign, a currency or a percent sign, or be a fraction. The found text
    may contain other words: without `####`, its last number counts. Units are compared if both answers have one.
    """
    if found.split() == expected.split():
        return True
    # If lines follow the last `####`, it marks a heading, as do those before it.
    *headings, behind = expected.split(MARK)
    wanted = _first_line(behind) if headings else expected
    number = _sole_number(wanted)
    parts = found.split(MARK)
    place = min(max(1, len(headings)), len(parts) - 1)
    given = _first_line(parts[place]) if place else found
    if number is None:
        return bool(headings) and wanted == behind.strip() and given.split() == wanted.split()
    numbers = list(_numbers(given))
    if not numbers:
        return False
    other = numbers[0 if place else -1]
    return other is not None and other[0] == number[0] and (other[1] == number[1] or not (other[1] and number[1]))


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0]


def _sole_number(text: str) -> _Number | None:
    """The value of a text that is one number, else None."""
    text = _with_minus(text)
    runs = list(_RUN.finditer(text))
    if len(runs) != 1 or not _BESIDE.fullmatch(text[: runs[0].start()] + text[runs[0].end() :]):
        return None
    return _value(runs[0])


def _numbers(text: str) -> Iterator[_Number | None]:
    """The numbers of a text; None for text that only looks like a number, such as a time."""
    return map(_value, _RUN.finditer(_with_minus(text)))


def _with_minus(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")


def _value(run: re.Match[str]) -> _Number | None:
    parts = _PLAIN.fullmatch(run["digits"])
    if parts is None or (run["sign"] and run["inner"]):
        return None
    integer, fraction, decimal = parts.groups()
    try:
        value = Fraction(fraction or decimal.replace(",", "")) + (int(integer.replace(",", "")) if integer else 0)
    except (ValueError, ZeroDivisionError):
        # The denominator is zero, or Python refuses so many digits.
        return None
    return -value if "-" in run["sign"] + run["inner"] else value, run["unit"] or (run["percent"] or "").strip()
