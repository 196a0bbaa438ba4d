"""The game and its pictures; the scores, also against the cheats that they must catch."""

import math
import re
from copy import deepcopy
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import CPU, TINY, copy_digits, new_game, random_images, run, run_cell, same
from PIL import Image


@pytest.fixture(scope="module")
def data(gan, tmp_path_factory):
    """What the cell data-run leaves; in a folder of its own, since this one may be read-only."""
    folder = tmp_path_factory.mktemp("digits")
    copy_digits(folder)
    scope = {"device": CPU, "parameters": SimpleNamespace(**TINY | {"LIMIT": 0})}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return run_cell("data-run", vars(gan) | scope | {"show": lambda *_: None})


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


def test_the_losses_are_those_of_the_equations(gan):
    on_real, on_fake = torch.tensor([[2.0], [-1]]), torch.tensor([[0.5], [-3]])
    loss_d = -on_real.sigmoid().log().mean() - (1 - on_fake.sigmoid()).log().mean()
    torch.testing.assert_close(gan.discriminator_loss(on_real, on_fake), loss_d)
    torch.testing.assert_close(gan.generator_loss(on_fake), -on_fake.sigmoid().log().mean())
    sure = torch.full((1, 1), -200.0)  # the probability rounds to 0, the loss stays finite
    assert gan.generator_loss(sure).item() == 200


def test_noise_becomes_images_in_range_and_images_logits_that_leave_0_to_1(gan):
    images = gan.Generator()(torch.randn(5, 42) * 10)
    assert images.shape == (5, 1, 28, 28) and images.abs().max() <= 1
    logits = gan.Discriminator()(torch.randn(64, 1, 28, 28) * 20)
    assert logits.shape == (64, 1) and (logits.min() < 0 or logits.max() > 1)
    wide = [layer for layer in gan.perceptron(9, 8, 7, norm=True) if hasattr(layer, "num_features")]
    assert [layer.num_features for layer in wide] == [8], "batch norm after the last layer"


def test_a_choice_is_one_of_ten_alike_and_can_be_left_out(gan):
    noise = torch.randn(10_000, 12, generator=torch.Generator().manual_seed(0))
    chosen = gan.Choice()(noise)
    assert torch.equal(chosen[:, 10:], noise[:, 10:])
    assert chosen[:, :10].unique().tolist() == [0, 2] and (chosen[:, :10].sum(1) == 2).all()
    assert torch.equal(chosen[:, :10].argmax(1), noise[:, :10].argmax(1))
    generator, plain = gan.Generator(12), gan.Generator(12, choice=False)
    plain.load_state_dict(generator.state_dict())
    images = gan.sample(generator, noise[:9])
    torch.testing.assert_close(gan.sample(plain, chosen[:9]), images)
    assert not torch.equal(gan.sample(plain, noise[:9]), images)


def test_discriminator_step_moves_only_the_discriminator_and_lowers_its_loss(gan):
    game = new_game(gan, 1e-4)
    real, fake = random_images(32), game.generator(torch.randn(32, 12))
    generator, discriminator = deepcopy(game.generator), deepcopy(game.discriminator)
    loss = gan.discriminator_step(game, real, fake, gan.discriminator_loss)
    assert same(game.generator.state_dict(), generator.state_dict())
    assert all(weights.grad is None for weights in game.generator.parameters())
    assert not same(game.discriminator.state_dict(), discriminator.state_dict())
    expected = gan.discriminator_loss(discriminator(real), discriminator(fake)).detach()
    torch.testing.assert_close(loss, expected)
    assert gan.discriminator_step(game, real, fake, gan.discriminator_loss) < loss


def test_generator_step_moves_only_the_generator_and_lowers_its_loss(gan):
    game, noise = new_game(gan, 1e-4), torch.randn(32, 12)
    discriminator, losses = deepcopy(game.discriminator), []
    before = [weights.clone() for weights in game.generator.parameters()]
    for _ in range(2):
        fake = game.generator(noise)
        losses.append(gan.generator_step(game, fake, gan.generator_loss))
        torch.testing.assert_close(losses[-1], gan.generator_loss(discriminator(fake)).detach())
    assert losses[1] < losses[0]
    assert same(game.discriminator.state_dict(), discriminator.state_dict())
    assert all(weights.grad is None for weights in game.discriminator.parameters())
    moved = zip(before, game.generator.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in moved)


