"""What each part of the recipe is worth: the table "What we tried" of gan.ipynb.

Run it by hand: `.venv/bin/python tests/ablation.py` plays every row, `… ablation.py dropout R1` the rows
whose names contain one of these words. Each row is the notebook's own code with one thing changed. Every game gets
the same time, SECONDS of one core, and each row SEEDS games, side by side on all cores. A row is the mean
± the standard deviation of the judge's scores of 10,000 digits by the averaged generator.
"""

import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # games side by side must not share cores

import torch
from conftest import ROOT, TINY, load_definitions
from torch import nn
from torch.nn.functional import pad, softplus

SECONDS, SEEDS = 120, 3
DEFAULTS = TINY | {"LIMIT": 0, "BATCH_SIZE": 128, "LATENT_DIM": 100, "LEARNING_RATE": 1e-3}


def networks(
    gan, latent_dim=100, normed=True, slope=0.2, widths=(512, 256), dropout=0, code=0, piles=0
):
    """Give the module gan generators and discriminators of this form."""

    def generator(_):
        layers, inputs = [Code(code)] if code else [], latent_dim + code
        for width in (256, 512, 1024):
            norm = [nn.BatchNorm1d(width)] if normed else []
            layers += [nn.Linear(inputs, width), *norm, nn.LeakyReLU(slope)]
            inputs = width
        return nn.Sequential(*layers, nn.Linear(1024, 784), nn.Tanh(), nn.Unflatten(1, (1, 28, 28)))

    def discriminator():
        layers, inputs = [nn.Flatten()], 784
        for width in widths:
            layers += [nn.Linear(inputs, width), nn.LeakyReLU(slope), nn.Dropout(dropout)]
            inputs = width
        return nn.Sequential(
            *layers, *[Piles(piles)] * bool(piles), nn.Linear(inputs + bool(piles), 1)
        )

    gan.Generator, gan.Discriminator = generator, discriminator


class Code(nn.Module):
    """Append to the latent points which of their first numbers is the largest, as a one-hot code."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, points):
        which = points[:, : self.size].argmax(1)
        return torch.cat([points, 3 * nn.functional.one_hot(which, self.size)], 1)


class Piles(nn.Module):
    """Append the mean deviation of the features in each pile of images (Karras et al., 2018)."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, features):
        piles = features.view(-1, min(self.size, len(features)), features.shape[1])
        spread = piles.std(1).mean(1, keepdim=True).repeat_interleave(piles.shape[1], 0)
        return torch.cat([features, spread], 1)


def shift(images, most=2):
    """Move each image by up to so many pixels each way."""
    down, right = torch.randint(2 * most + 1, (2, len(images), 1)) + torch.arange(28)
    padded = pad(images, [most] * 4, value=-1)[:, 0]
    each = torch.arange(len(images))[:, None, None]
    return padded[each, down[:, :, None], right[:, None, :]][:, None]


def shifts(gan):
    """Let the discriminator see shifted images only (differentiable augmentation, Zhao et al., 2020)."""
    plain = gan.Discriminator

    class Shifting(plain):
        def forward(self, images):
            return super().forward(shift(images) if self.training else images)

    gan.Discriminator = Shifting


def penalty(logits, images):
    """Half the mean squared gradient of the logits with respect to the images (Mescheder et al., 2018)."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.flatten(1).square().sum(1).mean() / 2


def r1(gan, weight=1.0, relativistic=False):
    """Add weight times R1 to the discriminator's loss; or play the relativistic game, with R1 and R2."""
    seen = {}

    def discriminator_step(discriminator, optimizer, real, fake):
        seen["real"], fake = real.requires_grad_(), fake.detach().requires_grad_()
        on_real, on_fake = discriminator(torch.cat([real, fake])).split(len(real))
        if relativistic:
            loss = softplus(on_fake - on_real).mean() + weight * penalty(on_fake, fake)
        else:
            loss = gan.cross_entropy(on_real, 1) + gan.cross_entropy(on_fake, 0)
        loss = loss + weight * penalty(on_real, real)
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


def no_average(gan):
    """Let the averaged generator be the generator itself."""

    def copy(averaged, generator, step):
        averaged.load_state_dict(generator.state_dict())

    gan.update_average = copy


def no_decay(gan):
    gan.HALF_LIFE = float("inf")


