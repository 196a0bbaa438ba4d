"""What each part of the recipe is worth, and what other parts would be: a table by hand.

`.venv/bin/python tests/ablation.py` plays all rows in some hours, three games each, as many at a
time as there are cores; `tests/ablation.py choice R1` those whose names hold one of these words.
A row is the notebook's own code with something changed. A cell is the mean ± the standard deviation
over the games; 10,000 samples of each are scored against the held-out digits, by the features of
the notebook's two classifiers (first / second).
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

COLUMNS = {"Fréchet distance": ".2f", "precision": ".3f", "coverage": ".3f", "confident": ".3f"}
COLUMNS["class deviation"] = ".3f"


def average_over(gan, part):
    """Average over about the last so-manieth part of all steps; 1: the present weights."""

    def average_weights(means, weights, steps):
        for mean, weight in zip(means, weights, strict=True):
            mean.lerp_(weight, (part - 1) / (part + steps) if part > 1 else torch.tensor(1.0))

    gan.average_weights = average_weights


def widths(gan, generator=(256, 512, 512), discriminator=(1024, 256)):
    """Let the hidden layers have these widths."""
    usual = gan.perceptron

    def perceptron(*sizes, norm=False):
        return usual(sizes[0], *(generator if norm else discriminator), sizes[-1], norm=norm)

    gan.perceptron = perceptron


def relu_without_norm(gan):
    """Let all hidden layers have a ReLU, and none batch norm."""
    usual = gan.perceptron

    def perceptron(*sizes, norm=False):
        layers = usual(*sizes)
        for activation in layers[1::2]:
            activation.negative_slope = 0
        return layers

    gan.perceptron = perceptron


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


def choices(gan, count):
    """Let the choice be one of so many."""

    class Choice(nn.Module):
        def forward(self, noise):
            chosen = nn.functional.one_hot(noise[:, :count].argmax(1), count)
            return torch.cat([2 * chosen, noise[:, count:]], 1)

    gan.Choice = Choice


def r1(gan, every=8):
    """Add R1, half the mean squared slope of D on real images (Mescheder et al., 2018), to D's loss
    in every so-manieth step, so many times as much."""
    usual, steps = gan.discriminator_step, itertools.count()

    def discriminator_step(game, real, fake, loss):
        def penalised(on_real, on_fake):
            (slope,) = torch.autograd.grad(on_real.sum(), real, create_graph=True)
            return loss(on_real, on_fake) + every * slope.flatten(1).square().sum(1).mean() / 2

        if next(steps) % every:
            return usual(game, real, fake, loss)
        return usual(game, real.requires_grad_(), fake, penalised)

    gan.discriminator_step = discriminator_step


EQUAL = {"ratio": 1}  # of the learning rates
USUAL = partial(widths, generator=(256, 512, 1024), discriminator=(512, 256))  # of tutorials
ORIGINAL = EQUAL | {"choice": False, "size": 16, "rate": 2e-4, "momentum": 0.9}
ROWS = {  # name: (what differs from the default run's batch size and new_gan, changes of the code)
    "all of it": ({}, []),
    "no choice": ({"choice": False}, []),
    "D as fast as G": (EQUAL, []),
    "momentum 0.5": ({"momentum": 0.5}, []),
    "no running average": ({}, [partial(average_over, part=1)]),
    "G 256-256-512": ({}, [partial(widths, generator=(256, 256, 512))]),
    "D 512-256": ({}, [partial(widths, discriminator=(512, 256))]),
    "G 256-512-1024, D 512-256": ({}, [USUAL]),
    "the average over the last tenth of all steps": ({}, [partial(average_over, part=10)]),
    "D a quarter as fast as G": ({"ratio": 1 / 4}, []),
    "R1 in every eighth step": ({}, [r1]),
    "a choice of 20": ({"latent_dim": 52}, [partial(choices, count=20)]),
    "layer norm in G": ({}, [layer_norm]),
    "the original's recipe": (
        ORIGINAL,  # widths look at norm, so they come last
        [relu_without_norm, partial(average_over, part=1), USUAL],
    ),
}


def play(name, seed, epochs):
    """Play a game of the row; return its seconds of one core and its scores by both classifiers."""
    gan, (options, changes) = load_definitions(), ROWS[name]
    for change in changes:
        change(gan)
    (images, evaluators), values = load(), parameter_values(read_notebook())
    names = {"size": "BATCH_SIZE", "latent_dim": "LATENT_DIM", "rate": "LEARNING_RATE"}
    options = {option: values[name] for option, name in names.items()} | options
    size, began = options.pop("size"), time.process_time()
    game = gan.with_average(gan.new_gan(seed, CPU, **options))
    for epoch in range(1, epochs + 1):
        gan.train_epoch(game, images, size, seed, epoch)
    seconds = time.process_time() - began
    fake = gan.sample(game.averaged, game.noise(10_000, torch.manual_seed(seed + 1)))
    return seconds, [evaluator.score(fake) for evaluator in evaluators]


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
    parser.add_argument("--epochs", type=int, default=parameter_values(read_notebook())["EPOCHS"])
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    names = [name for name in ROWS if any(word in name for word in chosen.words or [""])]
    load()  # before the processes fork, so that they have it, too
    print("| recipe | seconds |", " | ".join(COLUMNS), "|")
    print("| --- | ---:", "| ---: " * len(COLUMNS), "|", flush=True)
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        games = {
            name: [pool.submit(play, name, seed, chosen.epochs) for seed in range(chosen.seeds)]
            for name in names
        }
        for name, futures in games.items():
            seconds, scores = zip(*(future.result() for future in futures), strict=True)
            cells = [cell(seconds, ".0f")]
            for column, form in COLUMNS.items():
                both = ([judged[k][column] for judged in scores] for k in (0, 1))
                cells.append(" / ".join(cell(values, form) for values in both))
            print("|", name, "|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
