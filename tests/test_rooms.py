"""Imports only go down: who may use whom."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
LAYERS = {"models": 0, "degrade": 0, "pipeline": 1, "caption": 2, "sample": 3, "train": 4, "dags": 5, "clearshard": 6}


def imported(path: Path) -> set[str]:
    """The rooms that a file imports absolutely."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module.split(".")[0])
    return found & set(LAYERS)


@pytest.mark.parametrize("room", LAYERS)
def test_a_room_imports_only_itself_and_lower_layers(room):
    files = [REPOSITORY / f"{room}.py"] if room == "clearshard" else sorted((REPOSITORY / room).rglob("*.py"))
    wrong = [f"{path.name} imports {other}" for path in files for other in imported(path)
             if other != room and LAYERS[other] >= LAYERS[room]]
    assert not wrong


def test_importing_the_pipeline_loads_no_torch():
    # Workers of the corpus start once a second on large clusters; torch would triple their start and memory.
    import subprocess
    import sys
    program = "import sys, pipeline.commands; sys.exit('torch' in sys.modules or 'pyiqa' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0
