"""The `sapwood` command: parses flags; `serve` hands a ServerConfig to server/run.py, `generate` hands a prompt to
engine/async_engine.py's Engine and prints what comes back.

Every flag is a field of ServerConfig, EngineConfig or SamplingParams, and its help is that field's line in the
struct's docstring, so neither a default nor a description exists twice; settings.py adds what the environment and a
file set. Text goes to stdout as it comes; everything else to stderr.
Exit codes: 0; 1 the engine failed; 2 wrong usage or an invalid request; 130 interrupted; 141 our output's reader left.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final, NoReturn

from sapwood import __version__
from sapwood.errors import InvalidRequest, SapwoodError

if TYPE_CHECKING:
    from sapwood.request import RequestOutput, SamplingParams
    from sapwood.settings import Setting

HELP: Final = """usage: sapwood COMMAND [options]

Serve large language models.

commands:
  serve          serve a model over HTTP, with OpenAI's and SGLang's API
  generate       continue a prompt, or answer it with --chat

options:
  -h, --help     this help; sapwood COMMAND --help lists a command's options
  -V, --version  the version
"""
COMMANDS: Final = ("serve", "generate")
# generate's model is positional; without a tokenizer there is no text to print; log-probabilities are no text; one
# story is printed.
NOT_FLAGS: Final = frozenset({"model", "skip_tokenizer_init", "return_logprob", "n"})
# A command line wants the most likely story and all of it; the API's defaults are SGLang's.
GENERATE_DEFAULTS: Final = (("temperature", 0.0), ("max_new_tokens", 256))


class UsageError(Exception):
    """The command line itself is wrong."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False, formatter_class=_Formatter)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)

    def has(self, flag: str) -> bool:
        return flag in self._option_string_actions

    def check(self, word: str, in_requests: bool) -> None:
        """Refuse a flag that is not ours, with what to write instead. argparse would take -tp for a -t."""
        from sapwood.flag_names import NOT_NEEDED, advice
        from sapwood.settings import nearest

        flag, equals, _ = word.partition("=")
        action = self._option_string_actions.get(flag)
        if action is not None:
            if equals and action.nargs == 0:
                raise UsageError(f"{flag} takes no value")
            return
        name = flag.lstrip("-").replace("-", "_")
        if (reason := NOT_NEEDED.get(name.removeprefix("no_"))) is not None:
            raise UsageError(f"{flag} is not possible: {reason}")
        if (instead := advice(name, in_requests=in_requests)) is not None:
            raise UsageError(f"sapwood has no {flag}: {instead}")
        hint = nearest(flag, self._option_string_actions) or f"; see {self.prog} --help"
        raise UsageError(f"unknown option {flag!r}{hint}")


class _Formatter(argparse.HelpFormatter):
    """A wide column for the flags, whose names are not broken at their hyphens."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent("\n".join(self._split_lines(text, width)), indent)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Expected errors print one line and no traceback."""
    _open_standard_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
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
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, SapwoodError):
        text = _with_flags(text)
    _say(f"error: {text}")
    return code


def _say(text: str) -> None:
    print(f"sapwood: {text}", file=sys.stderr)


def _with_flags(text: str) -> str:
    """A message of the engine's, which names settings as Python does: max_total_tokens, as the flags they are here."""
    from sapwood.config import ServerConfig
    from sapwood.request import SamplingParams

    fields = (*ServerConfig.__struct_fields__, *SamplingParams.__struct_fields__)
    names = "|".join(name for name in fields if "_" in name)  # others are English words, too
    return re.sub(rf"(?<![\w/.-])({names})(?![\w/])", lambda match: "--" + match[1].replace("_", "-"), text)


def _run(arguments: list[str]) -> int:
    command, *rest = arguments or [""]
    if command in ("--version", "-V"):
        print(f"sapwood {__version__}", flush=True)
    elif command in ("--help", "-h"):
        print(HELP, end="", flush=True)
    elif command == "serve":
        return _serve(rest)
    elif command == "generate":
        return _generate(rest)
    elif not command:
        sys.stderr.write(HELP)
        return 2
    else:
        from sapwood.settings import nearest

        if os.path.exists(command) or "/" in command:
            hint = f"; did you mean sapwood serve {command}?"
        else:
            hint = nearest(command, COMMANDS) or "; see sapwood --help"
        raise UsageError(f"unknown command {command!r}{hint}")
    return 0


