"""Chat rows: the tokenizer's chat template renders their conversations to the texts of prompt and responses.

Prompt and response together are the whole conversation as the template renders it, up to the end of the reply; nothing else decides what
is trained. Two messages are the same if the template renders them alike.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Optional

import jinja2

from tdpo.data.chat_template import TEMPLATE_SECONDS, CannotRender, ChatTemplate
from tdpo.data.messages import (
    REPLIES,
    SEGMENT,
    Messages,
    are_messages,
    content_of,
    misread,
    parsed,
    read_messages,
    spelled,
    spellings,
    strings_of,
    texts_of,
    without_nulls,
    words_of,
)
from tdpo.data.rows import Row, RowReport
from tdpo.data.tokenization import with_escapes
from tdpo.utils import UserError

MANY_VALUES = 200  # in a conversation, above which it is only checked whether each of them is there, because the work grows with the square
MOST_TIMEOUTS = 3  # rows after which a template counts as one that loops for every row


def has_messages(row: Row, names: Iterable[str]) -> bool:
    """Whether any of the row's fields of these names holds chat messages."""
    return any(isinstance(row.fields.get(name), (list, tuple, dict)) for name in names)


class Rendered(NamedTuple):
    """A prompt and its responses, as rendered by the template and as plain words."""

    texts: tuple[str, ...]  # prompt and responses, to be tokenized
    contents: tuple[str, ...]  # the same without what the template adds, to find empty texts
    spans: tuple[list[tuple[int, int]], ...] = ()  # of each response: (start, stop) of what is in the loss, in characters; [] for all
    cut: bool = False  # whether turns at the end were left out
    complete: bool = True  # whether the texts hold all special tokens; false for plain text


