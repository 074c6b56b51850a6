r"""The number that a text gives as its answer, in the digits and formats of many languages.

Where it is looked for, in this order:

1. The last ``\boxed{...}`` with a number in it (the form of arXiv 2601.14050): its last number.
2. The last answer phrase with a number right behind it: ``####`` (GSM8K), "The answer is", "答えは"
   and so on, in the languages of MGSM (arXiv 2210.03057) and ar, fa, he, hi, tr: that number, or
   the end of the equation that it begins.
3. The last number of the text, which is also what lm-eval's flexible-extract takes.

How it is read:

* Digits of any script. A minus (ASCII, U+2212, full-width) counts where it touches the number and
  stands behind no letter (but 是 は), digit or bracket, so that 10-12 ends in 12. Currency, units,
  % and marks around a number are ignored. 8万 is 80000.
* Groups of three may be split by , . ' ’ ٬ ، ， or a space, Indian groups by commas (1,23,456).
  Where two kinds of mark occur the last one is decimal. A lone point or comma is decimal unless
  exactly three digits follow it and one to three, the first not 0, precede it: 1.250 is 1250 in
  every language; 0.125, 1.25 and 1250.500 keep their fraction.
* None where the number so found is a fraction, root or power, 1e5, 1.2.3, or longer than
  ``MAX_DIGITS``. Passed over are digits behind a letter (B12, m^2, x_1), dates and times. Numbers
  in words or Chinese numerals, and "minus" as a word, are not read.
"""

from __future__ import annotations

import re
import string
from collections import deque
from decimal import Context, Decimal
from re import Match

from steered_moe.errors import SteeredMoEError

MAX_DIGITS = 30
PUNCTUATION = str.maketrans("", "", string.punctuation)
"""What lm-eval's ignore_punctuation and SQuAD's script leave out, for ``str.translate``."""
_PLACES, _BOX_LENGTH = 64, 400  # of so many boxes, phrases and terms at most, for time
_WINDOW, _MARGIN = 2000, 200  # where the last number is looked for first; a token is shorter

_SPACE = r"[ \u00a0\u2009\u202f]"
_GROUPING = r"[ \u00a0\u2009\u202f'’٬،，]"
_MONEY = (
    r"(?:[$€£¥₹৳฿₽₺₪₩＄￥]|(?<![^\W\d_])"
    r"(?:US|USD|EUR|GBP|JPY|CNY|RMB|INR|BDT|THB|RUB|KES|TZS|Rs\.?|Tk\.?|[KkTt]?[Ss]h\.?"
    r"|[Dd]ola|[Ss]hilingi) ?)"
)
_NUMBER = (
    rf"(?:(?<!\d)\d{{1,3}}(?:{_GROUPING}\d{{3}}(?!\d))+(?:[.,٫]\d+)?"
    r"|\d+(?:[.,٫]\d+)*|(?<![^\s($€£¥₹])\.\d+)"
)
_SCALES = {"": 0, "千": 3, "万": 4, "萬": 4, "百万": 6, "千万": 7, "億": 8, "亿": 8}
_SCALE = r"(?:[百千]?万|[萬億亿]|千(?![米克瓦卡]))"  # 千米 and 千克 are a kilometre and a kilogram
_WHOLE = re.compile(r"\d*|\d{1,3}([.,])\d{3}(?:\1\d{3})*|\d{1,2}(?:,\d{2})+,\d{3}")
_SCALED = re.compile(rf"({_NUMBER}){_SPACE}?({_SCALE}|)")
_TOKEN = re.compile(
    r"(?P<skipped>(?<!\d)(?:\d{4}([/-])\d{1,2}\2\d{1,2}|\d{1,2}([./])\d{1,2}\3(?:\d{4}|\d{2})"
    r"|\d{1,2}:\d{2}(?::\d{2})?)(?!\d)"
    r"|(?:[A-Za-zÀ-ÖØ-öø-ɏͰ-ϿЀ-ӿ]-?|(?<=[^\W_])_\{?|\^\{?-?)\d[\d.,]*)"
    rf"|(?P<minus>(?<![^\W是为為は])(?<![)\]%])(?<!\d )[-−])?{_MONEY}{{0,2}}"
    rf"(?P<number>{_NUMBER}(?:{_SPACE}?{_SCALE}(?:\d[\d.,]*{_SCALE})*(?:\d+(?!\d))?)?)"
    rf"(?P<more>(?:{_SPACE}\d+)?{_SPACE}?[/⁄∕]{_SPACE}?\d+|{_SPACE}?[¼-¾⅐-⅞]"
    r"|\^\{?-?\d*|[¹²³⁰⁴-⁹]+|[eE][+-]?\d+)?"
    r"|(?P<root>\\(?:[dt]?frac|sqrt)(?:\s?\{[^{}]{0,60}\}|\s?\d){1,2}|[¼-¾⅐-⅞])"
)
_STRETCH = re.compile(r"-?(?:[$0-9.,]{2,}|[0-9])")
_DIGIT = re.compile(r"[\d¼-¾⅐-⅞]")
_BOX = re.compile(r"\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)")

