"""Generated answers: the end of an answer, and the agreement of two answers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING

from irdscale.tasks.chats import added_tokens

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

MARK = "####"


class AnswerEnds:
    """Where the answers end that a model generates to the prompts of a split: at the end of a turn, or of the sequence.

    `tokens` are those that end an answer: the end-of-sequence token, the special tokens by which the chat template ends
    an answer, and the model's own ends of sequences as far as they are special tokens. Where the template ends answers
    by text, that text does, unless an expected answer holds it.

    Args:
        split: samples of sft.
        own: the end-of-sequence tokens of the model's generation settings.
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
        settings = {own} if isinstance(own, int) else set(own or ())
        # A token of texts is no end, but where there is no other.
        others |= settings & self._added if turns or others else settings
        self.tokens: list[int] = sorted(turns | (others - _within(split, turns or others)))
        self._ends = set(self.tokens)
        self._texts = sorted(text for text in texts if not any(text in answer.strip() for answer in self._answers))

    def _parts(self, end: str) -> tuple[int | None, str]:
        """The first special token of an end, if any, and the text before it: of white space, only what breaks lines."""
        tokens = self.tokenizer(end, add_special_tokens=False, verbose=False)["input_ids"]
        token = next((each for each in tokens if each in self._added and self._shows(each)), None)
        if token is None:
            return None, end.strip() or ("\n" if "\n" in end else "")
        return token, end.partition(str(self.tokenizer.convert_ids_to_tokens(token)))[0].strip()

    def _shows(self, token: int) -> bool:
        """Whether an added token is more than white space, and a token of its own."""
        return token != self.tokenizer.unk_token_id and bool(str(self.tokenizer.decode([token])).strip())

    def answer(self, place: int, tokens: list[int]) -> str:
        """The answer of the generated tokens to the prompt of the sample at `place`."""
        tokens = tokens[: next((i for i, token in enumerate(tokens) if token in self._ends), len(tokens))]
        expected, opening = self._answers[place], self._openings[place]
        # Special tokens are no part of an answer, but where the expected one holds some.
        skip = not any(special in expected for special in self._specials)
        if opening.strip():
            head = self.tokenizer(opening.rstrip(), add_special_tokens=False, verbose=False)["input_ids"]
            if head and head[-1] in self._added and head[-1] in tokens:
                # What stands before the answer, such as a thought, may be longer than the template's own.
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


def _within(split: Dataset, turns: set[int]) -> set[int]:
    """The tokens that stand within the answers of a split."""
    found: set[int] = set()
    for tokens, prompt in zip(split["input_ids"], split["prompt_length"], strict=True):
        stop = next((i for i in range(prompt, len(tokens)) if tokens[i] in turns), len(tokens))
        found.update(tokens[prompt:stop])
    return found


# Thousands' commas, or none.
_DIGITS = r"(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)"
_EXPONENT = r"(?:[eE][-+]?\d{1,3})?"
# A fraction, with an integer before it or not; or a decimal number.
_PLAIN = re.compile(rf"(?:({_DIGITS}) )?(\d+/\d+)|((?:{_DIGITS}(?:\.\d+)?|\.\d+){_EXPONENT})")
_CURRENCY = "$€£¥₹"
# Whatever looks like a number, from its first digit to the last that is joined with it: 3/4, 4:30, 1.5e3, 3x4, 10-3;
# with sign and currency before it, and a percent sign behind. Digits within a word (H2O, GPT-3) are none.
_RUN = re.compile(
    rf"(?<![\w.])(?<!\w[-–])(?P<sign>[-+]?)(?P<unit>[{_CURRENCY}]?)(?P<inner>[-+]?)"
    r"(?P<digits>(?:\d+ (?=\d+/\d))?\.?\d(?:[\w.,/:^*×+–-]*[\d¹²³¼-¾⅐-⅞])?)(?P<percent> ?%)?"
)
# What may stand beside a number that is all of an answer.
_BESIDE = re.compile(rf"[\s.*`'\"{_CURRENCY}]*")

# A number and its unit: a currency, a percent sign, or none.
_Number = tuple[Fraction, str]


def same_answer(found: str, expected: str) -> bool:
    """Whether two answers agree: as numbers if the expected one is a number, else in their words.

    The answer is what stands behind `####`, as GSM8K writes it, if anything does, or else all of the text. A number may
    have thousands' commas, an exponent, a sign, a currency or a percent sign, or be a fraction. What was found may hold
    other words: of a text without `####` the last number counts. Units differ if both answers have one. The first line
    break after a `####` answer ends it: a model that goes on and on is judged by its first answer.
    """
    if found.split() == expected.split():
        return True
    # Where lines follow the last `####`, it is a heading; so are those before it.
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
    """The number that a text is, if it is one."""
    text = _with_minus(text)
    runs = list(_RUN.finditer(text))
    if len(runs) != 1 or not _BESIDE.fullmatch(text[: runs[0].start()] + text[runs[0].end() :]):
        return None
    return _value(runs[0])


def _numbers(text: str) -> Iterator[_Number | None]:
    """The numbers of a text; None for what looks like one and is none, such as a time."""
    return map(_value, _RUN.finditer(_with_minus(text)))


def _with_minus(text: str) -> str:
    return text.replace("\N{MINUS SIGN}", "-")


def _value(run: re.Match[str]) -> _Number | None:
    parts = _PLAIN.fullmatch(run["digits"])
    if parts is None or (run["sign"] and run["inner"]):
        return None
    whole, fraction, decimal = parts.groups()
    try:
        value = Fraction(fraction or decimal.replace(",", "")) + (int(whole.replace(",", "")) if whole else 0)
    except (ValueError, ZeroDivisionError):
        # A fraction of zero, or more digits than Python reads.
        return None
    return -value if "-" in run["sign"] + run["inner"] else value, run["unit"] or (run["percent"] or "").strip()
