"""chat/template.py: the same text as HF transformers, and templates that misbehave."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sapwood.chat.template import MAX_TEXT_LEN, ChatTemplate, read_templates
from sapwood.engine.tokenizer import Tokenizer
from sapwood.errors import InvalidRequest

LLAMA3 = """{%- set loop_messages = messages %}
{%- if strftime_now is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
        + message['content'] | trim + '<|eot_id|>' %}
    {{- content }}
{%- endfor %}
{%- if tools is not none %}
    {{- "Environment: ipython\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\n\n" }}
    {%- endfor %}
{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' ~ date_string }}
{%- endif %}
"""
CHATML = """{% for message in messages %}
    {% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
    {% endif %}
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}{% if not enable_thinking %}{{ '<think>\n\n</think>' }}{% endif %}
{% endif %}
"""
# What real templates use between them: macros, namespaces, tests, slices, loop controls, filters, the generation block.
FEATURES = """{% macro show(m) %}[{{ m.role }}:{{ m.content | tojson }}]{% endmacro %}
{%- set ns = namespace(last=-1, text='') %}
{%- for m in messages[::-1] %}
    {%- if m.role == 'tool' %}{% continue %}{% endif %}
    {%- if loop.index > 3 %}{% break %}{% endif %}
    {%- set ns.text = ns.text ~ show(m) + ' ' * 2 %}
    {%- set ns.last = loop.index0 %}
{%- endfor %}
{{- ns.text }}{{ ns.last }}|
{{- messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}
{% for m in messages if m.role == 'assistant' %}
{% generation %}
{{ m.content.strip().split('</think>')[-1].lstrip('\n') }}
{% endgeneration %}
{% else %}nobody{% endfor %}
{{ {'b': '<&>"é', 'a': [1, none, true]} | tojson }}{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, indent=2) }}
{{- 'x' if messages is iterable and messages[0].content is string and messages is not mapping }}
{{- ('%05.1f' % 3.14159) ~ '{:>8}'.format('r') ~ 2 ** 10 ~ 7 % 4 ~ ([1] + [2]) }}
{{- 'ab' | center(6) }}{{ tools is none }}
"""
CONVERSATION = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": '1 < 2 & "naïve" 🦙?\n'},
    {"role": "assistant", "content": "<think>hm</think>\n\nYes. "},
    {"role": "tool", "content": "{}"},
    {"role": "user", "content": "Why?"},
]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "find", "parameters": {"type": "object", "properties": {"é": {"type": "string"}}}},
    }
]


@pytest.fixture(scope="module")
def oracle() -> Callable[..., str]:
    """HF transformers' rendering of the same template."""
    rendering = pytest.importorskip("transformers.utils.chat_template_utils")

    def render(source: str, messages: list[dict], tools: Any = None, **variables: Any) -> str:
        texts, _ = rendering.render_jinja_template([messages], tools=tools, chat_template=source, **variables)
        return texts[0]

    return render


@pytest.mark.parametrize("source", [LLAMA3, CHATML, FEATURES])
@pytest.mark.parametrize("messages", [CONVERSATION, CONVERSATION[1:2], CONVERSATION[:3]])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_equals_transformers(
    oracle: Callable[..., str], source: str, messages: list[dict], tools: Any, prompt: bool
) -> None:
    ours = ChatTemplate({"default": source}, {"bos_token": "<s>", "eos_token": "</s>"})
    expected = oracle(
        source, messages, tools, bos_token="<s>", eos_token="</s>", add_generation_prompt=prompt, enable_thinking=False
    )
    assert ours.render(messages, tools=tools, add_generation_prompt=prompt, enable_thinking=False) == expected
    assert len(expected) > 50


def test_phi3(oracle: Callable[..., str], unpack_tokenizer: Callable[[str], Path]) -> None:
    folder = unpack_tokenizer("phi-3-mini")
    tokenizer = Tokenizer.load(folder)
    source = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    assert tokenizer.has_chat_template
    for prompt in (True, False):
        text = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=prompt)
        assert text == oracle(source, CONVERSATION, eos_token="<|endoftext|>", add_generation_prompt=prompt)
    assert text.endswith("<|end|>\n<|endoftext|>")
    ids = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}]), add_special_tokens=False)
    assert (ids[0], ids[-2:]) == (
        32010,
        [32007, 32001],
    )  # <|user|> ... <|end|> <|assistant|>, whose newlines they swallow


