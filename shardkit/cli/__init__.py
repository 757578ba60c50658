"""The `shardkit` command. Subcommands are imported when they are invoked: help loads no torch."""

from importlib import import_module
from typing import Any, NamedTuple, NoReturn

import click

from shardkit import __version__
from shardkit.errors import ShardkitError
from shardkit.strict_json import escape_line

INTERRUPTED = 130


class CommandEntry(NamedTuple):
    """Where a subcommand is, as `module:attribute`, and the line of help the group shows."""

    target: str
    help: str


COMMANDS = {
    "split": CommandEntry("shardkit.cli.split:split", "Split a checkpoint into one file per rank."),
    "verify": CommandEntry(
        "shardkit.cli.verify:verify", "Verify a shard folder and report what is wrong."
    ),
    "merge": CommandEntry("shardkit.cli.merge:merge", "Write the unsharded checkpoint again."),
    "reshard": CommandEntry(
        "shardkit.cli.reshard:reshard", "Split shards for another number of ranks."
    ),
    "plan": CommandEntry("shardkit.cli.plan:plan", "Show what each rank would hold and cost."),
    "inspect": CommandEntry(
        "shardkit.cli.inspect:inspect", "Describe a shard folder or a checkpoint."
    ),
    "generate": CommandEntry("shardkit.cli.generate:generate", "Generate text from shards."),
    "serve": CommandEntry(
        "shardkit.cli.serve:serve", "Answer HTTP requests as OpenAI's API has them."
    ),
    "bench": CommandEntry("shardkit.cli.bench:bench", "Measure how fast shards load and run."),
    "recipes": CommandEntry("shardkit.cli.recipes:recipes", "List, show, check and draft recipes."),
    "demo": CommandEntry("shardkit.cli.demo:demo", "Split, verify and run two small models."),
}


class LazyGroup(click.Group):
    """The commands of COMMANDS, and the one place where an error becomes an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command's name, in the order a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None if there is none of that name."""
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
            exit_with_error(ctx, str(error), error.exit_code)
        except KeyboardInterrupt:
            exit_with_error(ctx, "interrupted", INTERRUPTED)
        except OSError as error:
            if error.filename is None:
                raise
            exit_with_error(ctx, f"{error.filename}: {error.strerror}", ShardkitError.exit_code)


def exit_with_error(ctx: click.Context, message: str, exit_code: int) -> NoReturn:
    """Print what went wrong in one line on stderr, and exit."""
    click.echo(f"Error: {escape_line(message)}", err=True)
    ctx.exit(exit_code)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="shardkit")
def main() -> None:
    """Split Hugging Face checkpoints into tensor-parallel shards, verify them, and run them.

    Results go to stdout, progress and errors to stderr. Exit codes: 0 success, 1 the checkpoint
    cannot be split that way, 2 wrong usage, 3 damaged input, 4 verification failed, 5 the output
    cannot be written, 6 the source changed meanwhile, 7 ranks failed, 130 interrupted,
    143 terminated.

    \b
    Example:
      shardkit plan models/llama --tp 4
      shardkit split models/llama llama-tp4 --tp 4
      shardkit verify llama-tp4 --against models/llama
      shardkit generate llama-tp4 "Once upon a time"
    """
