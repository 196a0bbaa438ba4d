"""What each part of the recipe is worth, and what other parts would be: a table by hand.

`.venv/bin/python tests/ablation.py` plays all rows in about an hour on two cores, each game for 90
seconds of one core; `tests/ablation.py dropout R1` plays those whose names hold one of these words.
`--seconds 360` or `--epochs 25` plays longer games, `--seeds 5` more of each row (without it 3), as
many at a time as there are cores. A row is the notebook's own code with something changed. A cell
is the mean ± the standard deviation over the games; 10,000 samples of each are scored against the
held-out digits, by the features of the notebook's two classifiers (the last column: the second).
"""

import argparse
import itertools
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial

os.environ["OMP_NUM_THREADS"] = "1"  # games side by side must not share cores

import torch
import torchvision
from conftest import CPU, ROOT, load_definitions, parameter_values, read_notebook
from torch import nn
from torch.nn.functional import pad, softplus
from torch.optim.swa_utils import update_bn

COLUMNS = {  # and how their figures are written
    "seconds an epoch": ".1f",
    "Fréchet distance": ".2f",
    "precision": ".3f",
    "coverage": ".3f",
    "confident": ".3f",
    "Fréchet distance, second classifier": ".2f",
}


def relu_without_norm(gan):
    """Let all hidden layers have a ReLU, and none batch norm."""
    usual = gan.perceptron

    def perceptron(*sizes, norm=False):
        layers = usual(*sizes)
        for activation in layers[1::2]:
            activation.negative_slope = 0
        return layers

    gan.perceptron = perceptron


def no_average(gan):
    """Let the average always be the present weights."""

    def average_weights(means, weights, steps):
        torch._foreach_copy_(means, weights)

    gan.average_weights = average_weights


def long_average(gan):
    """Average over about the last tenth of all steps."""

    def average_weights(means, weights, steps):
        torch._foreach_lerp_(means, weights, 9 / (10 + steps.item()))

    gan.average_weights = average_weights


def own_statistics(gan):
    """Measure the batch norm statistics of the average itself; usually it has the generator's."""
    usual = gan.sample

    def sample(averaged, noise):
        update_bn(noise.split(128), averaged)
        return usual(averaged, noise)

    gan.sample = sample


def short_memory(gan):
    """Let both Adams have β2 = 0.99."""
    usual = gan.new_gan

    def new_gan(*arguments, **options):
        game = usual(*arguments, **options)
        for adam in (game.adam_d, game.adam_g):
            adam.param_groups[0]["betas"] = (adam.defaults["betas"][0], 0.99)
        return game

    gan.new_gan = new_gan


def layer_norm(gan):
    """Let the generator have layer norm instead of batch norm."""
    usual = gan.perceptron

    def perceptron(*sizes, norm=False):
        layers = usual(*sizes, norm=norm)
        for place, layer in enumerate(layers):
            if isinstance(layer, nn.BatchNorm1d):
                layers[place] = nn.LayerNorm(layer.num_features)
        return layers

    gan.perceptron = perceptron


def choices(gan, count, size=2):
    """Let the choice be one of so many, and as large as size."""

    class Choice(nn.Module):
        def forward(self, noise):
            chosen = nn.functional.one_hot(noise[:, :count].argmax(1), count)
            return torch.cat([size * chosen, noise[:, count:]], 1)

    gan.Choice = Choice


def decay(gan):
    """Let both learning rates fall to 0 at the end of the game, in a straight line."""
    usual = gan.discriminator_step

    def discriminator_step(game, *arguments):
        for adam in (game.adam_d, game.adam_g):
            adam.param_groups[0]["lr"] = adam.defaults["lr"] * (1 - gan.played())
        return usual(game, *arguments)

    gan.discriminator_step = discriminator_step


class MinibatchDeviation(nn.Module):
    """Append the mean deviation of the features in each group of images (Karras et al., 2018)."""

    def __init__(self, group):
        super().__init__()
        self.group = group

    def forward(self, features):
        deviations = features.view(-1, self.group, features.shape[1]).std(1).mean(1, keepdim=True)
        return torch.cat([features, deviations.repeat_interleave(self.group, 0)], 1)


