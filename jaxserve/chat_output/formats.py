"""Which format a model's tool calls and its reasoning have: told by a name, or by its chat template."""

import re
import secrets
import string
from collections.abc import Callable, Container
from dataclasses import dataclass

from jaxserve.chat_output import hermes, llama3_json, mistral
from jaxserve.chat_output.hermes import HermesParser
from jaxserve.chat_output.llama3_json import Llama3JsonParser
from jaxserve.chat_output.message import MessageWriter, long_call_id
from jaxserve.chat_output.mistral import MistralParser
from jaxserve.chat_output.pythonic import PythonicParser
from jaxserve.chat_output.tool_call_parser import ToolCallParser


def _mistral_id() -> str:
    """Mistral's templates refuse any other."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """How a model writes tool calls.

    Attributes:
        name: for --tool-call-parser.
        new_parser: makes a parser of one answer, given the names of the functions that it may call.
        marker: what calls begin with; it may be a special token, and such must then not be skipped.
        new_call_id: makes a call's id.
        bare: what calls may begin with instead of the marker, at the start of an answer.
    """

    name: str
    new_parser: Callable[[MessageWriter, Container[str]], ToolCallParser]
    marker: str = ""
    new_call_id: Callable[[], str] = long_call_id
    bare: tuple[str, ...] = ()


HERMES = ToolFormat("hermes", lambda writer, names: HermesParser(writer), hermes.BEGIN)
LLAMA3_JSON = ToolFormat("llama3_json", Llama3JsonParser, llama3_json.BEGIN, bare=("{", "["))
PYTHONIC = ToolFormat("pythonic", PythonicParser, "<|python_start|>", bare=("[",))
MISTRAL = ToolFormat("mistral", lambda writer, names: MistralParser(writer), mistral.BEGIN, _mistral_id)

TOOL_CALL_PARSERS = {"hermes": HERMES, "qwen": HERMES, "llama3_json": LLAMA3_JSON, "pythonic": PYTHONIC, "mistral": MISTRAL}
REASONING_PARSERS = ("qwen3", "deepseek_r1")
_PYTHONIC_TEMPLATE = re.compile(r"\[func_name1\(|<\|python_start\|>|\[tool_name\(")
_LLAMA3_TEMPLATE = re.compile(r'<\|python_tag\|>|"parameters": dictionary of argument name')


def takes_tools(template: str) -> bool:
    """Whether a chat template shows tools to the model."""
    return re.search(r"\btools\b", template) is not None


def choose_tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template teaches; None where it is one that nothing here reads.

    A template that knows no tools gets them described in a message, in Hermes' format.
    """
    if not takes_tools(template):
        return HERMES
    if "[TOOL_CALLS]" in template:
        return MISTRAL
    if "<tool_call>" in template:
        return None if "<function=" in template or "<arg_key>" in template else HERMES
    if _PYTHONIC_TEMPLATE.search(template):
        return PYTHONIC
    return LLAMA3_JSON if _LLAMA3_TEMPLATE.search(template) else None


def choose_reasoning_parser(template: str) -> str | None:
    """The reasoning that a chat template speaks of; None: the model does not think aloud."""
    if "</think>" not in template:
        return None
    return "deepseek_r1" if "<\uff5cAssistant\uff5c>" in template else "qwen3"


def reasoning_state(parser: str | None, prompt: str) -> str:
    """Where an answer to the prompt begins: see MessageParser's `reasoning`.

    Templates begin the reasoning in the prompt (<think>), or leave it out there (<think></think>); DeepSeek-R1 thinks in any other case.
    """
    if parser is None:
        return ""
    end = prompt.rstrip()
    if end.endswith("<think>"):
        return "begun"
    return "begun" if parser == "deepseek_r1" and not end.endswith("</think>") else "possible"
