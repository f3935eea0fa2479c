"""Data rows with chat messages: the tokenizer's chat template renders them to the texts of prompt and responses."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Optional

import jinja2

from tdpo.data.rows import Row, RowReport
from tdpo.data.tokenization import trim_after_eos
from tdpo.utils import UserError, time_limit

Messages = list[Mapping[str, str]]
TEMPLATE_SECONDS = 10.0  # in which a template must have rendered a row; it takes milliseconds, unless it loops
MOST_TIMEOUTS = 3  # rows after which a template counts as one that loops for every row


def has_messages(row: Row, names: Sequence[str]) -> bool:
    """Whether any of the row's fields of these names holds chat messages."""
    return any(isinstance(row.fields.get(name), (list, tuple)) for name in names)


class Rendered(NamedTuple):
    """A prompt and its responses, as rendered by the template and as plain words."""

    texts: tuple[str, ...]  # prompt and responses, to be tokenized
    contents: tuple[str, ...]  # the same without what the template adds, to find empty and equal texts
    spans: tuple[list[tuple[int, int]], ...] = ()  # of each response: (start, stop) of its segment's turns, in characters
    cut: bool = False  # whether turns were cut off one segment, because the other one has fewer


def render(row: Row, report: RowReport, tokenizer, prompt_name: str, *names: str) -> Optional[Rendered]:
    """Render a row's prompt and responses with the tokenizer's chat template.

    A row holds either a prompt (text or messages) and responses (text, or messages that follow the prompt), or whole conversations as
    responses, whose shared beginning is the prompt; a prompt field is then not read.

    Args:
        row, report: the row, and where its defects are noted.
        tokenizer: with a chat template.
        prompt_name: field of the prompt.
        names: field of the only response, or fields of chosen and rejected.

    Returns:
        The texts; None if the row has a defect.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    _check_template(row, tokenizer)
    conversations = [_conversation(row, report, prompt_name, name) for name in names]
    if None in conversations:
        return None
    shared = _shared_beginning(conversations[0], conversations[-1])
    if shared == 0:
        report.refuse(row, "chosen and rejected have different prompts" if len(names) > 1 else f"no prompt before {names[0]!r}")
        return None
    if any(message["role"] == "user" for messages in conversations for message in messages[shared:]):
        report.refuse(row, "user turn within a response: conversations may differ only after their last user turn")
        return None
    found = _tried(row, report, lambda: [_render(messages, shared, tokenizer) for messages in conversations])
    if found is None:
        return None
    contents = (_words(conversations[0][:shared]), *(_words(messages[shared:]) for messages in conversations))
    return Rendered((found[0][0], *(response for _, response in found)), contents)


def render_segments(row: Row, report: RowReport, tokenizer, cut: bool) -> Optional[Rendered]:
    """Render the conversations in chosen and rejected, of which only turns marked {"segment": true} are in the loss.

    As in SDPO, https://arxiv.org/abs/2501.01821. What follows a segment's last turn is dropped, because nothing in the loss depends on it.

    Args:
        row, report, tokenizer: as for `render`.
        cut: if one segment has more turns than the other, cut off its last ones; otherwise the row is refused.

    Returns:
        The texts, with spans; None if the row has a defect.

    Raises:
        UserError: as `render`.
    """
    _check_template(row, tokenizer)
    conversations = [_conversation(row, report, "prompt", name) for name in ("chosen", "rejected")]
    if None in conversations:
        return None
    turns = [[i for i, message in enumerate(messages) if message.get("segment")] for messages in conversations]
    if not all(turns) or any(messages[i]["role"] != "assistant" for messages, some in zip(conversations, turns) for i in some):
        report.refuse(row, 'chosen and rejected need assistant turns marked {"segment": true}, and no other turns may be marked')
        return None
    n = min(map(len, turns))
    if not cut and n < max(map(len, turns)):
        report.refuse(row, f"segments of {len(turns[0])} and {len(turns[1])} turns (datasets.jsonl.segments=cut makes them equal)")
        return None
    conversations = [messages[: some[n - 1] + 1] for messages, some in zip(conversations, turns)]
    shared = min(_shared_beginning(*conversations), turns[0][0], turns[1][0])
    if shared == 0:
        report.refuse(row, "chosen and rejected have different prompts")
        return None
    found = _tried(row, report, lambda: [_render_turns(m, shared, some[:n], tokenizer) for m, some in zip(conversations, turns)])
    if found is None:
        return None
    contents = (_words(conversations[0][:shared]), *(_words([m[i] for i in some[:n]]) for m, some in zip(conversations, turns)))
    prompts, responses, spans = zip(*found)
    if prompts[0] != prompts[1]:
        report.refuse(row, "after the shared turns only one of the conversations continues with the assistant")
        return None
    return Rendered((prompts[0], *responses), contents, spans, n < max(map(len, turns)))


def render_prompt(row: Row, report: RowReport, tokenizer, name: str) -> Optional[str]:
    """Render the messages of a field up to where a reply begins; None if they have a defect, which is noted. Raises as `render`."""
    _check_template(row, tokenizer)
    messages = _as_messages(row.fields[name], "user")
    if not _are_messages(row, report, name, messages):
        return None
    found = _tried(row, report, lambda: [(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True), "")])
    return None if found is None else found[0][0]


def _check_template(row: Row, tokenizer) -> None:
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"{row.source} row {row.number} holds chat messages, but the tokenizer has no chat template: "
            "set model.tokenizer_name_or_path to an instruct model's tokenizer, or give plain text"
        )


def _tried(row: Row, report: RowReport, render: Callable[[], list[tuple]]) -> Optional[list[tuple]]:
    """Return what `render` returns; None if the template raises an error or a response is None, which is noted.

    Raises:
        UserError: the template does not end within TEMPLATE_SECONDS for MOST_TIMEOUTS rows.
    """
    try:
        with time_limit(TEMPLATE_SECONDS):
            found = render()
    except TimeoutError:
        defect = f"the chat template has not ended after {TEMPLATE_SECONDS:.0f} seconds"
        report.refuse(row, defect)
        if report.times(defect) == MOST_TIMEOUTS:
            what = f"{row.source}: {defect} for {MOST_TIMEOUTS} rows, the last of them row {row.number}"
            raise UserError(f"{what}: set model.tokenizer_name_or_path to a tokenizer with another template") from None
        return None
    except Exception as error:  # a template is a program, and can raise anything
        kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
        report.refuse(row, f"the chat template refuses it ({kind}{' '.join(str(error).split())[:200]})")
        return None
    if any(response is None for _, response, *_ in found):
        report.refuse(row, "the chat template does not render the conversation as a continuation of its prompt")
        return None
    return found


def _conversation(row: Row, report: RowReport, prompt_name: str, name: str) -> Optional[Messages]:
    """Return prompt and response as one list of messages; None if the row lacks them, which is noted."""
    if name not in row.fields:
        report.refuse(row, f"no field {name!r}")
        return None
    messages = _as_messages(row.fields[name], "assistant")
    if messages and messages[0].get("role") == "assistant":
        if row.fields.get(prompt_name) is None:
            report.refuse(row, f"no field {prompt_name!r}")
            return None
        messages = (_as_messages(row.fields[prompt_name], "user") or []) + messages
    return messages if _are_messages(row, report, name, messages) else None


def _shared_beginning(chosen: Messages, rejected: Messages) -> int:
    """Return the number of messages that both conversations begin with; the last message of each always counts as response."""
    shared = 0
    for a, b in zip(chosen[:-1], rejected[:-1]):
        if (a["role"], a["content"]) != (b["role"], b["content"]):
            break
        shared += 1
    return shared


def _words(messages: Messages) -> str:
    return "\n".join(message["content"] for message in messages)


def _as_messages(value: Any, role: str) -> Optional[Messages]:
    """Return a text as one message of that role, a list of messages as it is; None for anything else, also for lists with null entries."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return list(value) if isinstance(value, (list, tuple)) and all(isinstance(x, Mapping) for x in value) else None


