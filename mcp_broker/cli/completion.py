"""``mcp-broker completion``: a script for the shell, which asks us for names while the user types."""

from __future__ import annotations

import click

from mcp_broker.cli import output, settings

VARIABLE = "_MCP_BROKER_COMPLETE"


@click.command(
    short_help="Print shell completion, tool names included.",
    epilog="""\b
Examples:
  source <(mcp-broker completion bash)          # in ~/.bashrc
  mcp-broker completion fish > ~/.config/fish/completions/mcp-broker.fish""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@settings.shared()
def completion(shell: str) -> None:
    """Print the completion script of SHELL. It completes commands, options and the tools of the running broker."""
    from click.shell_completion import get_completion_class

    from mcp_broker.cli.root import PROGRAM, root

    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 (click ships all three)
    script = kind(root, {}, PROGRAM, VARIABLE)
    # not source(): for bash it starts bash to check a version that everybody has
    output.line(script.source_template % script.source_vars())