def test_each_player_moves_as_often_as_asked_and_the_mean_losses_are_returned(gan, monkeypatch):
    moves, batch, values = [], torch.zeros(4, 2), iter(range(100))

    def step(name):
        return lambda *_: moves.append(name) or torch.tensor(float(next(values)))

    monkeypatch.setattr(gan, "discriminator_step", step("d"))
    monkeypatch.setattr(gan, "generator_step", step("g"))
    game = gan.GAN(gan.perceptron(3, 2), gan.perceptron(2, 1), latent_dim=3)
    assert gan.play(game, [batch] * 3, torch.Generator()) == [2, 3]  # means of 0, 2, 4; 1, 3, 5
    gan.play(game, [batch] * 4, torch.Generator(), d_every=2)
    gan.play(game, [batch] * 4, torch.Generator(), g_every=3)
    assert "".join(moves) == "dgdgdg" + "dggdgg" + "dgdddg"


def test_the_balanced_game_finds_all_clouds_and_the_collapsed_one_does_not(gan):
    angles, found = torch.arange(8) * torch.pi / 4, []
    clouds = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    for options in ({}, {"d_every": 10}):
        game, pictures = gan.play_in_plane("", (10, 1000), **options)
        near = torch.cdist(game.generator(game.noise(2000, torch.Generator())), clouds) < 0.45
        found.append((near.float().mean(0) >= 0.01).sum().item())
        assert len(pictures) == 2 and (pictures[0] != pictures[1]).any()
    assert found[0] == 8 and found[1] <= 4


def test_a_game_has_the_settings_of_the_recipe(gan):
    def settings(game):
        return [
            (adam.defaults["lr"], adam.defaults["betas"]) for adam in (game.adam_g, game.adam_d)
        ]

    game, other = gan.new_gan(0, CPU, 12), gan.new_gan(1, CPU, 12, 4e-4, 0.5, False, 1)
    assert settings(game) == [(1e-3, (0, 0.999)), (5e-4, (0, 0.999))]
    assert settings(other) == [(4e-4, (0.5, 0.999))] * 2
    assert settings(gan.play_in_plane("", (1,))[0]) == [(1e-3, (0, 0.999))] * 2
    kinds = [isinstance(each.generator[0], gan.Choice) for each in (game, other)]
    assert kinds == [True, False] and game.latent_dim == 12
    norms = [str(network).count("BatchNorm1d") for network in (game.generator, game.discriminator)]
    assert norms == [3, 0]
    assert not same(game.generator.state_dict(), other.generator.state_dict()), "one seed"


def test_the_average_follows_slowly_and_its_images_stand_alone(gan):
    game = new_game(gan, 5e-3)
    start = game.averaged.module[1][0].weight.clone()
    gan.train_epoch(game, random_images(960), 32, seed=0, epoch=1)
    assert game.averaged.n_averaged == 30
    follower, leader = game.averaged.module[1][0].weight, game.generator[1][0].weight
    assert 0 < (leader - follower).norm() < (leader - start).norm() / 2
    before, noise = deepcopy(game.averaged.state_dict()), torch.randn(5000, 12)
    images = gan.sample(game.averaged, noise)
    torch.testing.assert_close(gan.sample(game.averaged, noise[:3]), images[:3])
    assert same(game.averaged.state_dict(), before), "looking at images changes the game"
    assert game.averaged.training and not images.requires_grad
    gan.average_weights(means := [torch.zeros(2)], [torch.ones(2)], torch.tensor(28))
    assert means[0].tolist() == pytest.approx([0.5, 0.5])  # 29 / 58


def test_an_epoch_shows_every_image_once_and_a_remainder_waits(gan):
    seen = list(gan.batches(torch.arange(100), 32, torch.Generator()))
    assert [len(batch) for batch in seen] == [32, 32, 32]
    assert len(torch.cat(seen).unique()) == 96
    assert not torch.equal(torch.cat(seen), torch.cat(seen).sort().values)


def test_each_epoch_of_each_seed_has_its_own_random_numbers(gan, monkeypatch):
    monkeypatch.setattr(gan, "play", lambda game, real, rng: rng.initial_seed())
    pairs = [(seed, epoch) for seed in (0, 1, 2**32 - 1) for epoch in (1, 2, 3)]
    draws = [[gan.train_epoch(None, torch.zeros(2, 1), 1, *x) for x in pairs] for _ in range(2)]
    assert draws[0] == draws[1] and len(set(draws[0])) == len(pairs)


