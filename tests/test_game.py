"""The losses, the networks, the steps and the loop."""

import math
from copy import deepcopy
from types import SimpleNamespace

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


def test_a_choice_is_one_of_ten_alike_and_leaves_the_other_numbers(gan):
    noise = torch.randn(10_000, 12, generator=torch.Generator().manual_seed(0))
    chosen = gan.Choice()(noise)
    assert torch.equal(chosen[:, 10:], noise[:, 10:])
    assert chosen[:, :10].unique().tolist() == [0, 2] and (chosen[:, :10].sum(1) == 2).all()
    assert torch.equal(chosen[:, :10].argmax(1), noise[:, :10].argmax(1))
    assert ((chosen[:, :10] > 0).float().mean(0) - 0.1).abs().max() < 0.015
    rows = torch.cat([torch.eye(10), torch.zeros(10, 2)], 1)  # so is a choice asked for
    assert torch.equal(gan.Choice()(rows)[:, :10], 2 * torch.eye(10))


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
    moves, batch = [], torch.zeros(4, 2)
    values = iter(range(100))
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


def modes_found(gan, game):
    """How many of the eight modes hold at least 1 % of 2,000 fake points, within 3 deviations."""
    angles = torch.arange(8) * torch.pi / 4
    centres = 2 * torch.stack([angles.cos(), angles.sin()], 1)
    noise = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        near = torch.cdist(game.generator(noise), centres) < 0.45
    return (near.float().mean(0) >= 0.01).sum().item()


def test_the_balanced_small_game_finds_all_modes_and_the_collapsed_one_does_not(gan):
    _, axes = plt.subplots(2, 4)
    assert modes_found(gan, gan.small_game(axes[0], "balanced")) == 8
    assert modes_found(gan, gan.small_game(axes[1], "collapsed", d_every=10)) <= 4


def test_the_discriminator_learns_at_half_the_rate_of_the_generator(gan):
    game = gan.new_gan(0, CPU, 12, rate=4e-4)
    assert [adam.param_groups[0]["lr"] for adam in (game.adam_g, game.adam_d)] == [4e-4, 2e-4]


def test_averaged_generator_follows_slowly(gan):
    game = new_game(gan)
    start = game.averaged.module[1][0][0].weight.clone()
    losses = gan.train_epoch(game, random_images(96), 32, seed=0, epoch=1)
    follower, leader = game.averaged.module[1][0][0].weight, game.generator[1][0][0].weight
    assert 0 < (follower - start).norm() < (leader - start).norm()
    assert (leader - follower).norm() < (leader - start).norm() / 2, "it starts too slowly"
    assert game.generator.training and all(map(math.isfinite, losses))


def test_the_average_makes_each_image_by_itself(gan):
    game = new_game(gan, 5e-3)
    gan.train_epoch(game, random_images(960), 32, seed=0, epoch=1)
    noise = torch.randn(5000, 12, generator=torch.Generator().manual_seed(1))
    before = deepcopy(game.averaged.state_dict())
    images = gan.sample(game.averaged, noise)
    torch.testing.assert_close(gan.sample(game.averaged, noise[:3]), images[:3])
    assert same(game.averaged.state_dict(), before), "looking at images changes the game"


def test_an_epoch_shows_every_image_once_and_a_remainder_waits(gan):
    items = torch.arange(100)
    seen = list(gan.batches(items, 32, torch.Generator()))
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
    first, other = (gan.new_gan(seed, CPU, 12).generator.state_dict() for seed in (0, 1))
    assert not same(first, other)


