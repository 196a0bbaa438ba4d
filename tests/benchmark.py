"""How fast the loop is: `.venv/bin/python tests/benchmark.py`, by hand, on an idle machine.

One process times, in turns, an epoch of 60,000 digits by the notebook's own play, running average
included, at its default batch size, by the matrix products of that alone, below which no loop on
this machine can get, and by the loop of most tutorials, at three batch sizes (a part of an epoch,
scaled up). All play with the same networks. Reported are the medians over the turns.
"""

import platform
import statistics
import time

import torch
import torchvision
from conftest import CPU, ROOT, load_definitions, parameter_values, read_notebook
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms

EPOCH, PART, TURNS = 60_000, 6_400, 5


def tutorial_loop(gan, digits, size):
    """Play all digits as most tutorials do: batches from a DataLoader, plain Adam, the generator
    run once for each player, the discriminator twice, and losses read in every step."""
    generator, discriminator = gan.Generator(), gan.Discriminator()
    latent_dim = generator[1][0].in_features
    adam_g = torch.optim.Adam(generator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    adam_d = torch.optim.Adam(discriminator.parameters(), lr=2e-4, betas=(0.5, 0.999))
    loss_of = nn.BCEWithLogitsLoss()
    loss_d_sum = loss_g_sum = 0
    for real, _ in DataLoader(digits, batch_size=size, shuffle=True):
        ones, zeros = torch.ones(len(real), 1), torch.zeros(len(real), 1)
        adam_d.zero_grad()
        fake = generator(torch.randn(len(real), latent_dim)).detach()
        loss_d = loss_of(discriminator(real), ones) + loss_of(discriminator(fake), zeros)
        loss_d.backward()
        adam_d.step()
        adam_g.zero_grad()
        loss_g = loss_of(discriminator(generator(torch.randn(len(real), latent_dim))), ones)
        loss_g.backward()
        adam_g.step()
        loss_d_sum += loss_d.item()
        loss_g_sum += loss_g.item()


def matrix_products(gan, size):
    """Do the matrix products of an epoch's steps, and nothing else."""

    def layers(network):
        return [
            module.weight.detach() for module in network.modules() if isinstance(module, nn.Linear)
        ]

    generator, discriminator = layers(gan.Generator()), layers(gan.Discriminator())
    rows = {
        (count, width): torch.randn(count, width)
        for count in (size, 2 * size)
        for weight in generator + discriminator
        for width in weight.shape
    }

    def forward(weights, count):
        for weight in weights:
            rows[count, weight.shape[1]] @ weight.T

    def to_weights(weights, count):
        for weight in weights:
            rows[count, weight.shape[0]].T @ rows[count, weight.shape[1]]

    def to_inputs(weights, count):
        for weight in weights:
            rows[count, weight.shape[0]] @ weight

    for _ in range(EPOCH // size):
        forward(generator, size)
        forward(discriminator, 2 * size)  # the discriminator's step, real and fake at once
        to_weights(discriminator, 2 * size)
        to_inputs(discriminator[1:], 2 * size)
        forward(discriminator, size)  # the generator's step
        to_inputs(discriminator, size)
        to_weights(generator, size)
        to_inputs(generator[1:], size)


def main():
    gan, values = load_definitions(), parameter_values(read_notebook())
    size = values["BATCH_SIZE"]
    scaling = transforms.Compose([transforms.ToTensor(), transforms.Normalize(0.5, 0.5)])
    mnist = torchvision.datasets.MNIST(ROOT / "data", transform=scaling, download=True)
    digits, images = Subset(mnist, range(PART)), mnist.data[:, None] / 127.5 - 1
    rng = torch.Generator().manual_seed(0)
    game = gan.new_gan(0, CPU, values["LATENT_DIM"], values["LEARNING_RATE"], **gan.RECIPE)
    gan.with_average(game)

    def notebook_loop():
        gan.play(game, gan.batches(images, size, rng), rng)

    contenders = {  # name: (what to time, how many of it make an epoch)
        "tutorial loop, batch 16": (lambda: tutorial_loop(gan, digits, 16), EPOCH / PART),
        "tutorial loop, batch 64": (lambda: tutorial_loop(gan, digits, 64), EPOCH / PART),
        "tutorial loop, batch 128": (lambda: tutorial_loop(gan, digits, 128), EPOCH / PART),
        f"this notebook, batch {size}": (notebook_loop, 1),
        f"matrix products alone, batch {size}": (lambda: matrix_products(gan, size), 1),
    }
    times = {name: [] for name in contenders}
    for _ in range(TURNS):
        for name, (play, times_an_epoch) in contenders.items():
            began = time.perf_counter()
            play()
            times[name].append((time.perf_counter() - began) * times_an_epoch)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    own = medians[f"this notebook, batch {size}"]
    threads = f"{torch.get_num_threads()} threads"
    print(f"{platform.machine()}, {threads}, torch {torch.__version__}, in float32\n")
    print("| an epoch by | seconds | fastest to slowest turn | times the notebook's |")
    print("| --- | ---: | ---: | ---: |")
    for name, seconds in times.items():
        turns = f"{min(seconds):.1f} to {max(seconds):.1f}"
        print(f"| {name} | {medians[name]:.1f} | {turns} | {medians[name] / own:.2f} |")


if __name__ == "__main__":
    main()
