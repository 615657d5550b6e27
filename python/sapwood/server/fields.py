"""From the bytes of a request's body to a struct whose every field was understood.

Receives bodies from server/exchange.py for the structs of server/openai.py and server/native.py. A field that nobody
knows is a 400 that names the nearest valid one; a field that asks for what this version cannot do is a 400 that says
so, unless its value asks for nothing (frequency_penalty=0); a null is an absent field, as in OpenAI's API.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from sapwood.server.problems import Problem

MIN_SEED: Final = -(2**63)
Body = TypeVar("Body", bound=msgspec.Struct)

# Sent by known clients, of no consequence for the answer, and accepted whatever they hold. server/README.md lists them.
HARMLESS: Final = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "session_id",
        "custom_labels",
        "parallel_tool_calls",  # there are no tool calls to be made in parallel
        "include_reasoning",
        "separate_reasoning",
        "stream_reasoning",
        "return_text_in_logprobs",
        "log_metrics",
        "no_logs",
    }
)
# field -> the values that ask for nothing. Any other is refused: what they ask for is not there yet.
NEUTRAL: Final = MappingProxyType[str, tuple[Any, ...]](
    {
        "allowed_token_ids": (),
        "audio": (),
        "audio_data": (),
        "background": (False,),
        "bad_words": ([],),
        "best_of": (1,),
        "chat_template": (),
        "custom_logit_processor": (),
        "custom_params": ({},),
        "documents": ([],),
        "ebnf": (),
        "echo": (False,),
        "frequency_penalty": (0,),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "guided_choice": (),
        "guided_grammar": (),
        "guided_json": (),
        "guided_regex": (),
        "image_data": (),
        "include_stop_str_in_output": (False,),
        "input_embeds": (),
        "json_schema": (),
        "length_penalty": (1,),
        "logit_bias": ({},),
        "logprob_start_len": (-1,),
        "lora_path": ("",),
        "modalities": (["text"],),
        "moderation": (),
        "no_stop_trim": (False,),
        "prediction": (),
        "presence_penalty": (0,),
        "prompt_logprobs": (),  # 0 asks for the prompt tokens' own
        "reasoning_effort": ("none",),
        "regex": (),
        "repetition_penalty": (1,),
        "response_format": ({"type": "text"},),
        "return_hidden_states": (False,),
        "return_routed_experts": (False,),
        "return_token_ids": (False,),
        "return_tokens_as_token_ids": (False,),
        "session_params": (),
        "spaces_between_special_tokens": (True,),
        "stop_regex": ([], ""),
        "structural_tag": (),
        "structured_outputs": (),
        "suffix": ("",),
        "thinking_token_budget": (-1,),
        "token_ids_logprob": (),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "top_logprobs_num": (0,),
        "truncate_prompt_tokens": (),
        "use_beam_search": (False,),
        "verbosity": ("medium",),
        "video_data": (),
        "web_search_options": (),
    }
)
# msgspec's messages end with the place: "Expected `int`, got `str` - at `$.stream_options.include_usage`"
_PLACE: Final = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_MISSING: Final = re.compile(r"missing required field `(?P<name>\w+)`")


class Sampling(msgspec.Struct, kw_only=True):
    """The sampling fields that every API shares, by OpenAI's, vLLM's and SGLang's names."""

    temperature: float | UnsetType = UNSET
    top_p: float | UnsetType = UNSET
    top_k: int | UnsetType = UNSET
    min_p: float | UnsetType = UNSET
    n: int | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    stop: str | list[str] | UnsetType = UNSET
    stop_token_ids: list[int] | UnsetType = UNSET
    ignore_eos: bool | UnsetType = UNSET
    skip_special_tokens: bool | UnsetType = UNSET

    def params(self) -> dict[str, Any]:
        """SamplingParams' fields, as far as the client set them: the rest is the model's or the engine's default."""
        values = ((name, getattr(self, name)) for name in Sampling.__struct_fields__)
        params = {name: value for name, value in values if value is not UNSET}
        if MIN_SEED <= params.get("seed", 0) < 0:  # OpenAI's seeds are signed; ours are the same 64 bits
            params["seed"] += 2**64
        return params