# What an answer is called: before a copula or a colon; the bare ones and #### also before neither.
_NAMES = "answer|antwort|respuesta|réponse|jibu|คำตอบ|答え|正解|答案|الإجابة|الجواب|תשובה"
_BARE = "ответ|উত্তর|సమాధానం|उत्तर|जवाब|پاسخ|جواب|cevap|yanıt"
_COPULA = "ist?|lautet|beträgt|est?|ni|হলো?|হচ্ছে|হবে|คือ|เท่ากับ|は|是|为|為|है|هي|هو|היא|הוא|[:：=—–]"
_NAME = re.compile(
    "|".join((_NAMES, _NAMES.title(), _NAMES.upper(), "(?P<bare>" + _BARE))
    + rf"|{_BARE.title()}|{_BARE.upper()}|####(?!\s*\d{{1,2}}[.)]\s+\w))"
)
_GAP = r"[\s*_`\"'«»“”„「『(\\\[{:：=≈~—–,，、-]"
_NEXT = rf"(?=[-−]?{_MONEY}{{0,2}}\.?\d|[¼-¾⅐-⅞]|\\[dt]?frac|\\sqrt)"
_BEHIND_BARE = re.compile(rf"{_GAP}{{0,12}}?{_NEXT}")
_ADVERB = "therefore|thus|exactly|simply|just|donc|alors|exactement|daher|genau|exactamente"
_BEHIND = re.compile(
    rf"[^\d\n.?!。।:：=]{{0,24}}?(?:{_COPULA})(?:\s(?:{_ADVERB})\b)?{_GAP}{{0,12}}?{_NEXT}"
)
_OPERATOR = r"(?:[-+*/×÷=≈−–·⋅]|\\times|\\cdot|\\div|(?<![^\W\d])[xX](?![^\W\d]))"
_EQUATION = re.compile(  # 9 eggs x $2/egg = $18
    rf"(?:/[^\W\d]+|[^\d+=*/×÷.,;:!?。।\n-]){{0,20}}?{_OPERATOR}{_GAP}{{0,6}}?{_NEXT}"
)
_UNSEEN = "[\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]"
_MEANT = {"{,}": ",", r"\,": "\u2009", r"\;": "\u2009", "\\ ": "\u2009", r"\!": "", r"\$": "$"}
_MEANT |= {"－": "-", "．": ".", r"^\circ": "°", r"^{\circ}": "°"}
_EXACT = Context(prec=99)


def final_number(text: str) -> Decimal | None:
    """The number that a reader would take as the answer of ``text``.

    Args:
        text: What a model wrote, in any of the languages.

    Returns:
        Its value without rounding; None where there is none or it is of a kind that is not read.
    """
    text = re.sub(_UNSEEN, "", text)
    for written, meant in _MEANT.items():
        text = text.replace(written, meant)
    token = _boxed(text) or _announced(text) or _last(text)
    return None if token is None else _value(token)


