"""The two READMEs: what they promise, their code, their likeness."""

import json
import re
from collections import Counter

import torch
from conftest import ROOT, parameter_lines, parameter_values
from PIL import Image, ImageChops

ENGLISH, PORTUGUESE = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.pt-BR.md")
)


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


def test_the_readme_and_the_notebook_explain_the_same_parameters(notebook):
    names = [name for name, _ in parameter_lines(notebook)]
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for text in (section("Parameters"), prose):
        assert re.findall(r"^\| `([A-Z_]+)` \|", text, flags=re.M) == names


def test_the_readme_gives_the_committed_defaults(gan, committed):
    values = parameter_values(gan, committed)
    table = section("Parameters")
    rows = re.findall(r"^\| `([A-Z_]+)` \| `?([^`|]+?)`? \|", table, flags=re.M)
    assert [name for name, _ in rows] == [name for name, _ in parameter_lines(committed)]
    for name, default in rows:
        assert type(values[name])(default) == values[name], name


def test_the_pictures_shown_are_of_the_last_epoch(gan, committed):
    epochs = parameter_values(gan, committed)["EPOCHS"]
    for text in (section("Results"), committed.cells[0].source):
        (shown,) = re.findall(r"gan_images/epoch_\d+\.png", text)
        assert shown == f"gan_images/epoch_{epochs:03d}.png"
    with Image.open(ROOT / shown) as last, Image.open(ROOT / "gan_images/progress.gif") as film:
        film.seek(film.n_frames - 1)
        difference = ImageChops.difference(film.convert("L"), last.convert("L"))
        assert film.format == "GIF" and difference.getextrema()[1] <= 2


def test_the_results_are_those_of_the_committed_notebook(committed):
    outputs = [output for cell in committed.cells for output in cell.get("outputs", [])]
    tables = [
        output.data["text/markdown"]
        for output in outputs
        if "text/markdown" in output.get("data", {})
    ]
    first = re.search(r"(^\|.*\n)+", section("Results"), flags=re.M)[0].splitlines()
    assert first == [line for line in tables[0].splitlines() if "share of" not in line]
    lines = [output.get("data", {}).get("text/plain", "") for output in outputs]
    (last,) = (line for line in lines if line.startswith("Epoch "))
    epochs, seconds = re.match(r"Epoch (\d+) of \d+: ([\d.]+) s an epoch", last).groups()
    assert f"The training took {epochs} epochs of {seconds} s " in section("Results")


def test_the_generator_can_be_used_as_the_readme_says(gan, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = gan.Generator()
    generator(torch.randn(64, 100))  # now the batch norm statistics are not the initial ones
    (tmp_path / "models").mkdir()
    torch.save(generator.state_dict(), "models/generator.pth")
    pasted, points = {}, torch.randn(64, 100)
    exec(code_blocks(section("Use the generator in your own code"))[0], pasted)
    digits, expected = pasted["generator"](points), generator.eval()(points)
    torch.testing.assert_close(digits.view(64, 28, 28), expected.squeeze(1))
    assert pasted["digits"].shape == (64, 28, 28) and not pasted["digits"].requires_grad


def test_the_scores_of_many_runs_are_listed_as_the_readme_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        models = tmp_path / "runs" / f"seed_{seed}" / "models"
        models.mkdir(parents=True)
        scores = {"frechet_distance": seed / 8, "coverage": 0.98765}
        run = {"scores": {"trained generator": scores}}
        (models / "metrics.json").write_text(json.dumps(run))
    exec(code_blocks(section("Many runs"), "python")[0], {})
    assert capsys.readouterr().out == "seed_1 0.125 0.988\nseed_2 0.25 0.988\n"


def test_every_picture_and_page_of_this_repository_that_is_linked_is_there():
    for text in (ENGLISH, PORTUGUESE):
        for target in re.findall(r"\]\(([^)]+)\)", text):
            assert target.startswith("https://") or (ROOT / target).exists(), target
        assert "![]" not in text, "a picture without alternative text"


def test_the_two_languages_hold_the_same():
    def figures(text):
        return Counter(re.findall(r"\d+(?:[.,]\d+)*", text))

    results = PORTUGUESE.split("\n## ")[1].translate(str.maketrans(",.", ".,"))
    assert figures(section("Results")) == figures(results)
    without_marks = [re.sub(r"(?<=\d)[.,](?=\d)", "", text) for text in (ENGLISH, PORTUGUESE)]
    assert figures(without_marks[0]) == figures(without_marks[1])
    assert code_blocks(ENGLISH) == code_blocks(PORTUGUESE)
    for pattern in (
        r"^#+ ",
        r"!\[.*\]\((.*)\)",
        r"`[^`\n]+`",
        r"https?://[^)\s]+",
        r"^\|",
        r"^\* ",
    ):
        counts = [Counter(re.findall(pattern, text, flags=re.M)) for text in (ENGLISH, PORTUGUESE)]
        assert counts[0] == counts[1], pattern
