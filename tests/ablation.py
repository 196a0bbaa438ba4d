"""What each part of the recipe is worth, and what other parts would be: the tables, by hand.

`.venv/bin/python tests/ablation.py` plays all rows in some hours, five games each, as many at a
time as there are cores (`--device cuda` and `--processes` for a GPU); `tests/ablation.py choice R1`
those whose names hold one of these words. A row is the notebook's own code with something changed.
A cell is the mean ± the standard deviation over the games: 10,000 samples of each are compared with
the held-out digits by the notebook's second classifier. `--curve` prints each game epoch by epoch.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import cache

os.environ["OMP_NUM_THREADS"] = "1"  # games side by side must not share cores

import torch
from conftest import ROOT, load_definitions, parameter_values, read_notebook

COLUMNS = {"Fréchet distance": ".2f", "precision": ".3f", "coverage": ".3f", "confident": ".3f"}
COLUMNS |= {"purity": ".2f", "seconds": ".0f"}

DEVIATION = '''class Deviation(nn.Module):
    """Features (N, F) -> (N, F + 1): how far they differ in groups of four images, in the mean
    (Karras et al., 2018, section 3)."""

    def forward(self, features):
        groups = features.view(-1, 4, features.shape[1])
        deviation = (groups.var(1, correction=0) + 1e-8).sqrt().mean(1, keepdim=True)
        return torch.cat([features, deviation.repeat_interleave(4, 0)], 1)


class Discriminator'''
R1 = """    if next(STEPS) % 8 == 0:
        real = real.clone().requires_grad_()
        slope = torch.autograd.grad(gan.discriminator(real).sum(), real, create_graph=True)[0]
        old_loss = old_loss + 8 / 2 * slope.flatten(1).square().sum(1).mean()
    gan.adam_d.zero_grad()"""

LAST_WEIGHTS = ("averages", "mean.lerp_(weight, 29 / (30 + steps))", "mean.copy_(weight)")
ROWS = {  # name: (what differs in the arguments of new_gan and the batch size, edits of the cells)
    "all of it": ({}, []),
    "batch norm statistics of the last weights": (
        {},
        [("averages", "update_bn(gan.noise(10_000, rng).split(1000), gan.averaged)", "pass")],
    ),
    "no running average": ({}, [LAST_WEIGHTS]),
    "no choice": ({"choice": False}, []),
    "D as fast as G": ({"ratio": 1}, []),
    "momentum 0.5": ({"momentum": 0.5}, []),
    "rate 2e-4": ({"rate": 2e-4}, []),
    "the recipe of Radford et al.": (
        {"choice": False, "ratio": 1, "rate": 2e-4, "momentum": 0.5},
        [LAST_WEIGHTS],
    ),
    "a choice of 10 instead of 2": ({}, [("choice", "2 * chosen", "10 * chosen")]),
    "second beta 0.99": ({}, [("players", "0.999", "0.99")]),
    "minibatch deviation": (
        {},
        [
            ("networks", "class Discriminator", DEVIATION),
            (
                "networks",
                "perceptron(784, 1024, 256, 1))",
                "perceptron(784, 1024, 256, 1)[:-1], Deviation(), nn.Linear(257, 1))",
            ),
        ],
    ),
    "R1 in every eighth step": (
        {},
        [
            (
                "steps",
                "def discriminator_step",
                "import itertools\n\nSTEPS = itertools.count()\n\n\ndef discriminator_step",
            ),
            ("steps", "    gan.adam_d.zero_grad()", R1),
        ],
    ),
    "float32 products": ({}, [("averages", '"medium"', '"highest"')]),
    "the original's recipe": (
        {"choice": False, "ratio": 1, "size": 16, "latent_dim": 100, "rate": 2e-4, "momentum": 0.9},
        [
            LAST_WEIGHTS,
            ("players", "nn.LeakyReLU(0.2)", "nn.ReLU()"),
            ("networks", "256, 512, 512, 784, norm=True", "256, 512, 1024, 784"),
            ("networks", "784, 1024, 256, 1", "784, 512, 256, 1"),
        ],
    ),
}


@cache
def load(device):
    """Return the training images, and an evaluator by the notebook's second classifier."""
    os.chdir(ROOT)
    gan = load_definitions()
    (images, labels), (held_out, _) = gan.load_digits("MNIST", tempfile.gettempdir())
    images, held_out = (pixels.to(device) / 127.5 - 1 for pixels in (images, held_out))
    split = len(images) * 5 // 6
    classifier = gan.train_classifier(images[:split], labels[:split].to(device), seed=1)
    return images, gan.Evaluator(classifier, held_out), images[split:]