def test_training_writes_comparable_grids_and_a_record_an_epoch(small, tmp_path):
    scope = run(small, TINY | {"EPOCHS": 1}, tmp_path)
    scope = run(small, TINY, tmp_path)  # goes on, with three steps an epoch
    assert scope["gan"].averaged.n_averaged == 6
    grids = [plt.imread(tmp_path / f"gan_images/epoch_00{k}.png") for k in (1, 2)]
    assert [record.keys() for record in scope["history"]] == [scope["history"][0].keys()] * 2
    for record in scope["history"]:
        assert sum(record.pop("class distribution")) == pytest.approx(1)
        assert all(map(math.isfinite, record.values()))
    rng = torch.Generator().manual_seed(TINY["SEED"])
    digits = small.sample(scope["gan"].averaged, torch.randn(2000, 12, generator=rng))
    shown = grids[1][32:60, 32:60, 0]  # second row, second column of 30 pixels each
    expected = (digits[9, 0].numpy() + 1) / 2
    assert np.abs(shown - expected).max() <= 1 / 255, "not on the fixed grey scale"
    assert grids[0].shape == grids[1].shape == (242, 242, 3) and (grids[0] != grids[1]).any()


@pytest.mark.parametrize("seen", [10, 3])
def test_the_line_of_an_epoch_counts_epochs_and_classes(small, tmp_path, capsys, monkeypatch, seen):
    shares = [1 - 0.02 * (seen - 1)] + [0.02] * (seen - 1) + [0.0] * (10 - seen)
    scores = {"Fréchet distance": 1.0, "class distribution": shares}
    evaluator = SimpleNamespace(score=lambda fake, neighbours: dict(scores))
    clock = iter((0, 30) * 2)
    monkeypatch.setattr(small.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr("conftest.tiny_evaluator", lambda gan: evaluator)
    run(small, TINY, tmp_path)
    printed = capsys.readouterr().out
    for epoch, left in ((1, 0.5), (2, 0.0)):
        line = f"Epoch {epoch} of 2, 30.0 s: {seen} of 10 classes, {left} min left"
        assert printed.count(line) == 1


@pytest.mark.parametrize("epochs", [1, 9])
def test_the_progress_shows_the_history(gan, monkeypatch, epochs):
    monkeypatch.setattr(plt, "show", lambda: None)
    names = ["loss of D", "loss of G", "training and fake", "held-out and fake", "Fréchet distance"]
    history = [{name: len(name) / (epoch + 9) for name in names} for epoch in range(epochs)]
    history = [record | {"class distribution": [0.1] * 10} for record in history]
    gan.plot_progress(history, torch.zeros(64, 1, 28, 28), floor=0.5)
    plt.gcf().canvas.draw()
    lines = {line.get_label(): line.get_ydata() for axis in plt.gcf().axes for line in axis.lines}
    for name in names:
        assert list(lines[name]) == [record[name] for record in history]
    (distance,) = (axis for axis in plt.gcf().axes if axis.get_yscale() == "log")
    assert distance.collections[0].get_segments()[0][:, 1].tolist() == [0.5, 0.5]
    for axis in plt.gcf().axes[1:]:
        assert all(tick == round(tick) for tick in axis.get_xticks()), "half an epoch"


@pytest.mark.parametrize("epochs", [1, 20])
def test_film_and_animation_show_the_epochs_in_order_and_rest_on_the_last(gan, tmp_path, epochs):
    paths = [tmp_path / f"epoch_{epoch:03d}.png" for epoch in range(1, epochs + 1)]
    for epoch, path in enumerate(paths, 1):
        Image.new("RGB", (242, 242), (10 * epoch,) * 3).save(path)
    gan.plot_film(paths)
    (axis,) = plt.gcf().axes
    rows = [int(label.get_text()) for label in axis.get_yticklabels()]
    assert rows == sorted(set(rows)) and rows[0] == 1 and rows[-1] == epochs
    assert len(rows) == 1 if epochs == 1 else 6 <= len(rows) <= 8
    for epoch, place in zip(rows, axis.get_yticks(), strict=True):
        shown = axis.images[0].get_array()[int(place)].max()
        assert shown == pytest.approx(10 * epoch / 255, abs=1 / 255)
    gan.save_animation(paths, tmp_path / "progress.gif")
    with Image.open(tmp_path / "progress.gif") as film:
        assert film.n_frames == epochs and film.info.get("loop", 0) == 0
        for epoch in range(1, epochs + 1):
            film.seek(epoch - 1)
            assert film.convert("L").getpixel((99, 99)) == pytest.approx(10 * epoch, abs=2)
            assert film.info["duration"] == (250 if epoch < epochs else 4000)
