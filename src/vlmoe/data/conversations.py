"""Conversations as captions: which turns of one are read.

A conversation is a list of objects, or one object of lists (as older Hugging Face data sets store a list of objects).
Three layouts are known by their keys: {from, value} (LLaVA, ShareGPT), {role, content} (chat templates; content is a
text or a list of parts, of which those with a text count), and {user, assistant}, a question and its answer in one.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from vlmoe.data.sample import BadSample

TURNS = ("answer", "all")  # what `turns` of a source can be
LAYOUTS = (("from", "value"), ("role", "content"), ("user", "assistant"))
ANSWERERS = ("assistant", "gpt", "model", "bot", "chatgpt", "bard", "bing")
SYSTEM = ("system", "developer")
PLACEHOLDERS = ("<image>", "<video>")  # where the image was meant to stand; the model reads it beside the text
LAYOUTS_IN_WORDS = ", ".join("{%s, %s}" % layout for layout in LAYOUTS)  # noqa: UP031 - braces


def layout_of(keys: Collection[str]) -> tuple[str, str] | None:
    """The layout that objects with these keys have, None where they are no turns of a conversation."""
    return next((layout for layout in LAYOUTS if set(layout) <= set(keys)), None)


def as_turns(value: Any) -> list[dict[str, Any]] | None:
    """The turns of a conversation in either form, None for a value that is none."""
    if isinstance(value, dict):
        columns = {k: v for k, v in value.items() if isinstance(v, list)}
        if layout_of(columns) is None or len({len(v) for v in columns.values()}) != 1:
            return None
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    if isinstance(value, (list, tuple)) and value and all(isinstance(turn, dict) for turn in value):
        return list(value)
    return None


def read_conversation(turns: list[dict[str, Any]], key: str, wanted: str) -> tuple[str, str]:
    """What a conversation gives as text, and in words which part of it that is.

    wanted: "answer", the first one; or "all" turns one after the other, but the system's.

    Raises BadSample: the objects are no turns, nobody answers, or nothing is said.
    """
    said = [turn for entry in turns for turn in _said(entry, key)]
    if wanted == "all":
        text = " ".join(words for who, words in said if who.lower() not in SYSTEM)
        return text, "all turns of a conversation"
    for who, words in said:
        if who.lower() in ANSWERERS and words.strip():
            return words, "the first answer of a conversation"
    speakers = ", ".join(dict.fromkeys(who for who, _ in said)) or "nobody"
    raise BadSample(key, f"no answer in the conversation: an answer is from {', '.join(ANSWERERS)}; here is {speakers}")


def _said(entry: dict[str, Any], key: str) -> list[tuple[str, str]]:
    """(who, text) of an object; two of them where it holds a question and its answer."""
    layout = layout_of(entry)
    if layout is None:
        raise BadSample(
            key, f"caption is a list of objects: with {', '.join(entry)}; expected texts or turns, {LAYOUTS_IN_WORDS}"
        )
    if layout == ("user", "assistant"):
        return [(who, _text(entry[who], key)) for who in layout]
    who, what = layout
    return [(str(entry[who]), _text(entry[what], key))]


def _text(value: Any, key: str) -> str:
    if isinstance(value, list):  # of parts: {"type": "image"}, {"type": "text", "text": "..."}
        parts = [part.get("text") if isinstance(part, dict) else part for part in value]
        value = " ".join(part for part in parts if isinstance(part, str))
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadSample(key, f"a turn of the conversation is {type(value).__name__}, expected text")
    for placeholder in PLACEHOLDERS:
        value = value.replace(placeholder, " ")
    return value
