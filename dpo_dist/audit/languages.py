"""Which language a text is in, where that is certain: by its script, or by its function words and a library.

Names, code and made-up words have no function words, so their language is unknown and never at odds with another.
"""
from __future__ import annotations

import re
from collections import Counter
from functools import cache
from typing import Any

LOOKED_AT = 1200                             # characters of a text
LEAST_LETTERS = 12                           # of a script other than Latin
SCRIPT_SHARE = 0.3                           # of all letters: Chinese texts hold Latin names
LEAST_HITS, LEAST_DISTINCT = 4, 4            # function words that a text must have
LEAST_SHARE = 0.12                           # of its words: in prose they are a third to a half
CLEAR = 2.0                                  # times as many as those of any other language
LEAST_CONFIDENCE = 0.9                       # of the library

UNKNOWN = ""
SCRIPTS = {                                  # in this order: Japanese has Chinese characters, too
    "ja": re.compile(r"[\u3040-\u30ff]"), "ko": re.compile(r"[\uac00-\ud7af\u1100-\u11ff]"),
    "zh": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]"), "cyrillic": re.compile(r"[\u0400-\u04ff]"),
    "arabic": re.compile(r"[\u0600-\u06ff]"), "he": re.compile(r"[\u0590-\u05ff]"),
    "devanagari": re.compile(r"[\u0900-\u097f]"), "th": re.compile(r"[\u0e00-\u0e7f]"),
    "el": re.compile(r"[\u0370-\u03ff]"), "bn": re.compile(r"[\u0980-\u09ff]"), "ta": re.compile(r"[\u0b80-\u0bff]")}
LETTER = re.compile(r"[^\W\d_]")
LATIN_WORD = re.compile(r"[^\W\d_]+")
CODE = re.compile(r"```.*?(```|$)|`[^`\n]*`|https?://\S+", re.S)
FUNCTION_WORDS = {
    "en": "a an on at any some the of and to in is that it for was with as you are be this have from or by but not "
          "what all were we when your can there an which their if will how about my would so has do i",
    "de": "der die das und ist nicht ein eine zu mit den von für auf im dem sich auch es ich sie wie dass wir sind "
          "oder haben werden kann bei aus nach einen zum zur über am noch",
    "fr": "a le la les des et est un une dans pour que qui pas sur vous nous avec ce plus je il au du ne se sont "
          "cette mais par ou ont être aux votre leur d l",
    "es": "a el la los las de que y en un una es por para con no su se al lo como más pero del está son este sus "
          "hay muy también yo le si puede sobre",
    "pt": "a o os as de que e em um uma é por para com não se do da dos das mais como mas ao são sua seu você pode "
          "isso foi também na no está ou muito",
    "it": "a il lo la gli le di che e un una è per con non si del della dei più come ma sono nel alla questo anche "
          "può essere dal delle su ha o se i",
    "nl": "de het een en van is dat niet op te in zijn voor met die je ik er aan ook om maar als dan wat bij wordt "
          "naar kan deze hebben uit of",
    "sv": "och att det som en på är av för med den till inte har ett om jag du kan men så från eller vi var ska när "
          "mer detta de",
    "da": "og at det som en på er af for med den til ikke har et om jeg du kan men så fra eller vi var skal når "
          "mere dette de",
    "pl": "i w na z do się nie to że jest o jak ale po co tak za od przez dla są lub może który jego ich być oraz "
          "już tylko",
    "tr": "ve bir bu da de için ile çok ne daha gibi olarak var olan kadar sonra ama en mi ya her değil ben sen şey",
    "id": "yang dan di itu dengan untuk tidak ini dari dalam akan pada juga saya ke karena bisa ada atau anda "
          "adalah sebagai lebih telah",
    "vi": "và của là có được cho trong một các không với người này đó những để đã từ khi như bạn tôi về cũng",
    "ro": "a și de la în pe cu nu este un o care să că din pentru mai sunt au fi ca sau dar acest prin lui după",
    "cs": "a se na je v že to s z o do i jako ale pro jsou by si tak které nebo jeho až za od být po jsem",
    "fi": "ja on ei se että oli hän mutta ovat kun niin myös tai jos joka sen voi kuin ole mitä tämä siitä",
}
LANGUAGES_OF: dict[str, tuple[str, ...]] = {}
for _name, _words in FUNCTION_WORDS.items():
    for _word in _words.split():
        LANGUAGES_OF[_word] = (*LANGUAGES_OF.get(_word, ()), _name)
