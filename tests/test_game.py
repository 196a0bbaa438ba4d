"""The losses, the networks, the steps and the loop; the pictures of a game."""

import math
from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import CPU, TINY, new_game, random_images, run, same
from PIL import Image


def test_the_losses_are_those_of_the_equations(gan):
    on_real, on_fake = torch.tensor([[2.0], [-1]]), torch.tensor([[0.5], [-3]])
    loss_d = -on_real.sigmoid().log().mean() - (1 - on_fake.sigmoid()).log().mean()
    torch.testing.assert_close(gan.discriminator_loss(on_real, on_fake), loss_d)
    torch.testing.assert_close(gan.generator_loss(on_fake), -on_fake.sigmoid().log().mean())
    sure = torch.full((1, 1), -200.0)  # the probability rounds to 0, the loss stays finite
    assert gan.generator_loss(sure).item() == 200


def test_noise_becomes_images_in_range_and_images_logits_that_leave_0_to_1(gan):
    images = gan.Generator()(torch.randn(5, 42) * 10)
    assert images.shape == (5, 1, 28, 28) and images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert gan.Generator(17)(torch.randn(2, 17)).shape == (2, 1, 28, 28)
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
    assert ((chosen[:, :10] > 0).float().mean(0) - 0.1).abs().max() < 0.015
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
    assert not loss.requires_grad


def test_generator_step_moves_only_the_generator_and_lowers_its_loss(gan):
    game, noise = new_game(gan, 1e-4), torch.randn(32, 12)
    discriminator, losses = deepcopy(game.discriminator), []
    before = [weights.clone() for weights in game.generator.parameters()]
    for _ in range(2):
        fake = game.generator(noise)
        losses.append(gan.generator_step(game, fake, gan.generator_loss))
        expected = gan.generator_loss(discriminator(fake)).detach()
        torch.testing.assert_close(losses[-1], expected)
    assert losses[1] < losses[0] and not losses[0].requires_grad
    assert same(game.discriminator.state_dict(), discriminator.state_dict())
    assert all(weights.grad is None for weights in game.discriminator.parameters())
    moved = zip(before, game.generator.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in moved)


def test_each_player_moves_as_often_as_asked_and_the_mean_losses_are_returned(gan, monkeypatch):
    moves, batch, values = [], torch.zeros(4, 2), iter(range(100))
    for name in ("discriminator_step", "generator_step"):

        def step(*args, name=name):
            moves.append(name[0])
            return torch.tensor(float(next(values)))

        monkeypatch.setattr(gan, name, step)
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
    assert game.adam_g.defaults["betas"] == (0, 0.999)


def test_a_game_for_digits_has_the_settings_of_the_recipe(gan):
    game = gan.new_gan(0, CPU, 12, rate=4e-4)
    for adam, rate in ((game.adam_g, 4e-4), (game.adam_d, 2e-4)):
        assert adam.param_groups[0]["lr"] == rate and adam.defaults["betas"] == (0, 0.999)
    assert isinstance(game.generator[0], gan.Choice) and game.latent_dim == 12
    game = gan.new_gan(0, CPU, 12, 4e-4, 0.5, False, 1)
    assert game.adam_d.param_groups[0]["lr"] == 4e-4 and game.adam_d.defaults["betas"][0] == 0.5
    assert not isinstance(game.generator[0], gan.Choice)
    defaults = gan.new_gan(1, CPU, 12)
    assert defaults.adam_g.defaults["lr"] == 1e-3
    assert not same(game.generator.state_dict(), defaults.generator.state_dict()), "one seed"


def test_the_average_follows_slowly_and_its_images_stand_alone(gan):
    game = new_game(gan, 5e-3)
    start = game.averaged.module[1][0].weight.clone()
    losses = gan.train_epoch(game, random_images(960), 32, seed=0, epoch=1)
    assert all(map(math.isfinite, losses)) and game.averaged.n_averaged == 30
    follower, leader = game.averaged.module[1][0].weight, game.generator[1][0].weight
    assert 0 < (leader - follower).norm() < (leader - start).norm() / 2
    before, noise = deepcopy(game.averaged.state_dict()), torch.randn(5000, 12)
    images = gan.sample(game.averaged, noise)
    torch.testing.assert_close(gan.sample(game.averaged, noise[:3]), images[:3])
    assert same(game.averaged.state_dict(), before), "looking at images changes the game"
    assert game.averaged.training and not images.requires_grad
    means, weights = [torch.zeros(2)], [torch.ones(2)]
    gan.average_weights(means, weights, torch.tensor(28))
    assert means[0].tolist() == pytest.approx([0.5, 0.5])  # 29 / 58


