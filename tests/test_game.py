"""The networks, the steps and the loop."""

import math
from copy import deepcopy

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, random_images, run, same

CPU = torch.device("cpu")


def test_generator_maps_latent_points_to_images_in_range(gan):
    images = gan.Generator()(torch.randn(5, 100) * 10)
    assert images.shape == (5, 1, 28, 28) and images.dtype == torch.float32
    assert images.abs().max() <= 1
    assert gan.Generator(7)(torch.randn(2, 7)).shape == (2, 1, 28, 28)


def test_discriminator_gives_logits_that_leave_0_to_1(gan):
    logits = gan.Discriminator()(torch.randn(64, 1, 28, 28) * 20)
    assert logits.shape == (64, 1)
    assert logits.min() < 0 or logits.max() > 1


def test_both_networks_leak_where_their_input_is_negative(gan):
    for network in (gan.Generator(), gan.Discriminator()):
        leaks = [m.negative_slope for m in network if isinstance(m, torch.nn.LeakyReLU)]
        assert leaks and all(slope == 0.2 for slope in leaks)
        assert not any(isinstance(module, torch.nn.ReLU) for module in network)


def test_images_are_scaled_to_the_range_of_tanh(gan):
    scaled = gan.to_unit_range(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled, torch.tensor([-1.0, -0.6, 1.0]))


def test_discriminator_step_moves_only_the_discriminator_and_lowers_its_loss(gan):
    game = gan.Game(TINY | {"LEARNING_RATE": 1e-4}, CPU)
    real = gan.to_unit_range(random_images(32))
    fake = game.generator(torch.randn(32, 8))
    generator, discriminator = deepcopy(game.generator), deepcopy(game.discriminator)
    args = game.discriminator, game.discriminator_adam, real, fake
    loss, on_real, on_fake = gan.discriminator_step(*args)
    assert same(game.generator.state_dict(), generator.state_dict())
    assert all(weights.grad is None for weights in game.generator.parameters())
    assert not same(game.discriminator.state_dict(), discriminator.state_dict())
    expected = -on_real.sigmoid().log().mean() - (1 - on_fake.sigmoid()).log().mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(on_fake, discriminator(fake).detach())
    assert gan.discriminator_step(*args)[0] < loss and not loss.requires_grad


def test_generator_step_moves_only_the_generator_and_lowers_its_loss(gan):
    game = gan.Game(TINY | {"LEARNING_RATE": 1e-4}, CPU)
    points = torch.randn(32, 8)
    discriminator = deepcopy(game.discriminator)
    before = [weights.clone() for weights in game.generator.parameters()]
    losses = []
    for _ in range(2):
        fake = game.generator(points)
        args = game.generator, game.discriminator, game.generator_adam, fake
        losses.append(gan.generator_step(*args))
        torch.testing.assert_close(losses[-1], -discriminator(fake).sigmoid().log().mean())
    assert losses[1] < losses[0] and not losses[0].requires_grad
    assert same(game.discriminator.state_dict(), discriminator.state_dict())
    assert all(weights.grad is None for weights in game.discriminator.parameters())
    moved = zip(before, game.generator.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in moved)


def test_averaged_generator_follows_slowly(gan):
    game = gan.Game(TINY, CPU)
    start = game.averaged[0].weight.clone()
    record = gan.train_epoch(game, random_images(96), random_images(8), torch.Generator())
    follower, leader = game.averaged[0].weight, game.generator[0].weight
    assert 0 < (follower - start).norm() < (leader - start).norm()
    assert (leader - follower).norm() < (leader - start).norm() / 2, "it starts too slowly"
    assert game.generator.training and not game.averaged.training
    assert all(0 <= record[key] <= 1 for key in record if key.startswith("accuracy"))


def test_the_average_has_batch_norm_statistics_of_its_own_weights(gan):
    game = gan.Game(TINY | {"LEARNING_RATE": 5e-3}, CPU)
    gan.train_epoch(game, random_images(960), random_images(8), torch.Generator())
    points = torch.randn(5000, 8, generator=torch.Generator().manual_seed(1))
    by_its_own_batch = deepcopy(game.averaged).train()
    with torch.no_grad():
        expected = by_its_own_batch(points)
    assert (game.sample(points) - expected).abs().mean() < 0.02
    assert not game.averaged.training


