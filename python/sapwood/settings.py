"""Where the settings of a command come from: its flags, then the environment, then a file, then config.py's defaults.

cli.py makes its flags of describe()'s Settings and hands what argparse found to collect(), which adds SAPWOOD_*
variables and the file of --config and gives values for one of config.py's structs. Every source is text that
Setting.parse reads, so a value means the same wherever it stands: YAML's own types (`no` is False, 010 is 8) are
not used.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import msgspec

from sapwood.config import EngineConfig, ServerConfig
from sapwood.errors import InvalidRequest
from sapwood.flag_names import ALIASES, NOT_NEEDED, advice

PREFIX: Final = "SAPWOOD_"
# Variables with the prefix that are no settings: the build's, the tests'.
OTHER_VARIABLES: Final = ("DATA", "BUILD_*", "CI_*", "CUDA_*", "TEST_*", "PROPERTY_OPS")
# What Kubernetes sets in every pod beside a service that is called sapwood.
KUBERNETES: Final = re.compile(r"SERVICE_HOST|SERVICE_PORT(_.*)?|PORT_\d+_(TCP|UDP|SCTP)(_.*)?")
SWITCH: Final = MappingProxyType(
    dict.fromkeys(("1", "true", "yes", "on"), True) | dict.fromkeys(("0", "false", "no", "off"), False)
)
# msgspec's kinds of fields.
KINDS: Final = MappingProxyType(
    {"IntType": "int", "FloatType": "float", "StrType": "text", "BoolType": "switch", "LiteralType": "choice"}
)
MAX_FILE_BYTES: Final = 2**20


class Setting(msgspec.Struct, frozen=True):
    """One field of a struct, as a person writes it.

    kind       how its text is read; a "list" is of `item`s
    optional   "none" means None
    group      the docstring's heading above it ("Memory"), or ""
    """

    name: str
    kind: str  # "int", "float", "text", "switch", "choice" or "list"
    item: str  # kind of a list's items
    choices: tuple[str, ...]
    optional: bool
    default: Any
    help: str
    group: str

    def parse(self, text: str) -> Any:
        """The value that `text` stands for; a list's items are separated by commas.

        InvalidRequest says what was expected, without naming the setting.
        """
        if self.optional and text.lower() == "none":
            return None
        if self.kind == "list":
            return [self.parse_item(part.strip()) for part in text.split(",")]
        return self._read(text, self.kind)

    def parse_item(self, text: str) -> Any:
        """One item of a list, for where items stand apart: a flag that is repeated, a list in a file."""
        return self._read(text, self.item)

    def _read(self, text: str, kind: str) -> Any:
        try:
            match kind:
                case "int":
                    return int(text)
                case "float":
                    return float(text)
                case "switch":
                    return SWITCH[text.lower()]
                case "choice":
                    return self.choices[self.choices.index(text)]
        except (ValueError, KeyError):
            raise InvalidRequest(f"expected {self.expected()}, got {text!r}", self.name) from None
        if not text:
            raise InvalidRequest("expected text, got nothing", self.name)
        return text

    def expected(self) -> str:
        kind = self.item if self.kind == "list" else self.kind
        kinds = {"int": "an integer", "float": "a number", "switch": "true or false", "text": "text"}
        what = f"one of {', '.join(self.choices)}" if kind == "choice" else kinds[kind]
        return f"{what} or none" if self.optional else what


def describe(struct: type[msgspec.Struct]) -> list[Setting]:
    """A Setting for every field, in the order of the docstrings: the parent's fields first."""
    lines = field_help(struct)
    found = {}
    for field in msgspec.structs.fields(struct):
        inner = msgspec.inspect.type_info(field.type)
        parts = inner.types if isinstance(inner, msgspec.inspect.UnionType) else (inner,)
        kinds: dict[str, Any] = {type(part).__name__: part for part in parts}
        optional = kinds.pop("NoneType", None) is not None
        listed = kinds.get("ListType")  # "a text or a list of texts" is a list, too
        first = next(iter(kinds.values()))
        group, about = lines[field.name]
        found[field.name] = Setting(
            name=field.name,
            kind="list" if listed else KINDS[type(first).__name__],
            item=KINDS[type(listed.item_type).__name__] if listed else "",
            choices=tuple(map(str, first.values)) if isinstance(first, msgspec.inspect.LiteralType) else (),
            optional=optional,
            default=field.default,
            help=about,
            group=group,
        )
    return [found[name] for name in lines]


