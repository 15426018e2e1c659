"""The argument parser of the programs that have options of their own."""

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

from megatron_slm import __version__
from megatron_slm.config.help import values_of
from megatron_slm.config.nearest import did_you_mean, nearest
from megatron_slm.config.ranges import Range, range_of
from megatron_slm.config.values import UNREADABLE, convert
from megatron_slm.installation import in_commands


def number_in(hint) -> Callable[[str], int | float]:
    """What argparse reads an option with, from an annotation: type=number_in(Count)."""
    bounds = range_of(hint) or Range()

    def read(text: str) -> int | float:
        value = convert(text, hint, "", [])
        if value is UNREADABLE or value not in bounds:
            raise argparse.ArgumentTypeError(f"got {text}; expected {values_of(hint)}")
        return value

    return read


def take_switch(argv: list[str] | None, name: str) -> tuple[list[str], bool]:
    """The words of a command line (None = sys.argv) without the option `name`, and whether it was
    given. It takes no value.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    remaining = [word for word in words if word not in (name, name.replace("_", "-"))]
    return remaining, len(remaining) < len(words)


class Program(argparse.ArgumentParser):
    """argparse with --version, and with the nearest known option or value where one is unknown.

    A program that was started as a console command (slm-merge) says so in its help, which then
    names the others as commands too.
    """

    def __init__(self, prog: str, *args, **settings):
        self._words: list[str] = []
        command = Path(sys.argv[0]).name
        if command.startswith("slm-"):
            prog = command
            for name in {"description", "epilog", "usage"} & settings.keys():
                settings[name] = in_commands(settings[name])
        super().__init__(prog, *args, **settings)
        self.add_argument(
            "--version",
            action="version",
            version=f"%(prog)s {__version__}",
            help="show the version and stop",
        )

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's; the words are kept for the message of a missing option."""
        self._words = list(map(str, sys.argv[1:] if args is None else args))
        return super().parse_known_args(self._words, namespace)

    def parse_args(self, args=None, namespace=None):
        """As argparse's, but an unknown option ends the program with the nearest one's name."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        return options

    def refuse_misspelled(self, unknown: Iterable[str]) -> None:
        """End with exit code 2 where a word that parse_known_args left over is nearly an option."""
        for word in unknown:
            name = word.partition("=")[0]
            if name.startswith("--") and nearest(name, self._option_string_actions):
                self.error(f"unrecognized arguments: {word}{self._meant([name])}")

    def _meant(self, unknown: Iterable[str]) -> str:
        options = [word.partition("=")[0] for word in unknown if word.startswith("--")]
        suggestions = (did_you_mean(word, self._option_string_actions) for word in options)
        return "".join(f"; {sentence}" for sentence in suggestions if sentence)

    def error(self, message: str) -> NoReturn:
        """As argparse's; where a required option is missing, the misspelled word may be it.

        argparse looks for required options first, and would never come to the unknown words.
        """
        if "are required: " in message:
            unknown = [word for word in self._words if not self._is_known(word)]
            message += self._meant(unknown)
        super().error(message)

    def _is_known(self, word: str) -> bool:
        return word.partition("=")[0] in self._option_string_actions

    def _check_value(self, action, value):
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            meant = did_you_mean(value, map(str, action.choices))
            if meant:
                error.message += f"; {meant}"
            raise
