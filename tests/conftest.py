"""Import the definition cells of gan.ipynb as the module `gan`; make tiny games to play with."""

import contextlib
import os
import re
import subprocess
import types
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch

matplotlib.use("Agg")
if "PYTEST_VERSION" in os.environ:
    torch.set_num_threads(1)  # these games are too small to share
for name in [name for name in os.environ if name.startswith("GAN_")]:
    del os.environ[name]  # the tests choose their own parameters
ROOT = Path(__file__).parent.parent


def read_notebook():
    return nbformat.read(ROOT / "gan.ipynb", as_version=4)


def code_cells(notebook, tag=None):
    """The code cells with this tag, or those with neither of the two tags."""
    known = {"definitions", "parameters"}
    for cell in notebook.cells:
        tags = known.intersection(cell.metadata.get("tags", []))
        if cell.cell_type == "code" and (tag in tags if tag else not tags):
            yield cell


def load_definitions():
    module = types.ModuleType("gan")
    for cell in code_cells(read_notebook(), "definitions"):
        exec(compile(cell.source, f"<{cell.id}>", "exec"), vars(module))
    return module


def parameter_values(gan, notebook):
    """The definitions, and the values that the parameters cell of notebook gives by default."""
    values = dict(vars(gan))
    exec(next(code_cells(notebook, "parameters")).source, values)
    return values


def parameter_lines(notebook):
    """The name and the value, as text, of each line of the parameters cell."""
    cell = next(code_cells(notebook, "parameters"))
    return re.findall(r"^([A-Z_]+) *= *(.*)$", cell.source, flags=re.M)


@pytest.fixture(scope="session")
def notebook():
    return read_notebook()


@pytest.fixture(scope="session")
def committed():
    """git's copy of the notebook: what a visitor sees, whatever was run or edited since."""
    git = ["git", "-C", str(ROOT), "show", "HEAD:gan.ipynb"]
    try:
        text = subprocess.run(git, capture_output=True, check=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git clone")
    return nbformat.reads(text, as_version=4)


@pytest.fixture(scope="session")
def gan():
    return load_definitions()


@pytest.fixture(scope="session")
def classifier_dir(gan, tmp_path_factory):
    """A folder with the classifier of MNIST, and a hasty one in the place of the second."""
    folder = tmp_path_factory.mktemp("classifiers")
    with contextlib.chdir(ROOT):
        gan.load_classifier("MNIST", 0, folder, torch.device("cpu"))
        images, labels = (tensor[:2000] for tensor in gan.load_images("MNIST", True))
    second = {"format": gan.FORMAT, "weights": gan.train_classifier(images, labels, 1).state_dict()}
    path = folder / "classifier_MNIST_1.pth"
    gan.write_atomically(path, gan.save_with_checksum, second)
    return folder


TINY = {  # possible parameters of a run that takes no time
    "DATASET": "MNIST",
    "EPOCHS": 2,
    "LIMIT": 96,
    "BATCH_SIZE": 32,
    "LATENT_DIM": 8,
    "LEARNING_RATE": 5e-4,
    "SEED": 1,
    "RESUME": 1,
}


def random_images(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8, generator=rng)


def tiny_judge(gan):
    """A judge of 8 features that has learned nothing, and therefore takes no time."""
    torch.manual_seed(0)
    features = torch.nn.Linear(784, 8, bias=False)
    last = torch.nn.Linear(8, 10, bias=False)
    classifier = torch.nn.Sequential(torch.nn.Flatten(), features, last)
    return gan.Judge(classifier, gan.to_unit_range(random_images(400, 2)))


def run(gan, parameters, folder):
    """What the notebook's training cell does, on random images, with all output in folder."""
    folder.mkdir(parents=True, exist_ok=True)
    game = gan.Game(parameters, torch.device("cpu"))
    if parameters["RESUME"]:
        gan.resume(game, folder)
    images, held_out = random_images(parameters["LIMIT"]), random_images(40, 1)
    gan.train(game, images, held_out, tiny_judge(gan), folder, folder)
    return game


def same(first, second):
    """Whether two nested states hold the same bits."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second