class Chat:
    """A tokenizer's chat template, for the rows of one dataset.

    Args:
        tokenizer: of Transformers.
        report: where defects of rows are noted, and what the template leaves out.
        escape: read a special token's string inside a message as plain text.
        tools, system: names of the fields that hold a row's tools and its system message, if it has them.
    """

    def __init__(self, tokenizer, report: RowReport, escape: bool = False, tools: str = "tools", system: Optional[str] = None):
        self.tokenizer, self.report, self.escape, self.tools, self.system = tokenizer, report, escape, tools, system
        self._templates: dict[bool, ChatTemplate] = {}  # by whether it is that for rows with tools
        self._tools: Optional[list] = None  # of the row that is rendered

    @property
    def template(self) -> ChatTemplate:
        """The template of the row; `_tried` has made sure that there is one."""
        kind = self._tools is not None and not isinstance(self.tokenizer.chat_template, str)
        if kind not in self._templates:
            self._templates[kind] = ChatTemplate(self.tokenizer, self._tools if kind else None)
        self._templates[kind].tools = self._tools
        return self._templates[kind]

    def responses(self, row: Row, prompt_name: str, *names: str) -> Optional[Rendered]:
        """Render a row's prompt and responses.

        A row holds either a prompt (text or messages) and responses (text, or messages that follow the prompt), or whole conversations as
        responses, whose shared beginning is the prompt. Of a response of several turns only the assistant's are in the loss.

        Args:
            row: the row.
            prompt_name: field of the prompt.
            names: field of the only response, or fields of chosen and rejected.

        Returns:
            The texts; None if the row has a defect.

        Raises:
            UserError: the tokenizer has no chat template.
        """
        return self._tried(row, lambda: self._responses(row, prompt_name, names))

    def conversation(self, row: Row, name: str, all_turns: bool, prompt_name: Optional[str] = None) -> Optional[Rendered]:
        """Render one conversation for SFT: its last reply is the response or, with `all_turns`, all that follows the first user turns, of
        which the assistant's turns are in the loss. What follows the last reply is left out.

        Args:
            row, name: the row, and its field.
            all_turns: train on all turns of the assistant.
            prompt_name: field of a prompt that comes before it, or None.

        Returns:
            The texts; None if the row has a defect.

        Raises:
            UserError: as `responses`.
        """

        def render() -> Rendered:
            messages, _ = self._conversation(row, prompt_name or name, name)
            replies = [i for i, message in enumerate(messages) if i > 0 and message["role"] in REPLIES]
            if not replies:
                raise CannotRender(f"{name!r} has no reply of the assistant after a prompt")
            first = replies[0] if all_turns else replies[-1]
            left_out = replies[-1] + 1 < len(messages)
            (messages,), (text,) = self._written(row, [messages[: replies[-1] + 1]])
            prompt = self._before_one(messages, first, text)
            turns = replies if all_turns else []
            return self._result([messages], (name,), first, prompt, [text], [turns], left_out)

        return self._tried(row, render)

    def segments(self, row: Row, prompt_name: str, names: tuple[str, str], cut: bool) -> Optional[Rendered]:
        """Render the conversations in chosen and rejected, of which only turns marked {"segment": true} are in the loss.

        As in SDPO, https://arxiv.org/abs/2501.01821. What follows a segment's last turn is dropped, because nothing in the loss depends on
        it.

        Args:
            row: the row.
            prompt_name: field of the prompt, if the conversations do not begin with it.
            names: fields of chosen and rejected.
            cut: if one segment has more turns than the other, cut off its last ones; otherwise the row is refused.

        Returns:
            The texts, with spans; None if the row has a defect.

        Raises:
            UserError: as `responses`.
        """

        def render() -> Rendered:
            conversations = [self._conversation(row, prompt_name, name)[0] for name in names]
            turns = [[i for i, message in enumerate(messages) if message.get(SEGMENT)] for messages in conversations]
            if not all(turns) or any(messages[i]["role"] != "assistant" for messages, some in zip(conversations, turns) for i in some):
                raise CannotRender('chosen and rejected need assistant turns marked {"segment": true}, and no other turns may be marked')
            n = min(map(len, turns))
            shortened = n < max(map(len, turns))
            if not cut and shortened:
                key = f"datasets.{self.report.name}.segments=cut"
                raise CannotRender(f"segments of {len(turns[0])} and {len(turns[1])} turns ({key} makes them equal)")
            conversations = [messages[: some[n - 1] + 1] for messages, some in zip(conversations, turns)]
            conversations, texts = self._written(row, conversations)
            shared = min(self._shared(conversations, texts), turns[0][0], turns[1][0])
            if shared == 0:
                raise CannotRender("chosen and rejected have different prompts")
            prompt = self.template.before_any(conversations, shared, texts)
            found = self._result(conversations, names, shared, prompt, texts, [some[:n] for some in turns], shortened)
            words = (words_of([messages[i] for i in some[:n]]) for messages, some in zip(conversations, turns))
            return found._replace(contents=(found.contents[0], *words))

        return self._tried(row, render)

    def prompt(self, row: Row, name: str) -> Optional[str]:
        """Render the messages of a field up to where a reply begins; None if they have a defect, which is noted. Raises as `responses`."""

        def render() -> str:
            messages = read_messages(row.fields[name], "user")
            if not are_messages(row, self.report, name, messages, self.template.structural):
                raise CannotRender("")
            (messages,), _ = self._written(row, [self._with_system(row, messages)], opened=True)
            return self.template.text(messages, True)

        return self._tried(row, render)

    def _tried(self, row: Row, render: Callable[[], Any]) -> Any:
        """Return what `render` returns; None if it finds a defect, or the template raises an error, which is noted.

        Raises:
            UserError: there is no template, or it does not end within TEMPLATE_SECONDS for MOST_TIMEOUTS rows.
        """
        report = self.report
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"{row.source} row {row.number} holds chat messages, but the tokenizer has no chat template: set model.chat_template to a "
                "file, or model.tokenizer_name_or_path to an instruct model's tokenizer, or give plain text"
            )
        self._tools = None
        try:
            found = render()
        except CannotRender as defect:
            if str(defect):  # otherwise it is noted already
                report.refuse(row, str(defect))
            return None
        except TimeoutError:
            defect = f"the chat template has not ended after {TEMPLATE_SECONDS:.0f} seconds"
            report.refuse(row, defect)
            if report.times(defect) == MOST_TIMEOUTS:
                what = f"{row.source}: {defect} for {MOST_TIMEOUTS} rows, the last of them row {row.number}"
                raise UserError(f"{what}: set model.chat_template to another template") from None
            return None
        except UserError:
            raise
        except Exception as error:  # a template is a program, and can raise anything
            kind = "" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: "
            report.refuse(row, f"the chat template refuses it ({kind}{' '.join(str(error).split())[:200]})")
            return None
        report.rendered += 1
        return found

    def _conversation(self, row: Row, prompt_name: str, name: str) -> tuple[Messages, Optional[int]]:
        """Return prompt and response as one list of messages, and the number of the prompt's; None if they are one conversation."""
        if name not in row.fields:
            raise CannotRender(self.report.no_field(row, name))
        messages = read_messages(row.fields[name], "assistant")
        given = row.fields.get(prompt_name) if prompt_name != name else None
        prompt = read_messages(given, "user") or []
        first = messages[0].get("role") if messages else None
        if messages and prompt_name != name and given is None and first in REPLIES:
            raise CannotRender(self.report.no_field(row, prompt_name))
        said = [(message.get("role"), content_of(message)) for message in messages or []]
        if isinstance(given, str):
            apart = first not in ("user", "system", "developer")
        else:  # a conversation that begins with its prompt has its messages
            apart = not any((message.get("role"), content_of(message)) in said for message in prompt)
        if messages and prompt and not apart:
            words = words_of(messages)
            self.report.other_prompts += not all(content_of(message).strip() in words for message in prompt)
        parts = [(prompt_name, prompt)] if messages and prompt and apart else []
        for field, some in [*parts, (name, messages)]:
            if not are_messages(row, self.report, field, some, self.template.structural):
                raise CannotRender("")
        whole = self._with_system(row, [*prompt, *messages] if parts else messages)
        return whole, len(whole) - len(messages) if parts else None

    def _with_system(self, row: Row, messages: Messages) -> Messages:
        """Return messages after the row's system message, if it has one; special tokens that they may not hold are escaped if asked for."""
        system = row.fields.get(self.system) if self.system else None
        if system:
            if not self.report.is_text(row, self.system, system):
                raise CannotRender("")
            own = messages[0] if messages[0]["role"] == "system" else None
            if own is not None and content_of(own).strip() != system.strip():
                raise CannotRender(f"a system message and another one in the field {self.system!r}")
            messages = messages if own is not None else [{"role": "system", "content": system}, *messages]
        if not self.escape:
            return messages
        finders = (self.template.structural if message["role"] in REPLIES else self.template.special for message in messages)
        return [with_escapes(message, special) for message, special in zip(messages, finders)]

    def _row_tools(self, row: Row) -> Optional[list]:
        """Return the row's tools: a list of schemas, or their JSON."""
        tools = row.fields.get(self.tools)
        if isinstance(tools, str) and tools.strip() in ("", "null"):
            return None
        tools = parsed(tools, tools) if isinstance(tools, str) else without_nulls(tools)
        tools = [tools] if isinstance(tools, dict) else tools
        if not tools:
            return None
        if not isinstance(tools, list):
            raise CannotRender(f"{self.tools!r} is {type(tools).__name__}, not a list of tools")
        tools = [parsed(tool, tool) if isinstance(tool, str) else tool for tool in tools]
        if not all(isinstance(tool, dict) for tool in tools):
            raise CannotRender(f"{self.tools!r} holds something else than the schemas of tools")
        if not all(self.report.is_text(row, self.tools, text) for _, text in strings_of(tools, self.tools)):
            raise CannotRender("")
        return with_escapes(tools, self.template.special) if self.escape else tools

    def _written(self, row: Row, conversations: Sequence[Messages], opened: bool = False) -> tuple[list[list[dict]], list[str]]:
        """Return the conversations in the first spelling that the template understands, and their texts up to the end of the last reply."""
        self._tools = self._row_tools(row)
        best, failed = None, None
        for spelling in spellings(conversations):
            written = [spelled(messages, spelling) for messages in conversations]
            try:
                texts = [self.template.text(messages, opened) for messages in written]
            except (TimeoutError, UserError):
                raise
            except Exception as error:
                failed = failed or error
                continue
            wrong = sum(misread(text, messages, spelling) for text, messages in zip(texts, conversations))
            if best is None or wrong < best[0]:
                best = wrong, written, texts
            if wrong == 0:
                break
        if best is None:
            raise failed
        _, written, texts = best
        self._note_left_out(written, texts, opened)
        return written, texts if opened else [self.template.completed(text) for text in texts]

    def _note_left_out(self, conversations: Sequence[Sequence[dict]], texts: Sequence[str], opened: bool) -> None:
        """Count what the template does not write as it is: texts of messages, by key, and tools."""
        left_out, listed = set(), []
        if self._tools is not None:
            tools, self._tools = self._tools, None
            unread = [self.template.text(messages, opened) for messages in conversations] == list(texts)
            self._tools = tools
            left_out |= {self.tools} if unread else set()
            listed = [] if unread else [text for _, text in texts_of(tools)]
        for messages, text in zip(conversations, texts):
            left_out |= _missing([pair for message in messages for pair in texts_of(message)], listed, text)
        self.report.left_out.update(left_out)

    def _shared(self, conversations: Sequence[Sequence[dict]], texts: Sequence[str]) -> int:
        """Return the number of messages that the conversations begin with; the last message of each always counts as response.

        Messages that differ are the same if the template renders the first conversation with either of them alike.
        """
        first, last = conversations[0], conversations[-1]
        for i, (a, b) in enumerate(zip(first[:-1], last[:-1])):
            if a == b:
                continue
            if a["role"] != b["role"] or self.template.completed(self.template.text([*first[:i], b, *first[i + 1 :]])) != texts[0]:
                return i
        return min(len(first), len(last)) - 1

    def _before_one(self, messages: Sequence[dict], i: int, text: str) -> str:
        """Return the text before reply i of a row of one conversation. It does not depend on the reply, such as on whether that has a
        thought, because the replies of other rows may belong to the same prompt."""
        try:
            other = self.template.completed(self.template.text_with_probe(messages, i))
        except TimeoutError:
            raise
        except Exception:  # the template refuses another reply there
            other = text
        return self.template.before([messages, messages], i, [text, other])

    def _responses(self, row: Row, prompt_name: str, names: Sequence[str]) -> Rendered:
        found = [self._conversation(row, prompt_name, name) for name in names]
        conversations, texts = self._written(row, [messages for messages, _ in found])
        shared = self._shared(conversations, texts) if len(names) > 1 or found[0][1] is None else found[0][1]
        if shared == 0:
            raise CannotRender("chosen and rejected have different prompts" if len(names) > 1 else f"no prompt before {names[0]!r}")
        replies = [[i for i in range(shared, len(m)) if m[i]["role"] in REPLIES] for m in conversations]
        for messages, own, name in zip(conversations, replies, names):
            if any(message["role"] == "user" for message in messages[shared:]):
                raise CannotRender("user turn within a response: conversations may differ only after their last user turn")
            if own[:1] != [shared] or own[-1] != len(messages) - 1:
                raise CannotRender(f"the response of {name!r} does not begin and end with a turn of the assistant")
        many = len(names) > 1
        prompt = self.template.before(conversations, shared, texts) if many else self._before_one(conversations[0], shared, texts[0])
        parts = [own if len(own) < len(messages) - shared else [] for own, messages in zip(replies, conversations)]
        return self._result(conversations, names, shared, prompt, texts, parts)

    def _result(
        self,
        conversations: Sequence[Sequence[dict]],
        names: Sequence[str],
        shared: int,
        prompt: str,
        texts: Sequence[str],
        turns: Sequence[Sequence[int]],
        cut: bool = False,
    ) -> Rendered:
        """Return prompt and responses, of which the given turns are in the loss; no turns: all of it."""
        spans = []
        for messages, text, own in zip(conversations, texts, turns):
            end, extents = 0, []
            for i in own:
                start, stop = self.template.extent(messages, i, text)
                extents.append((max(end, start - len(prompt)), stop - len(prompt)))
                end = extents[-1][1]
            spans.append(extents)
        written = [text[len(prompt) :] for text in texts]
        words = [words_of(messages[shared:]) for messages in conversations]
        for message, name, text in zip(words, names, written):
            if message.strip() and not self.template.special.sub("", text).strip():
                raise CannotRender(f"the chat template writes nothing of the reply in {name!r}")
        contents = (words_of(conversations[0][:shared]), *words)
        return Rendered((prompt, *written), contents, tuple(spans), cut)


def _missing(values: Sequence[tuple[str, str]], others: Sequence[str], text: str) -> set[str]:
    """Return the keys of values that a text does not hold as often as they occur, alone and within others.

    Args:
        values: (key, value) each.
        others: texts in which values may occur too.
        text: what the template has rendered.
    """
    known = [value for _, value in values] + list(others)

    def is_missing(value: str) -> bool:
        written = {value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]}
        found = sum(text.count(some) for some in written)
        return found < (sum(other.count(value) for other in known) if len(known) <= MANY_VALUES else 1)

    return {key for key, value in values if value.strip() and is_missing(value.strip())}
