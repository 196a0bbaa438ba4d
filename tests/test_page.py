"""gan_images/play.html in a browser: it draws what the generator draws, and does as it is told."""

import html
import json
import re
import shutil

import pytest
import torch
from conftest import BROWSER, ROOT, browse, gan, load_definitions, new_game, run_cell

pytestmark = pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome")
PAGE = (ROOT / "gan_images/play.html").read_text(encoding="utf-8")
LISTEN = "<script>const errors = []; onerror = text => { errors.push(text); };</script>"
ASK = """<script>const settled = setInterval(() => {
  if (!generator && find("problem").hidden) return;
  clearInterval(settled);
  const told = {};
  SCRIPT
  document.body.textContent = JSON.stringify({...told, errors});
}, 10);</script>"""


@pytest.fixture
def game():
    gan.train_epoch(game := new_game(gan, 5e-3), torch.rand(640, 1, 28, 28), 32, seed=0, epoch=1)
    return game


def write_generator(folder, game, definitions=gan):
    """Execute page-run, which writes gan_images/generator.js in folder; return gan_images."""
    scope = {"gan": game, "folder": folder, "latent_dim": 12, "game": "a71ba895", "own": 0.541}
    scope |= {"parameters": gan.SimpleNamespace(DATASET="MNIST"), "history": [1, 2], "fresh": 0.589}
    scope |= {"choices": torch.eye(10), "new_noise": torch.randn(200, 12)}
    scope["shares"] = torch.eye(10).roll(1, 1) * 0.7 + 0.03  # the first choice is mostly a 1
    scope["held_out"] = torch.rand(1000, 1, 28, 28) * 2 - 1
    scope["evaluator"] = gan.SimpleNamespace(read=lambda x: (None, torch.rand(len(x), 10)))
    (folder / "gan_images").mkdir(exist_ok=True)
    run_cell("page-run", vars(definitions) | scope)
    return folder / "gan_images"


def ask(folder, script, page=PAGE):
    """Open page in folder, run script there, and return what it put into told, and all errors."""
    (folder / "test.html").write_text(LISTEN + page + ASK.replace("SCRIPT", script), "utf-8")
    printed = browse(folder / "test.html", "--dump-dom")
    return json.loads(html.unescape(re.search("<body.*?>(.*)</body>", printed, re.S)[1]))


def test_the_page_draws_what_the_generator_draws(game, tmp_path):
    folder, noise = write_generator(tmp_path, game), torch.randn(20, 12)
    choices, hands = noise[:, :10].argmax(1).tolist(), noise[:, 10:].tolist()
    draw = f"told.images = {choices}.map((choice, k) => [...generate(choice, {hands}[k])]);"

    def error(page=PAGE):
        drawn = torch.tensor(ask(folder, draw, page)["images"])
        return (drawn - gan.sample(game.averaged, noise).flatten(1)).abs().mean()

    assert 0 < error() < 0.004, "more than by rounding"
    assert error(PAGE.replace("slope * sum", "0.1 * sum")) > 0.01
    wrong = load_definitions(("page", "map(fuse_linear_bn_eval, ", "map(lambda x, _: x, "))
    write_generator(tmp_path, game, wrong)
    assert error() > 0.01, "without batch norm"
    game.averaged.module = torch.nn.Linear(12, 784)
    assert not (write_generator(tmp_path, game) / "generator.js").exists(), "of another kind"


def test_drawing_writing_and_the_quiz_do_as_they_are_told(game, tmp_path):
    script = """
    const pixels = canvas => canvas.getContext("2d").getImageData(0, 0, 28, 28).data.join();
    const square = find("square"), corner = square.getBoundingClientRect();
    square.setPointerCapture = () => { square.hasPointerCapture = () => true; };
    told.steps = [];
    for (const act of [() => {}, () => find("choices").children[3].click(),
        () => square.dispatchEvent(new PointerEvent("pointerdown",
          {clientX: corner.x + 231, clientY: corner.y + 154, isPrimary: true})),
        () => square.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"})),
        () => find("another").click()]) {
      act();
      told.steps.push([pixels(find("large")), place.join()]);
    }
    told.reading = find("reading").textContent;
    find("number").value = "4x4";
    find("number").oninput();
    told.written = [...find("written").children].map(pixels);
    const answer = press => {
      const digits = [...find("quiz").children];
      const fakes = digits.filter(digit => digit.dataset.is === "fake");
      digits.filter(press).forEach(digit => digit.click());
      find("check").click();
      return `${fakes.length} are fake. ${find("score").textContent}`;
    };
    told.all = answer(digit => digit.dataset.is === "fake");
    find("others").click();
    told.none = answer(() => false);"""
    told = ask(write_generator(tmp_path, game), script)
    images, places = zip(*told["steps"], strict=True)
    assert told["errors"] == [] and len(set(images)) == 5
    assert places == ("0,0", "0,0", "1,0", "0.9,0", "0,0")
    assert "73% of the images of this choice as 4" in told["reading"]
    assert told["written"] == [images[-1]] * 2
    assert re.match("8 .* You: 16 of 16 right .*, 100% of all 16 .* 54%.* 59%", told["all"])
    assert re.match("8 .* You: 8 of 16 right .*, 75% of all 32 ", told["none"])


def test_a_missing_or_damaged_file_is_named(game, tmp_path):
    folder, script = write_generator(tmp_path, game), "told.text = find('problem').textContent;"
    shutil.copy(folder / "generator.js", folder / "default_generator.js")
    whole = (folder / "generator.js").read_text()
    for damaged in whole[:50_000], whole.replace('"layers": [{', '"layers": [{"x": 0}, {'):
        (folder / "generator.js").write_text(damaged)
        assert ask(folder, script)["text"].startswith("generator.js is damaged: run")
    (folder / "generator.js").unlink()
    assert ask(folder, script)["text"] == ""
    (folder / "default_generator.js").unlink()
    assert ask(folder, script)["text"].startswith("generator.js is missing and default_gen")