def field_help(struct: type[msgspec.Struct]) -> dict[str, tuple[str, str]]:
    """field -> (heading, description), from the docstrings' lines "name    text" of the struct and its parents.

    Lines indented to the text continue it; a line of one capitalised word is the heading of what follows.
    """
    found: dict[str, tuple[str, str]] = {}
    for owner in reversed(struct.__mro__):
        name, column, heading = "", 0, ""
        for line in (vars(owner).get("__doc__") or "").splitlines():
            match = re.match(r"( *)(\w+)( {2,})(\S.*)", line)
            if match and match[2] in struct.__struct_fields__:
                name, column = match[2], match.start(4)
                found[name] = (heading, match[4])
            elif name and line.strip() and len(line) - len(line.lstrip()) == column:
                found[name] = (found[name][0], f"{found[name][1]} {line.strip()}")
            else:
                name = ""
                heading = line.strip() if re.fullmatch(r" *[A-Z][a-z]+", line) else heading
    return found


class _Written(msgspec.Struct, frozen=True):
    """A setting as a file or the environment has it: its name with "_", its text, list of texts or None for YAML's
    null, and where it stands ("SAPWOOD_PORT", "serve.yaml:3: port").
    """

    name: str
    value: str | list[str] | None
    origin: str


class Collected(msgspec.Struct):
    """values: fields that something sets; origins: of those that no flag set, what did; notes: for standard error."""

    values: dict[str, Any]
    origins: dict[str, str]
    notes: list[str]

    def explain(self, error: InvalidRequest) -> InvalidRequest:
        """The same error, naming where the setting it is about was given, unless by a flag."""
        origin = self.origins.get(error.param or "")
        if origin is not None:
            error.args = (f"{error} (from {origin})",)
        return error


def collect(
    struct: type[EngineConfig], flags: Mapping[str, Any], config_file: str | None, environment: Mapping[str, str]
) -> Collected:
    """Values for `struct` from all sources.

    flags         field -> value, as the command line gives them
    config_file   path of a YAML file; None = what SAPWOOD_CONFIG names, if anything
    environment   os.environ

    A server's settings in the environment or the file are no error where `struct` is an engine's: one file serves both.
    InvalidRequest names the variable, or the file and line.
    """
    settings = {setting.name: setting for setting in describe(ServerConfig)}
    result = Collected({}, {}, [])
    written, named_file = _read_environment(environment, settings, result.notes)
    path = config_file or named_file
    for source in (_read_file(Path(path)) if path is not None else [], written):  # the later one wins
        seen: dict[str, _Written] = {}
        for entry in source:
            found = _lookup(entry, settings, result.notes)
            if found is None:
                continue
            setting, inverted = found
            if (earlier := seen.get(setting.name)) is not None:
                raise InvalidRequest(
                    f"{earlier.origin} and {entry.origin} are the same setting; leave one out", setting.name
                )
            seen[setting.name] = entry
            value = _value(setting, entry)
            if setting.name in struct.__struct_fields__:
                result.values[setting.name] = (not value) if inverted else value
                result.origins[setting.name] = entry.origin
    for name, value in flags.items():
        result.values[name] = value
        result.origins.pop(name, None)
    return result


def nearest(name: str, valid: Iterable[str]) -> str:
    """What a message on a wrong name ends with: the valid name nearest to it, or nothing where none is near."""
    near = difflib.get_close_matches(name, list(valid), 1)
    return f"; did you mean {near[0]}?" if near else ""


def _lookup(entry: _Written, settings: Mapping[str, Setting], notes: list[str]) -> tuple[Setting, bool] | None:
    """The setting that an entry means and whether it is its opposite; None where nothing needs to be done."""
    name, inverted = entry.name, False
    if name not in settings and name.startswith("no_"):
        name, inverted = name.removeprefix("no_"), True
    if name in NOT_NEEDED:
        if _value(Setting(name, "switch", "", (), False, False, "", ""), entry) is inverted:
            raise InvalidRequest(f"{entry.origin} cannot be switched off: {NOT_NEEDED[name]}", name)
        notes.append(f"{entry.origin} is not needed: {NOT_NEEDED[name]}")
        return None
    alias = ALIASES.get(name)
    setting = settings.get(alias.field if alias else name)
    if setting is not None and (setting.kind == "switch" or not inverted):
        return setting, inverted is not (alias is not None and alias.inverted)
    instead = advice(entry.name)
    hint = f": {instead}" if instead else nearest(entry.name, (*settings, *ALIASES))
    raise InvalidRequest(f"{entry.origin} is no setting{hint}", entry.name)