def _are_messages(row: Row, report: RowReport, name: str, messages: Optional[Messages]) -> bool:
    if not messages:
        report.refuse(row, f"{name!r} is not a list of messages")
        return False
    for message in messages:
        if not isinstance(message.get("role"), str):
            report.refuse(row, f"a message of {name!r} has no role")
            return False
        if not report.is_text(row, f"content of {name!r}", message.get("content")):
            return False
    return True


def _render(messages: Messages, shared: int, tokenizer) -> tuple[str, Optional[str]]:
    """Return prompt and response text. The prompt ends with the generation prompt, unless the template renders replies without it.

    The response is None if the rendered conversation does not begin with the rendered prompt.
    """
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    for add_generation_prompt in (True, False):
        prompt = tokenizer.apply_chat_template(messages[:shared], tokenize=False, add_generation_prompt=add_generation_prompt)
        if full.startswith(prompt):
            return prompt, full[len(prompt) :]
    return prompt, None


def _render_turns(
    messages: Messages, shared: int, turns: Sequence[int], tokenizer
) -> tuple[str, Optional[str], Optional[list[tuple[int, int]]]]:
    """Return prompt text, response text, and (start, stop) of each turn in the response text.

    The last two are None if the rendered conversation does not begin with the text of its first turns.
    """
    full = tokenizer.apply_chat_template(messages, tokenize=False)

    def until(i: int) -> str:
        """Render the messages before i, with the generation prompt if message i is a reply."""
        return tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=messages[i]["role"] == "assistant")

    prompt = until(shared)
    spans = []
    for i in turns:
        before, whole = until(i), tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (full.startswith(prompt) and full.startswith(whole) and whole.startswith(before)):
            return prompt, None, None
        end = len(before) + len(trim_after_eos(whole[len(before) :], tokenizer))
        spans.append((len(before) - len(prompt), end - len(prompt)))
    return prompt, full[len(prompt) :], spans
