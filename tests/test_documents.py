"""The notebook as a document: its rules, parameters, data, a whole run of it; the two READMEs."""

import ast
import base64
import gzip
import io
import json
import re
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from conftest import CPU, INJECTED, ROOT, TINY, code_cells, git, parameter_values, run_cell
from PIL import Image

DEFINITION = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
DEFINES = (*DEFINITION, ast.Lambda, ast.Import, ast.ImportFrom)
RUN_MAKES = {f"gan_images/{name}" for name in ("epoch_001.png", "epoch_002.png", "progress.gif")}
RUN_MAKES |= {f"models/{name}.pth" for name in ("generator", "discriminator", "checkpoint")}
RUN_MAKES |= {"models/checkpoint.previous.pth", "models/metrics.json"}
ENGLISH, PORTUGUESE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.pt-BR.md")
)
PICTURES = "gan_images/default_run.gif", "gan_images/default_uses.png"


def syntax(cell):
    return ast.parse(re.sub("^%.*$", "", cell.source, flags=re.M))


def by_id(notebook):
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def data_of(cell, kind):
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def printed_by(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


def section(heading):
    """The text under this heading of README.md."""
    return re.split(r"^## ", ENGLISH.split(f"\n## {heading}\n", 1)[1], flags=re.M)[0]


def code_blocks(text, language=r"\w+"):
    return re.findall(rf"^```{language}\n([\s\S]*?)^```", text, flags=re.M)


def table_rows(text):
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if "|" in line
    ]


def test_definition_cells_only_define_and_the_others_define_nothing(notebook):
    nbformat.validate(notebook)
    for cell in code_cells(notebook, "definitions"):
        for node in syntax(cell).body:
            if isinstance(node, ast.Assign | ast.AugAssign):
                ast.literal_eval(node.value)  # a constant
            else:
                assert isinstance(node, DEFINES), f"{cell.id}, line {node.lineno}, runs something"
        for node in ast.walk(syntax(cell)):
            if isinstance(node, DEFINITION) and node.name != "__init__":
                assert ast.get_docstring(node), f"{node.name} has no docstring"
    for cell in (*code_cells(notebook), *code_cells(notebook, "parameters")):
        for node in ast.walk(syntax(cell)):
            assert not isinstance(node, DEFINES), f"{cell.id}: {ast.unparse(node)}"


def test_no_run_cell_uses_a_name_that_two_others_make(notebook):
    """Or it would show something else when it is run again."""
    makers, users = Counter(), {}
    for cell in code_cells(notebook):
        made, needed = set(), users.setdefault(cell.id, set())
        for statement in syntax(cell).body:
            names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
            here = {node.id for node in names if isinstance(node.ctx, ast.Store)}
            needed |= {node.id for node in names} - made - here
            made |= here
        makers.update(made)
    for user, needed in users.items():
        assert not [name for name in needed if makers[name] > 1], user


