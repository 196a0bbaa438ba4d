"""A run is never lost: exact resuming, and the faults that a checkpoint has to survive."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, random_images, run, same, tiny_judge

THREE = TINY | {"EPOCHS": 3}
LATEST, KEPT = "checkpoint.pth", "checkpoint.previous.pth"


@pytest.fixture(autouse=True)
def interruptible():
    """Let SIGINT interrupt, also where the shell that started the tests ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(gan, tmp_path_factory):
    """The folder and the final state of three epochs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(gan, THREE, folder).state_dict()


@pytest.fixture
def started(gan, tmp_path):
    """A folder in which two of the three epochs are done."""
    run(gan, TINY, tmp_path)
    return tmp_path


def assert_ends_like(whole, gan, folder):
    """Go on in folder to the third epoch: every bit must be as in the undisturbed run."""
    reference, state = whole
    assert same(run(gan, THREE, folder).state_dict(), state)
    assert same(gan.read_checkpoint(folder / LATEST)["game"], state)
    for epoch in (1, 2, 3):
        name = f"epoch_00{epoch}.png"
        assert (folder / name).read_bytes() == (reference / name).read_bytes()
    assert not list(folder.glob("*.tmp"))


def run_elsewhere(folder, fault="", epochs=3):
    """Train in a new process, after the lines of fault; return the finished process."""
    lines = f"""
        import os, signal, sys
        from pathlib import Path
        from conftest import TINY, load_definitions, run
        gan = load_definitions()
        def die_in(owner, name, call):  # by SIGKILL, in the call-th call
            real, calls = getattr(owner, name), []
            def dying(*args, **kwargs):
                calls.append(name)
                if len(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)
            setattr(owner, name, dying)
        {fault}
        run(gan, TINY | {{"EPOCHS": {epochs}}}, Path(sys.argv[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(lines), str(folder)]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)


def test_a_run_resumed_in_a_new_process_ends_with_the_same_bits(gan, whole, tmp_path):
    assert run_elsewhere(tmp_path, epochs=1).returncode == 0
    torch.randn(3)
    assert_ends_like(whole, gan, tmp_path)


@pytest.mark.parametrize("left_out", ["generator_adam", "discriminator_adam", "averaged"])
def test_the_comparison_notices_a_part_that_a_checkpoint_leaves_out(
    gan, whole, tmp_path, monkeypatch, left_out
):
    parts = gan.Game.parts
    fewer = {name for name in whole[1] if name not in (left_out, "history")}
    monkeypatch.setattr(gan.Game, "parts", lambda game: {name: parts(game)[name] for name in fewer})
    run(gan, TINY, tmp_path)
    resumed = run(gan, THREE, tmp_path)
    monkeypatch.undo()
    assert not same(resumed.state_dict(), whole[1])


def test_the_comparison_notices_random_numbers_that_forget_the_epoch(gan, tmp_path, monkeypatch):
    def run_on_one_stream(parameters, folder):
        stream = torch.Generator().manual_seed(0)
        monkeypatch.setattr(gan, "random_numbers", lambda *args: stream)
        return run(gan, parameters, folder)

    undisturbed = run_on_one_stream(THREE, tmp_path / "whole")
    run_on_one_stream(TINY, tmp_path / "halves")
    resumed = run_on_one_stream(THREE, tmp_path / "halves")
    assert not same(resumed.state_dict(), undisturbed.state_dict())


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        ("gan.os", "fsync", 3),  # in the first checkpoint
        ("gan.os", "fsync", 7),  # the second checkpoint is written, not yet in place
        ("gan.os", "replace", 5),  # the first is aside, the second not yet in place
        ("gan", "train_epoch", 3),  # between two writes
    ],
)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(
    gan, whole, tmp_path, owner, name, call
):
    killed = run_elsewhere(tmp_path, f"die_in({owner}, {name!r}, {call})")
    assert killed.returncode == -signal.SIGKILL
    assert_ends_like(whole, gan, tmp_path)