def _serve(arguments: list[str]) -> int:
    from sapwood.config import ServerConfig
    from sapwood.settings import collect

    given, words = _parse(_serve_parser(), arguments, in_requests=True)
    if len(words) > 1:
        raise UsageError(f"unknown argument {words[1]!r}; serve takes one model")
    if words and given.setdefault("model", words[0]) != words[0]:
        raise UsageError(f"two models: {words[0]!r} and --model {given['model']!r}")
    settings = collect(ServerConfig, given, given.pop("config", None), os.environ)
    _say_notes(settings.notes)
    try:
        config = ServerConfig.from_kwargs(**settings.values)

        from sapwood.server.run import serve

        return serve(config)
    except InvalidRequest as error:
        raise settings.explain(error) from None


def _serve_parser() -> _Parser:
    from sapwood.config import ServerConfig
    from sapwood.flag_names import ALIASES
    from sapwood.settings import describe

    aliases = (f"{_flag(name)} is {_flag(to.field, not to.inverted)}" for name, to in ALIASES.items())
    parser = _Parser(
        prog="sapwood serve",
        usage="sapwood serve [MODEL] [options]",
        description="Serve a model over HTTP, with OpenAI's and SGLang's API.",
        epilog="Every setting may also stand in the environment (SAPWOOD_PORT=8000) or in the file of --config "
        "(port: 8000). A flag counts before the environment, the environment before the file. "
        f"Names of SGLang, vLLM and llama.cpp that mean the same work, too: {', '.join(aliases)}.",
    )
    parser.add_argument("words", nargs="*", metavar="MODEL", help=argparse.SUPPRESS)
    _add_config(parser)
    settings = describe(ServerConfig)
    _add_fields(parser, settings, {})
    _add_other_names(parser, settings)
    return parser


def _generate_parser() -> _Parser:
    from sapwood.config import EngineConfig
    from sapwood.request import SamplingParams
    from sapwood.settings import describe

    parser = _Parser(
        prog="sapwood generate",
        usage="sapwood generate MODEL [PROMPT] [options]",
        description="Continue a prompt and print the text as it comes.",
        epilog="The engine's settings may also stand in the environment (SAPWOOD_DTYPE=float32) or in the file of "
        "--config, as serve's. A flag counts before the environment, the environment before the file.",
    )
    parser.add_argument("model", metavar="MODEL", help="directory in HF format, a hub id, or sapling (bundled)")
    parser.add_argument(
        "words", nargs="?", metavar="PROMPT", help="the text; read from standard input when left out or '-'"
    )
    parser.add_argument("--chat", action="store_true", help="the prompt is a user's message: apply the chat template")
    parser.add_argument("--no-echo", action="store_true", help="leave out the prompt (always so with --chat)")
    parser.add_argument("-v", "--verbose", action="store_true", help="statistics on standard error")
    _add_config(parser)
    sampling, engine = ([s for s in describe(t) if s.name not in NOT_FLAGS] for t in (SamplingParams, EngineConfig))
    _add_fields(parser, sampling, dict(GENERATE_DEFAULTS))
    _add_fields(parser, engine, {})
    _add_other_names(parser, engine)
    return parser


def _parse(parser: _Parser, arguments: list[str], *, in_requests: bool) -> tuple[dict[str, Any], list[str]]:
    """(options that are given, positional words that no option takes). in_requests: see flag_names.advice()."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for word in arguments[:end]:
        if re.match(r"--?[A-Za-z]\S*$", word):
            parser.check(word, in_requests)
    options, unknown = parser.parse_known_args(arguments[:end])
    given = vars(options)
    # argparse knows a positional word only before the first option; the others are what is left over, or follow "--".
    first = given.pop("words") or []
    words = [*([first] if isinstance(first, str) else first), *unknown, *arguments[end + 1 :]]
    _say_notes(given.pop("not_needed", []))
    return given, words


def _say_notes(notes: list[str]) -> None:
    for note in notes:
        _say(f"note: {note}")


def _add_config(parser: _Parser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of settings, names as the flags'"
    )


def _add_fields(parser: _Parser, settings: list[Setting], defaults: dict[str, Any]) -> None:
    """One flag per setting. A flag that is not given stays out of the namespace, so defaults are the struct's."""
    groups: dict[str, Any] = {}
    for setting in settings:
        name = (setting.group or "sampling").lower()
        group = groups.get(name) or groups.setdefault(name, parser.add_argument_group(name))
        about = re.sub(r"\bNone\b", "none", _with_flags(setting.help.replace("%", "%%")))
        if setting.kind == "switch":
            shown = f"do not: {about}" if setting.default else about
            for value in (True, False):
                text = shown if value is not setting.default else argparse.SUPPRESS
                _add_switch(group, _flag(setting.name, value), setting.name, value, text)
            continue
        default = defaults.get(setting.name, setting.default)
        if setting.kind == "list":
            about += "; may be repeated"
        elif default is not None:
            about += f" (default: {default})"
        _add_value(group, _flag(setting.name), setting, about)


