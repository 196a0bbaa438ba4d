"""The game and its pictures; the scores, also against the cheats that they must catch."""

from contextlib import chdir
from copy import deepcopy
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import CPU, ROOT, TINY, gan, new_game, run, run_cell, small
from PIL import Image, ImageSequence
from torch.testing import assert_close


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What the cell data-run leaves, with all of MNIST; and a classifier."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "models").mkdir()
    parameters = SimpleNamespace(DATASET="MNIST", LIMIT=0, OUTPUT_DIR=folder)
    with chdir(ROOT):
        data = run_cell("data-run", vars(gan) | {"device": CPU, "parameters": parameters})
    learned = data["images"][:8000], data["labels"][:8000]
    return data | {"classifier": gan.train_classifier(*learned, seed=0, epochs=2)}


@pytest.fixture
def drawn(monkeypatch):
    """The lists of images that a cell draws."""
    drawn = []
    monkeypatch.setattr(gan, "grid", lambda images, *_, **__: drawn.append(images))
    monkeypatch.setattr(gan, "show", lambda *_: None)
    return drawn


def test_the_losses_are_those_of_the_equations():
    on_real, on_fake = torch.tensor([[2.0], [-1]]), torch.tensor([[0.5], [-3]])
    loss_d = -on_real.sigmoid().log().mean() - (1 - on_fake.sigmoid()).log().mean()
    assert_close(gan.discriminator_loss(on_real, on_fake), loss_d)
    assert_close(gan.generator_loss(on_fake), -on_fake.sigmoid().log().mean())


def test_noise_becomes_images_in_range_and_images_logits_that_leave_0_to_1():
    images = gan.Generator()(torch.randn(5, 42) * 10)
    assert images.shape == (5, 1, 28, 28) and images.abs().max() <= 1
    logits = gan.Discriminator()(torch.randn(64, 1, 28, 28) * 20)
    assert logits.shape == (64, 1) and (logits.min() < 0 or logits.max() > 1)


def test_a_choice_is_one_of_ten_and_can_be_left_out():
    noise = torch.randn(1000, 12)
    chosen = gan.Choice()(noise)
    assert torch.equal(chosen[:, 10:], noise[:, 10:])
    assert chosen[:, :10].unique().tolist() == [0, 2] and (chosen[:, :10].sum(1) == 2).all()
    assert torch.equal(chosen[:, :10].argmax(1), noise[:, :10].argmax(1))
    kinds = [type(gan.new_gan(0, CPU, 12, choice=choice).generator[0]) for choice in (True, False)]
    assert kinds == [gan.Choice, torch.nn.Identity]


@pytest.mark.parametrize("player", ["discriminator", "generator"])
def test_a_step_moves_only_its_player_and_lowers_its_loss(player):
    game, real, noise = new_game(gan, 1e-4), torch.rand(32, 1, 28, 28), torch.randn(32, 12)
    before, losses = deepcopy(game), []
    for weights in (*game.discriminator.parameters(), *game.generator.parameters()):
        weights.grad = torch.ones_like(weights)  # what earlier steps have left
    for _ in range(2):
        fake = game.generator(noise)
        if player == "discriminator":
            losses.append(gan.discriminator_step(game, real, fake))
        else:
            losses.append(gan.generator_step(game, fake))
    assert losses[1] < losses[0]
    for name in ("discriminator", "generator"):
        pairs = zip(*(getattr(each, name).parameters() for each in (before, game)), strict=True)
        kept = {torch.equal(old, new) and (new.grad == 1).all().item() for old, new in pairs}
        assert kept == {name != player}


