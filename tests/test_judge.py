"""The scores: against their definitions, and against the cheats that they must catch."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, code_cells, random_images, run, same, tiny_judge

CPU = torch.device("cpu")
SHARES = [f"share_of_{label}" for label in range(10)]


@pytest.fixture(scope="module")
def digits(gan):
    """Held-out digits in [-1, 1], and their labels."""
    images, labels = gan.load_images("MNIST", False, root=ROOT / "data")
    return gan.to_unit_range(images), labels


def frechet_distance(first, second):
    """The definition, by NumPy: the root of a product of covariances by two eigendecompositions."""
    first, second = first.double().numpy(), second.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(first.T))
    root = vectors * np.sqrt(values.clip(0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ np.cov(second.T) @ root).clip(0)).sum()
    spread = np.trace(np.cov(first.T)) + np.trace(np.cov(second.T)) - 2 * cross
    return ((first.mean(0) - second.mean(0)) ** 2).sum() + spread


def plain_judge(gan, real):
    """A judge whose features are the pixels themselves, of images (N, 1, 1, F)."""
    features = real.shape[-1]
    return gan.Judge(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(features, 10)), real)


def test_the_classifier_learns_and_is_kept(gan, classifier_dir, digits, monkeypatch):
    monkeypatch.setattr(gan, "train_classifier", lambda *args: pytest.fail("trained again"))
    classifier = gan.load_classifier("MNIST", 0, classifier_dir, CPU)
    images, labels = digits
    with torch.no_grad():
        assert (classifier(images).argmax(1) == labels).float().mean() >= 0.99
        assert classifier[:-1](images[:5]).shape == (5, 64)


def test_each_seed_is_another_judge(gan):
    images, labels = random_images(200), torch.arange(200) % 10
    first, again, other = (
        gan.train_classifier(images, labels, seed, epochs=1) for seed in (0, 0, 1)
    )
    assert same(first.state_dict(), again.state_dict()) and not first.training
    assert not torch.equal(first[0].weight, other[0].weight)


def test_the_neighbourhoods_are_of_real_digits_from_all_over(gan):
    """The writers of the first half of MNIST's test digits are neater than those of the second."""
    real = torch.arange(400.0).view(-1, 1, 1, 1).repeat(1, 1, 1, 2)
    scores = plain_judge(gan, real).score(real[1::2])
    assert scores["precision"] == scores["coverage"] == 1
    assert plain_judge(gan, real).score(real[:100])["coverage"] < 0.5


