"""The `shardkit` command.  Subcommands are imported when they are invoked: help loads no torch."""

from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import click

from shardkit import __version__
from shardkit.cli.output import escape_text
from shardkit.errors import ShardkitError

INTERRUPTED = 130


class Entry(NamedTuple):
    """Where a subcommand is, as `module:attribute`, and the line of help the group shows."""

    target: str
    help: str


COMMANDS = {
    "split": Entry("shardkit.cli.split:split", "Cut a checkpoint into one file per rank."),
    "verify": Entry("shardkit.cli.verify:verify", "Prove shards right, or say what is wrong."),
    "merge": Entry("shardkit.cli.merge:merge", "Write the unsharded checkpoint again."),
    "reshard": Entry("shardkit.cli.reshard:reshard", "Cut shards for another number of ranks."),
    "plan": Entry("shardkit.cli.plan:plan", "Show what a split would hold and cost."),
    "inspect": Entry("shardkit.cli.inspect:inspect", "Say what a folder holds."),
    "generate": Entry("shardkit.cli.generate:generate", "Generate text from shards."),
    "recipes": Entry("shardkit.cli.recipes:recipes", "List, show, check and draft recipes."),
    "demo": Entry("shardkit.cli.demo:demo", "Split, verify and run two small models here."),
}


class LazyGroup(click.Group):
    """The commands of COMMANDS, and the one place where an error becomes an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command's name, in the order a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None for a name there is none of."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].target.partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing one."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what a user can meet ends it with one line and an exit code."""
        try:
            return super().invoke(ctx)
        except ShardkitError as error:
            end(ctx, str(error), error.exit_code)
        except KeyboardInterrupt:
            end(ctx, "interrupted", INTERRUPTED)
        except OSError as error:
            if error.filename is None:
                raise
            end(ctx, f"{error.filename}: {error.strerror}", ShardkitError.exit_code)


def end(ctx: click.Context, message: str, exit_code: int) -> NoReturn:
    """Say what went wrong in one line on stderr, and exit."""
    click.echo(f"Error: {escape_text(message)}", err=True)
    ctx.exit(exit_code)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shardkit")
def main() -> None:
    """Cut a Hugging Face checkpoint into tensor-parallel shards, prove them right, and run them.

    Results go to stdout, progress and errors to stderr.  Exit codes: 0 done, 1 the checkpoint
    cannot be divided so, 2 wrong usage, 3 damaged input, 4 verification failed, 5 the output
    cannot be written, 6 the source changed meanwhile, 7 ranks failed, 130 interrupted,
    143 terminated.

    \b
    Example:
      shardkit plan models/llama --tp 4
      shardkit split models/llama llama-tp4 --tp 4
      shardkit verify llama-tp4 --against models/llama
      shardkit generate llama-tp4 "Once upon a time"
    """
