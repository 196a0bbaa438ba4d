"""The scores: against their definitions, and against the cheats that they must catch."""

import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import (
    CPU,
    ROOT,
    TINY,
    new_game,
    random_images,
    run_cell,
)


@pytest.fixture(scope="module")
def data(gan):
    """What the cell data-run leaves."""
    scope = {
        "device": CPU,
        "parameters": SimpleNamespace(**TINY | {"LIMIT": 0}),
        "show": lambda *_: None,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return run_cell("data-run", vars(gan) | scope)


@pytest.fixture(scope="module")
def digits(data):
    return data["held_out"]


@pytest.fixture(scope="module")
def classifier(gan, data):
    return gan.train_classifier(data["images"][:8000], data["labels"][:8000], 0, epochs=2)


@pytest.fixture
def drawn(gan, monkeypatch):
    """The lists of images that a cell draws."""
    drawn = []
    monkeypatch.setattr(gan, "grid", lambda images, *_, **__: drawn.append(images))
    monkeypatch.setattr(gan, "show", lambda *_: None)
    return drawn


class Perfect(torch.nn.Module):
    """A generator whose images are real ones."""

    def __init__(self, images):
        super().__init__()
        self.images, self.weight = images, torch.nn.Parameter(torch.zeros(1))

    def forward(self, noise):
        return self.images[(noise[:, 0].abs() * 1e5).long() % len(self.images)]


def test_the_classifier_learns_to_read_the_whole_of_mnist(classifier, data, digits):
    assert len(data["images"]) == 60_000 and len(digits) == 10_000
    assert data["images"].unique().tolist() == pytest.approx(
        (torch.arange(256) / 127.5 - 1).tolist()
    )
    with torch.no_grad():
        assert (classifier(digits).argmax(1) == data["test"].targets).float().mean() > 0.96
        assert classifier[:-1](digits[:5]).shape == (5, 64) and not classifier.training


def test_the_distance_is_that_of_the_definition(gan):
    """By NumPy: the root of a product of covariances by two eigendecompositions."""
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(2000, 4, generator=rng)
    fake = real[:900] @ torch.rand(4, 4, generator=rng) + torch.tensor([1, 0, -2, 0.5])
    first, second = np.cov(real.double().T), np.cov(fake.double().T)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root)).sum()
    means = ((real.double().mean(0) - fake.double().mean(0)) ** 2).sum().item()
    expected = means + np.trace(first) + np.trace(second) - 2 * cross
    assert gan.frechet_distance(real, fake) == pytest.approx(expected, rel=1e-9)
    assert gan.frechet_distance(real, real) == pytest.approx(0, abs=1e-9)


def test_neighbourhoods_of_hand_made_points(gan):
    """On a line, k = 1: the real points 0, 1, 3, 10 reach 1, 1, 2, 7 far."""
    real = torch.tensor([[0.0], [1], [3], [10]])
    fake = torch.tensor([[0.5], [4.5], [28.5]])
    # 0.5 is near 0 and 1, 4.5 near 3 and 10, 28.5 near none; and each real point has one
    scores = gan.neighbourhood_scores(real, fake, k=1)
    assert scores == pytest.approx({"precision": 2 / 3, "coverage": 1})
    scores = gan.neighbourhood_scores(real, fake[1:] + 20, k=1)  # 24.5, 48.5
    assert scores == {"precision": 0, "coverage": 0}
    real, fake = (torch.nn.functional.pad(points, (0, 1)) for points in (real, fake[:1]))
    assert gan.neighbourhood_scores(real, fake, k=1) == {"precision": 1, "coverage": 0.5}
    gan.draw_circles(axis := plt.subplots()[1], real, fake, k=1)
    circles = [(*c.center, c.radius, c.get_fill()) for c in axis.patches]
    assert circles == [(0, 0, 1, 1), (1, 0, 1, 1), (3, 0, 2, 0), (10, 0, 7, 0)]
    assert axis.get_title() == "precision 1.00, coverage 0.50"
    assert axis.lines[0].get_xdata().tolist() == [0, 1, 3, 10], "the real ones first"
    assert axis.lines[1].get_xdata().tolist() == [0.5]


def test_the_scores_and_the_wheel_of_known_classes(gan, monkeypatch):
    """Features are one-hot and the last layer is the identity: each image names its class."""
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(10, 10, bias=False))
    torch.nn.init.eye_(classifier[-1].weight)
    names = torch.eye(10).view(10, 1, 1, 10)
    evaluator = gan.Evaluator(classifier, names.repeat(20, 1, 1, 1))
    scores = evaluator.score(names[[3, 3, 3, 3, 3, 3, 7, 7]])
    assert scores["class deviation"] == pytest.approx(0.65)
    assert scores["confident"] == 0  # e / (e + 9) is 0.23
    assert evaluator.score(3.6 * names)["confident"] == 0  # 0.80
    assert evaluator.score(4.5 * names)["confident"] == 1  # 0.91
    compared = []
    monkeypatch.setattr(gan, "neighbourhood_scores", lambda *both: compared.extend(both) or {})
    evaluator.score(names.repeat(600, 1, 1, 1))
    assert torch.equal(compared[0], evaluator.real[::2]), "the first writers are the neater ones"
    assert len(compared[1]) == 5000
    gan.draw_wheels(evaluator, {"real digits": 30 * names, "untrained": 0 * names})
    real, fake = plt.gcf().axes
    for text, x, y in zip(real.texts, *real.lines[0].get_data(), strict=True):
        assert np.dot(text.get_position(), (x, y)) == pytest.approx(1.15, rel=1e-3), "wrong digit"
    assert [text.get_text() for text in real.texts] == list("0123456789")
    assert np.abs(fake.lines[0].get_data()).max() < 1e-6, "the unclear ones are in the middle"
    assert real.lines[0].get_color() != fake.lines[0].get_color() == fake.title.get_color()