def test_each_player_moves_as_often_as_asked_and_the_mean_losses_are_returned(monkeypatch):
    moves, batch = [], torch.zeros(4, 2)

    def step(name):
        return lambda *_: moves.append(name) or torch.tensor(float(len(moves)))

    monkeypatch.setattr(gan, "discriminator_step", step("d"))
    monkeypatch.setattr(gan, "generator_step", step("g"))
    game = gan.GAN(gan.perceptron(3, 2), gan.perceptron(2, 1), latent_dim=3)
    assert gan.play(game, [batch] * 3, torch.Generator()) == [3, 4]  # means of 1, 3, 5; 2, 4, 6
    gan.play(game, [batch] * 4, torch.Generator(), d_every=2)
    gan.play(game, [batch] * 4, torch.Generator(), g_every=3)
    assert "".join(moves) == "dgdgdg" + "dggdgg" + "dgdddg"


def test_the_balanced_game_finds_all_clouds_and_the_collapsed_one_does_not():
    angles = torch.arange(8) * torch.pi / 4
    clouds = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    for options, least, most in ({}, 8, 8), ({"d_every": 10}, 0, 4):
        game, _ = gan.film_in_plane("", (600,), **options)
        near = torch.cdist(game.generator(game.noise(2000, torch.Generator())), clouds) < 0.45
        assert least <= (near.float().mean(0) >= 0.01).sum() <= most


def test_the_average_follows_slowly_also_in_a_copy_and_its_images_stand_alone():
    game, start = deepcopy(new_game(gan, 5e-3)), new_game(gan).generator[1][0].weight
    gan.train_epoch(game, torch.rand(960, 1, 28, 28), 32, seed=0, epoch=1)
    follower, leader = game.averaged.module[1][0].weight, game.generator[1][0].weight
    assert 0 < (leader - follower).norm() < (leader - start).norm() / 2
    numbers = game.averaged.module[1][0](game.averaged.module[0](torch.randn(9999, 12)))
    own = (game.averaged.module[1][1].running_mean - numbers.mean(0)).norm()
    assert own < (game.generator[1][1].running_mean - numbers.mean(0)).norm() / 2
    gan.average_weights(means := [torch.zeros(1)], [torch.ones(1)], torch.tensor(28))
    assert means[0].item() == pytest.approx(0.5)  # 29 / 58
    before, noise = deepcopy(game.averaged.state_dict()), torch.randn(5000, 12)
    images = gan.sample(game.averaged, noise)
    assert_close(gan.sample(game.averaged, noise[:3]), images[:3])
    assert_close(game.averaged.state_dict(), before, rtol=0, atol=0)
    assert game.averaged.training and not images.requires_grad


def test_each_epoch_shows_every_image_once_and_has_its_own_random_numbers(monkeypatch):
    seen = list(gan.batches(torch.arange(100), 32, torch.Generator()))
    assert [len(batch) for batch in seen] == [32, 32, 32]
    assert len(torch.cat(seen).unique()) == 96 and (torch.cat(seen).diff() < 0).any()
    monkeypatch.setattr(gan, "play", lambda game, real, rng: rng.initial_seed())
    monkeypatch.setattr(gan, "update_bn", lambda *_: None)
    pairs = [(seed, epoch) for seed in (0, 1, 2**32 - 1) for epoch in (1, 2, 3)]
    draws = [
        [gan.train_epoch(new_game(gan), torch.zeros(2, 1), 1, *x) for x in pairs] for _ in range(2)
    ]
    assert draws[0] == draws[1] and len(set(draws[0])) == len(pairs)


def test_training_writes_comparable_grids_records_and_the_final_weights(tmp_path):
    scope = run(small, TINY, tmp_path)
    game, judge, (_, record) = scope["gan"], scope["evaluator"], scope["history"]
    digits = small.sample(game.averaged, game.noise(2000, torch.manual_seed(TINY["SEED"])))
    assert_close(record["digits"], ((digits[:64] + 1) * 127.5).round().byte())
    assert record["distance"] == pytest.approx(judge.score(digits)["Fréchet distance"])
    assert record["losses"][0] > record["losses"][1] > 0
    first, second = (plt.imread(tmp_path / f"gan_images/epoch_00{k}.png") for k in (1, 2))
    assert first.shape == (726, 726) and (first != second).any()  # 8 digits of 90 pixels
    assert np.array_equal((second[96:180:3, 96:180:3] * 255).round(), record["digits"][9, 0])
    for name, trained in ("generator", game.averaged.module), ("discriminator", game.discriminator):
        assert_close(torch.load(tmp_path / f"models/{name}.pth"), trained.state_dict())


