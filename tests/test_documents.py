"""The notebook as a document: its rules, parameters, data, a whole run of it; the two READMEs."""

import ast
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock
from urllib.error import URLError

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, code_cells, gan, git, parameter_values, read_notebook, run_cell
from PIL import Image

DEFINES = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.Import, ast.ImportFrom)
RUN_MAKES = {f"gan_images/{name}" for name in ("epoch_001.png", "epoch_002.png", "progress.gif")}
RUN_MAKES |= {f"models/{name}" for name in ("generator.pth", "discriminator.pth", "metrics.json")}
RUN_MAKES.add("gan_images/generator.js")
READMES = [(ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.pt-BR.md")]
PICTURES = [f"gan_images/default_{x}" for x in ("run.gif", "page.png", "plane.gif", "uses.png")]
GENERATOR = "gan_images/default_generator.js"
CODE_BLOCK = r"^```\w+\n([\s\S]*?)^```"


def syntax(cell):
    return ast.parse(re.sub("^%.*$", "", cell.source, flags=re.M))


def data_of(cell, kind):
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def printed_by(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def section(heading):
    """The text under this heading of the English README."""
    return READMES[0].split(f"\n## {heading}\n")[1].split("\n## ")[0]


def clean_cells(notebook):
    """The code cells by id, each executed once, in their order, with what it should show."""
    cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    for name, cell in cells.items():
        assert "execution" not in cell.metadata, "timing metadata"
        assert bool(data_of(cell, "image/png")) == ("alt" in cell.metadata), name
        assert not [out for out in cell.outputs if "stderr" in (out.get("name"), out.output_type)]
        text = printed_by(cell) + "".join(data_of(cell, "text/plain"))
        assert not re.search(r"(^|[\s'\"(])(/\w+/|[A-Z]:\\)", text), "an absolute path"
    return cells


def test_definition_cells_only_define_and_the_others_define_nothing():
    nbformat.validate(notebook := read_notebook())
    for cell in code_cells(notebook, "definitions"):
        for node in syntax(cell).body:
            assert isinstance(node, DEFINES) or ast.literal_eval(node.value), "not even a constant"
    for cell in (*code_cells(notebook), *code_cells(notebook, "parameters")):
        for node in ast.walk(syntax(cell)):
            assert not isinstance(node, DEFINES), f"{cell.id}: {ast.unparse(node)}"


def test_no_run_cell_uses_a_name_that_two_others_make():
    """Or it would show something else when it is run again."""
    makers, users = Counter(), {}
    for cell in code_cells(read_notebook()):
        made, needed = set(), users.setdefault(cell.id, set())
        for statement in syntax(cell).body:
            names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
            here = {node.id for node in names if isinstance(node.ctx, ast.Store)}
            needed |= {node.id for node in names} - made - here
            made |= here
        makers.update(made)
    for user, needed in users.items():
        assert not [name for name in needed if makers[name] > 1], user


def test_every_parameter_can_come_from_the_environment_and_wins(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    texts = ["KMNIST", "3", "7", "50", "1e-4", "77", "600", "0", "~/runs/1"]
    values = ["KMNIST", 3, 7, 50, 1e-4, 77, 600, 0, str(tmp_path / "runs/1")]
    for name, text in zip(parameter_values(read_notebook()), texts, strict=True):
        monkeypatch.setenv(f"GAN_{name}", text)
    parameters = run_cell("parameters-run", vars(gan) | TINY)["parameters"]
    assert vars(parameters) == dict(zip(TINY, values, strict=True))
    monkeypatch.setenv("GAN_EPOCH", "1")
    with pytest.raises(ValueError, match="^GAN_EPOCH is no parameter: .* GAN_EPOCHS, "):
        gan.read_parameters(TINY)


IMPOSSIBLE = [("EPOCHS", 0), ("EPOCHS", "five"), ("EPOCHS", 2.5), ("BATCH_SIZE", 1), ("LIMIT", 99)]
IMPOSSIBLE += [("BATCH_SIZE", 101), ("LATENT_DIM", 10), ("LEARNING_RATE", float("nan"))]
IMPOSSIBLE += [("SEED", 2**32), ("RESUME", -1), ("DATASET", "CIFAR10"), ("OUTPUT_DIR", __file__)]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_in_one_line_that_names_it(tmp_path, name, value):
    with pytest.raises(ValueError) as refusal:
        gan.read_parameters(TINY | {"OUTPUT_DIR": tmp_path, name: value})
    assert re.fullmatch(f".*{name}.*{re.escape(str(value))}.*", str(refusal.value))


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """The folder of the embedded digits, beside an empty one; and no connection."""
    monkeypatch.setattr("urllib.request.urlopen", Mock(side_effect=URLError("no connection")))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    return shutil.copytree(ROOT / "data/MNIST/raw", tmp_path / "data/MNIST/raw")


def test_runs_that_start_together_read_the_digits_and_write_nothing_beside_them(raw):
    raw.chmod(0o555)
    before = set(raw.parents[2].rglob("*"))
    with ThreadPoolExecutor(3) as pool:
        loaded = list(pool.map(gan.load_digits, ["MNIST"] * 3, ["out"] * 3))
    sizes = [[len(labels) for _, labels in parts] for parts in loaded]
    assert sizes == [[60_000, 10_000]] * 3
    assert set(raw.parents[2].rglob("*")) == before


def test_missing_or_damaged_digits_are_named_with_their_place(raw):
    expected = re.escape(f"MNIST cannot be read, neither from {raw} ") + ".* download: .+"
    for damage in (lambda path: path.write_bytes(b"cut"), lambda path: shutil.rmtree(path.parent)):
        damage(raw / "train-labels-idx1-ubyte.gz")
        with pytest.raises(RuntimeError) as refusal:
            gan.load_digits("MNIST", "out")
        assert re.fullmatch(expected, str(refusal.value)), "not in one line"


def test_a_whole_run_makes_what_is_promised_and_saves_the_figures_it_shows(tmp_path):
    out = os.path.relpath(tmp_path / "out", ROOT)
    parameters = TINY | {"LIMIT": 256, "BATCH_SIZE": 64, "OUTPUT_DIR": out}
    surroundings = os.environ | {f"GAN_{name}": str(value) for name, value in parameters.items()}
    surroundings |= {"PYTHONIOENCODING": "ascii:strict", "MPLBACKEND": "Agg"}  # no accents
    command = [sys.executable, "-m", "nbconvert", "--config", ".nbconvert.py", "--to", "notebook"]
    command += ["--execute", "--output-dir", str(tmp_path), "gan.ipynb"]
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=ROOT, env=surroundings, **outputs)
    assert done.returncode == 0, done.stdout
    cells = clean_cells(nbformat.read(tmp_path / "gan.ipynb", as_version=4))
    metrics = json.loads((tmp_path / "out/models/metrics.json").read_text())
    made = {path.relative_to(tmp_path / "out").as_posix() for path in tmp_path.glob("out/*/*")}
    made -= {f"models/checkpoint-{metrics['game']}.{k}.pth" for k in (0, 1)}
    assert made == RUN_MAKES | {"gan_images/play.html"}, "the page comes along"
    assert Image.open(tmp_path / "out/gan_images/progress.gif").n_frames == 2
    assert re.fullmatch("Epoch 2 of 2, .*\n", printed_by(cells["train-run"])), "not in place"
    assert printed_by(cells["proof-run"]).endswith("Equal to the last bit: True\n")
    assert re.findall(r"^Epoch (\d) of 2, .* s: distance \d", done.stdout, flags=re.M) == ["1", "2"]
    assert not re.search("warn|error|debugger", done.stdout, re.IGNORECASE)
    assert max(map(len, done.stdout.splitlines())) < 300, "an output that is for the notebook only"
    assert metrics["parameters"] == parameters
    both = metrics["scores"] | metrics["second_scores"]
    assert data_of(cells["scores-run"], "text/markdown") == [gan.score_table(both).data]
    assert both["generator"] != both["generator, second"], "the second classifier is the first"
    assert f" {metrics['fresh_discriminator_accuracy']:.1%}" in printed_by(cells["fresh-run"])
    assert f" {metrics['nearest_is_training']:.1%}" in printed_by(cells["nearest-run"])
    assert f" {metrics['taught_by_fakes']:.2%}" in printed_by(cells["taught-run"])


def test_the_committed_notebook_is_a_run_of_its_defaults_whose_results_the_readmes_show():
    notebook = nbformat.reads(git("show", "HEAD:gan.ipynb").decode(), as_version=4)
    cells, values = clean_cells(notebook), parameter_values(notebook)
    printed, epochs = printed_by(cells["parameters-run"]), values["EPOCHS"]
    assert all(f"{name!r}: {value!r}" in printed for name, value in values.items())
    assert f"Epoch {epochs} of {epochs}" in printed_by(cells["train-run"])
    (computed,) = data_of(cells["scores-run"], "text/markdown")
    rows = re.findall(r"^\| [A-Za-z].* \d.* \|$", section("Results"), flags=re.M)
    assert len(rows) == 4 and all(row in computed for row in rows)
    assert all(f"]({path})" in text for path in PICTURES for text in READMES)
    assert all(f"]({path})" in notebook.cells[0].source for path in (PICTURES[0], PICTURES[2]))
    film, _, plane, uses = (git("show", f"HEAD:{path}") for path in PICTURES)
    film_run, uses_run = (data_of(cells[f"{name}-run"], "image/png") for name in ("film", "fill"))
    plane_run = base64.b64decode(*data_of(cells["small-game-run"], "image/png"))
    assert Image.open(io.BytesIO(plane)).n_frames == Image.open(io.BytesIO(plane_run)).n_frames - 1
    assert uses == base64.b64decode(*uses_run)
    film, last = (Image.open(io.BytesIO(x)) for x in (film, base64.b64decode(*film_run)))
    film.seek(epochs - 1)  # of which the other one shows the upper rows
    difference = np.asarray(film.convert("L"), int)[: last.height] - np.asarray(last.convert("L"))
    assert film.n_frames == epochs and np.abs(difference).mean() < 5
    game = re.search(r"of game (\w{8})", printed_by(cells["metrics-run"]))[1]
    page = json.loads(git("show", f"HEAD:{GENERATOR}").partition(b" = ")[2].strip(b";\n"))
    assert page["name"] == f"MNIST, {epochs} epochs, game {game}"


def test_git_keeps_the_pictures_shown_and_ignores_whatever_a_run_makes():
    tracked = git("ls-tree", "-r", "--name-only", "HEAD", "gan_images", "models").decode().split()
    assert set(tracked) - {"models/.gitkeep"} == {*PICTURES, "gan_images/play.html", GENERATOR}
    made = [*RUN_MAKES, "models/checkpoint-a71ba895.0.pth", "models/x.pth.1.tmp", "runs/1/models/x"]
    made += ["gan_images/epoch_028.png", "gan.nbconvert.ipynb", "data/KMNIST/raw/x-ubyte.gz"]
    assert set(git("check-ignore", "--no-index", *made).decode().split()) == set(made)


def test_the_readme_lists_what_a_run_saves_and_how_to_use_it(tmp_path, monkeypatch):
    saved = section("What a run saves")
    assert all(f"`{name}`" in saved for name in RUN_MAKES - {"gan_images/epoch_002.png"})
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "gan.ipynb", tmp_path)
    generator, noise = gan.Generator(), torch.randn(64, 42)
    generator(noise)  # now the batch norm statistics are not the initial ones
    (tmp_path / "models").mkdir()
    torch.save(generator.state_dict(), "models/generator.pth")
    exec(re.findall(CODE_BLOCK, saved, flags=re.M)[0], pasted := {"__name__": "pasted"})
    assert pasted["digits"].shape == (64, 1, 28, 28) and not pasted["digits"].requires_grad
    torch.testing.assert_close(pasted["generator"](noise), generator.eval()(noise))


def test_the_readmes_link_to_what_is_there_and_hold_the_same():
    for target in re.findall(r"\]\(([^)]+)\)", "".join(READMES)):
        assert target.startswith(("https://", "#")) or (ROOT / target).exists(), target
    plain = [re.sub(r"(?<=\d)[.,](?=\d)", "", text) for text in READMES]  # 1,000 is 1.000
    patterns = [r"\d+", r"^[#|*]+ ", r"!\[.+\]\((.*)\)", r"`[^`\n]+`"]
    patterns += [r"https?://[^)\s]+", CODE_BLOCK]
    for pattern in patterns:
        first, second = (Counter(re.findall(pattern, text, flags=re.M)) for text in plain)
        assert first == second, pattern
