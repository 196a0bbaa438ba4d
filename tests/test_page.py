"""gan_images/play.html in a browser: it draws what the generator draws, and does as it is told."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch
from conftest import CPU, ROOT, gan, load_definitions, new_game, run_cell

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome")
PAGE = (ROOT / "gan_images/play.html").read_text(encoding="utf-8")
READS = torch.eye(10).roll(1, 1) * 0.7 + 0.03  # the first choice is mostly read as a 1
LISTEN = """<script>const errors = [];
addEventListener("error", event => errors.push(event.message ?? event.target.src), true);
addEventListener("unhandledrejection", event => errors.push(String(event.reason)));</script>"""
ASK = """<script>const settled = setInterval(() => {
  if (!generator && find("problem").hidden) return;
  clearInterval(settled);
  const told = {};
  SCRIPT
  document.body.textContent = JSON.stringify({...told, errors});
}, 10);</script>"""


@pytest.fixture(scope="module")
def game():
    game = new_game(gan, 5e-3)
    gan.train_epoch(game, torch.rand(640, 1, 28, 28), 32, seed=0, epoch=1)
    return game


def write_generator(folder, game, definitions=gan):
    """Execute page-run, which writes generator.js in folder."""
    scope = vars(definitions) | {
        "gan": game,
        "folder": folder,
        "latent_dim": 12,
        "game": "a71ba895",
    }
    scope |= {"parameters": gan.SimpleNamespace(DATASET="MNIST"), "history": [1, 2], "device": CPU}
    scope |= {"choices": torch.eye(10), "shares": READS, "own": 0.541, "fresh": 0.589}
    (folder / "gan_images").mkdir(exist_ok=True)
    run_cell("page-run", scope | {"held_out": torch.rand(300, 1, 28, 28) * 2 - 1})
    return folder / "gan_images"


def ask(folder, script, page=PAGE):
    """Open page in folder, run script there, and return what it put into told, and all errors."""
    (folder / "test.html").write_text(LISTEN + page + ASK.replace("SCRIPT", script), "utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += ["--virtual-time-budget=20000", f"--user-data-dir={folder / 'profile'}"]
    command.append((folder / "test.html").as_uri())
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return json.loads(html.unescape(re.search("<body.*?>(.*)</body>", done.stdout, re.S)[1]))


def test_the_page_draws_what_the_generator_draws(game, tmp_path):
    folder, noise = write_generator(tmp_path, game), torch.randn(20, 12)
    choices, hands = noise[:, :10].argmax(1).tolist(), noise[:, 10:].tolist()
    expected = gan.sample(game.averaged, noise).flatten(1)

    def error(page=PAGE):
        script = "told.images = CHOICES.map((choice, k) => [...generate(choice, HANDS[k])]);"
        script = script.replace("CHOICES", str(choices)).replace("HANDS", str(hands))
        told = ask(folder, script, page)
        assert told["errors"] == []
        return (torch.tensor(told["images"]) - expected).abs().mean()

    assert 0 < error() < 0.004
    assert error(PAGE.replace("generator.slope * sum", "0.1 * sum")) > 0.01
    wrong = load_definitions(("page", "fuse_linear_bn_eval, hidden", "lambda x, y: x, hidden"))
    write_generator(tmp_path, game, wrong)
    assert error() > 0.01


def test_drawing_writing_and_the_quiz_do_as_they_are_told(game, tmp_path):
    script = """
    const pixels = canvas => canvas.getContext("2d").getImageData(0, 0, 28, 28).data.join();
    const large = () => pixels(find("large")), pen = name => told[name] = large();
    const pointer = (kind, x, y) => find("square").dispatchEvent(new PointerEvent(kind,
      {clientX: find("square").getBoundingClientRect().x + x,
       clientY: find("square").getBoundingClientRect().y + y, buttons: 1, pointerId: 1}));
    find("square").setPointerCapture = () => {};
    pen("first");
    find("choices").children[3].click();
    pen("chosen");
    told.reading = find("reading").textContent;
    pointer("pointermove", 231, 154);
    pen("dragged");
    told.place = place.join();
    find("square").dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowLeft"}));
    pen("stepped");
    find("another").click();
    pen("another");
    find("number").value = "4x4";
    find("number").oninput();
    told.written = [...find("written").children].map(pixels);
    told.unsure = find("unsure").textContent;
    const answer = press => {
      const digits = [...find("quiz").children];
      digits.filter(press).forEach(digit => digit.click());
      find("check").click();
      const fakes = digits.filter(digit => digit.dataset.is === "fake");
      return [fakes.length, find("score").textContent];
    };
    told.all = answer(digit => digit.dataset.is === "fake");
    find("others").click();
    told.none = answer(() => false);"""
    told = ask(write_generator(tmp_path, game), script)
    assert told["errors"] == []
    steps = [told[name] for name in ("first", "chosen", "dragged", "stepped", "another")]
    assert len(set(steps)) == 5, "nothing has changed"
    assert told["place"] == "1,0" and "73 % of the images of this choice as a 4" in told["reading"]
    assert told["written"] == [told["another"]] * 2 and "4 (73 %)" in told["unsure"]
    assert told["all"][0] == told["none"][0] == 8
    assert re.match("You: 16 of 16 right, 100 % of all 16 so far.* 54 %.* 59 %", told["all"][1])
    assert re.match("You: 8 of 16 right, 75 % of all 32 so far", told["none"][1])


def test_a_missing_or_damaged_file_is_named(game, tmp_path):
    folder, script = write_generator(tmp_path, game), "told.text = find('problem').textContent;"
    shutil.copy(folder / "generator.js", folder / "default_generator.js")
    whole = (folder / "generator.js").read_text()
    for damaged in whole[:50_000], whole.replace('"layers": [{', '"layers": [{"x": 0}, {'):
        (folder / "generator.js").write_text(damaged)
        assert ask(folder, script)["text"].startswith("generator.js is damaged: run")
    (folder / "generator.js").unlink()
    assert ask(folder, script + "told.name = find('source').textContent;")["text"] == ""
    (folder / "default_generator.js").unlink()
    missing = "generator.js is missing and default_generator.js is missing"
    assert ask(folder, script)["text"].startswith(missing)


def test_a_generator_of_another_kind_is_left_out(game, tmp_path):
    folder = write_generator(tmp_path, game)
    other = gan.SimpleNamespace(averaged=gan.SimpleNamespace(module=torch.nn.Linear(12, 784)))
    write_generator(tmp_path, other)
    assert not (folder / "generator.js").exists()
