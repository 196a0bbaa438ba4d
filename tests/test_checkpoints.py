"""A run is never lost: exact resuming, and the faults that a checkpoint has to survive."""

import hashlib
import io
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, TINY, act_in, load_definitions, new_game, run, same, state

THREE = TINY | {"EPOCHS": 3}
LATEST, KEPT = "models/checkpoint.pth", "models/checkpoint.previous.pth"


@pytest.fixture(scope="module")
def gan(small):
    return small


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
    return folder, state(run(gan, THREE, folder))


@pytest.fixture(scope="module")
def two_epochs(gan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_epochs")
    run(gan, TINY, folder)
    return folder


@pytest.fixture
def started(two_epochs, tmp_path):
    """A folder in which two of the three epochs are done."""
    return shutil.copytree(two_epochs, tmp_path / "started")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.*")}


def assert_ends_like(whole, gan, folder):
    """Go on in folder to the third epoch: every bit must be as in the undisturbed run."""
    reference, reached = whole
    assert same(state(run(gan, THREE, folder)), reached)
    saved = gan.read_checkpoint(folder / LATEST)
    assert same({name: saved[name] for name in reached}, reached)
    for path in reference.glob("gan_images/*"):
        assert (folder / "gan_images" / path.name).read_bytes() == path.read_bytes()
    assert not list(folder.rglob("*.tmp"))


MOMENTS = [  # in the call-th call of a function of what, and how many epochs are saved then
    ("gan", "bce", 5, 0),  # of 9 calls an epoch
    ("gan", "bce", 14, 1),
    ("gan", "sample", 2, 1),
    ("gan", "save_image", 1, 0),
    ("gan", "save_image", 2, 1),
    ("os", "fsync", 2, 1),  # the second checkpoint is written, not yet in place
    ("os", "replace", 3, 1),  # the first is aside, the second not yet in place
    ("gan", "clear_output", 2, 2),
]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Folders in which another process trained: killed at each of MOMENTS, and one epoch."""
    folders = {moment: str(tmp_path_factory.mktemp("killed")) for moment in [*MOMENTS, "done"]}
    lines = f"""
        import os, signal
        from pathlib import Path
        from conftest import TINY, act_in, load_definitions, run
        gan, folders = load_definitions(*{SMALL}), {folders}
        done = folders.pop("done")
        for (owner, name, call, _), folder in folders.items() if hasattr(os, "fork") else ():
            if (child := os.fork()) == 0:
                act_in(locals()[owner], name, call, lambda: os.kill(os.getpid(), signal.SIGKILL))
                run(gan, TINY | {{"EPOCHS": 3}}, Path(folder))
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        run(gan, TINY | {{"EPOCHS": 1}}, Path(done))
    """
    command = [sys.executable, "-c", textwrap.dedent(lines)]
    subprocess.run(command, cwd=Path(__file__).parent, check=True)
    return {moment: Path(folder) for moment, folder in folders.items()}


def test_a_run_resumed_in_a_new_process_ends_with_the_same_bits(gan, whole, elsewhere):
    torch.randn(3)  # what is drawn elsewhere changes nothing
    assert len(gan.read_checkpoint(elsewhere["done"] / LATEST)["history"]) == 1
    assert_ends_like(whole, gan, elsewhere["done"])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(gan, whole, elsewhere, moment):
    assert_ends_like(whole, gan, elsewhere[moment])


@pytest.mark.parametrize("left_out", ["discriminator", "averaged", "adam_g", "adam_d"])
def test_the_comparison_notices_a_part_that_a_checkpoint_leaves_out(
    gan, whole, started, monkeypatch, left_out
):
    monkeypatch.setattr(gan, "PARTS", [name for name in gan.PARTS if name != left_out])
    assert not same(state(run(gan, THREE, started)), whole[1])


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_an_interrupt_says_what_is_saved_and_goes_on_to_the_same_bits(
    gan, whole, tmp_path, monkeypatch, moment
):
    owner, name, call, done = moment
    owner = {"gan": gan, "os": os}[owner]
    monkeypatch.setattr(owner, name, getattr(owner, name))  # to be restored
    act_in(owner, name, call, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt, match=f"^{done} epochs done: go on with RESUME = 1$"):
        run(gan, THREE, tmp_path)
    assert_ends_like(whole, gan, tmp_path)


def test_a_full_disk_is_an_error_that_keeps_the_last_checkpoint(gan, whole, started):
    resource = pytest.importorskip("resource")
    before = (started / LATEST).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        with pytest.raises(OSError, match="^.*File too large.*$") as error:
            run(gan, THREE, started)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(started / LATEST) in str(error.value)
    assert (started / LATEST).read_bytes() == before and not list(started.rglob("*.tmp"))
    assert_ends_like(whole, gan, started)


def test_a_file_is_on_the_disk_before_it_is_moved_into_place(gan, tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(gan.os, "fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr(gan.os, "replace", lambda *args: calls.append("replace") or replace(*args))
    gan.save_checkpoint(new_game(gan), [], TINY, tmp_path)
    assert calls == ["fsync", "replace"]


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def sound(contents):
    """The bytes of a checkpoint that holds this, with the right checksum."""
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue() + hashlib.sha256(file.getvalue()).digest()


DAMAGE = {  # of a checkpoint's bytes
    "one flipped bit": lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "runs code": lambda data: pickle.dumps(Bomb()),
    "sound, runs code": lambda data: sound(torch.load(io.BytesIO(data)) | {"history": Bomb()}),
    "a list": lambda data: sound([1, 2, 3]),
    "other contents": lambda data: sound({"weights": {}}),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_serves(
    gan, whole, started, monkeypatch, capsys, kind
):
    monkeypatch.chdir(started)
    damaged = DAMAGE[kind]((started / LATEST).read_bytes())
    (started / LATEST).write_bytes(damaged)
    run(gan, TINY | {"EPOCHS": 1}, started)  # enough to go on from the epoch before, and stop
    refused, going_on, *_ = capsys.readouterr().out.splitlines()
    assert refused.startswith(f"{started / LATEST} is not a sound checkpoint: ")
    assert going_on == "Going on after epoch 1, from checkpoint.previous.pth"
    assert (started / "models/checkpoint.damaged").read_bytes() == damaged, "not set aside"
    assert not (started / "exploded").exists()
    assert_ends_like(whole, gan, started)


def test_without_any_sound_checkpoint_it_stops_and_changes_no_file(gan, started):
    for path in (started / LATEST, started / KEPT):
        path.write_bytes(DAMAGE["one flipped bit"](path.read_bytes()))
    before = contents(started)
    for _ in range(2):  # also the second time
        with pytest.raises(ValueError, match="^No checkpoint in .* is sound: .* RESUME = 0"):
            run(gan, THREE, started)
    assert contents(started) == before


def test_whatever_bit_is_damaged_a_checkpoint_is_refused(gan, tmp_path):
    game = SimpleNamespace(**dict.fromkeys(gan.PARTS, torch.nn.Linear(1, 1)))
    gan.save_checkpoint(game, [{"loss": 0.5}], TINY, tmp_path)
    data = (tmp_path / "checkpoint.pth").read_bytes()

    def read(damaged):
        return gan.read_checkpoint(SimpleNamespace(read_bytes=lambda: damaged))

    assert read(data)["history"] == [{"loss": 0.5}]
    for at in range(len(data)):
        for damaged in (data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :], data[:at]):
            with pytest.raises(ValueError, match="not a sound checkpoint"):
                read(damaged)


def assert_refused(gan, parameters, folder, *words):
    """In one line that holds these words and the ways out; and no file is changed."""
    before = contents(folder)
    with pytest.raises(ValueError) as refusal:
        run(gan, parameters, folder)
    for part in (*words, str(folder / LATEST), "RESUME = 0", "OUTPUT_DIR"):
        assert part in str(refusal.value)
    assert "LATENT_DIM" not in str(refusal.value) and "\n" not in str(refusal.value)
    assert contents(folder) == before


def test_other_parameters_are_refused_with_the_ways_out(gan, started):
    other, words = {"BATCH_SIZE": 16, "SEED": 9}, ("BATCH_SIZE was 32, is 16", "SEED was 1, is 9")
    assert_refused(gan, THREE | other, started, *words)
    assert_refused(gan, TINY | {"EPOCHS": 1}, started, "2 epochs are done, more than EPOCHS")


@pytest.mark.parametrize(
    ("cell", "old", "new", "named"),
    [
        ("losses", "return bce(on_fake, ", "return 0.9 * bce(on_fake, ", "generator_loss"),
        ("losses", "zeros_like(on_fake)", "zeros_like(on_fake) + 0.1", "discriminator_loss"),
        ("steps", "cat([real, fake.detach()])", "cat([real, fake])", "discriminator_step"),
        ("steps", "loss_g = generator", "fake = -fake\n            loss_g = generator", "play"),
        ("players", "LeakyReLU(0.2)", "LeakyReLU(0.1)", "generator"),
        ("networks", "nn.Tanh()", "nn.Hardtanh()", "generator"),
        ("averages", "momentum=0.0", "momentum=0.5", "adam_g"),
        ("averages", "29 / (30 + ", "9 / (10 + ", "average_weights"),
        ("digits", "len(items) // size * size", "len(items) // size * size - size", "batches"),
    ],
)
def test_edited_code_of_the_game_is_refused_by_its_name(started, cell, old, new, named):
    assert_refused(load_definitions(*SMALL, (cell, old, new)), THREE, started, f"{named} was ")


def test_an_edited_helper_of_a_helper_is_refused_too(gan, tmp_path):
    helpers = "def target():\n    return 0.9\n\n\ndef scaled(x):\n    return target() * x\n\n\n"
    edits = [*SMALL, ("losses", "def generator_loss", f"{helpers}def generator_loss")]
    edits.append(("losses", "return bce(on_fake, ", "return scaled(1) * bce(on_fake, "))
    run(load_definitions(*edits), TINY, tmp_path)
    assert_refused(load_definitions(*edits, ("losses", "0.9", "0.8")), THREE, tmp_path, "target")


def test_edited_comments_are_not_refused(whole, started):
    comment = ("losses", "    return bce(on_fake, ", "\n    # comment\n    return bce(on_fake, ")
    docstring = ("players", "Return an MLP", "Return a multilayer perceptron")
    assert_ends_like(whole, load_definitions(*SMALL, comment, docstring), started)


def test_with_all_epochs_done_nothing_is_trained(gan, started, capsys, monkeypatch):
    monkeypatch.setattr(gan, "bce", lambda *args: pytest.fail("trained"))
    before = contents(started)
    assert len(run(gan, TINY, started)["history"]) == 2
    assert "Going on after epoch 2" in capsys.readouterr().out
    assert contents(started) == before


def test_starting_anew_keeps_the_old_game_until_a_new_one_is_saved(gan, started, monkeypatch):
    old = (started / LATEST).read_bytes()
    anew = TINY | {"RESUME": 0, "SEED": 5, "EPOCHS": 1}
    for name in ("bce", "save_image"):
        with monkeypatch.context() as patch:
            patch.setattr(gan, name, lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
            with pytest.raises(KeyboardInterrupt):
                run(gan, anew, started)
        assert (started / LATEST).read_bytes() == old
    run(gan, anew, started)
    assert (started / KEPT).read_bytes() == old
    assert gan.read_checkpoint(started / LATEST)["made_by"]["SEED"] == 5


@pytest.mark.parametrize("poisoned", ["bce", "average_weights"])  # the losses; the average alone
def test_a_run_that_is_no_longer_finite_stops_at_that_epoch(gan, started, monkeypatch, poisoned):
    before = contents(started)

    def poison(first, *_):
        if poisoned == "bce":
            return first.mean() * float("nan")
        first[0].fill_(float("nan"))

    monkeypatch.setattr(gan, poisoned, poison)
    with pytest.raises(FloatingPointError, match="^Epoch 3 .* LEARNING_RATE$"):
        run(gan, THREE, started)
    assert contents(started) == before


def test_a_checkpoint_holds_what_its_docstring_lists(gan, started):
    saved = torch.load(started / LATEST, weights_only=True)
    assert saved.keys() == {"made_by", "history", *gan.PARTS}
    assert all(name in gan.save_checkpoint.__doc__ for name in ("made_by", "history", "PARTS"))
