"""The chat template of a tokenizer: its own, one of its own by name, or a file, with values for the variables that it reads."""

import json
import os
from collections.abc import Mapping
from typing import Any, Optional

import jinja2
import jinja2.ext

from tdpo.utils import UserError, get_logger

log = get_logger(__name__)


def set_chat_template(tokenizer, chosen: Optional[str], values: Mapping[str, Any]) -> None:
    """Give a tokenizer its chat template.

    Args:
        tokenizer: of Transformers, changed in place.
        chosen: a file, or the name of one of the tokenizer's templates; None: its own.
        values: variables that the template reads. They are written into the template, so that whoever renders with it later, such as with
            an exported model, renders what was trained.

    Raises:
        UserError: there is no such template, it is not valid, or there is none for the values.
    """
    own = tokenizer.chat_template
    if chosen is not None:
        if isinstance(own, Mapping) and chosen in own:
            tokenizer.chat_template = own[chosen]
        elif os.path.isfile(chosen):
            tokenizer.chat_template = _read_template(chosen)
        else:
            names = ", ".join(own) if isinstance(own, Mapping) else "none by name"
            raise UserError(f"model.chat_template={chosen}: neither a file nor the name of one of the tokenizer's templates ({names})")
    elif isinstance(own, Mapping) and "default" not in own:
        raise UserError(f"the tokenizer has several chat templates: choose one by model.chat_template=... ({', '.join(own)})")
    if not values:
        return
    if not tokenizer.chat_template:
        raise UserError("model.chat_template_kwargs is given, but the tokenizer has no chat template: set model.chat_template to a file")
    given = {"messages", "tools", "documents", "add_generation_prompt"} & set(values)
    if given:
        raise UserError(f"model.chat_template_kwargs: {', '.join(sorted(given))} come with each conversation; give other names")
    unused = [name for name in values if not any(name in text for text in _templates_of(tokenizer).values())]
    if unused:
        log.warning(f"the chat template does not read {', '.join(unused)} (model.chat_template_kwargs)")
    head = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}" for name, value in values.items()
    )
    # The line break, which is not written, lets the template's first line begin with a block.
    written = {name: head + "\n" + text for name, text in _templates_of(tokenizer).items()}
    tokenizer.chat_template = written if isinstance(tokenizer.chat_template, Mapping) else written["default"]


def _templates_of(tokenizer) -> Mapping[str, str]:
    templates = tokenizer.chat_template
    return templates if isinstance(templates, Mapping) else {"default": templates}


def _read_template(path: str) -> str:
    """Return the template in a file.

    Raises:
        UserError: the file cannot be read, or holds no template.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        jinja2.Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"model.chat_template={path} cannot be read: {' '.join(str(error).split())}") from None
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"model.chat_template={path}, line {error.lineno}: {' '.join(str(error).split())}") from None
    return text


def _literal(value: Any) -> str:
    """Return a value as it is written in a template: as in JSON, apart from null."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key))}: {_literal(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


class _Generation(jinja2.ext.Extension):
    """The tag {% generation %}, by which templates mark replies for Transformers."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)