def test_an_epoch_shows_every_image_once_and_a_remainder_waits(gan):
    seen = list(gan.batches(torch.arange(100), 32, torch.Generator()))
    assert [len(batch) for batch in seen] == [32, 32, 32]
    assert len(torch.cat(seen).unique()) == 96
    assert not torch.equal(torch.cat(seen), torch.cat(seen).sort().values)


def test_each_epoch_of_each_seed_has_its_own_random_numbers(gan, monkeypatch):
    monkeypatch.setattr(gan, "play", lambda game, real, rng: rng.initial_seed())

    def draw(seed, epoch):
        return gan.train_epoch(None, torch.zeros(2, 1), 1, seed, epoch)

    pairs = [(seed, epoch) for seed in (0, 1, 2**32 - 1) for epoch in (1, 2, 3)]
    assert len({draw(*pair) for pair in pairs}) == len(pairs)
    assert all(draw(*pair) == draw(*pair) for pair in pairs)


def test_training_writes_comparable_grids_records_and_the_final_weights(small, tmp_path, capsys):
    scope = run(small, TINY | {"EPOCHS": 1}, tmp_path)
    scope = run(small, TINY, tmp_path)  # goes on, with three steps an epoch
    game, rng = scope["gan"], torch.Generator().manual_seed(TINY["SEED"])
    assert game.averaged.n_averaged == 6
    grids = [plt.imread(tmp_path / f"gan_images/epoch_00{k}.png") for k in (1, 2)]
    digits = small.sample(game.averaged, torch.randn(2000, 12, generator=rng))
    shown = grids[1][32:60, 32:60, 0]  # second row, second column of 30 pixels each
    assert np.abs(shown - (digits[9, 0].numpy() + 1) / 2).max() <= 1 / 255, "not one grey scale"
    assert grids[0].shape == grids[1].shape == (242, 242, 3) and (grids[0] != grids[1]).any()
    for record in scope["history"]:
        assert all(map(math.isfinite, record.values()))
    judge = scope["evaluator"]
    distance = small.frechet_distance(judge.real, judge.read(digits)[0])
    assert scope["history"][1]["Fréchet distance"] == pytest.approx(distance)
    assert f"distance {distance:.2f}, 0.0 min left" in capsys.readouterr().out
    generator, discriminator = small.Generator(12), small.Discriminator()
    generator.load_state_dict(torch.load(tmp_path / "models/generator.pth"))
    discriminator.load_state_dict(torch.load(tmp_path / "models/discriminator.pth"))
    torch.testing.assert_close(
        small.sample(generator, torch.ones(1, 12)), small.sample(game.averaged, torch.ones(1, 12))
    )
    assert same(discriminator.state_dict(), game.discriminator.state_dict())


@pytest.mark.parametrize("epochs", [1, 9])
def test_the_progress_shows_the_history(gan, monkeypatch, epochs):
    monkeypatch.setattr(plt, "show", lambda: None)
    levels = {"loss of D": math.log(4), "loss of G": math.log(2), "Fréchet distance": 0}
    history = [{name: len(name) / (epoch + 9) for name in levels} for epoch in range(epochs)]
    gan.plot_progress(history, torch.zeros(20, 1, 28, 28), floor=0.5)
    plt.gcf().canvas.draw()
    lines = {line.get_label()[:9]: line.get_ydata() for a in plt.gcf().axes for line in a.lines}
    for name, level in levels.items():
        expected = [record[name] - level for record in history]
        assert list(lines[name[:9]]) == pytest.approx(expected, abs=1e-3)
    assert list(lines["real digi"]) == [0.5, 0.5]
    for axis in plt.gcf().axes:
        assert all(tick == round(tick) for tick in axis.get_xticks()), "half an epoch"


def shown_by(gan, monkeypatch, *pictures):
    """What show() hands to the notebook, read back."""
    shown = []
    monkeypatch.setattr(gan, "display", lambda image: shown.append(image.data))
    gan.show(*pictures)
    (png,) = shown
    return Image.open(gan.io.BytesIO(png))


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
    film = shown_by(gan, monkeypatch, *pictures)
    assert film.default_image and film.info["loop"] == 0
    colours = []
    for frame in range(film.n_frames):  # the first is what is seen where no film can be shown
        film.seek(frame)
        colours.append(film.convert("RGB").getpixel((0, 2))[0])
    assert film.info["duration"] == 3000
    assert colours == pytest.approx([200, 0, 50, 100, 150, 200], abs=4)
