"""Chat templates, and conversations to render with them, for the tests of chat rows."""

from helpers import CHATML, turn

HEADER = "<|im_start|>{{ m['role'] }}\n"
OPENS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")  # a thought, for the reply to come
# Earlier turns lose their thoughts, and the last one gets an empty thought if it has none, as with Qwen 3.
DROPS = (
    "{% for m in messages %}" + HEADER + "{% set parts = m['content'].split('</think>') %}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ parts[0] if parts | length > 1 else '<think>\n' }}{{ '\n</think>\n\n' }}{% endif %}"
    "{{ parts[-1].lstrip() if m['role'] == 'assistant' else m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRIPS = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
# The conversation ends with another token, as with Phi-3.
CLOSES = CHATML.replace("{% endif %}", "{% else %}<|endoftext|>{% endif %}")
FIELDS = CHATML.replace("{{ m['content'] }}", "{% if m['reasoning'] %}<think>{{ m['reasoning'] }}</think>{% endif %}{{ m['content'] }}")
# The header of the reply differs with what it holds, as with gpt-oss.
CHANNELS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m['role'] == 'assistant' %}"
    "{{ '<|a|>' if 'think' in m['content'] else '<|b|>' }}{% endif %}{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
# The system text is part of the first user turn, and replies need no header, as with Mistral.
INST = (
    "<s>{% set first = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ first if loop.index0 < 2 }}{{ m['content'] }}[/INST]{% elif m['role'] == 'assistant' %}"
    " {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
TEMPLATES = {"ChatML": CHATML, "opens": OPENS, "drops": DROPS, "strips": STRIPS, "closes": CLOSES, "fields": FIELDS, "channels": CHANNELS}
TEMPLATES["inst"] = INST
HISTORY = [turn("user", "hi"), turn("assistant", "<think>\nlong ago\n</think>\n\nyo"), turn("user", "2+2?")]
CONVERSATIONS = {
    "one turn": ([turn("user", "2+2?")], "4", "5"),
    "system": ([turn("system", "Be terse."), turn("user", "2+2?")], "4", "5"),
    "turns": (HISTORY, "it is 4", "no"),
    "spaces": ([turn("user", "  2+2? ")], "  4 \n", "5  "),
    "thoughts": ([turn("user", "2+2?")], "<think>\nadd them\n</think>\n\n4", "<think>\nguess\n</think>\n\n5"),
    "one thought": (HISTORY, "<think>\nadd them\n</think>\n\n4", "5"),
    "looks like a thought": ([turn("user", "2+2?")], "<thing> 4", "<|x|> 5"),
}


def reply(content, **more) -> dict:
    return {"role": "assistant", "content": content, **more}


TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
]
AWARE = (  # of tools, and of content that is missing or a list
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for m in messages %}"
    + HEADER
    + "{% set content = m['content'] %}{% if content is string %}{{ content }}{% elif content is not none %}"
    "{% for part in content %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{% for call in m['tool_calls'] or [] %}<call>{{ call['function']['name'] }} ARGUMENTS</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ARGUMENTS = {
    "json": "{{ call['function']['arguments'] | tojson }}",
    "text": "{{ '' + call['function']['arguments'] }}",
    "plain": "{{ call['function']['arguments'] }}",
    "items": "{% for k, v in call['function']['arguments'] | items %}{{ k }}={{ v }};{% endfor %}",
    "mapping": "{% if call['function']['arguments'] is mapping %}{% for k, v in call['function']['arguments'].items() %}{{ k }}={{ v }};"
    "{% endfor %}{% endif %}",
}
WRITTEN = {
    "json": '{"city": "Rome"}',
    "text": '{"city": "Rome"}',
    "plain": '{"city": "Rome"}',
    "items": "city=Rome;",
    "mapping": "city=Rome;",
}


def call(arguments) -> dict:
    return {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}


def assert_as_rendered(element: dict, tokenizer, conversations: dict[str, list], **more) -> None:
    """Check that each role's tokens decode to the rendered conversation, up to white space after the end of the reply."""
    for role, messages in conversations.items():
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, **more)
        assert tokenizer.decode(element[f"{role}_input_ids"]) == rendered.rstrip()
        assert element["prompt"] + element[f"{role}_response_only"] == element[role] == rendered.rstrip()
