"""Preference rows with chat messages, rendered to prompt and response text by the tokenizer's chat template."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Optional

import jinja2

from rows import Row, RowReport
from utils import UserError

Messages = list[Mapping[str, str]]


def has_messages(row: Row) -> bool:
    """Whether any of the row's texts is given as chat messages."""
    return any(isinstance(row.fields.get(name), (list, tuple)) for name in ("prompt", "chosen", "rejected"))


@dataclass(frozen=True)
class RenderedPair:
    """A pair as the template renders it, and the words of its messages alone, by which emptiness and equality are judged."""

    texts: tuple[str, str, str]  # prompt, chosen, rejected: what is tokenized
    contents: tuple[str, str, str]


def render_pair(row: Row, report: RowReport, tokenizer) -> Optional[RenderedPair]:
    """The row's pair in the tokenizer's chat template; None where the row is no pair, noted in the report.

    The forms in use: a prompt (text or messages) with responses as text or as messages after the prompt; or whole conversations in chosen
    and rejected, whose shared beginning is the prompt, with or without a field `prompt`, which is then not read.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{row.source} row {row.number} holds chat messages, but the tokenizer has no chat template: "
            "use an instruct model's tokenizer (model.tokenizer_name_or_path) or plain text"
        )
    conversations = [_conversation(row, report, name) for name in ("chosen", "rejected")]
    if None in conversations:
        return None
    chosen, rejected = conversations
    shared = _shared_beginning(chosen, rejected)
    if shared == 0:
        report.refuse(row, "rejected has another prompt than chosen")
        return None
    if any(message["role"] == "user" for messages in conversations for message in messages[shared:]):
        report.refuse(row, "a user's turn within the response: the conversations part before the last reply")
        return None
    try:
        (prompt, *_), responses = zip(*(_render(messages, shared, tokenizer) for messages in conversations))
    except jinja2.TemplateError as error:
        report.refuse(row, f"the chat template refuses it ({error})")
        return None
    if None in responses:
        report.refuse(row, "the chat template does not render the conversation as a continuation of its prompt")
        return None
    contents = (_words(chosen[:shared]), _words(chosen[shared:]), _words(rejected[shared:]))
    return RenderedPair((prompt, *responses), contents)


def _conversation(row: Row, report: RowReport, name: str) -> Optional[Messages]:
    """Prompt and response of that name as one list of messages; None where the row does not have them, noted."""
    if name not in row.fields:
        report.refuse(row, f"no field {name!r}")
        return None
    messages = _as_messages(row.fields[name], "assistant")
    if messages and messages[0].get("role") == "assistant":
        if row.fields.get("prompt") is None:
            report.refuse(row, "no field 'prompt'")
            return None
        messages = (_as_messages(row.fields["prompt"], "user") or []) + messages
    return messages if _are_messages(row, report, name, messages) else None


def _shared_beginning(chosen: Messages, rejected: Messages) -> int:
    """How many messages the two begin with in common; the last message of each is always a response."""
    shared = 0
    for a, b in zip(chosen[:-1], rejected[:-1]):
        if (a["role"], a["content"]) != (b["role"], b["content"]):
            break
        shared += 1
    return shared


def _words(messages: Messages) -> str:
    return "\n".join(message["content"] for message in messages)


def _as_messages(value: Any, role: str) -> Optional[Messages]:
    """Text as one message of that role, a list as it is; None for anything else, and for null entries."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return list(value) if isinstance(value, (list, tuple)) and all(isinstance(x, Mapping) for x in value) else None


def _are_messages(row: Row, report: RowReport, name: str, messages: Optional[Messages]) -> bool:
    if not messages:
        report.refuse(row, f"{name!r} is no list of messages")
        return False
    for message in messages:
        if not isinstance(message.get("role"), str):
            report.refuse(row, f"a message of {name!r} has no role")
            return False
        if not report.is_text(row, f"content of {name!r}", message.get("content")):
            return False
    return True


def _render(messages: Messages, shared: int, tokenizer) -> tuple[str, Optional[str]]:
    """Prompt and response text. Some templates render a reply without the generation prompt; then that belongs to the response."""
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    for add_generation_prompt in (True, False):
        prompt = tokenizer.apply_chat_template(messages[:shared], tokenize=False, add_generation_prompt=add_generation_prompt)
        if full.startswith(prompt):
            return prompt, full[len(prompt) :]
    return prompt, None