def test_every_parameter_can_come_from_the_environment_and_wins(
    gan, notebook, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    texts = ["KMNIST", "3", "7", "50", "1e-4", "77", "600", "0", "~/runs/1"]
    other = dict(zip(TINY, texts, strict=True))
    assert parameter_values(notebook).keys() == other.keys()
    numpy = TINY | {"LEARNING_RATE": np.float64(1e-4), "BATCH_SIZE": np.int64(60_000), "LIMIT": 0}
    read = vars(gan.read_parameters(numpy | {"OTHER": 1, "OUTPUT_DIR": 2026}))
    assert read == numpy | {"OUTPUT_DIR": "2026"} and (tmp_path / "2026/models").is_dir()
    assert all(type(read[name]) is type(TINY[name]) for name in TINY)
    for name, text in other.items():
        monkeypatch.setenv(f"GAN_{name}", text)
    scope = run_cell("parameters-run", vars(gan) | TINY)
    for name, text in (other | {"OUTPUT_DIR": str(tmp_path / "home/runs/1")}).items():
        value = getattr(scope["parameters"], name)
        assert type(value) is type(TINY[name]) and value == type(TINY[name])(text)
    assert (tmp_path / "home/runs/1/gan_images").is_dir()
    assert (scope["seed"], scope["latent_dim"], scope["size"]) == (77, 50, 7)


IMPOSSIBLE = [("EPOCHS", value) for value in (-3, 0, "five", "", 2.5)] + [("DATASET", "CIFAR10")]
IMPOSSIBLE += [("BATCH_SIZE", 1), ("BATCH_SIZE", 101), ("LATENT_DIM", 10), ("SEED", -1)]
IMPOSSIBLE += [("LEARNING_RATE", value) for value in ("fast", 0, float("nan"), 2)]
IMPOSSIBLE += [("LIMIT", value) for value in (31, 99, -1, "all", 60_001)] + [("SEED", 2**32)]
IMPOSSIBLE += [("RESUME", -1), ("RESUME", 2), ("OUTPUT_DIR", "file"), ("OUTPUT_DIR", "x" * 300)]


@pytest.mark.parametrize("from_environment", [False, True])
@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_in_one_line_that_names_it(
    gan, monkeypatch, tmp_path, name, value, from_environment
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    if from_environment:
        monkeypatch.setenv(f"GAN_{name}", str(value))
    with pytest.raises(ValueError) as refusal:
        gan.read_parameters(TINY if from_environment else TINY | {name: value})
    assert name in str(refusal.value) and str(value) in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_misspelt_variable_is_named_with_those_there_are(gan, monkeypatch):
    monkeypatch.setenv("GAN_EPOCH", "1")
    with pytest.raises(ValueError, match="^GAN_EPOCH is no parameter: .* GAN_EPOCHS, "):
        gan.read_parameters(TINY)


@pytest.fixture
def raw(tmp_path, monkeypatch):
    """An empty folder for MNIST's files, in the current folder, and no connection."""
    monkeypatch.delattr("urllib.request.urlopen")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data/MNIST/raw").mkdir(parents=True)
    return tmp_path / "data/MNIST/raw"


def test_the_embedded_digits_are_read_without_a_connection(gan, raw):
    for path in ROOT.glob("data/MNIST/raw/*.gz"):
        shutil.copy(path, raw)
    scope = {"device": CPU, "parameters": SimpleNamespace(**TINY | {"LIMIT": 300})}
    scope = run_cell("data-run", vars(gan) | scope | {"show": lambda *_: None})
    assert len(scope["images"]) == len(scope["labels"]) == 300 and len(scope["held_out"]) == 10_000
    unpacked = raw / "train-images-idx3-ubyte"
    unpacked.write_bytes(unpacked.read_bytes()[:30_000_000] + bytes(17_040_016))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="^MNIST cannot .*data.MNIST.raw: .*train-images"):
            gan.load_digits("MNIST")
        packed = gzip.compress(unpacked.read_bytes(), 1)  # now both files are alike, and wrong
        unpacked.with_suffix(".gz").write_bytes(packed)


DAMAGED = [(".gz", gzip.compress(b"damaged")), ("", b"\0\0\x08\x03cut"), ("", bytes(100))]


@pytest.mark.parametrize(("ending", "content"), [*DAMAGED, ("", b""), (None, b"")])
def test_missing_or_damaged_data_are_named_with_their_place(gan, ending, content, raw):
    for path in ROOT.glob("data/MNIST/raw/*.gz") if ending is not None else ():
        (raw / (path.stem + ending)).write_bytes(content)
    with pytest.raises(RuntimeError, match="^MNIST cannot be read .* in data.MNIST.raw: [^\\n]+$"):
        gan.load_digits("MNIST")


def test_runs_that_start_together_unpack_the_digits_one_after_the_other(gan, raw, monkeypatch):
    """Without that, about one start in five of three runs in a fresh clone failed."""
    busy = threading.Lock()

    def unpack(*_, **__):
        assert busy.acquire(blocking=False), "two unpack at the same time"
        time.sleep(0.05)
        busy.release()

    unpack.resources = ()
    monkeypatch.setattr(gan.torchvision.datasets, "MNIST", unpack)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(gan.load_digits, ["MNIST"] * 3))


