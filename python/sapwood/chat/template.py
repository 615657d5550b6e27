"""Chat templates: messages in, the prompt text a model was trained on out.

engine/tokenizer.py finds the templates of a checkpoint with `read_templates` and calls `ChatTemplate.render`; the text
goes back to engine/async_engine.py, which encodes it without adding special tokens (the template writes its own BOS).

A template is a program somebody uploaded with the weights. It runs in Jinja's immutable sandbox, has no loader (no file
can be included), and its work is bounded: loop turns, size of the strings it builds, size of the output.
The environment is that of HF transformers: trim_blocks, lstrip_blocks, break/continue, tojson without HTML escaping,
raise_exception, strftime_now, and the `generation` block, which marks the assistant's tokens for training and changes
nothing here.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sapwood.errors import InvalidRequest, SapwoodError

if TYPE_CHECKING:
    from jinja2 import Template

MAX_LOOP_TURNS: Final = 200_000  # of one rendering: under a second, where a long conversation needs some thousands
MAX_TEXT_LEN: Final = 1 << 24  # characters: the longest contexts of 2026 are a quarter of it
MAX_NUMBER_BITS: Final = 4096
WIDE_FORMAT: Final = re.compile(r"\d{5,}|\*")
RESERVED: Final = ("messages", "tools", "add_generation_prompt", "continue_final_message")


class ChatTemplate:
    """The templates of one checkpoint by name, each compiled when first used.

    templates        name -> source; "default" is used, or "tool_use" where it exists and tools are given (as in HF)
    special_tokens   bos_token, eos_token, ...: variables of the template
    Thread safety: render may be called from several threads.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._sources = dict(templates)
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, Template] = {}

    @property
    def exists(self) -> bool:
        return bool(self._sources)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt text. `variables` (enable_thinking=False, ...) are passed to the template.

        messages   [{"role": ..., "content": ...}, ...]; further keys are the template's business
        tools      JSON schemas of functions
        continue_final_message   end with the last message's content, as in HF: what the template writes behind it is
                   cut off; add_generation_prompt is then without effect
        Raises InvalidRequest: no template, malformed messages, or whatever the template objects to.
        """
        _check_messages(messages, tools)
        taken = next((name for name in variables if name in RESERVED), None)
        if taken is not None:
            raise InvalidRequest(f"chat template: {taken!r} is an argument of its own, not a template variable", taken)
        if continue_final_message:
            add_generation_prompt = False
        template = self._template("tool_use" if tools and "tool_use" in self._sources else "default")
        environment: Any = template.environment
        try:
            environment.start_render()
            chunks, size = [], 0
            for chunk in template.generate(
                self._special_tokens
                | variables
                | {
                    "messages": messages,
                    "tools": tools or None,
                    "add_generation_prompt": add_generation_prompt,
                }
            ):
                size += len(chunk)
                if size > MAX_TEXT_LEN:
                    raise InvalidRequest(f"chat template: its output exceeds {MAX_TEXT_LEN} characters", "messages")
                chunks.append(chunk)
            text = "".join(chunks)
            return _cut_behind(text, messages[-1].get("content")) if continue_final_message else text
        except SapwoodError:
            raise
        except Exception as error:  # the template's own code ran: any exception is its verdict on these messages
            raise InvalidRequest(f"chat template: {error or type(error).__name__}", "messages") from error

    def _template(self, name: str) -> Template:
        compiled = self._compiled.get(name)
        if compiled is None:
            source = self._sources.get(name)
            if source is None:
                have = (
                    f"it has only {sorted(self._sources)}"
                    if self._sources
                    else ("looked for chat_template.jinja, chat_template in tokenizer_config.json, chat_template.json")
                )
                raise InvalidRequest(
                    f"chat template: this model has no {name!r} one ({have}); pass text or token ids instead",
                    "messages",
                )
            compiled = self._compiled[name] = compile_template(source)
        return compiled


def read_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """name -> source of a checkpoint's chat templates, {} where it has none.

    As in HF: chat_template.jinja (and additional_chat_templates/NAME.jinja) before tokenizer_config.json's entry (a
    string, or a list of {name, template}) before chat_template.json. Raises InvalidRequest for a malformed one.
    """
    jinja = folder / "chat_template.jinja"
    if jinja.is_file():
        more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
        return {"default": jinja.read_text("utf-8")} | {file.stem: file.read_text("utf-8") for file in more}
    value, where = tokenizer_config.get("chat_template"), "tokenizer_config.json"
    file = folder / "chat_template.json"
    if value is None and file.is_file():
        where = file.name
        try:
            value = json.loads(file.read_bytes())["chat_template"]
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidRequest(f"chat template: cannot read {file}: {error!r}", "tokenizer") from None
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        return {str(entry["name"]): str(entry["template"]) for entry in value}
    except (KeyError, TypeError):
        raise InvalidRequest(
            f"chat template: chat_template of {where} must be a string or a list of {{name, template}}", "tokenizer"
        ) from None


def compile_template(source: str) -> Template:
    """Compile once. Raises InvalidRequest with the line of a syntax error."""
    from jinja2 import TemplateSyntaxError

    try:
        return _environment_class()().from_string(source)
    except TemplateSyntaxError as error:
        raise InvalidRequest(f"chat template: line {error.lineno}: {error.message}", "tokenizer") from None
    except RecursionError:
        raise InvalidRequest("chat template: nested too deeply", "tokenizer") from None


def _check_messages(messages: Any, tools: Any) -> None:
    if not _is_list(messages) or not messages:
        raise InvalidRequest(
            f"messages must be a list of {{role, content}}, not empty, got {messages!r:.80}", "messages"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(
                f"messages[{i}] must be an object with a string 'role', got {message!r:.100}", "messages"
            )
    if tools is not None and not (_is_list(tools) and all(isinstance(tool, Mapping) for tool in tools)):
        raise InvalidRequest(f"tools must be a list of JSON schemas, got {tools!r:.100}", "tools")


def _cut_behind(text: str, content: Any) -> str:
    """text up to the end of its last occurrence of content, which the template may have stripped."""
    content = content.strip() if isinstance(content, str) else ""
    at = text.rfind(content) if content else -1
    if at < 0:
        raise InvalidRequest(
            "continue_final_message: the last message needs text that the chat template shows as it is", "messages"
        )
    return text[: at + len(content)]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


@functools.cache
def _environment_class() -> type:
    """The sandbox. Built on first use: jinja2 costs a twentieth of a second, which `sapwood --version` need not pay."""
    from jinja2 import TemplateError, TemplateRuntimeError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: the body, unchanged."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def __init__(self) -> None:
            super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
            for name in ("center", "format", "indent"):
                self.filters[name] = self.bounded_filter(name)
            self.filters["tojson"] = _to_json
            del self.globals["lipsum"]  # filler text, as much as asked for
            self.globals["raise_exception"] = self.raise_exception
            self.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
            self._render = threading.local()

        def start_render(self) -> None:
            self._render.turns = 0

        def raise_exception(self, message: str) -> None:
            raise TemplateError(message)

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            """Make every loop count its turns and every ~ check its size; Jinja itself bounds neither."""
            tree = super()._parse(source, name, filename)
            for loop in tree.find_all(nodes.For):
                loop.body.insert(0, nodes.ExprStmt(self._call("count_turn", [], loop.lineno), lineno=loop.lineno))
            _replace_concats(tree, lambda node: self._call("join_texts", node.nodes, node.lineno))
            return tree

        @staticmethod
        def _call(method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
            return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None, lineno=line)

        def count_turn(self) -> None:
            self._render.turns += 1
            if self._render.turns > MAX_LOOP_TURNS:
                raise TemplateRuntimeError(f"more than {MAX_LOOP_TURNS} loop turns")

        def join_texts(self, *parts: Any) -> str:
            texts = [str(part) for part in parts]
            self.check_len(sum(map(len, texts)))
            return "".join(texts)

        def check_len(self, size: int) -> None:
            if size > MAX_TEXT_LEN:
                raise TemplateRuntimeError(f"a text of {size} characters (limit {MAX_TEXT_LEN})")

        def check_widths(self, *arguments: Any) -> None:
            """center, ljust, zfill, indent, ... take a width; no honest one is longer than the longest text."""
            for argument in arguments:
                if isinstance(argument, int):
                    self.check_len(argument)

        def check_format(self, form: str) -> None:
            if WIDE_FORMAT.search(form):
                raise TemplateRuntimeError(f"a format wider than 4 digits, or of computed width: {form!r:.100}")

        def bounded_filter(self, name: str) -> Callable[..., Any]:
            unbounded = self.filters[name]

            def bounded(value: Any, *args: Any, **kwargs: Any) -> Any:
                self.check_widths(*args, *kwargs.values())
                if name == "format":
                    self.check_format(str(value))
                return unbounded(value, *args, **kwargs)

            return bounded

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+" and _is_sized(left) and _is_sized(right):
                self.check_len(len(left) + len(right))
            elif operator == "*" and _is_sized(left) and isinstance(right, int):
                self.check_len(len(left) * right)
            elif operator == "*" and _is_sized(right) and isinstance(left, int):
                self.check_len(left * len(right))
            elif operator == "*" and isinstance(left, int) and isinstance(right, int):
                self.check_bits(left.bit_length() + right.bit_length())
            elif operator == "**" and isinstance(left, int) and isinstance(right, int):
                self.check_bits(left.bit_length() * right)
            elif operator == "%" and isinstance(left, str):
                self.check_format(left)
            return super().call_binop(context, operator, left, right)

        def check_bits(self, num_bits: int) -> None:
            if num_bits > MAX_NUMBER_BITS:
                raise TemplateRuntimeError(f"numbers of more than {MAX_NUMBER_BITS} bits")

        def call(self, context: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
            text = getattr(method, "__self__", None)
            if isinstance(text, str):
                self.check_widths(*args, *kwargs.values())
                if method.__name__.startswith("format"):
                    self.check_format(text)
            return super().call(context, function, *args, **kwargs)

    return Bounded


def _replace_concats(node: Any, replacement: Callable[[Any], Any]) -> None:
    from jinja2 import nodes

    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            _replace_concats(value, replacement)
            if isinstance(value, nodes.Concat):
                setattr(node, name, replacement(value))
        elif isinstance(value, list):
            for i, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    _replace_concats(item, replacement)
                    if isinstance(item, nodes.Concat):
                        value[i] = replacement(item)


def _is_sized(value: Any) -> bool:
    return isinstance(value, (str, list, tuple))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, >, & and ' for HTML, which a model has never seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
