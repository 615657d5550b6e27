"""The `sapwood` command: parses flags, hands a prompt to engine/async_engine.py's Engine, prints what comes back.

Every flag is a field of EngineConfig or SamplingParams, and its help is that field's line in the struct's docstring,
so neither a default nor a description exists twice. Text goes to stdout as it comes; everything else to stderr.
Exit codes: 0; 1 the engine failed; 2 wrong usage or an invalid request; 130 interrupted; 141 our output's reader left.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import time
from collections.abc import Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NoReturn

from sapwood import __version__
from sapwood.errors import InvalidRequest, SapwoodError

if TYPE_CHECKING:
    from sapwood.config import EngineConfig
    from sapwood.request import RequestOutput, SamplingParams

# model is the positional argument; without a tokenizer there is no text to print; log-probabilities are no text.
NOT_FLAGS: Final = frozenset({"model", "skip_tokenizer_init", "return_logprob"})
# A command line wants the most likely story and all of it; the API's defaults are SGLang's.
GENERATE_DEFAULTS: Final = (("temperature", 0.0), ("max_new_tokens", 256))
NUMBERS: Final = MappingProxyType({"IntType": ("N", int), "FloatType": ("X", float)})  # msgspec's kinds of fields


class UsageError(Exception):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Expected errors print one line and no traceback."""
    _open_standard_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and arguments[0] in ("--version", "-V"):
            print(f"sapwood {__version__}", flush=True)
            return 0
        options = _parse(arguments)
        return _generate(options)
    except UsageError as error:
        return _fail(error, 2)
    except InvalidRequest as error:
        return _fail(error, 2)
    except SapwoodError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _give_up_stdout()
        return 141
    except (OSError, MemoryError) as error:  # what the machine refuses; a bug keeps its traceback
        _give_up_stdout()
        return _fail(error, 1)