def _value(setting: Setting, entry: _Written) -> Any:
    try:
        if isinstance(entry.value, str):
            return setting.parse(entry.value)
        if entry.value is None:
            if setting.optional:
                return None
            raise InvalidRequest(f"expected {setting.expected()}, got nothing", setting.name)
        if setting.kind != "list":
            raise InvalidRequest(f"expected {setting.expected()}, got a list", setting.name)
        return [setting.parse_item(text) for text in entry.value]
    except InvalidRequest as error:
        raise InvalidRequest(f"{entry.origin}: {error}", setting.name) from None


def _read_environment(
    environment: Mapping[str, str], settings: Mapping[str, Setting], notes: list[str]
) -> tuple[list[_Written], str | None]:
    """(entries, the file that SAPWOOD_CONFIG names). What is no setting is a note: the variable may be another's."""
    entries: list[_Written] = []
    config_file = None
    for variable, text in sorted(environment.items()):
        if not variable.startswith(PREFIX):
            continue
        rest = variable.removeprefix(PREFIX)
        if any(fnmatch.fnmatchcase(rest, pattern) for pattern in OTHER_VARIABLES) or KUBERNETES.fullmatch(rest):
            continue
        if rest == "PORT" and re.match(r"(tcp|udp|sctp)://", text):
            notes.append(f"{variable}={text} comes from Kubernetes, for a service called sapwood; ignored")
            continue
        if rest == "CONFIG":
            config_file = text
            continue
        name = rest.lower()
        bare = name.removeprefix("no_")
        if not {name, bare} & {*settings, *ALIASES, *NOT_NEEDED}:
            instead = advice(name)
            valid = [PREFIX + key.upper() for key in (*settings, *ALIASES, "config")]
            hint = f": {instead}" if instead else nearest(variable, valid)
            notes.append(f"{variable} is no setting and is ignored{hint}")
            continue
        entries.append(_Written(name, text, variable))
    return entries, config_file


def _read_file(path: Path) -> list[_Written]:
    """The entries of a YAML mapping of names to single values, or to lists of them. InvalidRequest names the line."""
    import yaml  # not needed without a file

    try:
        with path.expanduser().open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InvalidRequest(f"config file {path} is larger than {MAX_FILE_BYTES} bytes", "config")
        # The nodes know their lines, and BaseLoader leaves every value the text it is.
        root = yaml.compose(data.decode("utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise InvalidRequest(f"config file {path} cannot be read: {error.strerror}", "config") from None
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"config file {path} is not valid UTF-8 (byte {error.start})", "config") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise InvalidRequest(f"{where}: not valid YAML: {what}", "config") from None
    except RecursionError:
        raise InvalidRequest(f"config file {path} is nested too deeply; settings are not nested", "config") from None
    except yaml.YAMLError as error:
        raise InvalidRequest(f"config file {path} is not valid YAML: {error}", "config") from None
    if root is None:  # nothing but comments
        return []
    if not isinstance(root, yaml.MappingNode):
        raise InvalidRequest(f"{path}: expected lines like 'port: 8000', got {_kind(root)}", "config")
    entries: list[_Written] = []
    lines: dict[str, int] = {}
    for key, node in root.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise InvalidRequest(f"{path}:{line}: expected a setting's name, got {_kind(key)}", "config")
        name = key.value.replace("-", "_")
        origin = f"{path}:{line}: {key.value.replace('_', '-')}"
        if name in lines:
            raise InvalidRequest(f"{origin} is set on line {lines[name]} already", name)
        lines[name] = line
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not all(isinstance(item, yaml.ScalarNode) for item in items):
            raise InvalidRequest(f"{origin}: expected a single value, got {_kind(node)}; settings are not nested", name)
        for item in (node, *items):
            if item.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq"):
                tag = item.tag.replace("tag:yaml.org,2002:", "!!")
                raise InvalidRequest(f"{origin}: YAML tags such as {tag} mean nothing here", name)
        if isinstance(node, yaml.SequenceNode):
            entries.append(_Written(name, [item.value for item in items], origin))
        else:
            is_null = node.style is None and node.value in ("", "~", "null")  # unquoted
            entries.append(_Written(name, None if is_null else node.value, origin))
    return entries


def _kind(node: Any) -> str:
    return {"mapping": "a mapping", "sequence": "a list"}.get(node.id, f"{node.value!r}")