def test_training_writes_comparable_grids_records_and_the_final_weights(small, tmp_path, capsys):
    run(small, TINY | {"EPOCHS": 1}, tmp_path)
    scope = run(small, TINY, tmp_path)  # goes on, with three steps an epoch
    game, rng = scope["gan"], torch.Generator().manual_seed(TINY["SEED"])
    assert game.averaged.n_averaged == 6
    grids = [plt.imread(tmp_path / f"gan_images/epoch_00{k}.png") for k in (1, 2)]
    digits = small.sample(game.averaged, torch.randn(2000, 12, generator=rng))
    shown = grids[1][32:60, 32:60, 0]  # second row, second column of 30 pixels each
    assert np.abs(shown - (digits[9, 0].numpy() + 1) / 2).max() <= 1 / 255, "not one grey scale"
    assert grids[0].shape == grids[1].shape == (242, 242, 3) and (grids[0] != grids[1]).any()
    judge, record = scope["evaluator"], scope["history"][1]
    distance = small.frechet_distance(judge.real, judge.read(digits)[0])
    assert record["Fréchet distance"] == pytest.approx(distance)
    assert record["loss of D"] > record["loss of G"] > 0
    assert f"distance {distance:.2f}, 0.0 min left" in capsys.readouterr().out
    for network, trained in (
        (small.Generator(12), game.averaged.module),
        (small.Discriminator(), game.discriminator),
    ):
        name = type(network).__name__.lower()
        network.load_state_dict(torch.load(tmp_path / f"models/{name}.pth"))
        assert same(network.state_dict(), trained.state_dict())


@pytest.mark.parametrize("epochs", [1, 9])
def test_the_progress_shows_the_history(gan, monkeypatch, epochs):
    monkeypatch.setattr(plt, "show", lambda: None)
    names = "loss of D", "loss of G", "Fréchet distance"
    history = [{x: k / (epoch + 9) for k, x in enumerate(names, 1)} for epoch in range(epochs)]
    gan.plot_progress(history, torch.zeros(20, 1, 28, 28), floor=0.5)
    plt.gcf().canvas.draw()
    lines = {line.get_label(): list(line.get_ydata()) for a in plt.gcf().axes for line in a.lines}
    assert all(lines[name] == [record[name] for record in history] for name in names)
    assert lines["real digits"] == [0.5, 0.5]
    levels = [segment[0, 1] for segment in plt.gcf().axes[0].collections[0].get_segments()]
    assert levels == pytest.approx([math.log(4), math.log(2)], abs=1e-3)
    ticks = [tick for axis in plt.gcf().axes for tick in axis.get_xticks()]
    assert all(tick == round(tick) for tick in ticks), "half an epoch"


def shown_by(gan, monkeypatch, *pictures):
    """What show() hands to the notebook, read back."""
    shown = []
    monkeypatch.setattr(gan, "display", lambda image: shown.append(image.data))
    gan.show(*pictures)
    return Image.open(gan.io.BytesIO(*shown))


def test_digits_are_drawn_pixel_by_pixel_in_their_places(gan, monkeypatch):
    images = random_images(6)
    picture = gan.grid(images, columns=3, zoom=3)
    assert picture.shape == (2 * 90 + 6, 3 * 90 + 6)
    place = picture[96 : 96 + 84, 186 : 186 + 84]  # the last of the second row
    expected = ((images[5, 0] + 1) * 127.5).round().numpy().repeat(3, 0).repeat(3, 1)
    assert np.abs(place.astype(int) - expected).max() <= 1
    labelled = gan.grid(images, columns=3, zoom=3, labels=["first", "second"])
    assert np.array_equal(labelled[:, -picture.shape[1] :], picture)
    margin = labelled[:, : -picture.shape[1]]
    assert margin.max() == 255 and margin[:90].min() == margin[90:].min() == 0, "no label"
    black = shown_by(gan, monkeypatch, np.where(picture > 99, 255, 0).astype(np.uint8))
    assert np.array_equal(np.asarray(black.convert("L")) > 99, picture > 99)


def test_a_film_shows_its_pictures_in_order_and_rests_on_the_last(gan, monkeypatch):
    stripes = np.repeat(np.arange(0, 250, 50, dtype=np.uint8), 8)  # five greys, all in each
    pictures = [np.tile(np.roll(stripes, -8 * k)[:, None], (30, 1, 3)) for k in range(5)]
    film, colours = shown_by(gan, monkeypatch, *pictures), []
    assert film.default_image and film.info["loop"] == 0
    for frame in range(film.n_frames):  # the first is what is seen where no film can be shown
        film.seek(frame)
        colours.append(film.convert("RGB").getpixel((0, 2))[0])
    assert film.info["duration"] == 3000
    assert colours == pytest.approx([200, 0, 50, 100, 150, 200], abs=4)


