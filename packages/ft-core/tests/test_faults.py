"""Bad input and full disks: one line, exit code 2, nothing half-written and nothing lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

Change = Callable[[Path], object]


@pytest.fixture
def check_refused(ft: Any, tree: Any, tmp_path: Path) -> Callable[..., str]:
    """`check_refused(config, *words)`: `ft train` exits with 2, says one line and leaves every file as it was."""

    def check(config: Path, *words: object) -> str:
        before = tree(tmp_path)
        done = ft("train", config, *words)
        assert (done.code, done.out) == (2, "")
        said = [line for line in done.err.splitlines() if line.startswith("ft train: ")]
        assert said == [done.message]
        assert done.err.endswith("\n")
        assert "Traceback" not in done.err
        # Before it there may be the line that names the model and the device, and no more.
        assert len(done.err.splitlines()) <= 2
        assert tree(tmp_path) == before
        return str(done.message.removeprefix("ft train: "))

    return check


# -- configuration


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learning_rate=1"], "unknown key 'learning_rate'; did you mean 'training.learning_rate'? (allowed: model, "),
        (["training.learnin_rate=1"], "unknown key 'training.learnin_rate'; did you mean 'training.learning_rate'? ("),
        (
            ["training.optimizer=adamw_8bits"],
            "training.optimizer: 'adamw_8bits' is not allowed; did you mean 'adamw",
        ),
        (["quantization=fp8"], "quantization: 'fp8' is not available in this version (allowed: none, nf4, int8)"),
        (["method=sfd"], "method: no method 'sfd'; did you mean 'sft'? (allowed: "),
        (["max_length=1000"], "max_length 1000 is more than the 512 positions of "),
        (["lora.targets=[q_porj]"], "lora.targets: the model has no module 'q_porj'; did you mean 'q_proj'? (it has: "),
        (
            ["lora.targets=[lm_head,q_proj]"],
            "lora.targets: an adapter on the head 'lm_head' would not be trained, the loss uses its weight directly; "
            "to train it whole, take it out and set lora.modules_to_save: [lm_head]",
        ),
        (["lora.modules_to_save=[head]"], "lora.modules_to_save: the model has no module 'head'"),
        (["eval_split=60"], "eval_split 60 of 60 distinct rows would hold out 60 and train on 0; both sides need"),
        (["eval_data=nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        (["max_steps"], "'max_steps' is no override: write key=value, such as training.max_steps=100"),
    ],
)
def test_a_wrong_configuration(configure: Any, check_refused: Any, words: list[str], message: str) -> None:
    assert check_refused(configure(), *words).startswith(message)


def test_a_wrong_option(ft: Any, configure: Any) -> None:
    assert ft("train", configure(), "--resum", "--overwrit").code == 2
    done = ft("train", configure(), "--nothing")
    assert (done.code, done.err) == (
        2,
        "ft train: unrecognized arguments: --nothing; a setting is written without dashes, as key=value "
        "(see ft train --help)\n",
    )
    assert ft("train").err == "ft train: the following arguments are required: CONFIG.yaml (see ft train --help)\n"


# -- models


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model MODEL has no weights: "),
        (
            lambda folder: os.truncate(folder / "model.safetensors", 100_000),
            "model MODEL: model.safetensors is truncated, 100000 bytes are there of ",
        ),
        (
            lambda folder: os.truncate(folder / "model.safetensors", 100),
            "model MODEL: model.safetensors is no whole safetensors file (it ends within its header)",
        ),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
            "model MODEL has only pickled weights (pytorch_model.bin), which can run code when loaded",
        ),
        (shutil.rmtree, "no model folder MODEL (looked in "),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer of MODEL cannot be loaded: "),
    ],
)
def test_a_bad_model_folder(
    configure: Any, check_refused: Any, tiny: Path, tmp_path: Path, change: Change, message: str
) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    change(folder)
    config = configure(model=str(folder))
    assert check_refused(config).startswith(message.replace("MODEL", str(folder)))


# -- data


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "rows.jsonl",
            '{"text": "a"}\n\n{"text": "b"\n{"text": "c"}\n',
            "PATH, line 3: broken JSON: Expecting ',' delimiter at column ",
        ),
        ("rows.jsonl", "", "PATH: the file is empty"),
        ("rows.jsonl", "\n \n", "PATH: the file is empty"),
        (
            "rows.jsonl",
            '{"question": "a", "answer": "b"}\n',
            "PATH, line 1: columns 'question', 'answer' fit no format; needed are ",
        ),
        ("rows.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "PATH, line 2: "),
        ("rows.jsonl", '{"messages": [{"role": "usr", "content": "a"}]}\n', "PATH, line 1: "),
        ("rows.csv", 'prompt,completion\na,b\n"c\n', "PATH, line "),
        ("rows.jsonl", b'{"text": "\xff"}\n', "PATH, line 1: is not UTF-8"),
        ("rows.parquet", b"PAR1", "PATH: is no whole parquet file: "),
        ("rows.txt", "  \n", "PATH: the file is empty"),
    ],
)
def test_bad_data(
    configure: Any, check_refused: Any, tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / f"bad-{name}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert check_refused(configure(data=str(path))).startswith(message.replace("PATH", str(path)))


def test_data_that_is_not_there(configure: Any, check_refused: Any, tmp_path: Path) -> None:
    config = configure(data=str(tmp_path / "row.jsonl"))
    assert check_refused(config) == (
        f"{tmp_path}/row.jsonl: no such file or folder (did you mean '{tmp_path}/rows.jsonl'?)"
    )


def test_rows_that_are_measured_and_trained_on_too(
    ft: Any, configure: Any, tmp_path: Path, sums: Any, write_rows: Any
) -> None:
    same = write_rows(tmp_path / "other-name.jsonl", [*sums(60)[:3], *sums(4, seed=7)])
    done = ft("train", configure(eval_data=str(same), training={"max_steps": 1}))
    assert done.code == 0
    known = {json.dumps(row) for row in sums(60)}
    count = sum(json.dumps(row) in known for row in [*sums(60)[:3], *sums(4, seed=7)])
    assert count >= 3
    assert f"warning: {count} of the 7 held-out rows are trained on too, word for word" in done.err
    apart = ft("train", configure(), "eval_split=5", "training.max_steps=1", "--overwrite")
    assert "trained on too" not in apart.err


def test_no_answer_within_max_length(configure: Any, check_refused: Any) -> None:
    assert check_refused(configure(), "max_length=4").startswith(
        "none of 60 rows has a trained token within max_length 4 (60 are longer): raise max_length or look at the data"
    )


def test_overlong_rows_are_counted_and_the_run_goes_on(
    ft: Any, configure: Any, tmp_path: Path, sums: Any, write_rows: Any
) -> None:
    import json

    long = [{"prompt": "a", "completion": "word " * 200}] * 3
    data = write_rows(tmp_path / "mixed.jsonl", [{"prompt": "a", "completion": "b"}] * 7 + long)
    write_rows(tmp_path / "text.jsonl", [{"text": "word " * 100}, {"text": "short"}])
    done = ft("train", configure(data=str(data)), "training.max_steps=1")
    assert done.code == 0
    assert "3 of 10 train rows are longer than max_length 64: cut\n" in done.err
    counts = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))["data"]
    assert (counts["train_rows"], counts["overlong_rows"], counts["dropped_rows"]) == (10, 3, 0)
    done = ft("train", configure(data=str(tmp_path / "text.jsonl")), "training.max_steps=1", "--overwrite")
    assert "1 of 2 train rows is longer than max_length 64: split\n" in done.err


# -- the output folder


def test_an_output_that_holds_something(ft: Any, configure: Any, check_refused: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.write_text("mine", encoding="utf-8")
    assert check_refused(configure()) == f"output {run} is a file: give a folder"
    run.unlink()
    run.mkdir()
    (run / "notes.txt").write_text("mine", encoding="utf-8")
    message = f"output {run} holds other files (notes.txt, …): give an empty or a new folder"
    for words in ([], ["--overwrite"], ["--resume"]):
        assert check_refused(configure(), *words) == message
    (run / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (run / "notes.txt").unlink()
    assert check_refused(configure()).startswith(f"output {run} holds other files (checkpoints, …)")
    shutil.rmtree(run)
    run.mkdir()
    assert ft("train", configure()).code == 0  # an empty folder is fine
    assert check_refused(configure()) == (
        f"output {run} already holds a run: go on with --resume, or start anew with --overwrite"
    )


def test_overwriting_that_fails_keeps_the_old_run(ft: Any, configure: Any, check_refused: Any, tmp_path: Path) -> None:
    assert ft("train", configure()).code == 0
    for word in ("model=./nowhere", "data=nowhere.jsonl", "lora.targets=[nothing]", "max_length=3"):
        check_refused(configure(), "--overwrite", word)
    assert ft("train", configure(), "--overwrite", "training.seed=5").code == 0
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert values["training"]["seed"] == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "rows.jsonl", "run"]


def test_an_output_below_folders_that_are_not_there(
    configure: Any, check_refused: Any, ft: Any, tmp_path: Path
) -> None:
    config = configure(output=str(tmp_path / "a" / "b" / "run"))
    check_refused(config, "lora.targets=[nothing]")  # and so leaves neither a nor b
    assert ft("train", config).code == 0
    (tmp_path / "file").touch()
    assert check_refused(config, f"output={tmp_path}/file/run") == (
        f"cannot make the run folder {tmp_path}/file/run: Not a directory"
    )


def test_a_loss_that_is_no_number(ft: Any, configure: Any, tmp_path: Path) -> None:
    done = ft(
        "train", configure(lora=None), "training.learning_rate=1e30", "training.optimizer=sgd", "training.max_steps=9"
    )
    assert done.code == 2
    assert " at step " in done.message
    assert done.message.startswith(("ft train: loss is nan", "ft train: grad norm is"))
    assert not (tmp_path / "run" / "model").exists()


# -- a full disk


@pytest.fixture
def lasting(configure: Any, tmp_path: Path) -> Path:
    """A configuration with a checkpoint every 5 of 20 steps, whose optimizer's state is the largest file."""
    return Path(configure(training={"max_steps": 20, "batch_size": 1, "save_every": 5}, packing=False))


