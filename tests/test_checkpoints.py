"""A run is never lost: exact resuming, and the faults that a checkpoint has to survive."""

import hashlib
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import SMALL, TINY, load_definitions, new_game, run, same

THREE = TINY | {"EPOCHS": 3}
LATEST, KEPT = "models/checkpoint.pth", "models/checkpoint.previous.pth"


@pytest.fixture(scope="module")
def gan(small):
    return small


def state(scope):
    """Everything that a run has reached."""
    parts = {name: getattr(scope["gan"], name).state_dict() for name in scope["PARTS"]}
    return parts | {"history": scope["history"]}


@pytest.fixture(scope="module")
def whole(gan, tmp_path_factory):
    """The folder and the final state of three epochs that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, state(run(gan, THREE, folder))


@pytest.fixture(scope="module")
def two_epochs(gan, tmp_path_factory):
    run(gan, TINY, folder := tmp_path_factory.mktemp("two_epochs"))
    return folder


@pytest.fixture
def started(two_epochs, tmp_path):
    """A folder in which two of the three epochs are done."""
    return shutil.copytree(two_epochs, tmp_path / "started")


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*.*") if path.name != ".lock"}


def opened(path):
    """What a checkpoint holds."""
    return torch.load(io.BytesIO(path.read_bytes()[:-32]), weights_only=True)


def assert_ends_like(whole, gan, folder):
    """Go on in folder to the third epoch: every bit must be as in the undisturbed run."""
    reference, reached = whole
    assert same(state(run(gan, THREE, folder)), reached)
    saved = opened(folder / LATEST)
    assert same({name: saved[name] for name in reached}, reached)
    for path in reference.glob("*/[eg]*.p*"):
        assert (folder / path.relative_to(reference)).read_bytes() == path.read_bytes()
    assert not list(folder.rglob("*.tmp"))


def interrupt(*_):
    raise KeyboardInterrupt


def act_in(owner, name, call, act):
    """Let owner's function of that name first do act(), in its call-th call."""
    real, calls = getattr(owner, name), []

    def acting(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            act()
        return real(*args, **kwargs)

    setattr(owner, name, acting)


MOMENTS = [  # in the call-th call of a function of what, and how many epochs are saved then
    ("Tensor", "backward", 3, 0),  # of 6 calls an epoch
    ("Tensor", "backward", 9, 1),
    ("gan", "save_image", 1, 0),
    ("gan", "save_image", 2, 1),
    ("os", "replace", 4, 1),  # one epoch has three moves: the second checkpoint is not yet aside
    ("os", "replace", 5, 1),  # it is aside, the new one not yet in place
    ("gan", "clear_output", 2, 2),
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folders in which another process trained until it was killed, by moment."""
    folders = {moment: str(tmp_path_factory.mktemp("killed")) for moment in MOMENTS}
    lines = f"""
        import os
        from torch import Tensor
        from test_checkpoints import SMALL, THREE, act_in, load_definitions, run
        gan = load_definitions(*SMALL)
        for (owner, name, call, _), folder in {folders}.items():
            if (child := os.fork()) == 0:
                act_in(locals()[owner], name, call, lambda: os.kill(os.getpid(), 9))
                run(gan, THREE, folder)
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    """
    command = [sys.executable, "-c", textwrap.dedent(lines)]
    subprocess.run(command, cwd=Path(__file__).parent, check=True)
    return {moment: Path(folder) for moment, folder in folders.items()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_bits(gan, whole, killed, moment):
    torch.randn(3)  # what is drawn elsewhere changes nothing
    assert_ends_like(whole, gan, killed[moment])


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_an_interrupt_says_what_is_saved_and_goes_on_to_the_same_bits(
    gan, whole, tmp_path, monkeypatch, moment
):
    owner, name, call, done = moment
    owner = {"gan": gan, "os": os, "Tensor": torch.Tensor}[owner]
    monkeypatch.setattr(owner, name, getattr(owner, name))  # to be restored
    act_in(owner, name, call, interrupt)
    way = "go on with RESUME = 1" if done else "nothing is saved yet"
    with pytest.raises(KeyboardInterrupt, match=f"^{done} epochs done: {way}$"):
        run(gan, THREE, tmp_path)
    assert_ends_like(whole, gan, tmp_path)


@pytest.mark.parametrize(("kilobytes", "named"), [(1, "epoch_003.png"), (400, "checkpoint.pth")])
def test_a_full_disk_is_an_error_that_names_the_file_and_keeps_the_last_checkpoint(
    gan, whole, started, kilobytes, named
):
    resource, before = pytest.importorskip("resource"), contents(started)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000 * kilobytes, hard))
    try:
        with pytest.raises(OSError, match=f"^.*{named}: File too large. What was saved before"):
            run(gan, THREE, started)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert before.items() <= contents(started).items() and not list(started.rglob("*.tmp"))
    assert_ends_like(whole, gan, started)


def test_a_file_is_on_the_disk_before_it_is_moved_into_place(gan, tmp_path, monkeypatch):
    calls, replace = [], os.replace
    monkeypatch.setattr(gan.os, "fsync", lambda _: calls.append("fsync"))
    monkeypatch.setattr(gan.os, "replace", lambda *args: calls.append("replace") or replace(*args))
    gan.write_file(tmp_path / "some.txt", b"text")
    assert (tmp_path / "some.txt").read_bytes() == b"text"
    assert calls == ["fsync", "replace"] + ["fsync"] * (os.name == "posix")  # the folder at last


def test_a_second_run_in_the_same_folder_is_refused(gan, started, monkeypatch):
    def second(*_):
        with pytest.raises(RuntimeError, match="^Another run uses .*models: .* OUTPUT_DIR$"):
            run(gan, THREE, started)
        raise KeyboardInterrupt

    before = contents(started)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gan, "train", second)
        run(gan, THREE, started)
    assert contents(started) == before
    assert len(run(gan, THREE, started)["history"]) == 3, "the lock was left behind"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def changed(data, **parts):
    """The bytes of a checkpoint with these parts instead, and the right checksum."""
    torch.save(torch.load(io.BytesIO(data)) | parts, file := io.BytesIO())
    return file.getvalue() + hashlib.sha256(file.getvalue()).digest()


def wrong_moments(data):
    """Moments of a wrong shape: torch takes them, and its fused Adam would corrupt memory."""
    adam = torch.load(io.BytesIO(data))["adam_g"]
    adam["state"][0]["exp_avg"] = torch.zeros(3)
    return changed(data, adam_g=adam)


def one_flipped_bit(data):
    return data[:5000] + bytes([data[5000] ^ 1]) + data[5001:]


DAMAGE = {
    "one flipped bit": one_flipped_bit,
    "cut short": lambda data: data[: len(data) // 2],
    "runs code": lambda data: pickle.dumps(Bomb()),
    "sound, runs code": lambda data: changed(data, history=Bomb()),
    "history of numbers": lambda data: changed(data, history=[1, 2]),
    "a part is missing": lambda data: changed(data, adam_g={}),
    "moments of a wrong shape": wrong_moments,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_it_serves(
    gan, whole, started, monkeypatch, capsys, kind
):
    monkeypatch.chdir(started)
    damaged = DAMAGE[kind]((started / LATEST).read_bytes())
    (started / LATEST).write_bytes(damaged)
    run(gan, TINY, started)  # the second epoch again
    refused, going_on, *_ = capsys.readouterr().out.splitlines()
    assert refused.startswith(f"{started / LATEST} is not a sound checkpoint: ")
    assert going_on == "Going on after epoch 1, from checkpoint.previous.pth"
    assert (started / "models/checkpoint.damaged").read_bytes() == damaged, "not set aside"
    assert not (started / "exploded").exists()
    assert_ends_like(whole, gan, started)


def test_without_any_sound_checkpoint_it_stops_and_changes_no_file(gan, started):
    for path in (started / LATEST, started / KEPT):
        path.write_bytes(one_flipped_bit(path.read_bytes()))
    before = contents(started)
    for _ in range(2):  # also the second time
        with pytest.raises(ValueError, match="^No checkpoint in .* is sound: .* RESUME = 0"):
            run(gan, THREE, started)
    assert contents(started) == before


@pytest.mark.parametrize("error", [PermissionError, OSError, MemoryError])
def test_what_is_no_damage_is_shown_as_it_is_and_no_file_is_touched(
    gan, started, monkeypatch, error
):
    def fail(path):
        raise broken

    before, broken = contents(started), error("of the machine")
    with monkeypatch.context() as patch, pytest.raises(error) as shown:
        patch.setattr(gan.Path, "read_bytes", fail)
        run(gan, THREE, started)
    assert shown.value is broken and contents(started) == before


def test_learning_rates_come_from_the_code_and_not_from_the_file(gan, started):
    saved, game = opened(started / LATEST), new_game(gan)
    saved["adam_g"]["param_groups"][0]["lr"] = 9.0
    gan.load(game, saved)
    assert game.adam_g.param_groups[0]["lr"] == TINY["LEARNING_RATE"]


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


EDITS = [  # cell, old text, new text, which entry is named
    ("losses", "return bce(on_fake, ", "return 0.9 * bce(on_fake, ", "generator_loss"),
    ("losses", "zeros_like(on_fake)", "zeros_like(on_fake) + 0.1", "discriminator_loss"),
    ("steps", "cat([real, fake.detach()])", "cat([real, fake])", "discriminator_step"),
    ("steps", "gan.adam_g.zero_grad()", "[x for x in [0.5]]", "generator_step"),
    ("steps", "loss_g = generator", "fake = -fake\n            loss_g = generator", "play"),
    ("players", "LeakyReLU(0.2)", "LeakyReLU(0.1)", "perceptron"),
    ("players", 'fused": True', 'fused": False', "GAN"),
    ("networks", "nn.Tanh()", "nn.Hardtanh()", "generator"),
    ("networks", "momentum=0.0", "momentum=0.5", "adam_g"),
    ("choice", "2 * chosen", "3 * chosen", "Choice"),
    ("averages", "29 / (30 + ", "9 / (10 + ", "average_weights"),
    ("digits", "len(items) // size * size", "len(items) // size * size - size", "batches"),
    ("evaluator", "- 2 * product", "- product", "frechet_distance"),
]


@pytest.mark.parametrize(("cell", "old", "new", "named"), EDITS)
def test_edited_code_of_the_game_is_refused_by_its_name(started, cell, old, new, named):
    edited = load_definitions(*SMALL, (cell, old, new))
    assert_refused(edited, THREE, started, f"{named} was ")


HELPERS = """SMOOTH = 0.9
def target(): return SMOOTH
def scaled(x): return target() * x
def generator_loss"""


def test_edited_helpers_and_numbers_that_a_loss_reads_are_refused_too(tmp_path):
    edits = [*SMALL, ("losses", "def generator_loss", HELPERS)]
    edits.append(("losses", "return bce(on_fake, ", "return scaled(1) * bce(on_fake, "))
    run(load_definitions(*edits), TINY, tmp_path)
    number, helper = ("losses", "SMOOTH = 0.9", "SMOOTH = 0.8"), ("losses", "* x", "+ x")
    assert_refused(load_definitions(*edits, number), THREE, tmp_path, "SMOOTH was 0.9, is 0.8")
    assert_refused(load_definitions(*edits, helper), THREE, tmp_path, "scaled was ")


def test_edited_comments_are_not_refused(whole, started):
    comment = ("losses", "    return bce(on_fake, ", "\n    # comment\n    return bce(on_fake, ")
    docstring = ("players", "Return an MLP", "Return a multilayer perceptron")
    assert_ends_like(whole, load_definitions(*SMALL, comment, docstring), started)


def test_a_loss_may_be_anything_that_can_be_called(gan):
    lines = """
        class Loss:
            def __init__(self, smooth): self.smooth = smooth
            def __call__(self, on_fake): return bce(on_fake, on_fake) * self.smooth
        class Other(Loss):
            scale = 2
        def make(smooth): return lambda on_fake: bce(on_fake, on_fake) * smooth
        @torch.no_grad()
        def first(x, *, smooth=1): return smooth
        @torch.no_grad()
        def second(x, *, smooth=2): return smooth
        def third(x, smooth=1): return smooth
        def fourth(x, smooth=2): return smooth
        def recursive(step):
            def f(x): return f(x - step)
            return f
        losses = [make(1.0), make(2.0), first, second, third, fourth, recursive(1), recursive(2)]
        for each in [*losses, first.__wrapped__, second.__wrapped__, Other]: each.__qualname__ = "f"
        losses += [Loss(1), Loss(2), Other(1), Loss, Other, torch.add, torch.sub, nn.Tanh()]
        losses += [nn.Sequential(), nn.Sequential(nn.Tanh()), nn.HuberLoss(), nn.HuberLoss(delta=2)]
        losses += [partial(third, 1), partial(third, 2), partial(torch.add, 1), partial(third, x=1)]
        losses += [Loss(1).__call__, Loss(2).__call__, {8}, {8, 0}]
    """
    exec(textwrap.dedent(lines), scope := dict(vars(gan)))
    fingerprints = [gan.code_of(loss) for loss in scope["losses"]]
    assert len(set(fingerprints)) == len(fingerprints)
    assert not any(re.search("0x[0-9a-f]{6}", text) for text in fingerprints), "an address"
    assert gan.code_of({8, 0}) == gan.code_of({0, 8}) and list({8, 0}) != list({0, 8})


def test_starting_anew_keeps_the_old_game_until_a_new_one_is_saved(gan, started, monkeypatch):
    old, anew = (started / LATEST).read_bytes(), TINY | {"RESUME": 0, "SEED": 5, "EPOCHS": 1}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(gan, "bce", interrupt)
        run(gan, anew, started)
    assert (started / LATEST).read_bytes() == old
    run(gan, anew, started)
    assert (started / KEPT).read_bytes() == old
    assert opened(started / LATEST)["made_by"]["SEED"] == 5


POISONS = [  # the losses, the average
    (torch, "binary_cross_entropy_with_logits", lambda x, *_, **__: x.mean() / 0),
    (torch.Tensor, "lerp_", lambda mean, *_: mean.mul_(float("nan"))),
]


@pytest.mark.parametrize(("owner", "name", "poison"), POISONS)
def test_a_run_that_is_no_longer_finite_stops_at_that_epoch(
    gan, started, monkeypatch, owner, name, poison
):
    before = contents(started)
    monkeypatch.setattr(owner, name, poison)
    with pytest.raises(FloatingPointError, match="^Epoch 3 .* LEARNING_RATE$"):
        run(gan, THREE, started)
    assert contents(started) == before
