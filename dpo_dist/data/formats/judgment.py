"""What a row of any format may say of its judgment, and the names under which it is kept.

`record` of a row, JSON-ready, holds what is known beside the texts; each key only where the file says it:

    chosen_rating, rejected_rating     numbers, in the data's own unit; strength is their difference
    chosen_rank, rejected_rank         numbers, the lower the better; strength is their difference
    chosen_model, rejected_model       which models wrote the answers, ...
    chosen_version, rejected_version   ... and which versions of them
    chosen_aspects, rejected_aspects   {name of a criterion: rating}
    confidence                         above 0, at most 1: how sure the judgment is; it multiplies the pair's weight
    annotator, annotator_class         who judged, and of which kind (expert, crowd, model)
    annotators                         [{"annotator", "preference": chosen | rejected | tie | both_bad, "strength",
                                       "status", "reason", "chosen_feedback", "rejected_feedback"}]
    suggestion                         what a model proposed to the annotators: {"preference", "agent", "score"}
    locale                             the language of the row, as the file writes it
    tags                               the row's own, of any type
    columns                            {name: value} of every other column that its format does not read; see free.py

The file may call them otherwise: RECORDED holds the names.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dpo_dist.data.fields import LARGEST, Fields, Unfit, from_json, number_or_none, reserved
from dpo_dist.data.messages import NO_VALUE, tools_of
from dpo_dist.data.records import json_ready

MEDIA = {"images", "audios", "videos", "image", "audio", "video"}
# Columns named `language` may hold these: no locale.
PROGRAMMING = {"bash", "c", "c#", "c++", "cpp", "csharp", "css", "dart", "go", "golang", "haskell", "html", "java",
               "javascript", "julia", "kotlin", "lua", "matlab", "objective-c", "perl", "php", "powershell", "python",
               "r", "ruby", "rust", "scala", "shell", "sql", "swift", "typescript", "vba"}
Check = Callable[[Any], Any]                 # the value as it is kept; None where it is none of the kind


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value.strip() else None


def _name(value: Any) -> str | None:
    """A person or a kind of person, by name or number."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _locale(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip().lower() in PROGRAMMING else _text(value)


def _aspects(value: Any) -> dict[str, float] | None:
    ratings = {str(name): number_or_none(rating) for name, rating in value.items()} if isinstance(value, dict) else {}
    known_ratings = {name: rating for name, rating in ratings.items() if rating is not None}
    return known_ratings if known_ratings and len(known_ratings) == len(ratings) else None


def _tags(value: Any) -> Any:
    """As they are; a list or an object that stands as text, as in a CSV, is read."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for kind in (list, dict):
            try:
                return json_ready(from_json(value, "tags", kind))
            except Unfit:
                continue
    return json_ready(value)


def _annotators(value: Any) -> list[Any] | None:
    """A list in the record's own shape."""
    sides = ("chosen", "rejected", "tie", "both_bad")
    if not isinstance(value, list) or not all(isinstance(v, dict) and v.get("preference") in sides for v in value):
        return None
    return list(json_ready(value)) or None


def _suggestion(value: Any) -> dict[str, Any] | None:
    return dict(json_ready(value)) if isinstance(value, dict) and "preference" in value else None


# {what it is called in files: (its name in the record, what it must be)}; of several the first that a row has counts
RECORDED: dict[str, tuple[str, Check]] = {
    name.format(side): (f"{side}_{noun}", check)
    for side in ("chosen", "rejected")
    for noun, check, names in (
        ("rating", number_or_none, ("{}_rating", "{}-rating", "score_{}", "{}_score", "{}_reward")),
        ("rank", number_or_none, ("{}_rank", "rank_{}")),
        ("model", _text, ("{}_model", "{}-model", "model_{}", "{}_policy", "{}_generator", "generator_{}",
                          "{}_model_name")),
        ("version", _name, ("{}_version", "{}-version", "version_{}", "{}_model_version", "{}_revision",
                            "{}_model_revision")),
        ("aspects", _aspects, ("{}_aspects",)))
    for name in names} | {
    name: (kept, check)
    for kept, check, names in (
        ("annotator", _name, ("annotator", "annotator_id", "rater", "rater_id", "labeler", "labeler_id", "worker_id",
                              "judge")),
        ("annotator_class", _name, ("annotator_class", "annotator_type", "annotator_group", "rater_class",
                                    "rater_type")),
        ("locale", _locale, ("locale", "lang", "language")),
        ("annotators", _annotators, ("annotators",)), ("suggestion", _suggestion, ("suggestion",)),
        ("tags", _tags, ("tags",)))
    for name in names}
# Names that mean the same in every format; RECORDED's besides, where their value fits.
RESERVED = {*MEDIA, "weight", "strength", "margin", "confidence", "system", "system_prompt", "tools",
            "chat_template_kwargs", "tie", "both_bad"}


def judgment_of(fields: Fields) -> dict[str, Any]:
    """weight, strength, record, tools and template_kwargs, as PreferenceRow takes them. Unfit where a reserved name
    holds something else, and for images and sound."""
    for key in sorted(MEDIA & fields.keys()):
        if _holds_something(fields[key]):
            raise Unfit(f"the row has {key}, and only text is trained on", reserved(key, "not empty"))
    record, _ = recorded(fields)
    strength = _own_strength(fields)
    if strength is None and "chosen_rating" in record and "rejected_rating" in record:
        strength = record["chosen_rating"] - record["rejected_rating"]
    confidence = confidence_of(fields)
    if confidence is not None:
        record["confidence"] = confidence
    weight = _weight(fields) * (1.0 if confidence is None else confidence)
    return {"weight": weight, "strength": strength, "record": record, "tools": tools_of(fields),
            "template_kwargs": _template_kwargs(fields)}


def recorded(fields: Fields) -> tuple[dict[str, Any], set[str]]:
    """(what the fields say under RECORDED's names, which of the fields said it)."""
    record: dict[str, Any] = {}
    taken = set()
    for key in (key for key in fields if key in RECORDED):
        name, check = RECORDED[key]
        value = None if name in record else check(fields[key])
        if value is not None:
            record[name] = value
            taken.add(key)
    return record, taken


def confidence_of(fields: Fields) -> float | None:
    """How sure the row is of its judgment, None where it does not say. Unfit outside (0, 1]."""
    if "confidence" not in fields:
        return None
    confidence = _reserved_number(fields, "confidence")
    if not 0 < confidence <= 1:
        raise Unfit("confidence is not above 0 and at most 1", reserved("confidence", f"{confidence:g}"))
    return confidence


def known(entries: dict[str, Any]) -> dict[str, Any]:
    """The entries without those that nothing is known of."""
    return {key: value for key, value in entries.items() if value is not None}


def _holds_something(value: Any) -> bool:
    return any(part is not None for part in value) if isinstance(value, list) else bool(value)


def _weight(fields: Fields) -> float:
    if "weight" not in fields:
        return 1.0
    weight = _reserved_number(fields, "weight")
    if weight <= 1 / LARGEST:                # no less is kept in fp32
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