def test_a_whole_run_leaves_what_is_promised_and_a_clean_notebook(executed):
    folder, notebook = executed
    made = {path.relative_to(folder / "out").as_posix() for path in folder.glob("out/*/[a-z]*")}
    cells = by_id(notebook)
    assert made == RUN_MAKES
    for name, cell in cells.items():
        assert all(output.get("name") != "stderr" for output in cell.outputs)
        assert bool(data_of(cell, "image/png")) == ("alt" in cell.metadata), name
        assert not data_of(cell, "application/vnd.jupyter.widget-view+json")
    assert printed_by(cells["train-run"]).startswith("Epoch 2 of 2, ")
    assert printed_by(cells["train-run"]).count("\n") == 1
    assert "Equal to the last bit: True\n" in printed_by(cells["proof-run"])
    assert "generator_loss was " in printed_by(cells["proof-run"])
    answers = printed_by(cells["answers-run"]).split()
    assert answers.count("fake") == answers.count("real") == 8


def test_the_terminal_shows_each_epoch_and_what_was_saved_and_no_warning(executed):
    lines = (executed[0] / "terminal.txt").read_text().splitlines()
    epochs = [line for line in lines if re.match(r"Epoch \d of 2, [\d.]+ s: distance [\d.]+", line)]
    assert [line[:7] for line in epochs] == ["Epoch 1", "Epoch 2"]
    assert any(line.startswith("Saved: ") for line in lines)
    assert not [line for line in lines if re.search("warn|error|debugger", line, re.IGNORECASE)]
    assert max(map(len, lines)) < 200, "an output that is for the notebook only"


def test_the_metrics_that_a_run_saves_are_those_it_shows(executed):
    folder, notebook = executed
    cells, metrics = by_id(notebook), json.loads((folder / "out/models/metrics.json").read_text())
    assert metrics["parameters"] == INJECTED
    both = metrics["scores"] | metrics["second_scores"]
    heads, _, *rows = table_rows(*data_of(cells["scores-run"], "text/markdown"))
    assert heads[1:] == [*both] and heads[1:3] == ["real digits", "generator"]
    for score, *shown in rows:
        assert shown == [f"{scores[score]:.3f}" for scores in both.values()], score
    assert both["generator"] != both["generator, second"], "the second classifier is the first"
    printed = printed_by(cells["fresh-run"]) + printed_by(cells["nearest-run"])
    for key in ("fresh_discriminator_accuracy", "nearest_is_training"):
        assert f" {metrics[key]:.1%}" in printed


def test_the_committed_notebook_is_one_clean_run_of_its_defaults(committed):
    cells, values = by_id(committed), parameter_values(committed)
    counts = [cell.execution_count for cell in cells.values()]
    assert counts == list(range(1, len(cells) + 1))
    for name, cell in cells.items():
        assert "execution" not in cell.metadata, "timing metadata"
        assert bool(data_of(cell, "image/png")) == ("alt" in cell.metadata), name
        assert not [out for out in cell.outputs if "stderr" in (out.get("name"), out.output_type)]
        text = printed_by(cell) + "".join(data_of(cell, "text/plain"))
        assert not re.search(r"(^|[\s'\"(])(/\w+/|[A-Z]:\\)", text), "an absolute path"
    shown = printed_by(cells["parameters-run"])
    assert all(f"{name!r}: {value!r}" in shown for name, value in values.items()), (
        "not the defaults"
    )
    assert f"Epoch {values['EPOCHS']} of {values['EPOCHS']}" in printed_by(cells["train-run"])
    assert len(nbformat.writes(committed)) < 2_500_000


