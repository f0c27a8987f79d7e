"""Chat templates that render nothing but what the answer shall be: the engine double repeats it. Comments tell the tool format."""

from tiny_models import CHAT_TEMPLATE

ANSWER = "{{ messages[-1]['content'] }}"
TEMPLATES = {
    "hermes": ANSWER + "{# tools <tool_call> #}",
    "thinking": ANSWER + "{# tools <tool_call> </think> #}",
    "llama3_json": ANSWER + "{# tools <|python_tag|> #}",
    "pythonic": ANSWER + "{# tools [func_name1(...)] #}",
    "mistral": ANSWER + "{# tools [TOOL_CALLS] #}",
    "unknown": ANSWER + "{# tools #}",
    "ipython": ANSWER + "{# message.role == 'ipython' #}",
    "plain": CHAT_TEMPLATE,
    "json": "{{ messages | tojson }}{{ tools | tojson }}{# <tool_call> #}",
}