def test_a_generator_that_copies_is_caught(gan, data, capsys, drawn):
    images, held_out, unseen = data["images"][:7000].split([3000, 3000, 1000])

    def nearest_is_training(fake):
        names = {"images": images, "held_out": held_out, "fake": fake}
        scope = run_cell("nearest-run", vars(gan) | names)
        printed = re.findall(r"[\d.]+%", capsys.readouterr().out)
        assert (printed[0], printed[-1]) == (f"{scope['is_training']:.1%}", "50.0%")
        return scope["is_training"]

    assert 0.4 < nearest_is_training(unseen) < 0.6
    assert nearest_is_training(images[:500] + 0.1 * torch.randn(500, 1, 28, 28)) > 0.99
    assert torch.equal(drawn[-1][10:], images[:10]), "not beside the nearest"


def test_a_fresh_discriminator_can_only_guess_at_equilibrium(gan, data):
    """A game whose fakes are real digits; and one whose generator has not learned anything."""
    images = data["images"][:4000]
    perfect, untrained = new_game(gan), new_game(gan)
    perfect.averaged = Perfect(images)

    def accuracy(game):
        rng = torch.Generator().manual_seed(0)
        fresh = gan.fresh_discriminator(game, images, rng)
        return gan.accuracy(fresh, images[:1000], gan.sample(game.averaged, game.noise(1000, rng)))

    assert 0.4 < accuracy(perfect) < 0.6
    assert accuracy(untrained) > 0.95


def test_what_is_looked_for_is_found_where_it_can_be(gan):
    """Images of the generator's own, of which only the upper half is seen."""
    game = new_game(gan, 5e-3)
    hidden = gan.sample(game.averaged, game.noise(3, torch.Generator().manual_seed(3)))
    noise = gan.find(game.averaged, gan.upper_half(hidden), gan.upper_half, 12, steps=80)
    images = gan.sample(game.averaged, noise)
    error = (gan.upper_half(images) - gan.upper_half(hidden)).square().mean()
    others = gan.sample(game.averaged, game.noise(300, torch.Generator()))
    assert error < 0.3 * (others[:, None, :, :14] - hidden[:, :, :14]).square().mean()
    assert (gan.upper_half(hidden)[:, :, 14:] == -1).all()
    assert torch.equal(gan.upper_half(hidden)[:, :, :14], hidden[:, :, :14])


def test_the_hand_of_a_digit_writes_all_ten_choices(gan, drawn, monkeypatch):
    game, hands = new_game(gan), torch.randn(6, 12)
    monkeypatch.setattr(gan, "find", lambda *_: hands)
    scope = {"gan": game, "held_out": random_images(9), "latent_dim": 12, "device": CPU}
    run_cell("style-run", vars(gan) | scope)
    rows = drawn[0].view(6, 11, 1, 28, 28)
    assert torch.equal(rows[:, 0], random_images(9)[:6])
    choices = torch.cat([torch.eye(10), hands[4, 10:].expand(10, 2)], 1)
    torch.testing.assert_close(rows[4, 1:], gan.sample(game.averaged, choices))


def test_what_is_written_is_read_as_asked(gan, classifier, digits, drawn):
    game, text = new_game(gan), "20265519"
    game.averaged = Perfect(digits)
    gan.write(text, game, classifier, torch.Generator())
    with torch.no_grad():
        assert classifier(drawn[0]).argmax(1).tolist() == [int(digit) for digit in text]
    assert not torch.equal(drawn[0][0], drawn[0][2]), "twice the same 2"
    for wrong in ("", "two", "2 0", "-1", "٣"):
        with pytest.raises(ValueError, match="^text = '.*': choose .* digits 0 to 9$"):
            gan.write(wrong, game, classifier, torch.Generator())


def test_the_extremes_are_the_surest_and_the_least_sure_of_each_class(gan, drawn):
    sure, read_as = torch.rand(1000), torch.arange(1000) % 10
    read_as[read_as == 9] = 8  # no nines
    probabilities = torch.zeros(1000, 10)
    probabilities[range(1000), read_as] = sure
    evaluator = SimpleNamespace(read=lambda _: (None, probabilities))
    run_cell("extremes-run", vars(gan) | {"evaluator": evaluator, "fake": torch.arange(1000)})
    for digit in range(9):
        ranked = sorted((read_as == digit).nonzero()[:, 0], key=lambda place: -sure[place])
        shown = [part.view(10, 10)[digit].tolist() for part in drawn]
        assert shown == [ranked[:10], ranked[-10:]]
    assert all((part[90:] == -1).all() for part in drawn), "the rows have moved"
