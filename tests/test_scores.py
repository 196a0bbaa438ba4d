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
    run,
    run_cell,
    same,
    state,
    tiny_evaluator,
)


@pytest.fixture(scope="module")
def data(gan):
    """What the cell data-run leaves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        scope = run_cell("data-run", vars(gan) | TINY | {"LIMIT": 0, "device": CPU})
    plt.close("all")
    return scope


@pytest.fixture(scope="module")
def digits(data):
    return data["held_out"]


@pytest.fixture(scope="module")
def classifier(gan, data):
    return gan.train_classifier(data["images"][:8000], data["training"].targets[:8000], 0, epochs=2)


class Perfect(torch.nn.Module):
    """A generator whose images are real ones."""

    def __init__(self, images):
        super().__init__()
        self.images, self.weight = images, torch.nn.Parameter(torch.zeros(1))

    def forward(self, noise):
        return self.images[(noise[:, 0].abs() * 1e5).long() % len(self.images)]


def frechet_distance(first, second):
    """The definition, by NumPy: the root of a product of covariances by two eigendecompositions."""
    first, second = first.double().numpy(), second.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(first.T))
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ np.cov(second.T) @ root).clip(0)).sum()
    spread = np.trace(np.cov(first.T)) + np.trace(np.cov(second.T)) - 2 * cross
    return ((first.mean(0) - second.mean(0)) ** 2).sum() + spread


def plain_evaluator(gan, real):
    """An evaluator whose features are the pixels themselves, of images (N, 1, 1, F)."""
    last = torch.nn.Linear(real.shape[-1], 10)
    return gan.Evaluator(torch.nn.Sequential(torch.nn.Flatten(), last), real)


def test_the_data_are_the_whole_of_mnist_in_the_range_of_tanh(data):
    parts = (data["images"], data["training"].data), (data["held_out"], data["test"].data)
    for (images, pixels), count in zip(parts, (60_000, 10_000), strict=True):
        assert images.shape == (count, 1, 28, 28) and images.dtype == torch.float32
        assert images.min() == -1 and images.max() == 1
        torch.testing.assert_close((images[:9, 0] + 1) * 127.5, pixels[:9].float())
    assert data["training"].targets.unique().tolist() == list(range(10))


def test_the_classifier_learns_to_read(classifier, data, digits):
    with torch.no_grad():
        assert (classifier(digits).argmax(1) == data["test"].targets).float().mean() > 0.96
        assert classifier[:-1](digits[:5]).shape == (5, 64)


def test_the_neighbourhoods_are_of_real_digits_from_all_over(gan):
    """The writers of the first half of MNIST's test digits are neater than those of the second."""
    real = torch.arange(10_000.0).view(-1, 1, 1, 1).repeat(1, 1, 1, 2)
    scores = plain_evaluator(gan, real).score(real[1::2])
    assert scores["precision"] == scores["coverage"] == 1
    assert plain_evaluator(gan, real).score(real[:100])["coverage"] < 0.5


def test_two_gaussians_are_at_the_distance_of_the_closed_form(gan):
    """Independent axes: squared differences of the means and of the standard deviations."""
    rng = torch.Generator().manual_seed(0)
    means, deviations = torch.tensor([1.0, 0, -2, 0.5]), torch.tensor([1.0, 2, 0.5, 3])
    real = torch.randn(10_000, 1, 1, 4, generator=rng)
    fake = torch.randn(10_000, 1, 1, 4, generator=rng) * deviations + means
    expected = (means**2).sum() + ((deviations - 1) ** 2).sum()
    distance = plain_evaluator(gan, real).score(fake)["Fréchet distance"]
    assert distance == pytest.approx(expected.item(), rel=0.04)


def test_the_distance_agrees_with_its_definition(gan, classifier, digits):
    evaluator = gan.Evaluator(classifier, digits[:4000])
    fake = digits[4000:8000] * 0.8 + 0.1 * torch.randn(4000, 1, 28, 28)
    expected = frechet_distance(evaluator.real, evaluator.read(fake)[0])
    evaluator.score(random_images(100))  # of which nothing is left over
    assert evaluator.score(fake)["Fréchet distance"] == pytest.approx(expected, rel=1e-3)


def test_neighbourhoods_of_hand_made_points(gan):
    """On a line, k = 1: the real points 0, 1, 3, 10 reach 1, 1, 2, 7 far."""
    real = torch.tensor([[0.0], [1], [3], [10]])
    fake = torch.tensor([[0.5], [4.5], [28.5]])
    # 0.5 is near 0 and 1, 4.5 near 3 and 10, 28.5 near none; and each real point has one
    scores = gan.neighbourhood_scores(real, fake, k=1)
    assert scores == pytest.approx({"precision": 2 / 3, "coverage": 1})
    scores = gan.neighbourhood_scores(real, fake[1:] + 20, k=1)  # 24.5, 48.5
    assert scores == {"precision": 0, "coverage": 0}
    assert gan.neighbourhood_scores(real, fake[:1], k=1) == {"precision": 1, "coverage": 0.5}


def test_fewer_modes_lower_coverage_only(gan):
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(1000, 2, generator=rng) + torch.tensor([[0.0, 0], [50, 0]]).repeat(500, 1)
    one = gan.neighbourhood_scores(real, torch.randn(1000, 2, generator=rng))
    assert one["precision"] > 0.9 and one["coverage"] < 0.55