def test_the_classifier_learns_to_read_the_whole_of_mnist(classifier, data):
    digits, images = data["held_out"], data["images"]
    assert len(images) == 60_000 and len(digits) == 10_000
    assert images.unique().tolist() == pytest.approx((torch.arange(256) / 127.5 - 1).tolist())
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


def test_neighbourhoods_of_hand_made_points(gan):
    """On a line, k = 1: the real points 0, 1, 3, 10 reach 1, 1, 2, 7 far."""
    real = torch.tensor([[0.0], [1], [3], [10]])
    fake = torch.tensor([[0.5], [4.5], [28.5]])
    # 0.5 is near 0 and 1, 4.5 near 3 and 10, 28.5 near none; and each real point has one
    scores = gan.neighbourhood_scores(real, fake, k=1)
    assert scores == pytest.approx({"precision": 2 / 3, "coverage": 1})
    real, fake = (torch.nn.functional.pad(points, (0, 1)) for points in (real, fake[:1]))
    assert gan.neighbourhood_scores(real, fake, k=1) == {"precision": 1, "coverage": 0.5}
    gan.draw_circles(axis := plt.subplots()[1], real, fake, k=1)
    circles = [(*c.center, c.radius, c.get_fill()) for c in axis.patches]
    assert circles == [(0, 0, 1, 1), (1, 0, 1, 1), (3, 0, 2, 0), (10, 0, 7, 0)]
    assert axis.get_title() == "precision 1.00, coverage 0.50"
    assert [len(line.get_xdata()) for line in axis.lines] == [4, 1], "the real ones first"


def test_the_scores_and_the_wheel_of_known_classes(gan, monkeypatch):
    """Features are one-hot and the last layer is the identity: each image names its class."""
    classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(10, 10, bias=False))
    torch.nn.init.eye_(classifier[-1].weight)
    names = torch.eye(10).view(10, 1, 1, 10)
    evaluator = gan.Evaluator(classifier, names.repeat(20, 1, 1, 1))
    assert evaluator.score(names[[3] * 6 + [7] * 2])["class deviation"] == pytest.approx(0.65)
    assert evaluator.score(torch.cat([3.6 * names, 4.5 * names]))["confident"] == 0.5  # 0.80, 0.91
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
    colours = [axis.lines[0].get_color() for axis in (real, fake)]
    assert colours == ["#1b7837", "#762a83"] == [axis.title.get_color() for axis in (real, fake)]


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
    assert torch.equal(drawn[-1][6:], images[:6]), "not beside the nearest"


def test_a_fresh_discriminator_can_only_guess_at_equilibrium(gan, data):
    """A game whose fakes are real digits; and one whose generator has not learned anything."""
    images = data["images"][:4000]
    perfect, untrained = new_game(gan), new_game(gan)
    perfect.averaged = Perfect(images)

    def accuracy(game):
        fresh = gan.fresh_discriminator(game, images, torch.manual_seed(0))
        fake = gan.sample(game.averaged, game.noise(1000, torch.manual_seed(1)))
        return gan.accuracy(fresh, images[:1000], fake)

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
    black = torch.full((3, 1, 14, 28), -1.0)
    assert torch.equal(gan.upper_half(hidden), torch.cat([hidden[:, :, :14], black], 2))


def test_the_hand_of_a_digit_writes_all_ten_choices(gan, drawn, monkeypatch):
    game, hands = new_game(gan), torch.randn(6, 12)
    monkeypatch.setattr(gan, "find", lambda *_: hands)
    scope = {"gan": game, "held_out": random_images(9), "latent_dim": 12, "device": CPU}
    run_cell("style-run", vars(gan) | scope)
    rows = drawn[0].view(6, 11, 1, 28, 28)
    assert torch.equal(rows[:, 0], random_images(9)[:6])
    choices = torch.cat([torch.eye(10), hands[4, 10:].expand(10, 2)], 1)
    torch.testing.assert_close(rows[4, 1:], gan.sample(game.averaged, choices))


def test_what_is_written_is_read_as_asked(gan, classifier, data, drawn):
    game, text = new_game(gan), "20265519"
    game.averaged = Perfect(data["held_out"])
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