def same_number(text: str, expected: str | int | Decimal) -> bool:
    """Whether ``final_number(text)`` is the expected value; 18 and 18.00 are the same.

    Args:
        text: What a model wrote.
        expected: A str, such as "2,125", is read by the rules of ``final_number``.

    Raises:
        SteeredMoEError: ``expected`` is a str with no number that can be read.
    """
    value = final_number(expected) if isinstance(expected, str) else expected
    if value is None:
        raise SteeredMoEError(f"the expected answer {expected!r} has no number that can be read")
    return final_number(text) == value


def flexible_extract(text: str) -> str | None:
    """What the filter ``flexible-extract`` of lm-eval 0.4.13 leaves of ``text``.

    Of its tasks mgsm_direct, mgsm_en_cot, mgsm_native_cot and gsm8k: the last stretch of two or
    more of ``0-9 . , $``, or single digit, with a hyphen before it if there is one. ASCII only; it
    may hold no digit ("..."), and keeps the point that ends a sentence.

    Args:
        text: What a model wrote.

    Returns:
        None where lm-eval says "[invalid]".
    """
    last = deque(_STRETCH.finditer(text), maxlen=1)
    return last[0].group() if last else None


def flexible_match(text: str, expected: str) -> bool:
    """Whether lm-eval 0.4.13 counts ``text`` as right in its mgsm tasks: exact_match behind the
    filter flexible-extract, without punctuation on both sides, so that -1.5, 1.5 and 15 are one.
    """
    found = flexible_extract(text) or "[invalid]"
    return found.translate(PUNCTUATION) == expected.lower().translate(PUNCTUATION)


def _boxed(text: str) -> Match[str] | None:
    for rest in reversed(text.rsplit(r"\boxed", _PLACES)[1:]):
        box = _BOX.match(rest[:_BOX_LENGTH])
        if box and (token := _last(box[1])):
            return token
    return None


def _announced(text: str) -> Match[str] | None:
    for name in reversed(deque(_NAME.finditer(text), maxlen=_PLACES)):
        behind = _BEHIND_BARE.match(text, name.end()) if name["bare"] else None
        gap = behind or _BEHIND.match(text, name.end())
        token = gap and _TOKEN.match(text, gap.end())
        if token and not token["skipped"]:
            return _end_of_equation(text, token)
    return None


def _end_of_equation(text: str, token: Match[str]) -> Match[str]:
    for _ in range(_PLACES):
        operator = _EQUATION.match(text, token.end())
        following = operator and _TOKEN.match(text, operator.end())
        if not following or following["skipped"]:
            break
        token = following
    return token


def _last(text: str) -> Match[str] | None:
    digit = _DIGIT.search(text[::-1])
    if digit is None:
        return None
    end = len(text) - digit.start() + _MARGIN
    start, size = end, _WINDOW
    while start > 0:
        start, size = max(0, end - size), size * 8
        tokens = (m for m in _TOKEN.finditer(text, start, end) if not m["skipped"])
        found = deque(tokens, maxlen=1)
        if found and (start == 0 or found[0].start() > start + _MARGIN):
            return found[0]
    return None


def _value(token: Match[str]) -> Decimal | None:
    number = token["number"]
    if not number or token["more"] or len(re.findall(r"\d", number)) > MAX_DIGITS:
        return None
    total = Decimal(0)
    for digits, scale in _SCALED.findall(number):
        if (plain := _plain(digits)) is None:
            return None
        total = _EXACT.fma(Decimal(plain), 10 ** _SCALES[scale], total)
    return total.copy_negate() if token["minus"] else total


def _plain(digits: str) -> str | None:
    digits, fraction = re.sub(_GROUPING, "", digits), ""
    marks = re.findall("[.,٫]", digits)
    thousands = re.fullmatch(r"\d{1,3}[.,]\d{3}", digits) and int(digits[0]) > 0
    if marks and marks.count(marks[-1]) == 1 and not thousands:
        digits, _, fraction = digits.rpartition(marks[-1])
    if not _WHOLE.fullmatch(digits):
        return None
    return re.sub("[.,]", "", digits) + (f".{fraction}" if fraction else "")
