"""Import the definition cells of gan.ipynb as the module `gan`; play tiny games with them."""

import ast
import linecache
import os
import shutil
import subprocess
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
ROOT, CPU = Path(__file__).resolve().parent.parent, torch.device("cpu")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
TINY = {"DATASET": "MNIST", "EPOCHS": 2, "BATCH_SIZE": 32, "LATENT_DIM": 12, "LEARNING_RATE": 5e-4}
TINY |= {"SEED": 1, "LIMIT": 100, "RESUME": 1, "OUTPUT_DIR": "."}  # a run that takes no time
SMALL = [  # edits that make both networks small, and their games fast
    ("networks", "(latent_dim, 256, 512, 512, 784, ", "(latent_dim, 32, 784, "),
    ("networks", "(784, 1024, 256, 1)", "(784, 32, 1)"),
]


def read_notebook():
    notebook = nbformat.read(ROOT / "gan.ipynb", as_version=4)
    if not all("id" in cell for cell in notebook.cells):
        raise ValueError("gan.ipynb has lost the ids of its cells: save it as nbformat 4.5")
    return notebook


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
        filename = f"<{cell.id} {hash(source)}>"  # another text has another name, as in IPython
        linecache.cache[filename] = len(source), None, source.splitlines(True), filename
        exec(compile(source, filename, "exec"), vars(module))
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
    """What git says, also in somebody else's clone; skips where this folder is no clone."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    start = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    top = subprocess.run([*start, "rev-parse", "--show-toplevel"], capture_output=True, text=True)
    if top.returncode or not ROOT.samefile(top.stdout.rstrip("\n")):
        pytest.skip("not a git clone")
    return subprocess.run([*start, *command], capture_output=True).stdout


def browse(page, *options):
    """Open the file page in the headless browser; return what it prints."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", *options]
    command += ["--virtual-time-budget=20000", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def new_game(gan, rate=TINY["LEARNING_RATE"]):
    return gan.with_average(gan.new_gan(TINY["SEED"], CPU, TINY["LATENT_DIM"], rate, **gan.RECIPE))


def run(gan, parameters, folder):
    """Execute train-run on random images, beside an untrained classifier; return its names."""
    parameters = gan.read_parameters(parameters | {"OUTPUT_DIR": str(folder)})
    torch.manual_seed(0)
    images, held_out = (torch.rand(parameters.LIMIT, 1, 28, 28) * 2 - 1 for _ in range(2))
    layers = torch.nn.Linear(784, 8), torch.nn.Linear(8, 10)
    evaluator = gan.Evaluator(torch.nn.Sequential(torch.nn.Flatten(), *layers), held_out)
    scope = {"parameters": parameters, "folder": Path(parameters.OUTPUT_DIR), "device": CPU}
    scope |= {"images": images, "evaluator": evaluator}
    scope |= {"seed": parameters.SEED, "latent_dim": parameters.LATENT_DIM, "split": 60}
    return run_cell("train-run", vars(gan) | scope)


gan, small = load_definitions(), load_definitions(*SMALL)
