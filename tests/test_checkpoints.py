"""A run is never lost: exact resuming, the name of a game, and the faults to be survived."""

import io
import itertools
import multiprocessing
import os
import re
import signal
from contextlib import redirect_stdout
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, TINY, load_definitions, new_game, run, small

THREE = TINY | {"EPOCHS": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of three epochs that nothing disturbed."""
    run(small, THREE, folder := tmp_path_factory.mktemp("whole"))
    return folder


@pytest.fixture
def started(tmp_path):
    """A folder in which two of the three epochs are done."""
    run(small, TINY, tmp_path)
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.*")}


def assert_ends_like(whole, folder, done):
    """Go on in folder, where done epochs are saved, to the third; return what was printed."""
    with redirect_stdout(io.StringIO()) as printed:
        run(small, THREE, folder)
    assert f": {done} epochs are done (EPOCHS = 3)\n" in printed.getvalue()
    for path in whole.glob("*/[deg]*.p*"):  # the weights of both players, the digits of each epoch
        assert (folder / path.relative_to(whole)).read_bytes() == path.read_bytes(), path
    return printed.getvalue()


def train_until(signal_name, name, call, folder):
    """Train in folder until that signal comes, in the call-th call of the function of that name."""
    owner, calls = {"backward": torch.Tensor, "replace": os}[name], itertools.count(1)
    function = getattr(owner, name)

    def stopping(*args, **kwargs):
        if next(calls) == call:
            os.kill(os.getpid(), getattr(signal, signal_name))
        return function(*args, **kwargs)

    setattr(owner, name, stopping)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run(load_definitions(*SMALL), THREE, folder)


MOMENTS = [  # signal, function, call, and how many epochs are saved then
    ("SIGKILL", "backward", 9, 1),  # of 6 calls an epoch
    ("SIGKILL", "replace", 3, 1),  # the second checkpoint is written, and not yet in its place
    ("SIGKILL", "replace", 4, 2),  # it is in its place, the picture of its epoch is not
    ("SIGINT", "backward", 3, 0),
]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(whole, tmp_path, moment):
    *stop, done = moment
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torchvision", "matplotlib.pyplot", "nbformat", "pytest"])
    process = processes.Process(target=train_until, args=(*stop, tmp_path))
    process.start()
    process.join()
    assert_ends_like(whole, tmp_path, done)


def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_what_was_saved(started):
    resource, before = pytest.importorskip("resource"), contents(started)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))  # a checkpoint is larger
    try:
        with pytest.raises(OSError, match=r"checkpoint-\w{8}\.1\.pth: File too large"):
            run(small, THREE, started)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(started) == before


@pytest.mark.parametrize("done", [0, 1])
def test_a_damaged_checkpoint_is_named_and_the_other_one_serves(whole, started, done):
    newer, older = sorted(started.glob("models/checkpoint-????????.?.pth"))
    content = newer.read_bytes()
    newer.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])  # one bit
    if done == 0:  # both
        older.write_bytes(older.read_bytes()[:5000])
    printed = assert_ends_like(whole, started, done)
    damaged = re.findall("^(.*) is damaged, and not used$", printed, flags=re.M)
    assert damaged == [str(newer), str(older)][: 2 - done]


def name_of(gan, **parameters):
    return gan.game_name(new_game(gan), SimpleNamespace(**TINY | parameters))


EDITS = [  # cell, old text, new text; none of them shows in the networks or optimizers as printed
    ("losses", "return bce(on_fake, ", "return 0.9 * bce(on_fake, "),
    ("losses", "\n\ndef generator_loss", "\n\nSMOOTH = 0.9\n\n\ndef generator_loss"),
    ("players", "return torch.randn(", "return torch.rand("),
    ("steps", "gan.adam_g.zero_grad()", "pass"),
    ("networks", "torch.manual_seed(seed)", "torch.manual_seed(seed + 1)"),
    ("choice", "2 * chosen", "3 * chosen"),
    ("averages", "29 / (30 + ", "9 / (10 + "),
]


def test_the_name_follows_from_the_game_and_from_nothing_else():
    names = [name_of(small), *(name_of(load_definitions(*SMALL, edit)) for edit in EDITS)]
    for parameter in {"DATASET": "KMNIST"}, {"SEED": 2}, {"LIMIT": 101}, {"BATCH_SIZE": 16}:
        names.append(name_of(small, **parameter))
    names.append(small.game_name(new_game(small, rate=9), SimpleNamespace(**TINY)))
    edited = load_definitions(*SMALL)
    for factor in (0.8, 0.9):  # without text, as in a cell under %%time
        exec(f"def generator_loss(on_fake): return {factor} * on_fake.mean()", vars(edited))
        names.append(name_of(edited))
    assert len(set(names)) == len(names)
    comment = ("losses", "    return bce(on_fake, ", "\n    # comment\n    return bce(on_fake, ")
    judge = ("evaluator", "- 2 * trace_of_root", "- trace_of_root")
    assert name_of(load_definitions(*SMALL, comment, judge)) == name_of(small)
    assert name_of(small, EPOCHS=9, RESUME=0, OUTPUT_DIR="elsewhere") == name_of(small)


def test_an_edited_game_begins_anew_and_the_old_one_is_there_again(whole, started):
    folder = started / "gan_images"
    for name in ("epoch_mine.png", "progress.gif"):  # the second is a film of two epochs
        (folder / name).touch()
    run(load_definitions(*SMALL, EDITS[0]), TINY | {"EPOCHS": 1}, started)
    assert {path.name for path in folder.iterdir()} == {"epoch_001.png", "epoch_mine.png"}
    assert_ends_like(whole, started, done=2)


def test_with_all_epochs_done_nothing_is_played_unless_resume_is_0(started, capsys):
    before = contents(started)
    run(small, TINY | {"EPOCHS": 1}, started)
    assert ": 2 epochs are done (EPOCHS = 1)\n" in capsys.readouterr().out
    assert contents(started) == before
    assert len(run(small, TINY | {"EPOCHS": 1, "RESUME": 0}, started)["history"]) == 1
    assert [path.name for path in started.glob("gan_images/*")] == ["epoch_001.png"]


@pytest.mark.parametrize("name", ["bce", "lerp_"])
def test_a_run_that_is_no_longer_finite_stops_at_that_epoch(started, monkeypatch, name):
    before = contents(started)
    if name == "bce":  # the losses, not the weights
        monkeypatch.setattr(small, name, lambda logits, _: logits.mean() + float("inf"))
    else:  # the average, not the losses
        monkeypatch.setattr(torch.Tensor, name, lambda mean, *_: mean.mul_(float("nan")))
    with pytest.raises(FloatingPointError, match="^Epoch 3 .* LEARNING_RATE$"):
        run(small, THREE, started)
    assert contents(started) == before