# what a prompt says that asks for another language, or for this one
ASKS = re.compile(
    r"translat|transliterat|overset|traduc|traduz|tradur|tradui|\u00fcbersetz|\u7ffb\u8bd1|\u7ffb\u8b6f|\u7ffb\u8a33"
    r"|\u043f\u0435\u0440\u0435\u0432\u0435\u0434"
    r"|\blanguage|\bsprache|\blangue|\bidioma|\blingua|multilingual|bilingual", re.I)
ASKS_FOR = {name: re.compile(rf"\b({words})", re.I) for name, words in {
    "en": "english|englisch|anglais|ingl\u00e9s|inglese", "de": "german|deutsch|allemand|alem|tedesco",
    "fr": "french|franz\u00f6s|fran\u00e7ais|franc\u00e9s", "es": "spanish|spanisch|espagnol|espa\u00f1ol|castellano",
    "pt": "portug|brazil", "it": "italian|italien", "nl": "dutch|nederlands", "sv": "swedish|svenska",
    "da": "danish|dansk", "pl": "polish|polski", "tr": "turkish", "id": "indonesian|bahasa", "vi": "vietnamese",
    "ro": "romanian", "cs": "czech", "fi": "finnish|suomi", "ja": "japan", "ko": "korean", "zh": "chinese|mandarin",
    "cyrillic": "russian|ukrain|bulgarian|serbian", "arabic": "arab|persian|farsi|urdu", "he": "hebrew",
    "devanagari": "hindi|marathi|nepali|sanskrit", "th": "thai", "el": "greek", "bn": "bengali|bangla",
    "ta": "tamil"}.items()}


def asks_for(prompt: str, *languages: str) -> bool:
    """Whether a prompt is about translation, or names one of these languages."""
    return ASKS.search(prompt) is not None or any(
        name in ASKS_FOR and ASKS_FOR[name].search(prompt) is not None for name in languages)


def language_of(text: str) -> str:
    """A language's code, or the name of a script that several share; "" where it is not certain."""
    text = text[:LOOKED_AT]
    if "`" in text or "http" in text:
        text = CODE.sub(" ", text)
    if not text.isascii() and (script := _script(text)):
        return script
    return _by_words(text)


def _script(text: str) -> str:
    letters = len(LETTER.findall(text))
    for name, pattern in SCRIPTS.items():
        n = len(pattern.findall(text))
        bound = 0.05 if name == "ja" else SCRIPT_SHARE               # kana among Chinese characters
        if n >= (3 if name == "ja" else LEAST_LETTERS) and n >= bound * letters:
            return name
    return UNKNOWN


def _by_words(text: str) -> str:
    words = [word.casefold() for word in LATIN_WORD.findall(text)]
    counts = Counter(word for word in words if word in LANGUAGES_OF)
    score: dict[str, float] = {}             # a word of several languages says less of each
    for word, n in counts.items():
        names = LANGUAGES_OF[word]
        for name in names:
            score[name] = score.get(name, 0.0) + n / len(names)
    if not score:
        return UNKNOWN
    best = max(score, key=lambda name: score[name])
    own = [word for word in counts if best in LANGUAGES_OF[word]]
    n = sum(counts[word] for word in own)
    if n < LEAST_HITS or len(own) < LEAST_DISTINCT or n < LEAST_SHARE * len(words):
        return UNKNOWN
    likely = {name for name, value in score.items() if value >= score[best] / CLEAR}
    if best == "en" and len(likely) == 1:
        return best                          # most texts: the library would say the same, and takes ten times as long
    found, confidence = _library().classify(text)
    return str(found) if found in likely and confidence >= LEAST_CONFIDENCE else UNKNOWN


@cache
def _library() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # here: its model takes most of a second to load

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
