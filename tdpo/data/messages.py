"""Conversations of a data row: lists of chat messages, read from a row's fields, and written as a chat template reads them.

A row means the same from a .jsonl file as from a .parquet file, which gives every message the keys of all: entries of null count as absent.
Templates differ in what they take as content or as arguments of a tool call, so a conversation has several spellings (`Spelling`).
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Optional

from tdpo.data.rows import Row, RowReport

Messages = list[Mapping[str, Any]]
REPLIES = ("assistant", "model", "bot", "chatbot", "gpt", "ai")  # roles of messages that a policy writes; no others are replies
FROM = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}  # ShareGPT's names of roles
SEGMENT = "segment"  # key that marks the turns in the loss (Chat.segments); templates do not see it


class Spelling(NamedTuple):
    """How a conversation is written for a template."""

    empty: Optional[str] = None  # content of a message that has none, as beside tool calls: null or an empty text
    content: str = "given"  # "text": parts [{"type": "text", "text": ...}] as one text, an object as JSON; "parts": a text as one part
    arguments: str = "given"  # of tool calls: as given, "objects", or "strings" of JSON


def read_messages(value: Any, role: str) -> Optional[Messages]:
    """Return a text as one message of that role, a message or a list of messages without entries of null; None for anything else.

    Messages {from, value}, as ShareGPT has them, become {role, content}.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, Mapping) for message in value):
        return None
    return [_without_empty_calls(_from_sharegpt(without_nulls(message))) for message in value]


def _from_sharegpt(message: Mapping) -> Mapping:
    """Return a message {from, value} as {role, content}; another one as it is."""
    if "role" in message or not isinstance(message.get("from"), str) or "value" not in message:
        return message
    others = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": FROM.get(message["from"], message["from"]), "content": message["value"], **others}


def without_nulls(value: Any) -> Any:
    """Return a value without the null entries of its objects, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _without_empty_calls(message: Mapping) -> Mapping:
    return message if message.get("tool_calls", True) else {key: value for key, value in message.items() if key != "tool_calls"}


def are_messages(row: Row, report: RowReport, name: str, messages: Optional[Messages], structural: re.Pattern) -> bool:
    """Whether messages can be rendered; a defect is noted.

    Args:
        row, report, name: the row, where defects are noted, and the field that the messages are from.
        messages: see `read_messages`.
        structural: finds special tokens by which the template separates turns. A reply may hold others, such as those around a thought.
    """
    if not messages:
        report.refuse(row, f"{name!r} is not a list of messages")
        return False
    for message in messages:
        if not isinstance(message.get("role"), str):
            report.refuse(row, f"a message of {name!r} has no role")
            return False
        content = message.get("content")
        if content is None:
            if len(message) == 1:
                report.refuse(row, f"content of {name!r} is null, and the message has nothing else")
                return False
        elif isinstance(content, Mapping) and message["role"] not in REPLIES:
            pass  # the result of a tool
        elif isinstance(content, list):
            if unknown := [part for part in content if part_text(part) is None]:
                kind = unknown[0].get("type") if isinstance(unknown[0], Mapping) else type(unknown[0]).__name__
                report.refuse(row, f"content of {name!r} has a part of type {kind!r}, not text")
                return False
        elif not isinstance(content, str):
            report.refuse(row, f"content of {name!r} is {type(content).__name__}, not text")
            return False
        special = structural if message["role"] in REPLIES else None
        if not all(report.is_text(row, f"{key} of {name!r}", text, special) for key, text in strings_of(message)):
            return False
    return True


def part_text(part: Any) -> Optional[str]:
    """Return the text of a part of a content; None if it is no text."""
    if isinstance(part, str):
        return part
    return part["text"] if isinstance(part, Mapping) and isinstance(part.get("text"), str) else None


def texts_of(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, text) of all texts in a message but roles, types and ids; nested ones have the key of the message's own entry."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            if name not in ("role", "type", "id", "tool_call_id", SEGMENT):
                yield from texts_of(entry, key or name)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from texts_of(entry, key)


def strings_of(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield (key, text) of everything in a message or a schema that a template can write: all texts, roles and names of entries too."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            if key:
                yield key, name
            yield from strings_of(entry, key or name)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from strings_of(entry, key)


def content_of(message: Mapping) -> str:
    """Return a message's content as one text; '' if it has none."""
    content = message.get("content") or ""
    if isinstance(content, Mapping):
        return json.dumps(content, ensure_ascii=False)
    return "".join(filter(None, map(part_text, content))) if isinstance(content, (list, tuple)) else str(content)