@pytest.mark.parametrize("resumes", [0, 1])
@pytest.mark.parametrize("call", [2, 5])  # in mid-epoch: an epoch has three steps
def test_an_interrupt_says_what_is_saved_and_goes_on_to_the_same_bits(
    gan, whole, tmp_path, monkeypatch, capsys, call, resumes
):
    step, calls = gan.generator_step, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(signal.SIGINT)
        return step(*args)

    monkeypatch.setattr(gan, "generator_step", interrupted)
    game = run(gan, THREE | {"RESUME": resumes}, tmp_path)
    done = (call - 1) // 3
    said = capsys.readouterr().out.splitlines()[-1]
    way_on = ", all saved: run from this cell on, with RESUME = 1, to go on" if done else ""
    assert said == f"Interrupted after {done} epochs{way_on}."
    assert len(calls) == call and len(game.history) == done
    untouched = gan.Game(THREE, torch.device("cpu"))
    if done:
        gan.resume(untouched, tmp_path)
    assert same(game.state_dict(), untouched.state_dict()), "the cells below see half an epoch"
    assert_ends_like(whole, gan, tmp_path)


def test_an_interrupt_while_batch_norm_is_measured_leaves_the_average_usable(
    gan, tmp_path, monkeypatch
):
    measure = gan.update_bn

    def interrupted(batches, network):
        measure((signal.raise_signal(signal.SIGINT) or batch for batch in batches), network)

    monkeypatch.setattr(gan, "update_bn", interrupted)
    game = run(gan, TINY, tmp_path)
    assert not game.history and not game.averaged.training


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_full_disk_is_an_error_that_keeps_the_last_checkpoint(gan, whole, tmp_path):
    run(gan, TINY | {"EPOCHS": 1}, tmp_path)
    before = (tmp_path / LATEST).read_bytes()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))"
    failed = run_elsewhere(tmp_path, limit)
    assert failed.returncode == 1
    assert f"{tmp_path / LATEST} could not be written: File too large" in failed.stderr
    assert (tmp_path / LATEST).read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    assert_ends_like(whole, gan, tmp_path)


