"""`torchrun -m train CONFIG`: the command `clearshard train` as one of many ranks."""

import typer

from train.commands import train

if __name__ == "__main__":
    typer.run(train)