def test_a_damaged_classifier_is_trained_anew(gan, classifier_dir, tmp_path, monkeypatch):
    data = bytearray((classifier_dir / "classifier_MNIST_0.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "classifier_MNIST_0.pth").write_bytes(data)
    new = gan.make_classifier().eval()
    monkeypatch.setattr(
        gan, "load_images", lambda *args, **kwargs: (torch.zeros(1), torch.zeros(1))
    )
    monkeypatch.setattr(gan, "train_classifier", lambda *args: new)
    for _ in range(2):  # the second time it is read
        found = gan.load_classifier("MNIST", 0, tmp_path, CPU)
        assert same(found.state_dict(), new.state_dict())
        monkeypatch.setattr(gan, "train_classifier", lambda *args: pytest.fail("trained again"))


def test_equal_piles_are_at_distance_zero(gan):
    real = torch.randn(500, 1, 1, 6)
    scores = plain_judge(gan, real).score(real)
    assert abs(scores["frechet_distance"]) < 1e-4
    assert scores["kl_divergence"] == 0
    features = real.flatten(1)
    scores = gan.neighbourhood_scores(features, features)
    assert scores["precision"] == scores["recall"] == scores["coverage"] == 1


def test_two_gaussians_are_at_the_distance_of_the_closed_form(gan):
    """Independent axes: squared differences of the means and of the standard deviations."""
    rng = torch.Generator().manual_seed(0)
    means, deviations = torch.tensor([1.0, 0, -2, 0.5]), torch.tensor([1.0, 2, 0.5, 3])
    real = torch.randn(10_000, 1, 1, 4, generator=rng)
    forged = torch.randn(10_000, 1, 1, 4, generator=rng) * deviations + means
    expected = (means**2).sum() + ((deviations - 1) ** 2).sum()
    assert plain_judge(gan, real).score(forged)["frechet_distance"] == pytest.approx(
        expected.item(), rel=0.04
    )


def test_the_distance_agrees_with_its_definition(gan, classifier_dir, digits):
    judge = gan.Judge(gan.load_classifier("MNIST", 0, classifier_dir, CPU), digits[0][:4000])
    forged = digits[0][4000:8000] * 0.8 + 0.1 * torch.randn(4000, 1, 28, 28)
    expected = frechet_distance(judge.real, judge.look(forged)[0])
    for _ in range(2):  # nothing is left over from the first time
        assert judge.score(forged)["frechet_distance"] == pytest.approx(expected, rel=1e-3)


def test_neighbourhoods_of_hand_made_points(gan):
    """On a line, k = 1. The real points 0, 1, 3, 10 reach 1, 1, 2, 7 far; the forged 4, 4, 24."""
    real = torch.tensor([[0.0], [1], [3], [10]])
    forged = torch.tensor([[0.5], [4.5], [28.5]])
    scores = gan.neighbourhood_scores(real, forged, k=1)
    # 0.5 is among 0 and 1; 4.5 among 3 and 10; 28.5 among none. 10 is among 28.5 only.
    assert scores == pytest.approx(
        {"precision": 2 / 3, "recall": 1, "density": 4 / 3, "coverage": 1}
    )
    scores = gan.neighbourhood_scores(real, forged[1:] + 20, k=1)  # 24.5, 48.5
    assert scores == {"precision": 0, "recall": 0.75, "density": 0, "coverage": 0}


def test_fewer_modes_lower_recall_and_coverage_only(gan):
    rng = torch.Generator().manual_seed(0)
    real = torch.randn(1000, 2, generator=rng) + torch.tensor([[0.0, 0], [50, 0]]).repeat(500, 1)
    one = gan.neighbourhood_scores(real, torch.randn(1000, 2, generator=rng))
    assert one["precision"] > 0.9 and 0.9 < one["density"] < 1.1
    assert one["recall"] < 0.55 and one["coverage"] < 0.55


def test_the_divergence_of_known_shares(gan):
    """Features are one-hot and the last layer is the identity: the judge names what it is shown."""
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(10, 10, bias=False))
    torch.nn.init.eye_(classifier[-1].weight)
    names = torch.eye(10).view(10, 1, 1, 10)
    judge = gan.Judge(classifier, names.repeat(20, 1, 1, 1))
    scores = judge.score(names[[3, 3, 3, 3, 3, 3, 7, 7]])
    assert [scores[name] for name in SHARES] == [0, 0, 0, 0.75, 0, 0, 0, 0.25, 0, 0]
    assert scores["kl_divergence"] == pytest.approx(0.75 * math.log(7.5) + 0.25 * math.log(2.5))
    assert scores["confident"] == 0  # e / (e + 9) is 0.23
    assert judge.score(10 * names)["confident"] == 1


def test_a_collapsed_generator_is_caught(gan, classifier_dir, digits):
    judge = gan.Judge(gan.load_classifier("MNIST", 0, classifier_dir, CPU), digits[0][:5000])
    floor = judge.score(digits[0][5000:7000])
    one = digits[0][5000:5001] + 0.01 * torch.randn(2000, 1, 28, 28)
    collapsed = judge.score(one)
    assert collapsed["frechet_distance"] > 50 * floor["frechet_distance"]
    assert collapsed["coverage"] < 0.1 < 0.8 < floor["coverage"]
    assert collapsed["kl_divergence"] > 1 > 0.1 > floor["kl_divergence"]
    assert "mode collapse" in gan.progress_line([collapsed], 1, 0)
    assert "mode collapse" not in gan.progress_line([collapsed, floor], 2, 0)


def nearest_is_training(gan, notebook, forged, training, held_out):
    """The share that the notebook's own cell finds."""
    (cell,) = (cell for cell in code_cells(notebook) if cell.id == "nearest-run")
    names = {"images": training, "held_out": held_out, "real": gan.to_unit_range(held_out)}
    names["piles"] = {"trained generator": forged}
    scope = vars(gan) | names
    exec(cell.source, scope)
    return scope["nearest_is_training"]


def test_a_generator_that_copies_is_caught(gan, notebook, digits):
    images = gan.load_images("MNIST", True, root=ROOT / "data")[0]
    training, held_out, unseen = images[:3000], images[3000:6000], images[6000:7000]
    honest = gan.to_unit_range(unseen)
    assert 0.4 < nearest_is_training(gan, notebook, honest, training, held_out) < 0.6
    copies = gan.to_unit_range(training[:500])
    speckled = copies + 0.1 * torch.randn_like(copies)
    assert nearest_is_training(gan, notebook, speckled, training, held_out) > 0.99
    distances, indices = gan.nearest(copies, gan.to_unit_range(training))
    assert indices.tolist() == list(range(500)) and distances.max() < 0.05


def test_a_fresh_discriminator_can_only_guess_at_equilibrium(gan, digits):
    """A game whose samples are real digits; and one whose generator has not learned anything."""
    images = gan.load_images("MNIST", True, root=ROOT / "data")[0][:4000]

    def draw(points):
        return gan.to_unit_range(images[(points[:, 0].abs() * 1e5).long() % len(images)])

    untrained = gan.Game(TINY, CPU)
    perfect = SimpleNamespace(device=CPU, latent_points=untrained.latent_points, sample=draw)
    held_out = images[:1000]  # known by heart or not, both kinds are

    def accuracy(game):
        return gan.fresh_accuracy(game, images, held_out, torch.Generator().manual_seed(0))

    first = accuracy(perfect)
    assert 0.4 < first < 0.6
    assert accuracy(untrained) > 0.95
    torch.randn(3)  # what is drawn elsewhere changes nothing
    assert accuracy(perfect) == first


def test_the_evaluation_changes_no_training(gan, tmp_path):
    undisturbed = run(gan, TINY | {"EPOCHS": 2}, tmp_path / "a")
    game = run(gan, TINY | {"EPOCHS": 1}, tmp_path / "b")
    state = torch.get_rng_state()
    tiny_judge(gan).score(game.sample(torch.randn(64, 8, generator=torch.Generator())))
    gan.fresh_accuracy(game, random_images(96), random_images(40), torch.Generator(), epochs=1)
    gan.train_classifier(random_images(40), torch.zeros(40, dtype=torch.long), 0, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    game.parameters["EPOCHS"] = 2
    gan.train(game, random_images(96), random_images(40, 1), tiny_judge(gan), *[tmp_path / "b"] * 2)
    assert same(game.state_dict(), undisturbed.state_dict())


def test_a_walk_keeps_to_the_great_circle(gan):
    start, end = torch.tensor([3.0, 0, 0]), torch.tensor([0.0, 3, 0])
    way = gan.slerp(start, end, steps=4)
    torch.testing.assert_close(way[[0, -1]], torch.stack([start, end]))
    torch.testing.assert_close(way.norm(dim=1), torch.full((4,), 3.0))
    angles = torch.atan2(way[:, 1], way[:, 0])
    torch.testing.assert_close(angles, torch.linspace(0, math.pi / 2, 4))


def test_the_table_has_a_row_a_score_and_a_column_a_pile(gan):
    table = gan.score_table({"floor": {"frechet_distance": 0.1}, "forged": {"frechet_distance": 2}})
    assert "|  | floor | forged |" in table.data
    assert "| frechet distance | 0.100 | 2.000 |" in table.data