def parse(raw: bytes, struct: type[Body], *, aliases: Mapping[str, str] = MappingProxyType({})) -> Body:
    """The body as `struct`. aliases: other names of its fields. Raises Problem 400 naming the field."""
    return build(parse_object(raw), struct, aliases=aliases)


def parse_object(raw: bytes) -> dict[str, Any]:
    """The body as a JSON object. Raises Problem 400."""
    if not raw:
        raise Problem(400, "the body is empty; expected a JSON object")
    try:
        data = msgspec.json.decode(raw)
    except msgspec.DecodeError as error:
        raise Problem(400, f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise Problem(400, "the body is not valid JSON: nested too deeply") from None
    except UnicodeError:
        raise Problem(400, "the body is not valid JSON: it must be UTF-8") from None
    if not isinstance(data, dict):
        raise Problem(400, f"the body must be a JSON object, got {_kind(data)}")
    return data


def build(
    data: Mapping[str, Any],
    struct: type[Body],
    *,
    aliases: Mapping[str, str] = MappingProxyType({}),
    where: str = "",
) -> Body:
    """data as `struct`. where: the place of data in the body, for messages."""
    fields = struct.__struct_fields__
    values: dict[str, Any] = {}
    spelled: dict[str, str] = {}  # field -> the name that the client used
    for name, value in data.items():
        field = aliases.get(name, name)
        if field not in fields:
            if name in HARMLESS:
                continue
            if name not in NEUTRAL:
                raise _unknown(name, (*fields, *aliases), where)
            if value is not None:
                refuse_unless_neutral(name, value, where)
        elif value is not None:
            if field in values:
                raise Problem(
                    400,
                    f"{where}{spelled[field]} and {where}{name} are the same field; give one",
                    param=where + name,
                )
            values[field], spelled[field] = value, name
    try:
        return msgspec.convert(values, struct)
    except msgspec.ValidationError as error:
        text = str(error)
        place, missing = _PLACE.search(text), _MISSING.search(text)
        if place is None and missing is not None:
            raise Problem(400, f"{where}{missing['name']} is missing", param=where + missing["name"]) from None
        message = text[: place.start()] if place else text
        path = re.sub(r"^\w+", lambda field: spelled.get(field[0], field[0]), place["path"] if place else "")
        raise Problem(400, f"{where}{path}: {message}" if path else message, param=where + path or None) from None
    except RecursionError:
        raise Problem(400, "the body is nested too deeply") from None


def holds_prompts(prompt: list[Any], name: str, *, texts: bool) -> bool:
    """Whether a list holds prompts, lists of token ids and with `texts` also texts, and not the ids of one.

    Raises Problem 400 where it holds anything else. Which ids there are is for the engine to say.
    """
    if set(map(type, prompt)) <= {int}:
        return False
    is_flat = isinstance(prompt[0], (int, float))
    for i, item in enumerate(prompt):
        if type(item) is int if is_flat else (texts and isinstance(item, str)) or _is_ids(item):
            continue
        expected = "an integer" if is_flat else "a string or a list of token ids" if texts else "a list of token ids"
        raise Problem(400, f"{name}[{i}]: expected {expected}, got {item!r:.100}", param=f"{name}[{i}]")
    return True


def _is_ids(item: Any) -> bool:
    return isinstance(item, list) and set(map(type, item)) <= {int}


def refuse_unless_neutral(name: str, value: Any, where: str = "") -> None:
    """Raise Problem 400 for a field of NEUTRAL whose value asks for something."""
    # 1 == True in Python; a client's true is no number.
    if not any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in NEUTRAL[name]):
        accepted = ", ".join(msgspec.json.encode(neutral).decode() for neutral in NEUTRAL[name])
        raise Problem(
            400,
            f"{where}{name} is not supported by this version"
            + (f" (accepted: {accepted})" if accepted else "")
            + "; leave it out",
            param=where + name,
            code="unsupported",
        )


def _unknown(name: str, valid: Iterable[str], where: str) -> Problem:
    near = difflib.get_close_matches(name, list(valid), 1)
    hint = f"did you mean {near[0]!r}?" if near else "/openapi.json lists the valid ones"
    field = (where + name)[:200]
    return Problem(400, f"unknown field {field!r}; {hint}", param=field, code="unknown_field")


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "an array"
    return {str: "a string", bool: "a boolean", type(None): "null"}.get(type(value), "a number")
