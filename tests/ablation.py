"""What each part of the recipe is worth: the tables "What we tried" of gan.ipynb.

Run it by hand: `.venv/bin/python tests/ablation.py` plays all rows, in about 50 minutes on two
cores; `tests/ablation.py dropout R1` those whose names hold one of these words, and
`tests/ablation.py --seconds 360 "the default" 0.999` longer games. A row is the notebook's own
code with something changed. Each row plays SEEDS games, each game gets that many seconds of one
core, as many games at a time as there are cores. A cell is the mean ± the standard deviation over
the games; the judge scores 10,000 digits of each.
"""

import argparse
import functools
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

os.environ["OMP_NUM_THREADS"] = "1"  # games side by side must not share cores

import torch
from conftest import ROOT, load_definitions, parameter_values, read_notebook
from torch import nn
from torch.nn.functional import pad, softplus

SEEDS = 3
COLUMNS = {  # and how their figures are written
    "seconds_an_epoch": ".1f",
    "frechet_distance": ".2f",
    "coverage": ".3f",
    "confident": ".3f",
}


class Piles(nn.Module):
    """Append the mean deviation of the features in each pile of images (Karras et al., 2018)."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, features):
        size = min(self.size, len(features))
        spread = features.view(-1, size, features.shape[1]).std(1).mean(1, keepdim=True)
        return torch.cat([features, spread.repeat_interleave(size, 0)], 1)


def networks(gan, norm=True, slope=0.2, widths=(512, 256), dropout=0, pile=None):
    """Let the players be networks of this form."""

    def generator(latent_dim):
        layers, inputs = [], latent_dim
        for width in (256, 512, 1024):
            batch_norm = [nn.BatchNorm1d(width)] if norm else []
            layers += [nn.Linear(inputs, width), *batch_norm, nn.LeakyReLU(slope, inplace=True)]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(1024, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))

    def discriminator():
        layers, inputs = [nn.Flatten()], 784
        for width in widths:
            layers += [nn.Linear(inputs, width), nn.LeakyReLU(slope, inplace=True)]
            layers += [nn.Dropout(dropout)] if dropout else []
            inputs = width
        layers += [Piles(pile), nn.Linear(inputs + 1, 1)] if pile else [nn.Linear(inputs, 1)]
        return nn.Sequential(*layers)

    gan.Generator, gan.Discriminator = generator, discriminator


def no_average(gan):
    """Let the averaged generator be the generator itself."""

    class Game(gan.Game):
        def sample(self, points):
            self.averaged.load_state_dict(self.generator.state_dict())
            return super().sample(points)

    gan.Game, gan.update_average = Game, lambda averaged, generator, step: None
    gan.update_bn = lambda loader, averaged: None


def betas(gan, share):
    """Let both Adams keep this share of momentum, and this of past squared gradients."""

    class Game(gan.Game):
        def __init__(self, parameters, device):
            super().__init__(parameters, device)
            for adam in (self.discriminator_adam, self.generator_adam):
                adam.param_groups[0]["betas"] = share

    gan.Game = Game


def copied_statistics(gan):
    """Give the average the generator's batch norm statistics instead of some of its own."""
    update = gan.update_average

    def update_average(averaged, generator, step):
        update(averaged, generator, step)
        for copied, collected in zip(averaged.buffers(), generator.buffers(), strict=True):
            copied.copy_(collected)

    gan.update_average, gan.update_bn = update_average, lambda loader, averaged: None


def decay(gan):
    """Halve the learning rate of both players every other epoch."""
    play_on = gan.train_epoch

    def train_epoch(game, *arguments):
        for adam in (game.discriminator_adam, game.generator_adam):
            rate = game.parameters["LEARNING_RATE"]
            adam.param_groups[0]["lr"] = rate * 0.5 ** (len(game.history) / 2)
        return play_on(game, *arguments)

    gan.train_epoch = train_epoch


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