def test_the_average_counts_its_steps_over_all_epochs(gan, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(gan, "update_average", lambda *args: steps.append(args[2]))
    run(gan, TINY | {"EPOCHS": 1}, tmp_path)
    run(gan, TINY, tmp_path)  # goes on, with three steps an epoch
    assert steps == list(range(6))


def test_an_epoch_shows_every_image_once_and_a_remainder_waits(gan, monkeypatch):
    seen = []
    step = gan.discriminator_step

    def spy(discriminator, optimizer, real, fake):
        seen.append(real)
        return step(discriminator, optimizer, real, fake)

    monkeypatch.setattr(gan, "discriminator_step", spy)
    images = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
    gan.train_epoch(gan.Game(TINY, CPU), images, random_images(8), torch.Generator())
    shown = torch.cat(seen)[:, 0, 0, 0]
    assert len(shown) == len(shown.unique()) == 96


def test_same_seed_same_weights_and_another_seed_other_weights(gan, tmp_path):
    first = run(gan, TINY, tmp_path / "a").state_dict()
    torch.randn(3)  # what is drawn elsewhere changes nothing
    assert same(first, run(gan, TINY, tmp_path / "b").state_dict())
    other = run(gan, TINY | {"SEED": 2}, tmp_path / "c").state_dict()
    assert not same(first["generator"], other["generator"])


def test_each_epoch_of_each_seed_has_its_own_random_numbers(gan):
    def draw(seed, epoch):
        return tuple(torch.randn(4, generator=gan.random_numbers(seed, epoch, CPU)).tolist())

    pairs = [(seed, epoch) for seed in (0, 1, 2**32 - 1) for epoch in (0, 1, 2)]
    assert len({draw(*pair) for pair in pairs}) == len(pairs)
    assert all(draw(*pair) == draw(*pair) for pair in pairs)


def test_training_writes_comparable_grids_and_a_record_an_epoch(gan, tmp_path):
    game = run(gan, TINY, tmp_path)
    grids = [plt.imread(tmp_path / f"epoch_00{k}.png") for k in (1, 2)]
    assert [record.keys() for record in game.history] == [game.history[0].keys()] * 2
    assert all(math.isfinite(value) for record in game.history for value in record.values())
    points = game.latent_points(64, gan.random_numbers(TINY["SEED"], 0, CPU))
    digit = game.sample(points)[9, 0]  # second row, second column of 30 pixels each
    shown = grids[1][32:60, 32:60, 0]
    assert np.abs(shown - (digit.numpy() + 1) / 2).max() <= 1 / 255, "not on the fixed grey scale"
    assert grids[0].shape == grids[1].shape == (242, 242, 3) and (grids[0] != grids[1]).any()


def test_the_epoch_line_counts_and_reports_a_collapse(gan):
    healthy = {f"share_of_{label}": 0.1 for label in range(10)}
    collapsed = healthy | {f"share_of_{label}": 0.005 for label in range(7)}
    assert gan.progress_line([healthy] * 3, 5, 30) == "Epoch 3 of 5: 30.0 s an epoch, 1.0 min left"
    assert gan.progress_line([healthy] * 5, 5, 30).endswith("training is done")
    assert "only 3 of the 10 classes" in gan.progress_line([collapsed], 5, 30)
    assert "mode collapse" not in gan.progress_line([collapsed, healthy], 5, 30)


def test_a_healthy_first_epoch_is_not_called_a_collapse(gan, classifier_dir, tmp_path):
    images, held_out = (gan.load_images("MNIST", train, root=ROOT / "data")[0] for train in (1, 0))
    classifier = gan.load_classifier("MNIST", 0, classifier_dir, CPU)
    judge = gan.Judge(classifier, gan.to_unit_range(held_out))
    game = gan.Game(TINY | {"EPOCHS": 1, "LEARNING_RATE": 1e-3}, CPU)
    gan.train(game, images[:12_800], held_out, judge, tmp_path, tmp_path)
    assert "mode collapse" not in gan.progress_line(game.history, 1, 0)


@pytest.mark.parametrize("epochs", [0, 1, 9])
def test_the_pictures_are_drawn_with_whatever_there_is(gan, tmp_path, epochs):
    accuracies = ["accuracy_training", "accuracy_held_out", "accuracy_forged"]
    shares = {f"share_of_{label}": 0.1 for label in range(10)}
    record = dict.fromkeys(["loss_d", "loss_g", "frechet_distance", *accuracies], 0.5) | shares
    history = [record] * epochs
    figure = gan.progress_figure(history, torch.zeros(64, 1, 28, 28))
    figure.canvas.draw()
    assert gan.read_grids(tmp_path, epochs, count=8) == {}


def test_the_animation_shows_epochs_of_this_run_in_their_order_and_rests_on_the_last(gan, tmp_path):
    for epoch in range(1, 26):  # the last five are left over from a longer run
        grid = gan.Image.new("RGB", (242, 242), (10 * epoch,) * 3)
        grid.save(tmp_path / f"epoch_{epoch:03d}.png")
    grids = gan.read_grids(tmp_path, 20, count=8)
    epochs = list(grids)
    assert (
        epochs == sorted(epochs) and epochs[0] == 1 and epochs[-1] == 20 and 6 <= len(epochs) <= 8
    )
    assert list(gan.read_grids(tmp_path, 1, count=8)) == [1]
    (tmp_path / "epoch_020.png").unlink()
    assert 19 in gan.read_grids(tmp_path, 20, count=8)
    gan.save_animation(grids, tmp_path / "progress.gif")
    with gan.Image.open(tmp_path / "progress.gif") as film:
        assert film.n_frames == len(epochs) and film.info["loop"] == 0
        for index, epoch in enumerate(epochs):
            film.seek(index)
            assert film.convert("L").getpixel((99, 99)) == pytest.approx(10 * epoch, abs=2)
            assert film.info["duration"] == (250 if epoch < 20 else 4000)
