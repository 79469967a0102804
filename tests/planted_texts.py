"""The texts of planted defects: other languages, special tokens, lists, gibberish, reworded prompts."""
from __future__ import annotations

import random
import re

SPECIAL_TOKENS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
GERMAN = """Das hängt davon ab, wie viel Zeit Sie dafür haben.|Am besten fangen Sie mit dem einfachsten Teil an.
    |Die meisten Leute machen am Anfang denselben Fehler.|Ich würde zuerst einen Plan auf Papier zeichnen.
    |Danach können wir über die Kosten sprechen.|Fragen Sie ruhig jemanden, der es schon einmal gemacht hat."""
FRENCH = """Cela dépend du temps que vous avez devant vous.|Il vaut mieux commencer par la partie la plus simple.
    |La plupart des gens font la même erreur au début.|Je dessinerais d'abord un plan sur une feuille de papier.
    |Ensuite, nous pourrons parler des coûts.|Demandez à quelqu'un qui l'a déjà fait auparavant."""
SPANISH = """Eso depende del tiempo que usted tenga para hacerlo.|Lo mejor es empezar por la parte más sencilla.
    |La mayoría de la gente comete el mismo error al principio.|Primero yo dibujaría un plano en una hoja de papel.
    |Después podemos hablar de los costes.|Pregunte a alguien que ya lo haya hecho antes."""
RUSSIAN = """Это зависит от того, сколько у вас времени.|Лучше всего начать с самой простой части.
    |Большинство людей вначале делают одну и ту же ошибку.|Сначала я нарисовал бы план на бумаге.
    |Потом мы можем поговорить о расходах.|Спросите того, кто уже делал это раньше."""
CHINESE = """这取决于你有多少时间来做这件事。|最好从最简单的部分开始。|大多数人一开始都会犯同样的错误。
    |我会先在纸上画一个计划。|然后我们可以谈谈费用的问题。|你可以问问以前做过这件事的人。"""
FOREIGN = tuple([" ".join(sentence.split()) for sentence in text.split("|")]
                for text in (GERMAN, FRENCH, SPANISH, RUSSIAN, CHINESE))
LETTERS = "bcdfghjklmnpqrstvwxz0123456789"


def reworded(text: str, r: random.Random) -> str:
    """The text with one word more, one less, or one exchanged, or with other capitals and punctuation."""
    words = text.split(" ")
    at = r.randrange(1, len(words) - 1)
    way = r.randrange(4)
    if way == 0:
        words.insert(at, "really")
    elif way == 1:
        del words[at]
    elif way == 2:
        words[at] = "such"
    else:
        return text.rstrip(".?! ").lower() + " !"
    return " ".join(words)


def listed(text: str) -> str:
    """The sentences of a text as a list whose first words are bold."""
    sentences = [s.strip("-*# \n") for s in re.split(r"(?<=[.!?])\s+(?=\w)|\n+", plain_style(text))]
    lines = [sentence.partition(" ") for sentence in sentences if sentence]
    return "\n".join(f"- **{first}** {rest}".rstrip() for first, _, rest in lines)


def plain_style(text: str) -> str:
    """The text without headings, lists and bold words."""
    text = re.sub(r"(?m)^\s*(#+|[-*•]|\d+[.)])\s+", "", text.replace("**", ""))
    return " ".join(text.split())


def gibberish(text: str, r: random.Random) -> str:
    """Random letters in words as long as the text's."""
    return " ".join("".join(r.choices(LETTERS, k=len(word))) for word in text.split()) or "xqzj"
