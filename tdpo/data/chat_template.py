"""A tokenizer's chat template: the texts that it renders, and where the turns of the assistant lie in them."""

import os
import re
from collections.abc import Sequence
from typing import Optional

from tdpo.data.messages import REPLIES, content_of, texts_of
from tdpo.data.tokenization import special_token_strings
from tdpo.utils import time_limit

TEMPLATE_SECONDS = 10.0  # in which a template must have rendered a row; it takes milliseconds, unless it loops
PROBE = "\ue000"  # stands for a reply's content; of Unicode's private use, so in no text
TURN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": PROBE}]
# Conversations by which a template is tried: some refuse one without a system message, or write only the parts of a content.
IN_PARTS = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in TURN]
SYSTEM = {"role": "system", "content": "b"}
TRIALS = [TURN, [SYSTEM, *TURN], IN_PARTS, [{**SYSTEM, "content": [{"type": "text", "text": "b"}]}, *IN_PARTS]]
PIECE = re.compile(r"<[^<>\s]{1,60}>|\[/?[A-Z_]{2,30}\]|\s|[^\s<\[]+|.", re.DOTALL)  # a text is cut between pieces, not within a tag


class CannotRender(Exception):
    """Why conversations cannot be rendered as prompt and responses."""


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: of Transformers, with a template, or with several, of which Transformers takes one for rows with tools.
        tools: schemas of the tools that it is given, or None.
    """

    def __init__(self, tokenizer, tools: Optional[list] = None):
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token
        self.tools = tools
        specials = special_token_strings(tokenizer)
        self._specials = tuple(specials)
        self.special = one_of(specials)  # finds special tokens
        self._only_special = re.compile(rf"(?:\s|{self.special.pattern})*")
        text = self._tried()
        self._tail = text.partition(PROBE)[2] if text else None  # what it writes after the last reply's content
        self.end = self._end_of(self._tail or "")  # what of that ends the reply
        self.writes_end = self.special.search(self.end) is not None
        named = {token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str) and name.endswith("_token")}
        self.structural = one_of([token for token in specials if token in named or token in text])  # finds those that separate turns

    def _tried(self) -> str:
        """Return the text of the first conversation of TRIALS that the template renders with its reply; '' if it renders none."""
        for messages in TRIALS:
            try:
                text = self.text(messages)
            except TimeoutError:
                raise
            except Exception:  # a template that refuses this conversation may take others
                continue
            if text.count(PROBE) == 1:
                return text
        return ""

    def text(self, messages: Sequence[dict], opened: bool = False) -> str:
        """Render messages, with the row's tools; `opened`: with the beginning of a reply after them.

        Raises:
            TimeoutError: the template has not ended after TEMPLATE_SECONDS.
        """
        with time_limit(TEMPLATE_SECONDS):
            return self.tokenizer.apply_chat_template(list(messages), tools=self.tools, tokenize=False, add_generation_prompt=opened)

    def text_with_probe(self, messages: Sequence[dict], i: int) -> str:
        """Render messages with another reply in place of message i; it keeps its tool calls, without which their results may be refused."""
        calls = {"tool_calls": messages[i]["tool_calls"]} if messages[i].get("tool_calls") else {}
        reply = (IN_PARTS if isinstance(messages[i].get("content"), list) else TURN)[1]
        return self.text([*messages[:i], {**reply, "role": messages[i]["role"], **calls}, *messages[i + 1 :]])

    def completed(self, text: str) -> str:
        """Return a conversation up to the end of its last reply, with end-of-sequence if the template writes no end."""
        if self._tail is not None and text.endswith(self._tail):
            text = text[: len(text) - len(self._tail)] + self.end
        else:  # a turn that ends in another way, such as with a tool call
            at = text.rfind(self.eos) + len(self.eos)
            if at >= len(self.eos) and self._only_special.fullmatch(text, at):
                text = text[:at]
            elif text.rstrip().endswith(self._specials):
                text = text.rstrip()
        ended = self.writes_end or text.endswith(self._specials if self._tail is None else self.eos)
        return text if ended else text + self.eos

    def before(self, conversations: Sequence[Sequence[dict]], i: int, texts: Sequence[str]) -> str:
        """Return the text before reply i, with which all texts begin: up to the beginning of a reply, as far as they have it.

        A template may open a thought for the reply to come that it does not write for a reply without one; the reply then has no opened
        thought, and its header is part of the prompt.
        """
        messages = conversations[0]
        opened = self.text(messages[:i], True)
        if all(text.startswith(opened) for text in texts):
            return opened
        closed = os.path.commonprefix([self.text(messages[:i]), opened])
        end = _boundary(opened, texts)
        if end >= _boundary(closed, [opened]):
            return opened[:end]
        # The template renders these messages differently where a reply follows: what the reply does not change comes before it.
        others = [self.text_with_probe(some, i) for some in conversations]
        before = texts[0][: _boundary(texts[0], [*texts, *others])]
        if content_of(messages[i - 1]).strip() not in before:
            raise CannotRender("the chat template does not render the conversation as a continuation of its prompt")
        return before

    def before_any(self, conversations: Sequence[Sequence[dict]], i: int, texts: Sequence[str]) -> str:
        """Return the text before message i, which only some of the conversations have as a reply."""
        if all(messages[i]["role"] in REPLIES for messages in conversations):
            return self.before(conversations, i, texts)
        before = self.text(conversations[0][:i])
        return before[: _boundary(before, texts)]

    def extent(self, messages: Sequence[dict], i: int, text: str) -> tuple[int, int]:
        """Return (start, stop) of reply i in the conversation's text, with its end token, without its header."""
        start = len(self.before([messages], i, [text]))
        if i == len(messages) - 1:
            return start, len(text)
        alone = self.text(messages[: i + 1])
        until = self.completed(alone)
        if text.startswith(until):
            return start, len(until)
        common = _boundary(alone, [text])
        if messages[i].get("tool_calls") and all(value.strip() in text[start:common] for _, value in texts_of(messages[i])):
            return start, common  # the results of its calls follow in the same turn
        # The template writes a turn differently once others follow, such as without its thought: what changes with the reply is its text.
        other = self.completed(self.text_with_probe(messages, i))
        stop = len(text) - len(os.path.commonprefix([text[start:][::-1], other[start:][::-1]]))
        if self.end and text.startswith(self.end, stop):
            return start, stop + len(self.end)
        if not self.writes_end:
            return start, stop
        end = len(text[stop : stop + _boundary(text[stop:], [self.end])].rstrip())
        one = re.compile(rf"\s*(?:{self.special.pattern})").match(text, stop)
        return start, stop + end if end or one is None else one.end()

    def _end_of(self, tail: str) -> str:
        """Return what ends a reply, of all that the template writes after it: up to end-of-sequence, else to the last special token."""
        eos = tail.find(self.eos)
        if eos >= 0:
            return tail[: eos + len(self.eos)]
        ends = [found.end() for found in self.special.finditer(tail)]
        return tail[: ends[-1]] if ends else tail.rstrip()


def end_tokens(tokenizer) -> list[int]:
    """Return the ids of the tokens that end a reply: end-of-sequence, and what the chat template writes, if there is one."""
    ends = [tokenizer.eos_token_id]
    if getattr(tokenizer, "chat_template", None):
        try:
            written = ChatTemplate(tokenizer).end
        except TimeoutError:
            return ends
        ids = [i for i in tokenizer(written, add_special_tokens=False)["input_ids"] if i in tokenizer.all_special_ids]
        ends += [i for i in ids[:1] if i not in ends]
    return ends


def one_of(texts: Sequence[str]) -> re.Pattern:
    """Return a pattern that finds any of the texts; without texts, nothing."""
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _boundary(text: str, others: Sequence[str]) -> int:
    """Return the length of the longest beginning of a text that the others share and that ends between two pieces of all of them."""
    common = len(os.path.commonprefix([text, *others]))
    ends = [{0, *(piece.end() for piece in PIECE.finditer(some[: common + 61]))} for some in (text, *others)]
    return max(end for end in set.intersection(*ends) if end <= common)