def _open_standard_streams() -> None:
    """A stream that the shell closed (`<&-`, `>&-`) becomes /dev/null.

    Else files that the engine opens would get the numbers 0 to 2, which native code takes for the terminal.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def _give_up_stdout() -> None:
    """Python flushes stdout once more on exit: where that must fail, give it somewhere to go."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(error: Exception, code: int) -> int:
    print(f"sapwood: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
    return code


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="sapwood", description="Serve large language models.", allow_abbrev=False)
    parser.add_argument("-V", "--version", action="version", version=f"sapwood {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    generate = _add_generate(commands)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options, unknown = parser.parse_known_args(arguments[:end])
    flag = next((word for word in unknown if re.match(r"--?[A-Za-z]\S*$", word)), None)
    if flag is not None:
        name = flag.split("=")[0]
        near = difflib.get_close_matches(name, list(generate._option_string_actions), 1)
        hint = f"; did you mean {near[0]}?" if near else "; see sapwood generate --help"
        raise UsageError(f"unknown option {name!r}{hint}")
    # argparse knows a prompt only right behind the model; elsewhere it is what was left over, or what follows "--".
    prompts = [word for word in (options.prompt, *unknown, *arguments[end + 1 :]) if word is not None]
    if len(prompts) > 1:
        raise UsageError(f"unknown argument (quote a prompt of several words) {prompts[1]!r}")
    options.prompt = prompts[0] if prompts else None
    return options


def _add_generate(commands: Any) -> argparse.ArgumentParser:
    # Imported here: msgspec takes a sixth of `sapwood --version`'s time budget.
    from sapwood.config import EngineConfig
    from sapwood.request import SamplingParams

    parser = commands.add_parser(
        "generate",
        help="continue a prompt, or answer it with --chat",
        allow_abbrev=False,
        description="Continue a prompt and print the text as it comes.",
    )
    parser.add_argument("model", help="directory in HF format, or a hub id")
    parser.add_argument("prompt", nargs="?", help="the text; read from standard input when left out or '-'")
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message: apply the chat template")
    parser.add_argument("--no-echo", action="store_true", help="leave out the prompt (always so with --chat)")
    parser.add_argument("-v", "--verbose", action="store_true", help="statistics on standard error")
    defaults = dict(GENERATE_DEFAULTS)
    _add_fields(parser.add_argument_group("sampling"), SamplingParams, defaults)
    _add_fields(parser.add_argument_group("engine"), EngineConfig, {})
    return parser


def _add_fields(group: Any, struct: type[SamplingParams] | type[EngineConfig], defaults: dict[str, Any]) -> None:
    """One flag per field. A flag that is not given stays out of the namespace, so defaults are the struct's."""
    import msgspec

    descriptions = field_help(struct)
    for field in msgspec.structs.fields(struct):
        if field.name in NOT_FLAGS:
            continue
        default = defaults.get(field.name, field.default)
        flag = "--" + field.name.replace("_", "-")
        about = descriptions[field.name].replace("%", "%%")
        inner = msgspec.inspect.type_info(field.type)
        kinds = inner.types if isinstance(inner, msgspec.inspect.UnionType) else (inner,)
        optional = any(isinstance(kind, msgspec.inspect.NoneType) for kind in kinds)
        kind = next(k for k in kinds if not isinstance(k, msgspec.inspect.NoneType))
        settings: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        if isinstance(kind, msgspec.inspect.BoolType):
            if field.default:
                flag, about = f"--no-{flag[2:]}", f"do not: {about}"
            settings |= {"action": "store_false" if field.default else "store_true", "help": about}
        elif isinstance(kind, msgspec.inspect.LiteralType):
            settings |= {"choices": kind.values, "help": f"{about} (default: {default})"}
        elif field.name in ("stop", "stop_token_ids"):
            item, metavar = (str, "TEXT") if field.name == "stop" else (int, "ID")
            settings |= {"action": "append", "type": item, "metavar": metavar, "help": f"{about}; may be repeated"}
        else:
            metavar, parse = NUMBERS.get(type(kind).__name__, ("TEXT", str))
            settings |= {
                "type": _or_none(parse) if optional else parse,
                "metavar": metavar,
                "help": f"{about} (default: {'none' if default is None else default})",
            }
        group.add_argument(flag, **settings)


def _or_none(parse: Any) -> Any:
    def convert(text: str) -> Any:
        return None if text.lower() == "none" else parse(text)

    convert.__name__ = parse.__name__  # argparse names it in "invalid int value"
    return convert


def field_help(struct: type) -> dict[str, str]:
    """field -> description, from the docstring's lines "name    text"; lines indented to the text continue it."""
    found: dict[str, str] = {}
    fields = struct.__struct_fields__  # type: ignore[attr-defined]
    name, column = "", 0
    for line in (struct.__doc__ or "").splitlines():
        match = re.match(r"( *)(\w+)( {2,})(\S.*)", line)
        if match and match[2] in fields:
            name, column = match[2], match.start(4)
            found[name] = match[4]
        elif name and line.strip() and len(line) - len(line.lstrip()) == column:
            found[name] += " " + line.strip()
        else:
            name = ""
    return found


def _generate(options: argparse.Namespace) -> int:
    from sapwood.config import EngineConfig
    from sapwood.request import FinishReason, SamplingParams

    given = vars(options)
    params = SamplingParams(
        **(dict(GENERATE_DEFAULTS) | {name: given[name] for name in SamplingParams.__struct_fields__ if name in given})
    )
    settings = {name: given[name] for name in EngineConfig.__struct_fields__ if name in given and name != "model"}
    # Everything that can be wrong is found before weights are read.
    params.verify()
    EngineConfig.from_kwargs(options.model, **settings)
    prompt = _read_prompt(options.prompt)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the story

    from sapwood.engine.async_engine import Engine

    start = time.monotonic()
    with Engine(options.model, own_process=True, **settings) as engine:
        loaded = time.monotonic()
        text = [{"role": "user", "content": prompt}] if options.chat else prompt
        if not options.chat and not options.no_echo:
            _write(prompt)
        first, last, count = None, None, 0
        try:
            for last in engine.generate(text, params, stream=True):
                count += len(last.token_ids)
                first = first or (time.monotonic() if count else None)
                _write(last.text)
        finally:
            if last is not None or (not options.chat and not options.no_echo):
                _write("\n")
        if options.verbose and last is not None:
            end = time.monotonic()
            _report(last, count, loaded - start, (first or end) - loaded, end - (first or end))
    if last is not None and last.finish_reason is FinishReason.ABORT:
        return _fail(SapwoodError(last.error or "the request was aborted"), 1)
    return 0


def _read_prompt(argument: str | None) -> str:
    if argument is not None and argument != "-":
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise InvalidRequest("the prompt is not valid UTF-8", "prompt") from None
        return argument
    if argument is None and sys.stdin.isatty():
        raise UsageError("no prompt: give it as an argument or on standard input")
    try:
        # The shell's newline at the end of `echo ... |` is no part of the prompt.
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"standard input is not valid UTF-8 (byte {error.start})", "prompt") from None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _report(output: RequestOutput, count: int, load_s: float, first_s: float, decode_s: float) -> None:
    usage = output.usage
    rate = f"{(count - 1) / decode_s:.1f} tok/s" if count > 1 and decode_s > 0 else "-"
    print(
        f"sapwood: {usage.prompt_tokens} prompt tokens ({usage.cached_tokens} cached), {usage.completion_tokens} "
        f"generated ({output.finish_reason}), load {load_s:.2f} s, first token {first_s:.3f} s, then {rate}, "
        f"seed {output.seed}",
        file=sys.stderr,
    )
