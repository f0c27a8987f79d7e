"""Flags and environment variables, made from the fields of the option dataclasses (config.option).

`max_batch_size` becomes `--max-batch-size` and, where the caller passes an environment, the variable MAX_BATCH_SIZE. A flag goes
before its variable, a variable before the field's default; an empty variable counts as unset.
"""

import argparse
import difflib
import ipaddress
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn

from jaxserve.cli.vllm import OUR_NAMES
from jaxserve.config import check
from jaxserve.errors import StartupError

TRUE_WORDS = ("true", "1", "yes", "on")
FALSE_WORDS = ("false", "0", "no", "off")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line on stderr and exit code 2, and that knows no abbreviations."""

    def __init__(self, prog: str, **options: Any):
        super().__init__(prog=prog, allow_abbrev=False, formatter_class=_HelpFormatter, argument_default=argparse.SUPPRESS, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def hint(self, unknown: str) -> str:
        """Where to look in place of a flag that there is not: at ours where it is vLLM's, or at one that is called nearly so."""
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        name = unknown.partition("=")[0].replace("_", "-")
        near = [f"--{OUR_NAMES.get(name.removeprefix('--'), '')}"]
        if near[0] not in flags:
            near = difflib.get_close_matches(name, flags, n=1, cutoff=0.7)
        return f"did you mean {near[0]}?" if near else f"see {self.prog} --help"


def add_flags(parser: argparse.ArgumentParser, options: type, title: str, short: Mapping[str, str] | None = None) -> None:
    """Add a group of flags, one for each field of an options dataclass.

    Args:
        options: a dataclass whose fields were made by config.option.
        title: heading of the group in --help.
        short: field name -> one-letter flag.
    """
    group = parser.add_argument_group(title)
    for declared in fields(options):
        names = [_flag(declared.name)]
        if short and declared.name in short:
            names.insert(0, short[declared.name])
        kind = _kind(declared)
        text = _help(declared)
        if kind is bool:
            group.add_argument(*names, nargs="?", const=True, type=_boolean, help=text)
            group.add_argument(f"--no-{names[-1][2:]}", dest=declared.name, action="store_const", const=False, help=argparse.SUPPRESS)
        else:
            choices = "{" + ",".join(declared.metadata["choices"]) + "}" if declared.metadata["choices"] else ""
            group.add_argument(
                *names,
                type=_PARSERS[kind],
                action="append" if kind is tuple else "store",
                metavar=choices or declared.metadata["metavar"] or {int: "N", float: "X"}.get(kind, "TEXT"),
                help=text,
            )


def read_flags[T](parser: argparse.ArgumentParser, arguments: argparse.Namespace, options: type[T], environment: Mapping[str, str]) -> T:
    """Build the options from parsed flags and the environment; `parser.error` with the first that is out of bounds."""
    values: dict[str, Any] = {}
    for declared in fields(options):  # type: ignore[arg-type]  of a dataclass
        if hasattr(arguments, declared.name):
            value = getattr(arguments, declared.name)
            values[declared.name] = tuple(value) if isinstance(value, list) else value
        elif text := _variable(declared, environment):
            try:
                kind = _kind(declared)
                values[declared.name] = tuple(text.split(",")) if kind is tuple else _PARSERS[kind](text)
            except argparse.ArgumentTypeError as error:
                parser.error(f"environment variable {declared.name.upper()}: {error}")
    made = options(**values)
    try:
        check(made)
    except StartupError as error:
        parser.error(str(error))
    return made


def parse(parser: Parser, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; a word that no flag takes is told apart from an unknown flag."""
    parsed, rest = parser.parse_known_args(arguments)
    if rest:
        parser.error(f"unknown {'flag' if rest[0].startswith('-') else 'argument'} {rest[0]} ({parser.hint(rest[0])})")
    return parsed


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _kind(declared: Field[Any]) -> type:
    """The type to parse: `int | None` is int, `tuple[str, ...]` is tuple."""
    annotation = declared.type
    if isinstance(annotation, types.UnionType):
        (annotation,) = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    return typing.get_origin(annotation) or annotation  # type: ignore[return-value]  a class in every options class


def _help(declared: Field[Any]) -> str:
    text = declared.metadata["help"]
    default = declared.default
    if default is MISSING or default is None or default == () or default == "" or "efault" in text:
        return text
    return f"{text} [{str(default).lower() if isinstance(default, bool) else default}]"


def _variable(declared: Field[Any], environment: Mapping[str, str]) -> str:
    text = environment.get(declared.name.upper(), "")
    if declared.name == "hostname" and text:
        # Shells and containers set HOSTNAME to the machine's name, which nobody meant as an address to listen on; TGI ignores it too.
        try:
            ipaddress.ip_address(text)
        except ValueError:
            return ""
    return text


def _boolean(text: str) -> bool:
    if text.lower() not in TRUE_WORDS + FALSE_WORDS:
        raise argparse.ArgumentTypeError(f"must be true or false. Given: {text}")
    return text.lower() in TRUE_WORDS


def whole_number(text: str) -> int:
    """Read an int, or tell argparse why not."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number. Given: {text}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number. Given: {text}") from None


_PARSERS: dict[type, Any] = {str: str, int: whole_number, float: _number, bool: _boolean, tuple: str}


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Flags in one column of even width; `--[no-]sync` for a boolean."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=118)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.type is _boolean:
            return f"--[no-]{action.option_strings[-1][2:]}"
        if action.option_strings and action.nargs is None:
            return f"{', '.join(action.option_strings)} {action.metavar}"
        return super()._format_action_invocation(action)
