"""A command-line parser with one-line errors, and the types of its flags."""

import argparse
import contextlib
import difflib
import math
import sys
from functools import partial

from Utils import InputError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends with one line on a mistake and suggests the nearest flag."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **options)
        self.source = ""  # where the words come from, for messages; "": from the command line

    def group(self, title, changeable=False):
        """A function that declares flags, as add_argument does, under a title of --help. Its
        keyword `changeable`: whether a run may go on with another value of the flag."""
        add_argument = self.add_argument_group(title).add_argument

        def add(name, changeable=changeable, **options):
            add_argument(name, **options).changeable = changeable

        return add

    def parse_args(self, argv=None, namespace=None):
        argv = sys.argv[1:] if argv is None else argv
        # Before the parser's own checks: a missing flag may be a misspelt one.
        self.check_names(word.split("=")[0] for word in argv if word.startswith("--"))
        args, unknown = self.parse_known_args(argv, namespace)
        if unknown:
            self.error(f"unknown argument {unknown[0]}; each value must follow its flag")
        return args

    def check_names(self, names):
        """Ends the program if one of the names, such as --lr, is not the name of a flag; suggests
        the nearest flag."""
        flags = self._option_string_actions
        for name in names:
            if name not in flags:
                near = difflib.get_close_matches(name, flags, n=1)
                hint = f"; did you mean {near[0]}?" if near else "; see --help"
                self.error(f"unknown argument {name}{hint}")

    @contextlib.contextmanager
    def errors(self):
        """Inside `with`, an InputError ends the program like the parser's own errors."""
        try:
            yield
        except InputError as error:
            self.error(str(error))

    def error(self, message):
        source = f"{self.source}: " if self.source else ""
        self.exit(2, f"{self.prog}: error: {source}{message.removeprefix('argument ')}\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to a help text that does not name it, unless the default is empty."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34, width=110)

    def _get_help_string(self, action):
        if action.default in (None, "", argparse.SUPPRESS) or "default:" in action.help:
            return action.help
        return super()._get_help_string(action)


def number(kind, low=-math.inf, high=math.inf, also=None):
    """A type for add_argument: an int or float within [low, high], or the one value `also`."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value) or value == also):
            bounds = f" of at least {low}" if high == math.inf else f" from {low} to {high}"
            bounds = "" if low == -math.inf else bounds + ("" if also is None else f", or {also}")
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun}{bounds}")
        return value

    return convert


whole, real = partial(number, int), partial(number, float)  # whole(1): int of at least 1
SWITCH = {"type": whole(0, 1), "metavar": "{0,1}"}