def r1(gan, relativistic=False):
    """Add R1 to the discriminator's loss; or play the relativistic game with R1 and R2
    (Jolicoeur-Martineau, 2019; Huang et al., 2024)."""
    seen = {}

    def discriminator_step(discriminator, optimizer, real, fake):
        seen["real"] = real
        real, fake = real.requires_grad_(), fake.detach().requires_grad_()
        on_real, on_fake = discriminator(torch.cat([real, fake])).split(len(real))
        loss = penalty(on_real, real)
        if relativistic:
            loss = loss + softplus(on_fake - on_real).mean() + penalty(on_fake, fake)
        else:
            loss = loss + gan.cross_entropy(on_real, 1) + gan.cross_entropy(on_fake, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach(), on_real.detach(), on_fake.detach()

    def generator_step(generator, discriminator, optimizer, fake):
        loss = softplus(discriminator(seen["real"].detach()) - discriminator(fake)).mean()
        optimizer.zero_grad()
        loss.backward(inputs=list(generator.parameters()))
        optimizer.step()
        return loss.detach()

    gan.discriminator_step = discriminator_step
    if relativistic:
        gan.generator_step = generator_step


usual_adam = functools.partial(betas, share=(0.9, 0.999))
momentum = functools.partial(betas, share=(0.5, 0.999))
ORIGINAL = {"BATCH_SIZE": 16, "LEARNING_RATE": 2e-4}
ROWS = {  # name: (parameters that differ from the default run's, changes of the code)
    "the original's: ReLU, no batch norm, momentum 0.9, batch 16, learning rate 2e-4": (
        ORIGINAL,
        [usual_adam, no_average, lambda gan: networks(gan, norm=False, slope=0)],
    ),
    "+ LeakyReLU, batch norm in G": (ORIGINAL, [usual_adam, no_average]),
    "+ momentum 0.5": (ORIGINAL, [momentum, no_average]),
    "+ batch 128": ({"LEARNING_RATE": 2e-4}, [momentum, no_average]),
    "+ learning rate 1e-3": ({}, [momentum, no_average]),
    "+ no momentum, β2 = 0.99": ({}, [no_average]),
    "+ averaging = **the default**": ({}, []),
    "default, β2 = 0.999": ({}, [functools.partial(betas, share=(0, 0.999))]),
    "default, the average with the generator's batch norm statistics": ({}, [copied_statistics]),
    "default, batch 64": ({"BATCH_SIZE": 64}, []),
    "default, learning rate 5e-4": ({"LEARNING_RATE": 5e-4}, []),
    "default, learning rate that halves every 2 epochs": ({}, [decay]),
    "default, 32 latent numbers": ({"LATENT_DIM": 32}, []),
    "default, D twice as wide": ({}, [lambda gan: networks(gan, widths=(1024, 512))]),
    "default, dropout 0.3 in D": ({}, [lambda gan: networks(gan, dropout=0.3)]),
    "default, shifts of up to 2 pixels": ({}, [shifts]),
    "default, R1": ({}, [r1]),
    "default, relativistic loss with R1 and R2": ({}, [lambda gan: r1(gan, relativistic=True)]),
    "default, D also sees the spread of 16 digits": ({}, [lambda gan: networks(gan, pile=16)]),
}


class TimeIsUp(Exception):
    """Raised in the middle of an epoch."""


def play(name, seed, seconds):
    """Play one game of the row; return its seconds an epoch and its scores."""
    torch.set_num_threads(1)
    os.chdir(ROOT)
    gan, (parameters, changes) = load_definitions(), ROWS[name]
    for change in changes:
        change(gan)
    cpu, (images, held_out, judge) = torch.device("cpu"), load()
    defaults = gan.check_parameters(parameter_values(gan, read_notebook()))
    game = gan.Game(defaults | parameters | {"SEED": seed}, cpu)
    steps, update, began = 0, gan.update_average, time.process_time()

    def update_and_watch(*arguments):
        nonlocal steps
        update(*arguments)
        steps += 1
        if time.process_time() - began > seconds:
            raise TimeIsUp

    gan.update_average = update_and_watch
    try:
        while True:
            rng = gan.random_numbers(seed, len(game.history) + 1, cpu)
            game.history.append(gan.train_epoch(game, images, held_out, rng))
    except TimeIsUp:
        rng = gan.random_numbers(seed, 0, cpu)
        size = game.parameters["BATCH_SIZE"]
        gan.update_bn(game.latent_points(80 * size, rng).split(size), game.averaged)
        points, epochs = game.latent_points(10_000, rng), steps * size / len(images)
        return {"seconds_an_epoch": seconds / epochs} | judge.score(game.sample(points))


@functools.cache
def load():
    """Return the training images, the held-out ones and the notebook's judge."""
    gan = load_definitions()
    images, held_out = (gan.load_images("MNIST", train)[0] for train in (True, False))
    classifier = gan.load_classifier("MNIST", 0, ROOT / "models", torch.device("cpu"))
    return images, held_out, gan.Judge(classifier, gan.to_unit_range(held_out))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--seconds", type=int, default=90)
    chosen = parser.parse_args()
    os.chdir(ROOT)
    load()  # so that the classifier is there for all games
    names = [name for name in ROWS if any(word in name for word in chosen.words or [""])]
    print("| recipe |", " | ".join(column.replace("_", " ") for column in COLUMNS), "|")
    print("| --- |", " | ".join(["---:"] * len(COLUMNS)), "|")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        games = [
            [pool.submit(play, name, seed, chosen.seconds) for seed in range(SEEDS)]
            for name in names
        ]
        for name, futures in zip(names, games, strict=True):
            scores = [future.result() for future in futures]
            cells = []
            for column, form in COLUMNS.items():
                values = [score[column] for score in scores]
                mean, spread = statistics.mean(values), statistics.stdev(values)
                cells.append(f"{mean:{form}} ± {spread:{form}}")
            print("|", name, "|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
