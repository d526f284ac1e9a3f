"""Not in the paper: settings. One frozen dataclass is checked once, read from JSON, and turned into a command line.

    @dataclass(frozen=True, kw_only=True)
    class Sampling:
        temperature: float = setting(1.0, "0: always the likeliest token", least=0, most=100)
        def __post_init__(self): check(self)

    parse(Sampling, ["--temperature", "0.5"])      ->  Sampling(temperature=0.5)
    parse(Sampling, ["--temperature", "nan"])      ->  one line, exit code 2
"""
import argparse
import contextlib
import dataclasses
import os
import sys
import traceback
import types
import typing
from pathlib import Path


def setting(default=dataclasses.MISSING, help: str = "", *, least=None, most=None, choices=None, metavar=None,
            nargs=None, aliases=()):
    """A field of a settings dataclass: its default, what it is, and which values are allowed.

    least, most: bounds, included; choices: the only values; metavar, nargs, aliases: as in argparse.
    """
    how = dict(help=help, least=least, most=most, choices=choices, metavar=metavar, nargs=nargs, aliases=aliases)
    return dataclasses.field(default=default, metadata=how)


# ----------------------------------------------------------------------------- checking

def fit(value, kind):
    """`value` as `kind` (a type hint) wants it: a list becomes a tuple, a whole number a float, nothing else changes.

    Raises TypeError where the value is of another type. Examples:

        (3, float) -> 3.0      ([1, 2], tuple[int, ...]) -> (1, 2)      (True, int) -> TypeError
    """
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        options = typing.get_args(kind)
        if value is None and type(None) in options:
            return None
        kind = next(option for option in options if option is not type(None))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError
        inner = typing.get_args(kind)
        if inner[-1] is not Ellipsis and len(inner) != len(value):
            raise TypeError
        return tuple(fit(item, inner[0]) for item in value)
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if type(value) is kind and kind is not float:
        return value
    raise TypeError


def describe(kind) -> str:
    """A type hint in words, for messages."""
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", Path: "a path"}
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join("null" if option is type(None) else describe(option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "a list, each " + describe(typing.get_args(kind)[0])
    return words.get(kind, str(kind))


def check(config) -> None:
    """Checks every field of a settings dataclass against its type and its bounds; called in its `__post_init__`.

    Raises ValueError, one line: the field, its value, and what was expected.
    """
    for field, kind in zip(dataclasses.fields(config), typing.get_type_hints(type(config)).values(), strict=True):
        value, how = getattr(config, field.name), field.metadata
        try:
            value = fit(value, kind)
        except TypeError:
            raise ValueError(f"{field.name} is {value!r}, expected {describe(kind)}") from None
        object.__setattr__(config, field.name, value)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, (int, float)) and type(item) is not bool:
                low, high = how.get("least"), how.get("most")
                if (low is not None and item < low) or (high is not None and item > high):
                    bounds = f"at least {low}" if high is None else f"{low} to {high}"
                    raise ValueError(f"{field.name} is {value!r}, expected {bounds}")
            if how.get("choices") and item is not None and item not in how["choices"]:
                raise ValueError(f"{field.name} is {value!r}, expected one of {', '.join(map(str, how['choices']))}")


def from_json(kind, content: dict, where) -> object:
    """The settings dataclass `kind` from a JSON object that holds every field and none beside.

    Raises ValueError, one line: `where`, the field, and what was expected.
    """
    names = {field.name for field in dataclasses.fields(kind)}
    for name in sorted(names ^ content.keys()):
        raise ValueError(f"{where}: field {name!r} is {'missing' if name in names else 'unknown'}")
    try:
        return kind(**content)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


# ----------------------------------------------------------------------------- the command line

class Parser(argparse.ArgumentParser):
    """Not in the paper: argparse without abbreviated flags, whose errors are one line and exit code 2."""

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more | {"allow_abbrev": False})

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help shows all flags)\n")


def add_flags(parser: argparse.ArgumentParser, kind) -> None:
    """Adds the fields of the settings dataclass `kind` to a parser: a field `save_every` is the flag --save-every;
    a field without a default comes first, without dashes."""
    hints = typing.get_type_hints(kind)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for field in dataclasses.fields(kind):
        how, hint = field.metadata, hints[field.name]
        hint = next((option for option in typing.get_args(hint) if option is not type(None)), hint) \
            if typing.get_origin(hint) in (typing.Union, types.UnionType) else hint
        many = typing.get_origin(hint) is tuple
        default = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        default = "" if field.default in (None, dataclasses.MISSING, False, (), "") else f" (default: {default})"
        more = {"help": (how.get("help", "") + default).replace("%", "%%")}
        if hint is bool:
            more |= {"action": "store_true"}
        else:
            more |= {"type": typing.get_args(hint)[0] if many else hint, "metavar": how.get("metavar"),
                     "choices": how.get("choices"), "nargs": how.get("nargs")}
            more = {key: value for key, value in more.items() if value is not None}
        if field.default is dataclasses.MISSING:
            parser.add_argument(field.name, **more)
        else:
            flags = ["--" + field.name.replace("_", "-"), *how.get("aliases", ())]
            parser.add_argument(*flags, dest=field.name, default=field.default, **more)


def parse(kind, arguments: list[str] | None = None, *, program: str | None = None):
    """Fills the settings dataclass `kind` from the command line; its docstring is the help text.

    An unknown flag and a refused value end in one line and exit code 2.
    """
    parser = Parser(program, description=kind.__doc__.splitlines()[0])
    add_flags(parser, kind)
    return build(kind, parser.parse_args(arguments), parser)


def build(kind, values: argparse.Namespace, parser: argparse.ArgumentParser):
    """The settings dataclass `kind` from parsed flags; a refused value ends in one line and exit code 2."""
    names = [field.name for field in dataclasses.fields(kind)]
    try:
        return kind(**{name: getattr(values, name) for name in names})
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        parser.error(f"--{name.replace('_', '-')} {rest}" if name in names else str(error))


@contextlib.contextmanager
def ends_in_one_line(program: str):
    """How every command ends: in a result, or in one line on stderr and exit code 2; Ctrl-C in one line and 130.

    With --debug the traceback of an error comes before its line. A terminal that cannot show a character shows "?".
    """
    if hasattr(sys.stdout, "reconfigure"):                # a test's stand-in has none
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                               # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        known = isinstance(error, (ValueError, OSError))
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{program}: {text}" if known else f"{program}: {type(error).__name__}: {text} "
              "(not foreseen; --debug shows where)", file=sys.stderr)
        sys.exit(2)
