"""The two READMEs: what they promise, their code, their likeness."""

import base64
import io
import json
import re
import shutil
from collections import Counter

import numpy as np
import torch
from conftest import ROOT, committed_bytes, git, parameter_values
from PIL import Image
from test_notebook import RUN_MAKES, data_of

ENGLISH, PORTUGUESE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.pt-BR.md")
)
PICTURES = "gan_images/default_run.gif", "gan_images/default_uses.png"


def section(heading):
    """The text under this heading of README.md."""
    return re.split(r"^## ", ENGLISH.split(f"\n## {heading}\n", 1)[1], flags=re.M)[0]


def code_blocks(text, language=r"\w+"):
    return re.findall(rf"^```{language}\n([\s\S]*?)^```", text, flags=re.M)


def test_there_is_one_line_each_to_run_and_to_test():
    for heading, ending in (("Run", " gan.ipynb"), ("Test", " -m pytest")):
        (command,) = code_blocks(section(heading))
        assert command.count("\n") == 1 and command.strip().endswith(ending)
        assert "-r requirements.txt" in command


def test_the_pictures_shown_are_of_the_committed_run(committed):
    assert all(f"]({path})" in text for path in PICTURES for text in (ENGLISH, PORTUGUESE))
    assert f"]({PICTURES[0]})" in committed.cells[0].source
    cells = {cell.id: cell for cell in committed.cells}
    film, uses = (
        base64.b64decode(data_of(cells[name].outputs, "image/png")[0])
        for name in ("film-run", "uses-run")
    )
    assert committed_bytes(PICTURES[1]) == uses
    shown, gif = (Image.open(io.BytesIO(data)) for data in (film, committed_bytes(PICTURES[0])))
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
    cells = {cell.id: cell for cell in committed.cells}
    (table,) = data_of(cells["scores-run"].outputs, "text/markdown")
    shown, rows = (
        [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if "|" in line]
        for text in (section("Results"), table)
    )
    assert len(shown) == 6 and all(row[:-1] in [each[:4] for each in rows] for row in shown[2:])
    printed = "".join(output.get("text", "") for output in cells["train-run"].outputs)
    said = re.findall(r"(\d+) epochs, the last in ([\d.]+) s\b", section("Results"))
    assert said == re.findall(r"^Epoch (\d+) of \d+, ([\d.]+) s: ", printed, flags=re.M)


def test_the_generator_can_be_used_as_the_readme_says(gan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "gan.ipynb", tmp_path)
    generator = gan.Generator()
    generator(torch.randn(64, 42))  # now the batch norm statistics are not the initial ones
    (tmp_path / "models").mkdir()
    torch.save(generator.state_dict(), "models/generator.pth")
    torch.manual_seed(0)
    exec(code_blocks(section("What a run saves"))[0], pasted := {"__name__": "pasted"})
    assert pasted["digits"].shape == (64, 1, 28, 28) and not pasted["digits"].requires_grad
    noise = torch.randn(64, 42)
    torch.testing.assert_close(pasted["generator"](noise), generator.eval()(noise))


def test_the_scores_of_many_runs_are_listed(executed, tmp_path, monkeypatch, capsys):
    saved = executed[0] / "out/models/metrics.json"
    for seed in (1, 2):
        models = tmp_path / "runs" / f"seed_{seed}" / "models"
        models.mkdir(parents=True)
        shutil.copy(saved, models)
    scores = json.loads(saved.read_text())["scores"]["generator"]
    expected = " ".join(str(round(scores[name], 3)) for name in ("Fréchet distance", "coverage"))
    monkeypatch.chdir(tmp_path)
    exec(code_blocks(section("Many runs"), "python")[0], {})
    assert capsys.readouterr().out == f"seed_1 {expected}\nseed_2 {expected}\n"


def test_every_picture_and_page_of_this_repository_that_is_linked_is_there():
    for text in (ENGLISH, PORTUGUESE):
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert target.startswith(("https://", "#")) or (ROOT / target).exists(), target
        assert "![]" not in text, "a picture without alternative text"


def test_the_two_languages_hold_the_same():
    first, second = (re.sub(r"(?<=\d)[.,](?=\d)", "", text) for text in (ENGLISH, PORTUGUESE))
    assert Counter(re.findall(r"\d+", first)) == Counter(re.findall(r"\d+", second))
    assert code_blocks(ENGLISH) == code_blocks(PORTUGUESE)
    for pattern in r"^#+ ", r"!\[.*\]\((.*)\)", r"`[^`\n]+`", r"https?://[^)\s]+", r"^\|", r"^\* ":
        counts = [Counter(re.findall(pattern, text, flags=re.M)) for text in (ENGLISH, PORTUGUESE)]
        assert counts[0] == counts[1], pattern
