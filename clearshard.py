"""The command line: one program that joins each room's own commands."""

import typer

from models import commands as models_commands
from pipeline import commands as pipeline_commands
from pipeline import degraded_commands
from pipeline.demo import demo
from pipeline.doctor import doctor

app = typer.Typer(help="Raw photographs in, trained image restorers out.", no_args_is_help=True,
                  add_completion=False, rich_markup_mode=None, pretty_exceptions_show_locals=False)
app.command()(doctor)
app.command()(demo)
pipeline_commands.register(app)
degraded_commands.register(app)
models_commands.register(app)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
