"""Import the definition cells of gan.ipynb as the module `gan`; play tiny games with them."""

import ast
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
import torch

matplotlib.use("Agg")
plt.show = lambda: plt.close("all")  # a notebook shows its figures, and is done with them
if "PYTEST_VERSION" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # these games are too small to share
    torch.set_num_threads(1)
for name in [name for name in os.environ if name.startswith("GAN_")]:
    del os.environ[name]  # the tests choose their own parameters
ROOT, CPU = Path(__file__).parent.parent, torch.device("cpu")
TINY = {"DATASET": "MNIST", "EPOCHS": 2, "BATCH_SIZE": 32, "LATENT_DIM": 12, "LEARNING_RATE": 5e-4}
TINY |= {"SEED": 1, "LIMIT": 100, "RESUME": 1, "OUTPUT_DIR": "."}  # a run that takes no time
INJECTED = TINY | {"LIMIT": 256, "BATCH_SIZE": 64, "OUTPUT_DIR": "out"}  # of the whole run
SMALL = [  # edits that make both networks small, and their games fast
    ("networks", "(latent_dim, 256, 512, 512, 784, ", "(latent_dim, 32, 784, "),
    ("networks", "(784, 1024, 256, 1)", "(784, 32, 1)"),
]


def read_notebook():
    return nbformat.read(ROOT / "gan.ipynb", as_version=4)


def code_cells(notebook, tag=None):
    """The code cells with this tag, or those with neither of the two tags that define."""
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        wanted = tag in tags if tag else not {"definitions", "parameters"}.intersection(tags)
        if cell.cell_type == "code" and wanted:
            yield cell


def load_definitions(*edits):
    """The definitions as a module; an edit (id, old, new) replaces old by new in that cell."""
    module = types.ModuleType("gan")
    for cell in code_cells(read_notebook(), "definitions"):
        source = cell.source
        for name, old, new in edits:
            assert name != cell.id or old in source, f"{name} does not hold {old!r}"
            source = source.replace(old, new) if name == cell.id else source
        exec(compile(source, f"<{cell.id}>", "exec"), vars(module))
    return module


def run_cell(name, scope):
    """Execute the notebook's cell with the id name; return all names that are there afterwards."""
    (cell,) = (cell for cell in read_notebook().cells if cell.id == name)
    exec(cell.source, scope := dict(scope))
    return scope


def parameter_values(notebook):
    """What the lines of the parameters cell say, by name."""
    (cell,) = code_cells(notebook, "parameters")
    lines = ast.parse(cell.source).body
    return {line.targets[0].id: ast.literal_eval(line.value) for line in lines}


def git(*command):
    """What git says in English, also in somebody else's checkout; skips where there is none."""
    command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *command]
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    done = subprocess.run(command, capture_output=True, env=os.environ | {"LC_ALL": "C"})
    if b"not a git repository" in done.stderr:
        pytest.skip("not a git clone")
    return done.stdout


def copy_digits(folder):
    """Copy the embedded digits, not what was unpacked beside them, to folder/data."""
    shutil.copytree(ROOT / "data", folder / "data", ignore=shutil.ignore_patterns("*-ubyte"))


@pytest.fixture(scope="session")
def notebook():
    return read_notebook()


@pytest.fixture(scope="session")
def committed():
    """git's copy: what a visitor sees, whatever was run or edited since."""
    return nbformat.reads(git("show", "HEAD:gan.ipynb").decode(), as_version=4)


@pytest.fixture(scope="session")
def gan():
    return load_definitions()


@pytest.fixture(scope="session")
def small():
    return load_definitions(*SMALL)


@pytest.fixture(autouse=True)
def no_figure_stays_open():
    yield
    plt.close("all")


@pytest.fixture(scope="session", autouse=True)
def beside(request, tmp_path_factory):
    """A run of the whole notebook beside the tests, if one asks for it: in a terminal that knows no
    accents, with MPLBACKEND, and papermill's way to set parameters, a cell after theirs."""
    if not any("executed" in item.fixturenames for item in request.session.items):
        return (yield)
    folder, notebook = tmp_path_factory.mktemp("whole"), read_notebook()
    place = 1 + notebook.cells.index(*code_cells(notebook, "parameters"))
    injected = "\n".join(f"{name} = {value!r}" for name, value in INJECTED.items())
    notebook.cells.insert(place, nbformat.v4.new_code_cell(injected))
    nbformat.write(notebook, folder / "gan.ipynb")
    copy_digits(folder)
    command = [sys.executable, "-m", "nbconvert", "--config", str(ROOT / ".nbconvert.py")]
    command += ["--to", "notebook", "--execute", "gan.ipynb"]
    surroundings = os.environ | {"PYTHONIOENCODING": "ascii:strict", "MPLBACKEND": "Agg"}
    with open(folder / "terminal.txt", "wb") as terminal:
        outputs = {"stdout": terminal, "stderr": terminal}
        process = subprocess.Popen(command, cwd=folder, env=surroundings, **outputs)
        yield process, folder
        process.kill()


@pytest.fixture(scope="session")
def executed(beside):
    """The folder of that run, and its executed notebook."""
    process, folder = beside
    assert process.wait() == 0, (folder / "terminal.txt").read_text()
    return folder, nbformat.read(folder / "gan.nbconvert.ipynb", as_version=4)


def random_images(count, seed=0):
    """Images (count, 1, 28, 28) of noise in [-1, 1]."""
    return torch.rand(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny_evaluator(gan):
    """An evaluator with 8 features whose classifier has learned nothing, and takes no time."""
    torch.manual_seed(0)
    layers = torch.nn.Linear(784, 8, bias=False), torch.nn.Linear(8, 10, bias=False)
    return gan.Evaluator(torch.nn.Sequential(torch.nn.Flatten(), *layers), random_images(400, 2))


def new_game(gan, rate=TINY["LEARNING_RATE"]):
    return gan.with_average(gan.new_gan(TINY["SEED"], CPU, TINY["LATENT_DIM"], rate))


def run(gan, parameters, folder):
    """What the notebook's cell train-run does, on random images, all files in folder; return the
    names that it leaves."""
    parameters = gan.read_parameters(parameters | {"OUTPUT_DIR": str(folder)})
    scope = vars(gan) | {"parameters": parameters, "device": CPU, "split": parameters.LIMIT - 40}
    scope |= {"seed": parameters.SEED, "latent_dim": parameters.LATENT_DIM}
    scope |= {"images": random_images(parameters.LIMIT), "evaluator": tiny_evaluator(gan)}
    return run_cell("train-run", scope)


def same(first, second):
    """Whether two nested states hold the same bits."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second