def test_the_pictures_shown_are_of_the_committed_run(committed):
    assert all(f"]({path})" in text for path in PICTURES for text in (ENGLISH, PORTUGUESE))
    assert f"]({PICTURES[0]})" in committed.cells[0].source
    film, uses = (
        base64.b64decode(data_of(by_id(committed)[name], "image/png")[0])
        for name in ("film-run", "uses-run")
    )
    film_of_readme, uses_of_readme = (git("show", f"HEAD:{path}") for path in PICTURES)
    assert uses_of_readme == uses
    shown, gif = (Image.open(io.BytesIO(data)) for data in (film, film_of_readme))
    assert gif.format == "GIF" and gif.n_frames == parameter_values(committed)["EPOCHS"]
    gif.seek(gif.n_frames - 1)
    last = np.asarray(gif.convert("L"), int)[: shown.height]
    assert np.abs(last - np.asarray(shown.convert("L"), int)).mean() < 2


def test_git_keeps_the_pictures_shown_and_ignores_whatever_a_run_makes():
    tracked = git("ls-tree", "-r", "--name-only", "HEAD", "gan_images", "models").decode().split()
    assert set(tracked) - {"models/.gitkeep"} == set(PICTURES)
    made = [*RUN_MAKES, "gan_images/epoch_028.png", "gan.nbconvert.ipynb", "runs/1/models/x"]
    made += ["models/checkpoint.damaged", "models/.lock", "data/MNIST.lock"]
    assert set(git("check-ignore", "--no-index", *made).decode().split()) == set(made)
    assert not git("check-ignore", "--no-index", *PICTURES)
    listed = re.findall(r"`((?:gan_images|models)/[\w.]+)`", section("What a run saves"))
    assert RUN_MAKES - set(listed) <= {"gan_images/epoch_002.png"}, "not listed in the README"


def test_the_results_are_those_of_the_committed_notebook(committed):
    cells = by_id(committed)
    shown, rows = (
        table_rows(text)
        for text in (section("Results"), *data_of(cells["scores-run"], "text/markdown"))
    )
    assert len(shown) == 6 and all(row in [each[:3] for each in rows] for row in shown[2:])
    said = re.findall(r"(\d+) epochs, the last in ([\d.]+) s\b", section("Results"))
    printed = printed_by(cells["train-run"])
    assert said == re.findall(r"^Epoch (\d+) of \d+, ([\d.]+) s: ", printed, flags=re.M)


def test_the_generator_can_be_used_as_the_readme_says(gan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "gan.ipynb", tmp_path)
    generator, noise = gan.Generator(), torch.randn(64, 42)
    generator(noise)  # now the batch norm statistics are not the initial ones
    (tmp_path / "models").mkdir()
    torch.save(generator.state_dict(), "models/generator.pth")
    exec(code_blocks(section("What a run saves"))[0], pasted := {"__name__": "pasted"})
    assert pasted["digits"].shape == (64, 1, 28, 28) and not pasted["digits"].requires_grad
    torch.testing.assert_close(pasted["generator"](noise), generator.eval()(noise))


def test_every_picture_and_page_of_this_repository_that_is_linked_is_there():
    for target in re.findall(r"\]\(([^)]+)\)", ENGLISH + PORTUGUESE):
        assert target.startswith(("https://", "#")) or (ROOT / target).exists(), target


def test_the_two_languages_hold_the_same():
    first, second = (re.sub(r"(?<=\d)[.,](?=\d)", "", text) for text in (ENGLISH, PORTUGUESE))
    assert Counter(re.findall(r"\d+", first)) == Counter(re.findall(r"\d+", second))
    assert code_blocks(ENGLISH) == code_blocks(PORTUGUESE)
    for pattern in r"^#+ ", r"!\[.+\]\((.*)\)", r"`[^`\n]+`", r"https?://[^)\s]+", r"^\|", r"^\* ":
        counts = [Counter(re.findall(pattern, text, flags=re.M)) for text in (ENGLISH, PORTUGUESE)]
        assert counts[0] == counts[1], pattern
