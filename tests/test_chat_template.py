"""Chat templates: rendering, the model's own refusals, and what a client must not be able to do with them."""

import json
from pathlib import Path
from typing import Any

import pytest
import small_tokenizers

from jaxserve.errors import InvalidRequest, StartupError
from jaxserve.tokenizer import Tokenizer, load_tokenizer

CHATML = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}{{ raise_exception('unknown role ' + m.role) }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if mood is defined %}[{{ mood }}]{% endif %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HI = [{"role": "user", "content": "hi"}]


def tokenizer(template: Any = CHATML) -> Tokenizer:
    return Tokenizer(small_tokenizers.fast(small_tokenizers.byte_level(), chat_template=template))


def test_text_and_tokens():
    text, token_ids = tokenizer().apply_chat_template(HI)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert token_ids == small_tokenizers.byte_level().encode(text).ids
    assert token_ids[0] == small_tokenizers.SPECIAL.index("<|im_start|>")
    assert tokenizer().apply_chat_template(HI, add_generation_prompt=False)[0] == "<|im_start|>user\nhi<|im_end|>\n"


def test_the_template_says_whether_bos_comes_first():
    spm = Tokenizer(small_tokenizers.fast(small_tokenizers.sentencepiece(), chat_template="{{ bos_token }}{{ messages[0].content }}"))
    assert spm.apply_chat_template(HI)[1].count(1) == 1


def test_the_last_message_can_be_left_open():
    messages = [*HI, {"role": "assistant", "content": "Well,"}]
    text, _ = tokenizer().apply_chat_template(messages, add_generation_prompt=False, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nWell,")
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        tokenizer().apply_chat_template(messages, add_generation_prompt=True, continue_final_message=True)


def test_tools_and_variables_reach_the_template():
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
    text, _ = tokenizer().apply_chat_template(HI, tools=[tool], mood="calm")
    assert json.dumps(tool) in text
    assert "[calm]" in text


def test_named_templates():
    both = {"default": "plain", "tool_use": "with tools"}
    assert tokenizer(both).apply_chat_template(HI)[0] == "plain"
    assert tokenizer(both).apply_chat_template(HI, tools=[{"type": "function"}])[0] == "with tools"


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (CHATML, [{"role": "clown", "content": "x"}], "unknown role clown"),
        (CHATML, [{"role": "user", "content": None}], "chat template"),
        (CHATML, [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "chat template"),
        (CHATML, [{"content": "x"}], "chat template"),
        (CHATML, [{}], "chat template"),
        (CHATML, [], "empty"),
        (None, HI, "no chat template"),
        ("{{ messages.__class__.__mro__ }}", HI, "chat template"),
        ("{% for i in range(10**9) %}x{% endfor %}", HI, "chat template"),
        ("{% if %}", HI, "chat template"),
    ],
    ids=["role", "null", "parts", "no-role", "nothing", "empty", "no-template", "sandbox", "loop", "syntax"],
)
def test_what_cannot_be_rendered_is_the_requests_fault(template: str | None, messages: list[dict[str, Any]], message: str):
    with pytest.raises(InvalidRequest, match=message) as error:
        tokenizer(template).apply_chat_template(messages)
    assert error.value.param == "messages"


def test_a_rendered_conversation_has_a_limit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jaxserve.tokenizer.tokenizer.MAX_RENDERED_CHARACTERS", 1000)
    limited = tokenizer("{% for m in messages %}{{ m.content * 10 }}{% endfor %}")
    assert limited.apply_chat_template([{"role": "user", "content": "x" * 100}])[0] == "x" * 1000
    with pytest.raises(InvalidRequest, match="longer than 1000"):
        limited.apply_chat_template([{"role": "user", "content": "x" * 101}])


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "return_dict", "conversation", "documents"])
def test_a_client_cannot_reach_the_renderers_own_arguments(name: str):
    with pytest.raises(InvalidRequest, match=name) as error:
        tokenizer().apply_chat_template(HI, None, True, False, **{name: "{{ 1 }}"})  # pyright: ignore[reportArgumentType]
    assert error.value.param == "chat_template_kwargs"


def test_a_jinja_file_in_the_folder_is_the_template(tmp_path: Path):
    small_tokenizers.fast(small_tokenizers.byte_level(), chat_template="old").save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("new {{ messages[0].content }}")
    assert load_tokenizer(tmp_path).apply_chat_template(HI)[0] == "new hi"


def test_a_tokenizer_config_replaces_the_template(tmp_path: Path):
    small_tokenizers.fast(small_tokenizers.byte_level(), chat_template="old").save_pretrained(tmp_path)
    config = tmp_path / "mine.json"
    config.write_text(json.dumps({"chat_template": "mine"}))
    assert load_tokenizer(tmp_path, str(config)).apply_chat_template(HI)[0] == "mine"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "listed"}]}))
    assert load_tokenizer(tmp_path, str(config)).apply_chat_template(HI)[0] == "listed"
    for content in ("{", "[]", "{}", '{"chat_template": [1]}', '{"chat_template": 7}'):
        config.write_text(content)
        with pytest.raises(StartupError, match="--tokenizer-config-path"):
            load_tokenizer(tmp_path, str(config))
    with pytest.raises(StartupError, match="No such file"):
        load_tokenizer(tmp_path, str(tmp_path / "missing.json"))