def half_life(gan, seconds_an_epoch=10):
    """Scale the half-life of the default run down to the epochs that fit into SECONDS."""


ROWS = {  # name: (parameters, changes of the module)
    "original: ReLU, no norm, batch 16, learning rate 2e-4": (
        {"BATCH_SIZE": 16, "LEARNING_RATE": 2e-4},
        [no_decay, no_average, lambda gan: networks(gan, normed=False, slope=0)],
    ),
    "+ LeakyReLU": (
        {"BATCH_SIZE": 16, "LEARNING_RATE": 2e-4},
        [no_decay, no_average, lambda gan: networks(gan, normed=False)],
    ),
    "+ batch norm in G": ({"BATCH_SIZE": 16, "LEARNING_RATE": 2e-4}, [no_decay, no_average]),
    "+ batch 128": ({"LEARNING_RATE": 2e-4}, [no_decay, no_average]),
    "+ learning rate 1e-3": ({}, [no_decay, no_average]),
    "+ averaging": ({}, [no_decay]),
    "+ learning rate that halves: **the default**": ({}, []),
    "default, batch 64": ({"BATCH_SIZE": 64}, []),
    "default, learning rate 5e-4": ({"LEARNING_RATE": 5e-4}, []),
    "default, learning rate 2e-3": ({"LEARNING_RATE": 2e-3}, []),
    "default, latent size 32": ({"LATENT_DIM": 32}, [lambda gan: networks(gan, 32)]),
    "default, D twice as wide": ({}, [lambda gan: networks(gan, widths=(1024, 512))]),
    "default, dropout 0.3 in D": ({}, [lambda gan: networks(gan, dropout=0.3)]),
    "default, shifts of up to 2 pixels": ({}, [shifts]),
    "default, R1": ({}, [r1]),
    "default, relativistic loss, R1 and R2": ({}, [lambda gan: r1(gan, relativistic=True)]),
    "default, D also sees the spread of 16 digits": ({}, [lambda gan: networks(gan, piles=16)]),
    "default, one-hot code of 10 in the latent point": ({}, [lambda gan: networks(gan, code=10)]),
}


class TimeIsUp(Exception):
    pass


def play(name, seed, seconds, folder):
    """Play one game of this row for so long; return its epochs and scores."""
    torch.set_num_threads(1)
    os.chdir(ROOT)
    gan, (parameters, changes) = load_definitions(), ROWS[name]
    for change in changes:
        change(gan)
    cpu = torch.device("cpu")
    images, held_out = (gan.load_images("MNIST", train)[0] for train in (True, False))
    judge = gan.Judge(gan.load_classifier("MNIST", 0, folder, cpu), gan.to_unit_range(held_out))
    game = gan.Game(DEFAULTS | parameters | {"SEED": seed}, cpu)
    steps, update = 0, gan.update_average
    began = time.process_time()

    def watch(*args):
        nonlocal steps
        update(*args)
        steps += 1
        if time.process_time() - began > seconds:
            raise TimeIsUp

    gan.update_average = watch
    try:
        while True:
            rng = gan.random_numbers(seed, len(game.history) + 1, cpu)
            game.history.append(gan.train_epoch(game, images, held_out, rng))
    except TimeIsUp:
        points = game.latent_points(10_000, gan.random_numbers(seed, 0, cpu))
        scores = judge.score(game.sample(points))
    return {"epochs": steps * game.parameters["BATCH_SIZE"] / len(images)} | scores


def main(words):
    columns = {"epochs": ".1f", "frechet_distance": ".2f", "coverage": ".3f", "confident": ".3f"}
    print("| recipe |", " | ".join(name.replace("_", " ") for name in columns), "|")
    print("| --- |", " | ".join(["---:"] * len(columns)), "|")
    folder = Path(ROOT, "models")
    load_definitions().load_classifier("MNIST", 0, folder, torch.device("cpu"))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        chosen = [name for name in ROWS if not words or any(word in name for word in words)]
        games = {
            name: [pool.submit(play, name, seed, SECONDS, folder) for seed in range(SEEDS)]
            for name in chosen
        }
        for name, futures in games.items():
            results = [future.result() for future in futures]
            cells = []
            for column, form in columns.items():
                values = [result[column] for result in results]
                spread = f" ± {statistics.stdev(values):{form}}" if column != "epochs" else ""
                cells.append(f"{statistics.mean(values):{form}}{spread}")
            print("|", name, "|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