def test_class_distribution_deviation_and_confidence_of_known_classes(gan):
    """Features are one-hot and the last layer is the identity: each image names its class."""
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(10, 10, bias=False))
    torch.nn.init.eye_(classifier[-1].weight)
    names = torch.eye(10).view(10, 1, 1, 10)
    evaluator = gan.Evaluator(classifier, names.repeat(20, 1, 1, 1))
    scores = evaluator.score(names[[3, 3, 3, 3, 3, 3, 7, 7]])
    assert scores["class distribution"] == [0, 0, 0, 0.75, 0, 0, 0, 0.25, 0, 0]
    assert scores["class deviation"] == pytest.approx(0.65)
    assert scores["confident"] == 0  # e / (e + 9) is 0.23
    assert evaluator.score(10 * names)["confident"] == 1


def test_a_collapsed_generator_is_caught(gan, classifier, digits):
    evaluator = gan.Evaluator(classifier, digits[:5000])
    floor = evaluator.score(digits[5000:7000])
    one = digits[5000:5001] + 0.01 * torch.randn(2000, 1, 28, 28)
    collapsed = evaluator.score(one)
    assert collapsed["Fréchet distance"] > 50 * floor["Fréchet distance"]
    assert collapsed["coverage"] < 0.1 < 0.8 < floor["coverage"]
    assert collapsed["class deviation"] > 0.8 > 0.05 > floor["class deviation"]


def nearest_is_training(gan, capsys, fake, images, held_out):
    """The fraction that the notebook's own cell finds, and prints beside the one by chance."""
    names = {"images": images, "held_out": held_out, "fake": fake}
    scope = run_cell("nearest-run", vars(gan) | names)
    printed = re.findall(r"[\d.]+%", capsys.readouterr().out)
    assert (printed[0], printed[-1]) == (f"{scope['is_training']:.1%}", "50.0%")
    return scope["is_training"]


def test_a_generator_that_copies_is_caught(gan, data, capsys):
    images, held_out, unseen = data["images"][:7000].split([3000, 3000, 1000])
    assert 0.4 < nearest_is_training(gan, capsys, unseen, images, held_out) < 0.6
    speckled = images[:500] + 0.1 * torch.randn(500, 1, 28, 28)
    assert nearest_is_training(gan, capsys, speckled, images, held_out) > 0.99


def test_a_fresh_discriminator_can_only_guess_at_equilibrium(gan, data):
    """A game whose fakes are real digits; and one whose generator has not learned anything."""
    images = data["images"][:4000]
    perfect, untrained = new_game(gan), new_game(gan)
    perfect.averaged = Perfect(images)

    def accuracy(game):  # held-out digits known by heart or not, both kinds are
        return gan.fresh_accuracy(game, images, images[:1000], torch.Generator().manual_seed(0))

    assert 0.4 < accuracy(perfect) < 0.6
    assert accuracy(untrained) > 0.95


def test_the_evaluation_changes_no_training(small, tmp_path):
    undisturbed = run(small, TINY, tmp_path / "a")
    scope = run(small, TINY | {"EPOCHS": 1}, tmp_path / "b")
    game, rng = scope["gan"], torch.Generator()
    tiny_evaluator(small).score(small.sample(game.averaged, torch.randn(64, 12)))
    small.fresh_accuracy(game, random_images(100), random_images(40), rng, epochs=1)
    small.train_classifier(random_images(40), torch.zeros(40, dtype=torch.long), 0, epochs=1)
    small.write("1", game, scope["evaluator"].classifier, rng, tries=50)
    scope = run_cell("train-run", scope | {"EPOCHS": 2})
    assert same(state(scope), state(undisturbed))


def test_interpolation_goes_from_one_vector_to_the_other_for_each_choice(gan):
    start, end = torch.eye(42)[[20, 30]]
    game, new_noise = SimpleNamespace(averaged=gan.Generator()), torch.stack([start, end])
    scope = vars(gan) | {"device": CPU, "gan": game, "new_noise": new_noise}
    rows = run_cell("interpolate-run", scope)["rows"].view(10, 20, 42)
    for choice, row in enumerate(rows):
        assert torch.equal(row[:, :10], torch.eye(10)[[choice] * 20])
        torch.testing.assert_close(row[[0, -1], 10:], new_noise[:, 10:])
        torch.testing.assert_close(row[:, 10:].norm(dim=1), torch.ones(20))


def test_what_is_written_is_read_as_asked(gan, classifier, digits, monkeypatch):
    drawn, game = [], new_game(gan)
    game.averaged = Perfect(digits)
    monkeypatch.setattr(gan, "plot_digits", lambda images, **_: drawn.append(images))
    text = "20265519"
    chosen = gan.write(text, game, classifier, torch.Generator())
    (images,) = drawn
    assert torch.equal(images, game.averaged(chosen))
    with torch.no_grad():
        assert classifier(images).argmax(1).tolist() == [int(digit) for digit in text]
    assert not torch.equal(images[0], images[2]), "twice the same 2"
    for wrong in ("", "two", "2 0", "-1", "٣"):
        with pytest.raises(ValueError, match="^text = '.*': choose .* digits 0 to 9$"):
            gan.write(wrong, game, classifier, torch.Generator())