def render(source: str, **variables: Any) -> str:
    return ChatTemplate({"default": source}, {}).render([{"role": "user", "content": "hi"}], **variables)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "^chat template: roles must alternate$"),
        ("line\n{% if %}", "line 2: Expected an expression"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ no_such(1) }}", "'no_such' is undefined"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(role='x') }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|undefined"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% for i in range(1000000000) %}{% endfor %}", "Range too big"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loop turns"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 'a' * 10**9 }}", "a text of"),
        ("{{ 10**9 * [0] }}", "a text of"),
        ("{{ 2 ** 10**4 }}{{ 3 ** 99999999 }}", "bits"),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "characters",
        ),
        (
            "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
            "characters",
        ),
        ("{{ 'a'.center(999999999) }}", "a text of"),
        ("{{ 'a' | center(999999999) }}", "a text of"),
        ("{{ 'a\nb' | indent(999999999) }}", "a text of"),
        ("{{ '%999999999d' % 1 }}", "width"),
        ("{{ '%*d' % (999999999, 1) }}", "width"),
        ("{{ '{:999999999}'.format(1) }}", "width"),
        ("{{ '{:{}}'.format(1, 999999999) }}", "a text of"),
        ("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", "output exceeds"),
    ],
)
def test_a_template_that_misbehaves_is_an_invalid_request(source: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(InvalidRequest, match=message):
        render(source)
    assert time.monotonic() - start < 20  # none may hang; the slowest takes half a second on an idle core


def test_undefined_is_empty_and_attributes_are_hidden() -> None:
    assert render("[{{ nothing }}{{ ''.__class__ }}{{ raise_exception.__globals__ }}]") == "[]"


def test_loop_turns_are_counted_per_rendering_and_thread() -> None:
    template = ChatTemplate({"default": "{% for i in range(90000) %}{% endfor %}{{ messages[0].content }}"}, {})
    done = []

    def work() -> None:
        done.extend(template.render([{"role": "user", "content": "x"}]) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done == ["x"] * 6


@pytest.mark.parametrize("messages", [None, [], "hi", {"role": "user"}, [1], [{"content": "x"}], [{"role": 3}]])
def test_malformed_messages(messages: Any) -> None:
    with pytest.raises(InvalidRequest, match="messages") as caught:
        ChatTemplate({"default": "x"}, {}).render(messages)
    assert caught.value.param == "messages"


def test_malformed_tools_and_reserved_names() -> None:
    template = ChatTemplate({"default": "x"}, {})
    for tools in ("x", {"a": 1}, [print]):
        with pytest.raises(InvalidRequest, match="tools must be"):
            template.render([{"role": "user"}], tools=tools)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        template.render([{"role": "user"}], messages=[])  # type: ignore[misc]


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    template = ChatTemplate(read_templates(tmp_path, {"chat_template": named}), {})
    assert template.render([{"role": "user"}]) == "plain"
    assert template.render([{"role": "user"}], tools=[]) == "plain"
    assert template.render([{"role": "user"}], tools=[{}]) == "tools"
    with pytest.raises(InvalidRequest, match=r"no 'default' one \(it has only \['rag'\]\)"):
        ChatTemplate({"rag": "x"}, {}).render([{"role": "user"}])


def test_where_templates_come_from(tmp_path: Path) -> None:
    assert read_templates(tmp_path, {}) == {}
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert read_templates(tmp_path, {}) == {"default": "json"}
    assert read_templates(tmp_path, {"chat_template": "config"}) == {"default": "config"}
    (tmp_path / "chat_template.jinja").write_text("jinja é")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert read_templates(tmp_path, {"chat_template": "config"}) == {"default": "jinja é", "tool_use": "tools"}


@pytest.mark.parametrize("value", [3, [1], [{"name": "default"}]])
def test_malformed_sources(tmp_path: Path, value: Any) -> None:
    with pytest.raises(InvalidRequest, match="must be a string or a list"):
        read_templates(tmp_path, {"chat_template": value})
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(InvalidRequest, match=r"chat_template\.json"):
        read_templates(tmp_path, {})


def test_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sapwood.chat import template as module

    compiled = []
    original = module.compile_template
    monkeypatch.setattr(module, "compile_template", lambda source: compiled.append(source) or original(source))
    template = ChatTemplate({"default": "{{ messages[0].content }}"}, {})
    assert [template.render([{"role": "user", "content": c}]) for c in ("a", "b" * 1000)] == ["a", "b" * 1000]
    assert len(compiled) == 1


def test_a_long_conversation_is_within_the_bounds() -> None:
    messages = [{"role": "user", "content": "x" * 1000} for _ in range(10_000)]
    text = ChatTemplate({"default": CHATML}, {}).render(messages)
    assert 10_000_000 < len(text) < MAX_TEXT_LEN