def discriminator(gan, widths=(512, 256), dropout=0, group=0):
    """Let the discriminator be a perceptron of this form."""

    def make():
        *hidden, last = gan.perceptron(784, *widths, 1)
        if dropout:
            hidden[1::2] = [nn.Sequential(each, nn.Dropout(dropout)) for each in hidden[1::2]]
        if group:
            hidden, last = [*hidden, MinibatchDeviation(group)], nn.Linear(widths[-1] + 1, 1)
        return nn.Sequential(nn.Flatten(), *hidden, last)

    gan.Discriminator = make


def shift(images, most=2):
    """Move each of images (N, 1, 28, 28) by up to so many pixels each way."""
    down, right = torch.randint(2 * most + 1, (2, len(images), 1)) + torch.arange(28)
    each = torch.arange(len(images))[:, None, None]
    return pad(images, [most] * 4, value=-1)[each, 0, down[:, :, None], right[:, None, :]][:, None]


def shifts(gan):
    """Let the discriminator see shifted images only (Zhao et al., 2020)."""

    class Discriminator(gan.Discriminator):
        def forward(self, images):
            return super().forward(shift(images))

    gan.Discriminator = Discriminator


def penalty(logits, images):
    """Half the mean squared gradient of logits by images: R1 or R2 (Mescheder et al., 2018)."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean() / 2


def r1(gan, weight=1, every=1):
    """Add R1 to the discriminator's loss, or every so many steps so many times as much."""
    usual, steps = gan.discriminator_step, itertools.count()

    def discriminator_step(game, real, fake, loss):
        def penalised(on_real, on_fake):
            return loss(on_real, on_fake) + weight * every * penalty(on_real, real)

        if next(steps) % every:
            return usual(game, real, fake, loss)
        return usual(game, real.requires_grad_(), fake, penalised)

    gan.discriminator_step = discriminator_step


def relativistic(gan):
    """Play the relativistic game with R1 and R2 (Jolicoeur-Martineau, 2019; Huang et al., 2024)."""
    step_d, step_g, batch = gan.discriminator_step, gan.generator_step, {}

    def discriminator_step(game, real, fake, _):
        batch["real"], images = real, torch.cat([real, fake.detach()]).requires_grad_()

        def loss(logits, _):
            on_real, on_fake = logits.chunk(2)
            return softplus(on_fake - on_real).mean() + 2 * penalty(logits, images)

        return step_d(game, images, fake[:0], loss)

    def generator_step(game, fake, _):
        on_real = game.discriminator(batch["real"])
        return step_g(game, fake, lambda on_fake: softplus(on_real - on_fake).mean())

    gan.discriminator_step, gan.generator_step = discriminator_step, generator_step


EQUAL = {"ratio": 1}  # of the learning rates
PLAIN = EQUAL | {"choice": False}
LESS_MOMENTUM = PLAIN | {"momentum": 0.5}
ORIGINAL = PLAIN | {"size": 16, "rate": 2e-4, "momentum": 0.9}
ROWS = {  # name: (what differs from the default run's batch size and new_gan, changes of the code)
    "the original's: ReLU, no batch norm, momentum 0.9, batch 16, learning rate 2e-4": (
        ORIGINAL,
        [relu_without_norm, no_average],
    ),
    "+ LeakyReLU, batch norm in G": (ORIGINAL, [no_average]),
    "+ momentum 0.5": (ORIGINAL | LESS_MOMENTUM, [no_average]),
    "+ batch 128": ({"rate": 2e-4} | LESS_MOMENTUM, [no_average]),
    "+ learning rate 1e-3": (LESS_MOMENTUM, [no_average]),
    "+ no momentum": (PLAIN, [no_average]),
    "+ a choice": (EQUAL, [no_average]),
    "+ D half as fast": ({}, [no_average]),
    "+ running average = **the default**": ({}, []),
    "default, no choice": ({"choice": False}, []),
    "default, no choice, 100 noise numbers": ({"choice": False, "latent_dim": 100}, []),
    "default, a choice beside 100 noise numbers": ({"latent_dim": 110}, []),
    "default, a choice of 20": ({"latent_dim": 52}, [partial(choices, count=20)]),
    "default, a choice of 64": ({"latent_dim": 96}, [partial(choices, count=64)]),
    "default, a choice of size 5": ({}, [partial(choices, count=10, size=5)]),
    "default, momentum 0.5": ({"momentum": 0.5}, []),
    "default, β2 = 0.99": ({}, [short_memory]),
    "default, no average": ({}, [no_average]),
    "default, an average over the last tenth of all steps": ({}, [long_average]),
    "default, batch norm statistics of the average itself": ({}, [own_statistics]),
    "default, layer norm in G": ({}, [layer_norm]),
    "default, batch 64": ({"size": 64}, []),
    "default, learning rate 5e-4": ({"rate": 5e-4}, []),
    "default, learning rate that decays linearly to 0": ({}, [decay]),
    "default, D twice as wide": ({}, [partial(discriminator, widths=(1024, 512))]),
    "default, dropout 0.3 in D": ({}, [partial(discriminator, dropout=0.3)]),
    "default, shifts of up to 2 pixels": ({}, [shifts]),
    "default, R1 on every 8th step times 8, γ = 1": ({}, [partial(r1, every=8)]),
    "default, R1 on every 8th step times 8, γ = 0.1": ({}, [partial(r1, weight=0.1, every=8)]),
    "default, D as fast as G": (EQUAL, []),
    "default, D a quarter as fast as G": ({"ratio": 1 / 4}, []),
    "default, relativistic loss with R1 and R2": ({}, [relativistic]),
    "default, minibatch deviation of 16 images": ({}, [partial(discriminator, group=16)]),
}