def words_of(messages: Sequence[Mapping]) -> str:
    """Return the contents of messages, and what else they say (tool calls, thoughts), as one text without what a template adds."""
    others = [{key: value for key, value in message.items() if key not in ("role", "content", SEGMENT)} for message in messages]
    return "\n".join(content_of(message) + (json.dumps(other, default=str) if other else "") for message, other in zip(messages, others))


def spellings(conversations: Sequence[Messages]) -> list[Spelling]:
    """Return the spellings in which conversations differ, the best one first: as given, with null for a content that is missing."""
    messages = [message for conversation in conversations for message in conversation]
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    given = {type(function.get("arguments")) for function in map(_function_of, calls)}
    return [
        Spelling(*choice)
        for choice in itertools.product(
            (None, "") if any("content" not in message for message in messages) else (None,),
            ("given", "text") if any(isinstance(message.get("content"), (list, Mapping)) for message in messages) else ("given", "parts"),
            ("given", *(["objects"] if str in given else []), *(["strings"] if dict in given else [])),
        )
    ]


def spelled(messages: Messages, spelling: Spelling) -> list[dict]:
    """Return messages in a spelling, without the marks of segments."""
    written = []
    for message in messages:
        content = message.get("content", spelling.empty)
        if spelling.content == "text" and isinstance(content, (list, Mapping)):
            content = content_of(message)
        elif spelling.content == "parts" and isinstance(content, str):
            content = [{"type": "text", "text": content}]
        new = {"role": message["role"], "content": content, **{k: v for k, v in message.items() if k not in ("role", "content", SEGMENT)}}
        if "tool_calls" in new and spelling.arguments != "given":
            new["tool_calls"] = [_with_arguments(call, spelling.arguments) for call in new["tool_calls"]]
        written.append(new)
    return written


def misread(text: str, messages: Messages, spelling: Spelling) -> int:
    """Return how many values a template did not understand in a spelling, judged by the text that it rendered.

    A template that takes a text for granted writes a list or object as Python does, and null as None; one that writes JSON itself quotes
    arguments that are a string already, or writes nothing.
    """
    wrong = 0
    written = spelled(messages, spelling)
    for message in written:
        content = message["content"]
        if isinstance(content, str):
            wrong += content.strip() not in text
        elif isinstance(content, Mapping):
            wrong += bool(content) and str(content) in text
        elif isinstance(content, list):
            wrong += sum(str(part) in text or part_text(part).strip() not in text for part in content)
        for call in message.get("tool_calls") or []:
            arguments, name = _function_of(call).get("arguments"), _function_of(call).get("name")
            wrong += isinstance(name, str) and name not in text
            if isinstance(arguments, str):
                wrong += json.dumps(arguments) in text or json.dumps(arguments, ensure_ascii=False) in text or arguments not in text
            elif arguments:
                wrong += str(arguments) in text
    if spelling.empty is None and any(message["content"] is None for message in written):
        said = sum(value.count("None") for message in written for _, value in texts_of(message))
        wrong += text.count("None") > said
    return wrong


def _function_of(call: Any) -> Mapping:
    function = call.get("function", call) if isinstance(call, Mapping) else {}
    return function if isinstance(function, Mapping) else {}


def _with_arguments(call: Any, form: str) -> Any:
    """Return a tool call with its arguments as an object, or as JSON; unchanged if they are neither."""
    function = _function_of(call)
    arguments = function.get("arguments")
    if form == "objects" and isinstance(arguments, str):
        arguments = parsed(arguments, arguments)
    elif form == "strings" and isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if arguments is function.get("arguments"):
        return call
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function


def parsed(text: str, default: Any = None) -> Any:
    """Return the object or list that a text holds as JSON, without entries of null; `default` if it holds none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return default
    return without_nulls(value) if isinstance(value, (dict, list)) else default