@pytest.fixture
def undisturbed(lasting: Path, ft: Any, losses: Any, tmp_path: Path) -> list[tuple[int, str]]:
    assert ft("train", lasting, f"output={tmp_path / 'whole'}").code == 0
    found: list[tuple[int, str]] = losses(tmp_path / "whole")
    return found


def limit_when(process: Any, condition: Callable[[], bool], size: Callable[[], int]) -> None:
    """From the moment that the condition holds, no file of the process may grow beyond `size()` bytes."""
    while not condition():
        assert process.running, process.log.read_text(encoding="utf-8")
        time.sleep(0.001)  # the process wants the core
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size(), resource.RLIM_INFINITY))


def whole_checkpoints(run: Path) -> list[str]:
    from ft_core.training.trainer import last_whole_checkpoint

    last = last_whole_checkpoint(run / "checkpoints")
    assert last is None or last.is_dir()
    return sorted(p.name for p in (run / "checkpoints").iterdir())


needs_prlimit = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs prlimit, which Linux has")


@needs_prlimit
@pytest.mark.parametrize("what", ["adapter_model.safetensors", "optimizer.pt"])
def test_a_checkpoint_that_cannot_be_written(
    lasting: Path, undisturbed: Any, tmp_path: Path, start_ft: Any, ft: Any, losses: Any, what: str
) -> None:
    run = tmp_path / "run"
    first = run / "checkpoints" / "checkpoint-5"
    process = start_ft("train", lasting)
    limit_when(process, first.is_dir, lambda: (first / what).stat().st_size - 1)
    failed = process.wait()
    assert failed.code == 2, failed.err
    step = int(failed.message.partition("the checkpoint of step ")[2].partition(" ")[0])
    assert failed.message.startswith(f"ft train: cannot save the checkpoint of step {step} in {run}/checkpoints: ")
    assert failed.message.endswith(
        f"; the last good checkpoint is checkpoint-{step - 5}; free some space and go on with --resume"
    )
    assert "Traceback" not in failed.err
    assert f"checkpoint-{step - 5}" in whole_checkpoints(run)
    assert f"checkpoint-{step}" not in whole_checkpoints(run)
    assert not list(run.rglob("*.partial*"))
    done = ft("train", lasting, "--resume")
    assert done.code == 0, done.err
    assert losses(run) == undisturbed


