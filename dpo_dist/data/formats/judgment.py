"""What a row of any format may say of its judgment, and the names under which it is kept.

`record` of a row, JSON-ready, holds what is known beside the texts; each key only where the file says it:

    chosen_rating, rejected_rating     numbers, in the data's own unit; strength is their difference
    chosen_rank, rejected_rank         numbers, the lower the better; strength is their difference
    chosen_model, rejected_model       which models wrote the answers
    chosen_aspects, rejected_aspects   {name of a criterion: rating}
    annotators                         [{"annotator", "preference": chosen | rejected | tie, "strength", "status",
                                       "reason", "chosen_feedback", "rejected_feedback"}]
    suggestion                         what a model proposed to the annotators: {"preference", "agent", "score"}
    tags                               the row's own, of any type
"""
from __future__ import annotations

from typing import Any

from dpo_dist.data.fields import Fields, Unfit, from_json, number_or_none, reserved
from dpo_dist.data.messages import NO_VALUE, tools_of
from dpo_dist.data.records import json_ready

MEDIA = {"images", "audios", "videos", "image", "audio", "video"}
# {what it is called in files: (its name in the record, what it must be)}
RECORDED = {name.format(side): (f"{side}_{noun}", check)
            for side in ("chosen", "rejected")
            for noun, check, names in (
                ("rating", number_or_none, ("{}_rating", "{}-rating", "score_{}", "{}_score", "{}_reward")),
                ("model", lambda value: value if isinstance(value, str) else None,
                 ("{}_model", "{}-model", "model_{}", "{}_policy")))
            for name in names} | {"tags": ("tags", json_ready)}


def judgment_of(fields: Fields) -> dict[str, Any]:
    """weight, strength, record, tools and template_kwargs, as PreferenceRow takes them. Unfit where a reserved name
    holds something else, and for images and sound."""
    for key in sorted(MEDIA & fields.keys()):
        if _holds_something(fields[key]):
            raise Unfit(f"the row has {key}, and only text is trained on", reserved(key, "not empty"))
    record = _record_of(fields)
    strength = _own_strength(fields)
    if strength is None and "chosen_rating" in record and "rejected_rating" in record:
        strength = record["chosen_rating"] - record["rejected_rating"]
    return {"weight": _weight(fields), "strength": strength, "record": record, "tools": tools_of(fields),
            "template_kwargs": _template_kwargs(fields)}


def _holds_something(value: Any) -> bool:
    return any(part is not None for part in value) if isinstance(value, list) else bool(value)


def _weight(fields: Fields) -> float:
    if "weight" not in fields:
        return 1.0
    weight = _reserved_number(fields, "weight")
    if weight <= 0:
        raise Unfit("weight is not greater than 0", reserved("weight", str(weight)))
    return weight


def _own_strength(fields: Fields) -> float | None:
    given = [key for key in ("strength", "margin") if key in fields]
    if len(given) == 2:
        raise Unfit("strength and margin are both given", reserved("margin", "they mean the same"))
    return _reserved_number(fields, given[0]) if given else None


def _reserved_number(fields: Fields, key: str) -> float:
    found = number_or_none(fields[key])
    if found is None:
        raise Unfit(f"{key} is not a number", reserved(key, repr(fields[key])[:40]))
    return found


def _template_kwargs(fields: Fields) -> dict[str, Any]:
    key = "chat_template_kwargs"
    if key not in fields or fields[key] in NO_VALUE:
        return {}
    try:
        kwargs = from_json(fields[key], key, dict)
    except Unfit as unfit:
        raise Unfit(unfit.reason, reserved(key, unfit.detail)) from None
    return {name: value for name, value in kwargs.items() if value is not None}


def _record_of(fields: Fields) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for key in fields:
        if key in RECORDED:
            name, check = RECORDED[key]
            value = check(fields[key])
            if value is not None:
                record.setdefault(name, value)
    return record


def known(entries: dict[str, Any]) -> dict[str, Any]:
    """The entries without those that nothing is known of."""
    return {key: value for key, value in entries.items() if value is not None}