def test_digits_are_drawn_pixel_by_pixel_in_their_places():
    images = torch.rand(6, 1, 28, 28) * 2 - 1
    picture = gan.grid(images, columns=3, zoom=3)
    expected = ((images[5, 0] + 1) * 127.5).round().byte().numpy().repeat(3, 0).repeat(3, 1)
    assert np.array_equal(picture[96 : 96 + 84, 186 : 186 + 84], expected)
    labelled = gan.grid(images, columns=3, zoom=3, labels=["first", "second"])
    margin, rest = np.split(labelled, [-picture.shape[1]], axis=1)
    assert np.array_equal(rest, picture) and margin[:90].min() == margin[90:].min() == 0


def test_a_film_shows_its_pictures_in_order_and_rests_on_the_last(monkeypatch):
    shown, greys = [], (0, 50, 100, 150, 200)
    monkeypatch.setattr(gan, "display", lambda image: shown.append(image.data))
    gan.show(*[np.full((30, 30, 3), grey, np.uint8) for grey in greys])
    film = Image.open(gan.io.BytesIO(*shown))
    frames = [frame.convert("L").getpixel((9, 9)) for frame in ImageSequence.Iterator(film)]
    assert frames == pytest.approx([200, *greys], abs=4)  # the first is for where nothing moves
    assert film.info["duration"] == 3000


def test_the_classifier_learns_to_read_the_whole_of_mnist(data):
    assert len(data["images"]) == 60_000 and data["images"].aminmax() == (-1, 1)
    held_out = data["held_out"], data["held_out_labels"]
    assert 0.96 < gan.reads_right(data["classifier"], *held_out) < 1


def test_the_distance_is_that_of_the_definition():
    """By NumPy: the root of a product of covariances by two eigendecompositions."""
    real = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    fake = real[:900] @ torch.vander(torch.tensor([1.0, 2, 3, 4])) - 1
    first, second = np.cov(real.double().T), np.cov(fake.double().T)
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(values) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ second @ root)).sum()
    means = ((real.double().mean(0) - fake.double().mean(0)) ** 2).sum().item()
    expected = means + np.trace(first) + np.trace(second) - 2 * cross
    assert gan.frechet_distance(real, fake) == pytest.approx(expected, rel=1e-6)


def test_neighbourhoods_of_hand_made_points():
    """On a line: the real points reach 1, 1, 2, 7 far; 0.5 is near two, 4.5 too, 28.5 near none."""
    real, fake = torch.tensor([[0.0], [1], [3], [10]]), torch.tensor([[0.5], [4.5], [28.5]])
    scores = gan.neighbourhood_scores(real, fake, k=1)
    assert scores == pytest.approx({"precision": 2 / 3, "coverage": 1})
    assert gan.neighbourhood_scores(real, fake[:1], k=1) == {"precision": 1, "coverage": 0.5}


def test_the_scores_and_the_wheel_of_known_classes():
    """Features are one-hot and the last layer is the identity: each image names its class."""
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(10, 10, bias=False))
    torch.nn.init.eye_(classifier[-1].weight)
    names = torch.eye(10).view(10, 1, 1, 10)
    evaluator = gan.Evaluator(classifier, names.repeat(20, 1, 1, 1))
    assert evaluator.score(torch.cat([3.6 * names, 4.5 * names]))["confident"] == 0.5  # 0.80, 0.91
    gan.draw_wheels(evaluator, {"sure": 30 * names, "unclear": 0 * names})
    sure, unclear = plt.gcf().axes
    labels = np.array([text.get_position() for text in sure.texts])
    assert sure.lines[0].get_xydata() == pytest.approx(labels / 1.2, abs=1e-3)
    assert np.abs(unclear.lines[0].get_xydata()).max() < 1e-6, "not in the middle"


