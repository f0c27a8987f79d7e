"""Tools for a model whose chat template knows none: told in its messages, in Hermes' format, with Qwen's words for what a tool answers."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

_INSTRUCTION = """\
You can call functions. Their signatures:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and its arguments between these tags:
<tool_call>
{{"name": "...", "arguments": {{...}}}}
</tool_call>"""


def with_tools_told(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The conversation with tools, calls and their results as text.

    Args:
        messages, tools: in OpenAI's shape.
    """
    told = [_plain(message) for message in messages]
    if not tools:
        return told
    text = _INSTRUCTION.format(tools="\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
    if told and told[0]["role"] == "system":
        return [{**told[0], "content": f"{told[0]['content']}\n\n{text}"}, *told[1:]]
    return [{"role": "system", "content": text}, *told]


def _plain(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if not message.get("tool_calls"):
        return message
    calls = [{"name": call["function"]["name"], "arguments": call["function"]["arguments"]} for call in message["tool_calls"]]
    text = "\n".join(f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls)
    return {"role": message["role"], "content": f"{message['content']}\n{text}" if message["content"] else text}
