"""The command line: options and exit codes of all commands, one file for each group of commands.

Heavy imports are inside their commands, so that `cai --help` and `cai constitution check` stay quick.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

import cai
from cai.cli.constitution_commands import constitution
from cai.cli.document_commands import profile, recipe
from cai.cli.judge_commands import judge, votes
from cai.cli.micro_commands import micro
from cai.cli.run_commands import clean, compare, fork, init, plan, run, show, status
from cai.cli.run_list_commands import runs
from cai.cli.shell_completion import completion
from cai.storage.refusals import refused_path
from cai.text.errors import BadInput, CaiError, Terminated

INTERRUPTED = 130
TERMINATED = 143
EXAMPLES = """\b
Author   cai init my-project
         cai constitution check my-project/constitutions/micro.yaml
Run      cai run quickstart
         cai show quickstart --random
Compare  cai compare base=micro policy=quickstart/policy --prompts micro:test
"""
"""Examples of the three uses, at the end of `cai --help`."""


class Commands(click.Group):
    """A group whose commands report a `CaiError` as one sentence on stderr and exit with the code of its class."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # here, and not when Python ends, a full disk can be reported
            return result
        except CaiError as error:
            _end(ctx, error)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            command = (error.ctx or ctx).command_path
            _end(ctx, BadInput(f"{command}: {error.format_message()} `{command} --help` shows what it takes."))
        except OSError as error:
            if (refused := refused_path(error)) is None:
                raise
            if error.filename is None:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left of the output has no place to go
            _end(ctx, refused)
        except KeyboardInterrupt as error:
            click.echo("Interrupted. What was finished is kept; the same command goes on from there.", err=True)
            ctx.exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED)


def _end(ctx: click.Context, error: CaiError) -> None:
    """Prints an error's sentence and ends with its exit code."""
    click.echo(str(error), err=True)
    ctx.exit(error.exit_code)


@click.group("cai", cls=Commands, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXAMPLES)
@click.version_option(cai.__version__, prog_name="cai")
def main() -> None:
    """Constitutional AI and RLAIF: author a constitution, run a recipe, compare checkpoints.

    Exit codes: 0 done, 1 a check or gate failed, 2 wrong input, 3 a stage failed, 130 or 143 interrupted (resumable).
    """


for command in (
    run,
    runs,
    plan,
    status,
    show,
    votes,
    clean,
    fork,
    init,
    constitution,
    recipe,
    profile,
    judge,
    compare,
    micro,
    completion,
):
    main.add_command(command)