@needs_prlimit
def test_a_line_of_metrics_that_cannot_be_written(
    lasting: Path, undisturbed: Any, tmp_path: Path, start_ft: Any, ft: Any, losses: Any
) -> None:
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    process = start_ft("train", lasting, "training.save_every=1000")
    limit_when(process, lambda: metrics.is_file() and metrics.stat().st_size > 0, lambda: metrics.stat().st_size + 200)
    failed = process.wait()
    assert failed.code == 2, failed.err
    assert failed.message == f"ft train: cannot write {metrics}: File too large; free some space, go on with --resume"
    assert "Traceback" not in failed.err
    done = ft("train", lasting, "--resume")
    assert done.code == 0, done.err
    assert losses(run) == undisturbed


@needs_prlimit
@pytest.mark.parametrize("full", [False, True])
def test_a_result_that_cannot_be_written(
    configure: Any, tmp_path: Path, start_ft: Any, ft: Any, losses: Any, full: bool
) -> None:
    config = configure(lora=None if full else {"r": 8}, training={"max_steps": 6, "save_every": 6})
    assert ft("train", config, f"output={tmp_path / 'whole'}").code == 0
    run = tmp_path / "run"
    name = "model" if full else "adapter"
    file = f"{name}.safetensors" if full else "adapter_model.safetensors"
    process = start_ft("train", config)
    checkpoint = run / "checkpoints" / "checkpoint-6"
    limit_when(process, checkpoint.is_dir, lambda: (tmp_path / "whole" / name / file).stat().st_size - 1)
    failed = process.wait()
    assert failed.code == 2, failed.err
    assert failed.message.startswith(f"ft train: cannot save {run}/{name}: ")
    assert failed.message.endswith("; the checkpoint checkpoint-6 is whole; free some space and go on with --resume")
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml", "environment.json", "metrics.jsonl"]
    done = ft("train", config, "--resume")
    assert done.code == 0, done.err
    assert losses(run) == losses(tmp_path / "whole")
    assert (run / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """`small_disk(size)`: a file system of that size, or the same one resized."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount") or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("a file system of its own can only be mounted by root: run the tests as root to have this one")
    made = False

    def mount(size: str) -> Path:
        nonlocal made
        options = f"{'remount,' if made else ''}size={size}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        made = True
        return folder

    yield mount
    if made:
        subprocess.run(["umount", "-l", folder], check=True)


def test_no_space_left(
    small_disk: Callable[[str], Path], lasting: Path, undisturbed: Any, ft: Any, losses: Any, tmp_path: Path
) -> None:
    one = sum(f.stat().st_size for f in (tmp_path / "whole" / "checkpoints" / "checkpoint-20").rglob("*"))
    disk = small_disk(f"{int(1.6 * one)}")
    run = disk / "run"
    failed = ft("train", lasting, f"output={run}")
    assert failed.code == 2
    assert failed.message.startswith(f"ft train: cannot save the checkpoint of step 10 in {run}/checkpoints: ")
    assert failed.message.endswith(
        "; the last good checkpoint is checkpoint-5; free some space and go on with --resume"
    )
    assert whole_checkpoints(run) == ["checkpoint-5"]
    again = ft("train", lasting, f"output={run}", "--resume")
    assert again.code == 2
    assert again.message == failed.message
    small_disk(f"{20 * one}")
    done = ft("train", lasting, f"output={run}", "--resume")
    assert done.code == 0, done.err
    assert losses(run) == undisturbed


def test_no_space_for_the_first_file(small_disk: Callable[[str], Path], lasting: Path, ft: Any) -> None:
    disk = small_disk("4096")
    (disk / "filler").write_bytes(b"x" * 4096)
    done = ft("train", lasting, f"output={disk / 'run'}")
    assert done.code == 2
    assert done.message.startswith(f"ft train: cannot write {disk}/run/config.yaml: No space left on device")
    assert [p.name for p in disk.iterdir()] == ["filler"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_an_output_where_no_file_can_be_made(ft: Any, configure: Any) -> None:
    """The folder is there, and the system says of each new file that its folder is not."""
    done = ft("train", configure(), "output=/proc/self/run")
    assert done.code == 2
    assert done.message == "ft train: cannot make the run folder /proc/self/run: No such file or directory"
