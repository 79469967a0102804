"""How files say that neither of two answers is better: a column of its own, or a label such as "tie (both bad)"."""
from __future__ import annotations

import re
from typing import Any

from dpo_dist.data.fields import Fields, Unfit, reserved, yes_or_no
from dpo_dist.types import TieKind

# Columns in which a text may say it; any other text in them is a free column.
VERDICTS = ("preference", "winner", "label", "verdict", "judgment", "judgement", "choice")
FLAGS: dict[str, TieKind] = {"both_bad": "both_bad", "tie": "tie"}
# a label without all but its letters and figures, from its first letter on
TIE = re.compile(r"(its?a)?(tie|draw|both|neither|equal|(the)?same|none|no(preference|difference)).*")
SAID_WHOLLY = re.compile(r"(its?a)?(tied?|draw|neither|equal)|(about)?(the)?same|no(preference|difference)|"
                         r"both(are)?(equal|same|good|fine)|equallygood|neither(is)?better|tieboth(are)?good")
BAD = re.compile(r"(tie)?(both(are)?(bad|poor|wrong|unacceptable|terrible)|equallybad|"
                 r"(neither|none)(one)?(is|are|was)?(good|acceptable|correct))")


def tie_of(fields: Fields) -> TieKind | None:
    """Whether a row that names a chosen and a rejected answer says that neither is better: `tie` or `both_bad` true, or
    a label in one of VERDICTS. Unfit where `tie` or `both_bad` is neither true nor false."""
    for key, kind in FLAGS.items():
        if key in fields:
            said = yes_or_no(fields[key])
            if said is None:
                raise Unfit(f"{key} is neither true nor false", reserved(key, repr(fields[key])[:40]))
            if said:
                return kind
    labels = (tie_label(fields.get(key)) for key in VERDICTS)
    return next((label for label in labels if label), None)


def tie_label(value: Any, loosely: bool = False) -> TieKind | None:
    """What a label says: both_bad ("both bad", "tie (bothbad)", "neither is good"), tie ("tie", "both", "neither", "no
    preference", "equal"), or None for anything else. loosely: a text that only begins like a tie is one too."""
    if not isinstance(value, str) or (len(value) > 60 and not loosely):
        return None
    plain = re.sub(r"[\W_]+", "", value).lower()
    if BAD.fullmatch(plain):
        return "both_bad"
    return "tie" if (TIE if loosely else SAID_WHOLLY).fullmatch(plain) else None
