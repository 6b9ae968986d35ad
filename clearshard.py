"""The command line: one program that joins each room's own commands."""

import typer

from caption import commands as caption_commands
from caption.stages import STAGES as CAPTION_STAGES
from dags import graph
from models import commands as models_commands
from pipeline import commands as pipeline_commands
from pipeline import degraded_commands
from pipeline.doctor import doctor
from pipeline.stages import STAGES
from sample import commands as sample_commands
from train import commands as train_commands
from train import demo

STAGES = STAGES | CAPTION_STAGES
ORDER = [STAGES[step.name] for step in graph.order(graph.GRAPHS["corpus"]) if step.name in STAGES]
run = pipeline_commands.run_command(ORDER)

app = typer.Typer(help="Raw photographs in, trained image restorers out.", no_args_is_help=True,
                  add_completion=False, rich_markup_mode=None, pretty_exceptions_show_locals=False)
app.command()(doctor)
app.command()(demo.command(run))
pipeline_commands.register(app)
app.command()(run)
caption_commands.register(app)
degraded_commands.register(app)
models_commands.register(app)
sample_commands.register(app)
train_commands.register(app)


def main() -> None:
    app()


if __name__ == "__main__":
    main()