def test_a_file_is_on_the_disk_before_it_is_moved_into_place(gan, tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            gan.os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))
        )
    gan.write_atomically(tmp_path / LATEST, torch.save, 1)
    assert calls[:2] == ["fsync", "replace"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def damage(gan, path, kind):
    data = bytearray(path.read_bytes())
    if kind == "one flipped bit":
        data[len(data) // 2] ^= 1
    elif kind == "cut short":
        data = data[: len(data) // 2]
    elif kind == "empty":
        data = b""
    elif kind == "not a checkpoint":
        data = pickle.dumps(Bomb())
    path.write_bytes(data)
    contents = {
        "runs code": {"format": gan.FORMAT, "parameters": TINY, "game": Bomb()},
        "another format": {"format": gan.FORMAT + 1, "parameters": TINY, "game": {}},
        "another content": [1, 2, 3],
    }
    if kind in contents:
        gan.write_atomically(path, gan.save_with_checksum, contents[kind])


KINDS = [
    "one flipped bit",
    "cut short",
    "empty",
    "not a checkpoint",
    "runs code",
    "another format",
    "another content",
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_serves(
    gan, whole, started, monkeypatch, capsys, kind
):
    monkeypatch.chdir(started)
    damage(gan, started / LATEST, kind)
    spoilt = (started / LATEST).read_bytes()
    run(gan, TINY | {"EPOCHS": 1}, started)  # enough to go on from the epoch before, and stop
    refused, going_on, *_ = capsys.readouterr().out.splitlines()
    assert refused.startswith(f"{started / LATEST} is not a sound checkpoint: ")
    assert going_on == f"Going on after epoch 1, from {started / KEPT}"
    assert (started / "checkpoint.damaged").read_bytes() == spoilt, "set aside, not lost"
    assert not (started / "exploded").exists()
    assert_ends_like(whole, gan, started)


def test_without_any_sound_checkpoint_it_stops_and_starts_nothing(gan, started):
    for name in (LATEST, KEPT):
        damage(gan, started / name, "one flipped bit")
    files = {path: path.read_bytes() for path in started.iterdir()}
    for _ in range(2):  # also the second time
        with pytest.raises(
            ValueError, match="^No checkpoint in .* is sound: start anew with GAN_RESUME=0"
        ):
            run(gan, THREE, started)
    assert {path: path.read_bytes() for path in started.iterdir()} == files


def test_whatever_bit_is_damaged_a_checkpoint_is_refused(gan, tmp_path):
    path = tmp_path / LATEST
    contents = {"format": gan.FORMAT, "parameters": TINY, "game": {"weights": torch.randn(20)}}
    gan.write_atomically(path, gan.save_with_checksum, contents)
    assert same(gan.read_checkpoint(path), contents)
    data = path.read_bytes()
    flipped = (
        data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        for at in range(len(data))
        for bit in range(8)
    )
    cut = (data[:length] for length in range(len(data)))
    for damaged in (*flipped, *cut):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a sound checkpoint"):
            gan.read_checkpoint(path)


def test_other_parameters_are_refused_with_the_ways_out(gan, started):
    before = (started / LATEST).read_bytes()
    for changed, words in (
        ({"BATCH_SIZE": 16, "SEED": 9}, ["BATCH_SIZE = 32, not 16", "SEED = 1, not 9"]),
        ({"EPOCHS": 1}, ["2 epochs done, more than EPOCHS"]),
    ):
        with pytest.raises(ValueError) as refusal:
            run(gan, THREE | changed, started)
        for part in (*words, "RESUME=0", "OUTPUT_DIR"):
            assert part in str(refusal.value)
        assert "LATENT_DIM" not in str(refusal.value) and "\n" not in str(refusal.value)
    assert (started / LATEST).read_bytes() == before


def test_other_networks_are_refused_with_the_ways_out(gan, started, monkeypatch):
    class Wider(gan.Discriminator):
        def __init__(self):
            super().__init__()
            self[1] = torch.nn.Linear(784, 600)

    monkeypatch.setattr(gan, "Discriminator", Wider)
    with pytest.raises(ValueError, match="^.* other networks: .* GAN_RESUME=0, .*$"):
        run(gan, THREE, started)


def test_with_all_epochs_done_nothing_is_trained(gan, started, capsys, monkeypatch):
    monkeypatch.setattr(gan, "train_epoch", lambda *args: pytest.fail("trained"))
    files = {path: path.read_bytes() for path in started.iterdir()}
    assert len(run(gan, TINY, started).history) == 2
    assert "nothing left to train" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in started.iterdir()} == files


def test_starting_anew_keeps_the_old_checkpoint_until_a_new_one_is_complete(
    gan, started, monkeypatch
):
    old = (started / LATEST).read_bytes()
    anew = TINY | {"RESUME": 0, "SEED": 5}
    with monkeypatch.context() as patch:
        patch.setattr(gan, "train_epoch", lambda *args: signal.raise_signal(signal.SIGINT))
        run(gan, anew, started)
    assert (started / LATEST).read_bytes() == old
    run(gan, anew | {"EPOCHS": 1}, started)
    assert (started / KEPT).read_bytes() == old
    assert gan.read_checkpoint(started / LATEST)["parameters"]["SEED"] == 5


def test_a_learning_rate_from_numpy_can_be_read_back(gan, tmp_path):
    rate = {"LEARNING_RATE": np.float64(5e-4)}
    parameters = gan.check_parameters(TINY | rate)
    run(gan, parameters | {"EPOCHS": 1}, tmp_path)
    assert gan.read_checkpoint(tmp_path / LATEST)["parameters"] == TINY | {"EPOCHS": 1}


@pytest.mark.parametrize("poison", ["the losses", "the last step"])
def test_a_run_that_is_no_longer_finite_stops_at_that_epoch(gan, started, monkeypatch, poison):
    before = (started / LATEST).read_bytes()
    game = gan.Game(THREE, torch.device("cpu"))
    gan.resume(game, started)
    two_epochs = gan.read_checkpoint(started / LATEST)["game"]

    def diverge(logits, label):
        return (logits * float("nan")).mean()

    def spoil(averaged, generator, step, update=gan.update_average):
        generator[0].weight.data.fill_(float("nan"))  # after both losses of the step
        update(averaged, generator, step)

    if poison == "the losses":
        monkeypatch.setattr(gan, "cross_entropy", diverge)
    else:
        monkeypatch.setattr(gan, "update_average", spoil)
        game.parameters = game.parameters | {"BATCH_SIZE": 96}  # an epoch of one step
    images = random_images(96)
    with pytest.raises(FloatingPointError, match="^Epoch 3: .* not finite.* LEARNING_RATE below"):
        gan.train(game, images, images, tiny_judge(gan), started, started)
    assert same(game.state_dict(), two_epochs)
    assert (started / LATEST).read_bytes() == before


def test_a_checkpoint_holds_what_its_docstring_lists(gan, started):
    checkpoint = torch.load(started / LATEST, weights_only=True)
    assert checkpoint.keys() == {"format", "parameters", "game"}
    described = gan.save_checkpoint.__doc__
    assert all(name in described for name in (*checkpoint, *checkpoint["game"]))
