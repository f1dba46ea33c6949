"""The root of the command tree: help on one screen, suggestions, and the way out with the right exit code."""

from __future__ import annotations

import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

import click

from mcp_broker.cli import failures, settings

#: section -> command -> what it does, in one line; the module of a command is found in MODULES
SECTIONS: Final[dict[str, dict[str, str]]] = {
    "Run": {
        "start": "Serve tools until Ctrl-C.",
        "stop": "End a running broker in order.",
        "demo": "Show everything once, in a temporary directory.",
        "doctor": "Check this machine and the state directory.",
    },
    "Operate": {
        "scale": "Keep so many workers of a pool.",
        "reload": "Read the configuration again and follow it.",
        "drain": "Let a pool or worker finish and take no more.",
    },
    "Use": {
        "tools": "List tools, or show one with an example call.",
        "call": "Call a tool.",
    },
    "Watch": {
        "status": "Say how broker and pools are; 0 when all are ready.",
        "ps": "List the worker processes.",
        "ports": "List leased ports and their connections.",
        "why": "Say why a worker died, or how a call, tool or pool is.",
        "dead-letters": "Show, retry or drop poisoned calls.",
    },
    "Set up": {
        "credentials": "Issue and list client profiles.",
        "completion": "Print shell completion, tool names included.",
    },
}

MODULES: Final[dict[str, str]] = {
    "start": "start",
    "stop": "stop",
    "demo": "demo",
    "doctor": "doctor",
    "scale": "operate",
    "reload": "operate",
    "drain": "operate",
    "tools": "tools",
    "call": "call",
    "status": "status",
    "ps": "status",
    "ports": "ports",
    "why": "why",
    "dead-letters": "dead_letters",
    "credentials": "credentials",
    "completion": "completion",
}

PROGRAM: Final = "mcp-broker"
#: the column of the sections' names
_SECTION_AT: Final = 71
_SIGPIPE_EXIT: Final = 141


class Suggesting(click.Group):
    """A group that names the nearest command when there is none of that name."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with the nearest command when there is none of that name."""
        known = self.list_commands(ctx)
        if args and args[0] not in known and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], known, n=2, cutoff=0.5)
            guess = f"; did you mean {' or '.join(close)}?" if close else ""
            raise click.UsageError(f"there is no command {args[0]!r}{guess}", ctx)
        return super().resolve_command(ctx, args)


class Commands(Suggesting):
    """Commands that are imported when they run."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 (click's signature)
        """Return every command, in the order of the help."""
        return list(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 (click's signature)
        """Import one command."""
        if cmd_name not in MODULES:
            return None
        module = importlib.import_module(f"mcp_broker.cli.{MODULES[cmd_name]}")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)  # noqa: S101 (our own table)
        return command

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 (click's signature)
        """Everything on one screen of 24 lines by 80 columns; what a section is for stands beside its first command."""
        lines = [
            f"Usage: {PROGRAM} COMMAND [ARGUMENTS]",
            "Runs tools for agents and pipelines in isolated, supervised worker processes.",
        ]
        for section, commands in SECTIONS.items():
            rows = [f"  {name:<12} {text}" for name, text in commands.items()]
            rows[0] = f"{rows[0]:<{_SECTION_AT}}{section}"
            lines += rows
        lines += [
            "With any command: --help --debug; most take --json --profile F --state-dir D",
            f"First steps: {PROGRAM} start, then in another shell:",
            f'  {PROGRAM} call text.word_count \'{{"text": "a b a"}}\'',
        ]
        formatter.write("\n".join(lines) + "\n")


@click.command(cls=Commands, name=PROGRAM, no_args_is_help=True)
@click.version_option(package_name=PROGRAM, prog_name=PROGRAM, message="%(prog)s %(version)s")
@settings.shared("json", "profile", "state-dir", hidden=True)
def root() -> None:
    """Run tools for agents and pipelines in isolated, supervised worker processes."""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; errors are printed, tracebacks only with ``--debug``."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    chosen = settings.Settings()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # tools may say anything, and not every terminal or pipe can take it
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if not arguments:
            # whoever gives no command wants to know which there are; it is no mistake to scold
            arguments = ["--help"]
        code = root.main(arguments, prog_name=PROGRAM, standalone_mode=False, obj=chosen)
        sys.stdout.flush()
        return code if isinstance(code, int) else failures.DONE
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.Abort:
        return _fail(KeyboardInterrupt(), chosen)
    except click.ClickException as error:
        return _syntax(error, as_json=chosen.as_json or "--json" in arguments)
    except BrokenPipeError:
        # whoever read us has seen enough; flushing again at exit would only complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _SIGPIPE_EXIT
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 (the last one to catch it: a user never sees a traceback)
        return _fail(error, chosen)


def _fail(error: BaseException, chosen: settings.Settings) -> int:
    if chosen.debug:
        import traceback

        traceback.print_exception(error)
    failure = failures.explain(error, chosen)
    failures.show(failure, as_json=chosen.as_json)
    return failure.exit_code


def _syntax(error: click.ClickException, *, as_json: bool) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if isinstance(context, click.Context) else PROGRAM
    message = error.format_message().rstrip(".")
    # click's own suggestion for options comes on lines of its own
    failure = failures.Failure(failures.SYNTAX, "USAGE", " ".join(message.split()), hint=f"{path} --help")
    failures.show(failure, as_json=as_json)
    return failure.exit_code


def main() -> NoReturn:
    """Entry point of the console script."""
    sys.exit(run())