def test_a_generator_that_copies_is_caught(data, drawn):
    images, held_out, unseen = data["images"][:7000].split([3000, 3000, 1000])

    def nearest_is_training(fake):
        names = {"images": images, "held_out": held_out, "fake": fake}
        return run_cell("nearest-run", vars(gan) | names)["is_training"]

    assert 0.4 < nearest_is_training(unseen) < 0.6
    assert nearest_is_training(images[:500] + 0.1 * torch.randn(500, 1, 28, 28)) > 0.99
    assert torch.equal(drawn[-1][6:12], images[:6]), "not beside the nearest"


def test_a_fresh_discriminator_can_only_guess_at_equilibrium(data, monkeypatch):
    game, images = new_game(gan), data["images"][:4000]

    def accuracy():
        fresh = gan.fresh_discriminator(game, images, torch.Generator())
        return gan.accuracy(fresh, images[:1000], gan.sample(game.averaged, torch.randn(1000, 12)))

    assert accuracy() > 0.95, "of a generator that has not learned anything"
    monkeypatch.setattr(gan, "sample", lambda _, noise: images[torch.randperm(4000)[: len(noise)]])
    assert 0.4 < accuracy() < 0.6


def test_the_answers_are_the_fakes_of_the_quiz_in_their_places(data, drawn):
    scope = vars(gan) | {"fake": data["images"], "held_out": data["held_out"], "seed": 3}
    scope |= {"gan": new_game(gan), "new_d": gan.Discriminator(), "device": CPU}
    run_cell("answers-run", run_cell("quiz-run", scope))
    order = torch.randperm(32, generator=torch.manual_seed(3))
    quiz, answers = drawn
    left, fakes = (answers > -1).flatten(1).any(1), data["images"][100:116][order[order < 16]]
    assert torch.equal(answers[left], fakes) and torch.equal(quiz[left], fakes)


def test_what_is_looked_for_is_found_where_it_can_be():
    game = new_game(gan, 5e-3)
    hidden = gan.sample(game.averaged, game.noise(3, torch.Generator().manual_seed(3)))
    half = torch.cat([hidden[:, :, :14], torch.full((3, 1, 14, 28), -1.0)], 2)
    noise = gan.find(game.averaged, half, gan.upper_half, 12, steps=80)
    error = (gan.upper_half(gan.sample(game.averaged, noise)) - half).square().mean()
    others = gan.sample(game.averaged, game.noise(300, torch.Generator()))
    assert error < 0.3 * (gan.upper_half(others)[:, None] - half).square().mean()


def test_what_is_written_is_read_as_asked(data, drawn, monkeypatch):
    game, classifier, rng = new_game(gan), data["classifier"], torch.Generator()
    monkeypatch.setattr(gan, "sample", lambda *_: data["held_out"][:2000])
    for number in (2026, "05519"):
        gan.write(number, game, classifier, rng)
        assert classifier(drawn[-1]).argmax(1).tolist() == [int(digit) for digit in str(number)]
    assert not torch.equal(drawn[0][0], drawn[0][2]), "twice the same 2"
    for wrong in ("", "two", "2 0", -1, "٣"):
        with pytest.raises(ValueError, match="^number = .*: choose .* digits 0 to 9$"):
            gan.write(wrong, game, classifier, rng)


def test_the_extremes_are_the_surest_and_the_least_sure_of_each_class(drawn):
    sure, probabilities = 1 - torch.rand(1000), torch.zeros(1000, 10)
    probabilities[:, 3] = sure
    evaluator = SimpleNamespace(read=lambda _: (None, probabilities))
    scope = vars(gan) | {"evaluator": evaluator, "fake": torch.arange(1000)}
    run_cell("worst-run", run_cell("best-run", scope))
    ranking, (best, worst) = sure.argsort(descending=True, stable=True), drawn
    assert best.tolist() == [ranking[0]]
    rows = worst.view(10, 10)
    assert torch.equal(rows[3], ranking[-10:]) and (rows[[*range(3), *range(4, 10)]] == -1).all()
