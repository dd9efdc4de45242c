"""The notebook demo/tour.ipynb: what is stored of it, and that it runs."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

NOTEBOOK = "demo/tour.ipynb"
CELLS = [
    cell
    for cell in json.loads((ROOT / NOTEBOOK).read_text())["cells"]
    if cell["cell_type"] == "code"
]


@pytest.fixture
def clone(tmp_path):
    """A copy of the repository's files, as a repository that can be cloned."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "models", "*.tar.index")
    folder = shutil.copytree(ROOT, tmp_path / "clone", ignore=left_out)
    shutil.copy(ROOT / ".gitignore", folder)
    (folder / "requirements.txt").write_text("")  # all is installed
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for words in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "-m", "all"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


def test_the_notebook_is_stored_with_the_outputs_of_one_run():
    assert [cell["execution_count"] for cell in CELLS] == list(range(1, len(CELLS) + 1))
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert not any(output.get("name") == "stderr" for output in outputs)
    assert sum("image/png" in output.get("data", ()) for output in outputs) == 4
    text = (ROOT / NOTEBOOK).read_text()
    assert len(text) < 200_000 and not any(name in text for name in ("site-packages", "/home/"))


def first_cell(folder, repository):
    """Runs the first cell in a folder, with this REPOSITORY; then prints where it looks for
    modules."""
    source = "".join(CELLS[0]["source"]).replace('REPOSITORY = ""', f"REPOSITORY = {repository!r}")
    program = [sys.executable, "-c", f"{source}\nprint(sys.path[:2])"]
    return subprocess.run(program, cwd=folder, capture_output=True, text=True)


def test_the_notebook_finds_its_clone_or_makes_one(clone, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    inside, made = first_cell(clone / "demo", ""), first_cell(outside, str(clone))
    for done, folder in ((inside, clone), (made, outside / "imle-ssl")):
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str([str(folder), str(folder / "scripts")])
        assert (folder / "TrainIMLE.py").exists()
    missing = first_cell(tmp_path, "")
    assert missing.returncode and "set REPOSITORY to its address" in missing.stderr


@pytest.mark.slow
def test_the_notebook_runs_and_leaves_its_clone_as_it_was(clone):
    install = "pip install nbclient ipykernel"
    nbclient = pytest.importorskip("nbclient", reason=f"no nbclient: {install}")
    pytest.importorskip("ipykernel", reason=f"no ipykernel: {install}")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(clone / NOTEBOOK, 4)
    stored = [cell.source for cell in notebook.cells]
    for cell in notebook.cells:
        cell.outputs = []
    place = {"metadata": {"path": str(clone / "demo")}}
    nbclient.NotebookClient(notebook, timeout=600, resources=place).execute()
    assert [cell.source for cell in notebook.cells] == stored
    *_, last = (cell for cell in notebook.cells if cell.cell_type == "code")
    printed = "".join(output.text for output in last.outputs)
    lines = printed.splitlines()
    trained, fresh = (float(line.split("probe ")[1].split(",")[0]) for line in lines[:2])
    assert trained > 0.8 > 0.6 > fresh
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True
    )
    assert not changed.stdout