def play(name, seed, seconds, epochs):
    """Play a game of the row, so many epochs or, if that is None, seconds; return its figures."""
    gan, (options, changes) = load_definitions(), ROWS[name]
    for change in changes:
        change(gan)
    (images, evaluators), values = load(), parameter_values(read_notebook())
    names = {"size": "BATCH_SIZE", "latent_dim": "LATENT_DIM", "rate": "LEARNING_RATE"}
    options = {option: values[name] for option, name in names.items()} | options
    size = options.pop("size")
    game, batches = gan.new_gan(seed, CPU, **options), gan.batches
    steps, began = 0, time.process_time()

    def played_epochs():
        return steps / (len(images) // size)

    def played():
        return played_epochs() / epochs if epochs else (time.process_time() - began) / seconds

    def batches_in_time(*arguments):
        nonlocal steps
        for batch in batches(*arguments):
            yield batch
            steps += 1
            if played() >= 1:
                return

    gan.batches, gan.played = batches_in_time, lambda: min(1, played())
    for epoch in itertools.count(1):
        gan.train_epoch(game, images, size, seed, epoch)
        if played() >= 1:
            break
    spent = time.process_time() - began
    noise = torch.randn(10_000, game.latent_dim, generator=torch.manual_seed(seed + 1))
    first, second = (each.score(gan.sample(game.averaged, noise)) for each in evaluators)
    return first | {
        "seconds an epoch": spent / played_epochs(),
        "Fréchet distance, second classifier": second["Fréchet distance"],
    }


@cache
def load():
    """Return the training images, and an evaluator by each of the notebook's two classifiers."""
    gan, data = load_definitions(), torchvision.datasets.MNIST
    training, test = (data(ROOT / "data", train, download=True) for train in (True, False))
    images, held_out = (part.data[:, None] / 127.5 - 1 for part in (training, test))
    split = len(images) * 5 // 6
    learned = images[:split], training.targets[:split]
    classifiers = [gan.train_classifier(*learned, seed) for seed in (0, 1)]
    return images, [gan.Evaluator(classifier, held_out) for classifier in classifiers]


def cell(values, form):
    """Return the mean of values and, if there are several, their standard deviation."""
    figures = [statistics.mean(values), *([statistics.stdev(values)] if values[1:] else [])]
    return " ± ".join(f"{figure:{form}}" for figure in figures)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=90)
    length.add_argument("--epochs", type=int)
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    names = [name for name in ROWS if any(word in name for word in chosen.words or [""])]
    load()  # before the processes fork, so that they have it, too
    print("| recipe |", " | ".join(COLUMNS), "|")
    print("| --- |", " | ".join(["---:"] * len(COLUMNS)), "|", flush=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        games = {
            name: [
                pool.submit(play, name, seed, chosen.seconds, chosen.epochs)
                for seed in range(chosen.seeds)
            ]
            for name in names
        }
        for name, futures in games.items():
            figures = [future.result() for future in futures]
            cells = [
                cell([each[column] for each in figures], COLUMNS[column]) for column in COLUMNS
            ]
            print("|", name, "|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
