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
import signal
import sys
import traceback
import types
import typing
from pathlib import Path


def leave(number, frame):
    """Ctrl-C while a command still imports torch: `ends_in_one_line` is not at work yet."""
    print(f"\n{Path(sys.argv[0]).name}: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


is_command = Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent            # which imports this first
if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, leave)


def setting(default=dataclasses.MISSING, help: str = "", *, least=None, most=None, choices=None, aliases=(), **more):
    """A field of a settings dataclass: its default and what it is. least, most: bounds, included; choices: the only
    values; aliases: other names of its flag; more: as in argparse."""
    how = dict(help=help, least=least, most=most, choices=choices, aliases=aliases, more=more)
    return dataclasses.field(default=default, metadata=how)


def options_of(kind) -> tuple:
    """The types that a type hint allows: int | None -> (int, NoneType), int -> (int,)."""
    is_union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if is_union else (kind,)


# ----------------------------------------------------------------------------- checking

def fit(value, kind):
    """`value` as `kind` (a type hint) wants it; raises TypeError where it is of another type.

        (3, float) -> 3.0      ([1, 2], tuple[int, ...]) -> (1, 2)      (True, int) -> TypeError
    """
    kind, *other = options_of(kind)
    if value is None and other:
        return None
    if typing.get_origin(kind) is tuple and isinstance(value, (list, tuple)):
        inner, *others = typing.get_args(kind)                                        # int, ... or int, int
        if others == [Ellipsis] or len(others) + 1 == len(value):
            return tuple(fit(item, inner) for item in value)
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind is Path and isinstance(value, (str, Path)) and "\0" not in str(value):
        return Path(value)
    if type(value) is kind and kind is not float:
        return value
    raise TypeError


def describe(kind) -> str:
    """A type hint in words, for messages."""
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", Path: "a path",
             type(None): "null"}
    if typing.get_origin(kind) is tuple:
        return "a list, each " + describe(typing.get_args(kind)[0])
    options = options_of(kind)
    return " or ".join(map(describe, options)) if len(options) > 1 else words.get(kind, str(kind))


def check(config) -> None:
    """Checks every field of a settings dataclass against its type and its bounds; called in its `__post_init__`.
    Raises ValueError, one line: the field, its value, and what was expected."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value, hint = field.name, getattr(config, field.name), hints[field.name]
        low, high, choices = (field.metadata[key] for key in ("least", "most", "choices"))
        try:
            value = fit(value, hint)
        except TypeError:
            raise ValueError(f"{name} is {value!r}, expected {describe(hint)}") from None
        object.__setattr__(config, name, value)
        for item in value if isinstance(value, tuple) else () if value is None else (value,):
            if (low is not None and item < low) or (high is not None and item > high):
                bounds = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"{name} is {value!r}, expected {bounds}")
            if choices and item not in choices:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, choices))}")


def from_json(kind, content: dict, where) -> object:
    """The settings dataclass `kind` from a JSON object that holds every field and no other. Raises ValueError, one
    line: `where`, the field, and what was expected."""
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


def add_flags(parser: argparse.ArgumentParser, kind, **defaults) -> None:
    """Adds the fields of the settings dataclass `kind` to a parser: a field `save_every` is the flag --save-every, a
    switch `resume` is --resume and --no-resume; a field without a default comes first, without dashes. defaults: of
    a preset, in place of the dataclass's."""
    hints = typing.get_type_hints(kind)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for field in dataclasses.fields(kind):
        how, hint, flag = field.metadata, options_of(hints[field.name])[0], "--" + field.name.replace("_", "-")
        default = defaults.get(field.name, field.default)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        shown = "" if shown in (None, dataclasses.MISSING, False, "") else f" (default: {shown})"
        more = {"help": (how["help"] + shown).replace("%", "%%")}
        if hint is bool:
            off = f"not {flag}" if default else argparse.SUPPRESS
            parser.add_argument(flag, action="store_true", default=default, **more)
            parser.add_argument("--no-" + flag[2:], action="store_false", default=default, dest=field.name, help=off)
            continue
        more |= {"type": (*typing.get_args(hint), hint)[0], "choices": how["choices"], **how["more"]}
        if field.default is dataclasses.MISSING:
            parser.add_argument(field.name, **more)
        else:
            parser.add_argument(flag, *how["aliases"], default=default, **more)


def parse(kind, arguments: list[str] | None = None, *, program: str | None = None):
    """Fills the settings dataclass `kind` from the command line; its docstring is the help text. See `build`."""
    parser = Parser(program, description=kind.__doc__.splitlines()[0])
    add_flags(parser, kind)
    return build(kind, parser.parse_args(arguments), parser)


def build(kind, values: argparse.Namespace, parser: argparse.ArgumentParser):
    """The settings dataclass `kind` from parsed flags; a refused value ends in one line and exit code 2."""
    found = {field.name: getattr(values, field.name) for field in dataclasses.fields(kind)}
    try:
        return kind(**found)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        parser.error(f"--{name.replace('_', '-')} {rest}" if name in found else str(error))


@contextlib.contextmanager
def ends_in_one_line(program: str):
    """How every command ends: in a result, or in one line on stderr and exit code 2; Ctrl-C in one line and 130.

    With --debug the traceback of an error comes before its line. A terminal that cannot show a character shows "?".
    """
    if hasattr(sys.stdout, "reconfigure"):                # a test's stand-in has none
        sys.stdout.reconfigure(errors="replace")
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
        text = " ".join(str(error).split()) or type(error).__name__
        if not isinstance(error, (ValueError, OSError)):
            text = f"{type(error).__name__}: {text} (not foreseen; --debug shows where)"
        print(f"{program}: {text}", file=sys.stderr)
        sys.exit(2)