def _add_other_names(parser: _Parser, settings: list[Setting]) -> None:
    """Other engines' names of the settings, and the flags that are not needed; not in the help."""
    from sapwood.flag_names import ALIASES, NOT_NEEDED

    by_name = {setting.name: setting for setting in settings}
    for name, alias in ALIASES.items():
        target = by_name.get(alias.field)
        if target is None or parser.has(_flag(name)):  # generate's --seed is the request's
            continue
        if target.kind != "switch":
            _add_value(parser, _flag(name), target, argparse.SUPPRESS)
            continue
        for value in (True, False):
            _add_switch(parser, _flag(name, value), target.name, value is not alias.inverted, argparse.SUPPRESS)
    for name, reason in NOT_NEEDED.items():
        parser.add_argument(
            _flag(name),
            dest="not_needed",
            action="append_const",
            const=f"{_flag(name)} is not needed: {reason}",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def _flag(name: str, value: bool = True) -> str:
    return f"{'--' if value else '--no-'}{name.replace('_', '-')}"


def _add_switch(group: Any, flag: str, dest: str, value: bool, about: str) -> None:
    group.add_argument(flag, dest=dest, action="store_const", const=value, default=argparse.SUPPRESS, help=about)


def _add_value(group: Any, flag: str, setting: Setting, about: str) -> None:
    kind = setting.item if setting.kind == "list" else setting.kind

    def convert(text: str) -> Any:
        try:
            return setting.parse_item(text) if setting.kind == "list" else setting.parse(text)
        except InvalidRequest as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    group.add_argument(
        flag,
        dest=setting.name,
        action="append" if setting.kind == "list" else "store",
        type=convert,
        metavar={"int": "N", "float": "X", "choice": "NAME"}.get(kind, "TEXT"),
        default=argparse.SUPPRESS,
        help=about,
    )


def _generate(arguments: list[str]) -> int:
    from sapwood.config import EngineConfig
    from sapwood.request import SamplingParams
    from sapwood.settings import collect

    given, words = _parse(_generate_parser(), arguments, in_requests=False)
    if len(words) > 1:
        raise UsageError(f"unknown argument (quote a prompt of several words) {words[1]!r}")
    chat, no_echo, verbose = (given.pop(name) for name in ("chat", "no_echo", "verbose"))
    sampling = {name: given.pop(name) for name in SamplingParams.__struct_fields__ if name in given}
    settings = collect(EngineConfig, given, given.pop("config", None), os.environ)
    _say_notes(settings.notes)
    # Everything that can be wrong is found before weights are read.
    params = SamplingParams(**(dict(GENERATE_DEFAULTS) | sampling))
    params.verify()
    try:
        EngineConfig.from_kwargs(**settings.values)
        prompt = _read_prompt(words[0] if words else None)
        return _tell(settings.values, prompt, params, chat=chat, echo=not (chat or no_echo), verbose=verbose)
    except InvalidRequest as error:
        raise settings.explain(error) from None


def _tell(
    settings: dict[str, Any], prompt: str, params: SamplingParams, *, chat: bool, echo: bool, verbose: bool
) -> int:
    from sapwood.request import FinishReason

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character must not end the story

    from sapwood.engine.async_engine import Engine

    start = time.monotonic()
    with Engine(own_process=True, **settings) as engine:
        loaded = time.monotonic()
        if echo:
            _write(prompt)
        first, last, count = None, None, 0
        try:
            text = [{"role": "user", "content": prompt}] if chat else prompt
            for last in engine.generate(text, params, stream=True):
                count += len(last.token_ids)
                first = first or (time.monotonic() if count else None)
                _write(last.text)
        finally:
            if last is not None or echo:
                _write("\n")
        if verbose and last is not None:
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