def purity(evaluator, noise, fake):
    """Return the share of images that are read as the commonest class of their choice."""
    pairs = torch.stack([noise[:, :10].argmax(1).cpu(), evaluator.read(fake)[1].argmax(1)])
    counts = torch.zeros(10, 10).index_put_(tuple(pairs), torch.ones(len(fake)), accumulate=True)
    return (counts.amax(1).sum() / len(fake)).item()


def play(name, seed, epochs, device, curve):
    """Play a game of the row; return its scores after the last epoch, or after each for a curve."""
    (changes, edits), values = ROWS[name], parameter_values(read_notebook())
    gan, (images, evaluator, _) = load_definitions(*edits), load(device)
    names = {"size": "BATCH_SIZE", "latent_dim": "LATENT_DIM", "rate": "LEARNING_RATE"}
    options = {option: values[name] for option, name in names.items()} | gan.RECIPE | changes
    size, seconds, scores = options.pop("size"), 0, []
    game = gan.with_average(gan.new_gan(seed, device, **options))
    for epoch in range(1, epochs + 1):
        began = time.process_time()
        gan.train_epoch(game, images, size, seed, epoch)
        seconds += time.process_time() - began
        if curve or epoch == epochs:
            noise = game.noise(10_000, torch.Generator(device).manual_seed(seed + 1))
            fake = gan.sample(game.averaged, noise)
            scores.append(evaluator.score(fake) | {"seconds": seconds})
            scores[-1]["purity"] = purity(evaluator, noise, fake)
    return scores


def row(name, scores):
    """Return a line of the table: the means and, of several games, the standard deviations."""
    cells = []
    for column, form in COLUMNS.items():
        values = [score[column] for score in scores if column in score]
        figures = [statistics.mean(values)] if values else []
        figures += [statistics.stdev(values)] if values[1:] else []
        cells.append(" ± ".join(f"{figure:{form}}" for figure in figures))
    cells.append(" ".join(f"{score['Fréchet distance']:.2f}" for score in scores))
    return f"| {name} | {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    parser.add_argument("--epochs", type=int, default=parameter_values(read_notebook())["EPOCHS"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--curve", action="store_true")
    asked = parser.parse_args()
    for word in asked.words:
        if not any(word in name for name in ROWS):
            parser.error(f"no row is called {word}: choose from {', '.join(ROWS)}")
    names = [name for name in ROWS if any(word in name for word in asked.words or [""])]
    _, evaluator, real = load(asked.device)
    print(f"| recipe | {' | '.join(COLUMNS)} | distance of each game |")
    print(f"| --- {'| ---: ' * len(COLUMNS)}| --- |")
    print(row("real digits", [evaluator.score(real)]), flush=True)
    spawn = multiprocessing.get_context("spawn")  # forked, a process can't use CUDA
    with ProcessPoolExecutor(asked.processes, spawn) as pool:
        rest = asked.epochs, asked.device, asked.curve
        games = {
            name: [pool.submit(play, name, seed, *rest) for seed in range(asked.seeds)]
            for name in names
        }
        for name, futures in games.items():
            scores = [future.result() for future in futures]
            print(row(name, [each[-1] for each in scores]), flush=True)
            for epoch, of_games in enumerate(zip(*scores, strict=True), 1) if asked.curve else ():
                print(row(f"{name}, epoch {epoch}", of_games), flush=True)


if __name__ == "__main__":
    main()
