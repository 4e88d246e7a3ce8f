"""Pushing to a Hub on this machine (hub_server.py), from other processes: huggingface_hub reads its settings once.

Most are forked from one (forks.py) that has read the settings of that Hub.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from hub_server import LARGE, TOKEN, Blob, HubServer, Repo, hub_server

from ft_export import merge
from ft_export.hub.licence import find_licence, said_licence

REPO = "me/dates"
SCRIPT = """
import json, sys, time
slept = time.sleep
time.sleep = lambda seconds: slept(min(seconds, 0.02))  # the waits between tries, and huggingface_hub's own
from ft_export import ExportError
from ft_export.hub.export import export
said = json.loads(sys.argv[1])
shown = []
try:
    made = export(said.pop("path"), progress=lambda done, total, what: shown.append([done, total, what]), **said)
except ExportError as error:
    print(json.dumps({"error": str(error), "shown": shown}))
else:
    print(json.dumps({"lines": made.lines, "next": made.next_command, "file": str(made.file), "shown": shown}))
"""
READ = """
import json, sys
import torch, transformers
if sys.argv[2] == "adapter":
    from peft import AutoPeftModelForCausalLM as kind
else:
    kind = transformers.AutoModelForCausalLM
model = kind.from_pretrained(sys.argv[1], dtype="auto")
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
torch.save(model.state_dict(), sys.argv[3])
print(json.dumps(tokenizer("Hello there, 2024")["input_ids"]))
"""


def environment_of(hub: HubServer, home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    known = {
        "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    return {name: value for name, value in {**kept, **known, **more}.items() if value}


IMPORTED = (
    "torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "peft",
    "ft_export.hub.export",
)
"""What every push or reader would spend its seconds on."""


@dataclass
class Pusher:
    """Runs exports, and whatever reads them back, in processes that know the server alone."""

    hub: HubServer
    home: Path
    forks: Forks

    def start(self, asked: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, asked], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment_of(self.hub, self.home, **environment),
        )  # fmt: skip

    def __call__(self, path: Path, environment: dict[str, str] | None = None, **said: Any) -> dict[str, Any]:
        """Push; with settings of its own in a process that reads them anew."""
        asked = self.words(path, **said)
        if environment is None:
            done = self.forks.run(SCRIPT, asked)
            code, out, err = done.returncode, done.stdout, done.stderr
        else:
            process = self.start(asked, **environment)
            out, err = process.communicate(timeout=240)
            code = process.returncode
        assert TOKEN not in out + err
        assert code == 0, err
        return dict(json.loads(out.splitlines()[-1]))

    @staticmethod
    def words(path: Path, **said: Any) -> str:
        """What SCRIPT is asked to do."""
        options = {"repo": REPO, **said.pop("options", {})}
        return json.dumps({"path": str(path), "options": {k: v for k, v in options.items() if v}, **said})

    def read(self, kind: str, to: Path, *snippets: str) -> None:
        """Load the repository's model, keep its weights, and run snippets, each with names of its own."""
        code = READ + "".join(f"exec({snippet!r}, {{'__name__': '__main__'}})\n" for snippet in snippets)
        done = self.forks.run(code, REPO, kind, to)
        assert done.returncode == 0, done.stderr


def code_in(card: str) -> str:
    """The Python that a card tells people to run."""
    found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home") / "hf home"


@pytest.fixture(scope="module")
def forks(server: HubServer, home: Path) -> Iterator[Forks]:
    """In place of conftest.py's, with the settings of the Hub."""
    started = Forks(IMPORTED, environment_of(server, home))
    yield started
    started.close()


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with hub_server() as listening:
        yield listening


@pytest.fixture
def hub(server: HubServer, home: Path) -> Iterator[HubServer]:
    server.reset()
    yield server
    server.hold.set()  # whoever still waits for it belongs to this test
    shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def push(hub: HubServer, home: Path, forks: Forks) -> Pusher:
    return Pusher(hub, home, forks)


@pytest.fixture(scope="session")
def shards(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, small ones."""
    import transformers

    folder: Path = make_model(tmp_path_factory.mktemp("shards") / "plain")
    out = folder.parent / "a model"
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").save_pretrained(out, max_shard_size="60KB")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


@pytest.fixture
def make_trained(make_run: Any, make_adapter: Any, base: Path) -> Callable[..., Path]:
    """A run folder with everything that a card is made from, and some that must stay."""

    def make(rows: str = "secret rows/dates.jsonl") -> Path:
        run: Path = make_run(base=base)
        make_adapter(run / "adapter", base, tokenizer=True)
        environment = json.loads((run / "environment.json").read_text())
        environment |= {"ft_core": "0.1.0", "torch": "2.13.0", "libraries": {"peft": "0.21.2"}, "dtype": "bfloat16"}
        environment["base_model"] |= {"reference": str(base), "name": base.name}
        (run / "environment.json").write_text(json.dumps(environment))
        (run / "config.yaml").write_text(
            f"model: {base}\nmethod: sft\nquantization: none\nmax_length: 77\noutput: {run}\n"
            f"data:\n- {{path: {run}/{rows}, weight: 1.0}}\n- {{path: 'ft/numbers:train'}}\n- {{path: 'ft/gone'}}\n"
            "lora: {r: 4, alpha: 8, targets: all-linear, dora: false}\n"
            "training: {learning_rate: 0.0002, epochs: 1.5, max_steps: null}\nsft: {train_on: answers}\n"
        )
        summary = {"steps": 120, "tokens": 74880, "data": {"train_rows": 1900, "held_out_rows": 10}}
        (run / "summary.json").write_text(json.dumps(summary))
        metrics = {"loss": {"before": 3.125, "after": 0.25}, "exact_match": {"before": None, "after": 0.98}}
        samples = [{"prompt": "a private question", "expected": "x", "before": "y", "after": "x"}]
        evaluation = {"data": "held_out.jsonl", "rows": 10, "metrics": metrics, "samples": samples}
        (run / "evaluation.json").write_text(json.dumps(evaluation))
        (run / "checkpoints" / "checkpoint-7").mkdir(parents=True)
        (run / "checkpoints" / "checkpoint-7" / "optimizer.pt").write_bytes(b"state")
        (run / "adapter" / "training_args.bin").write_bytes(b"pickle")
        return run

    return make


def card_of(hub: HubServer, repo: str = REPO) -> tuple[dict[str, Any], str]:
    from huggingface_hub import ModelCard

    card = ModelCard(hub.files(repo)["README.md"].decode())
    return card.data.to_dict(), card.text


def check_nothing_private(hub: HubServer, run: Path, repo: str = REPO) -> None:
    """No path of this machine, no row and no answer stands in what was pushed."""
    for name, content in hub.files(repo).items():
        for word in (
            str(run),
            str(run.parent),
            str(Path.home()) + "/",
            "secret rows",
            "a private question",
            "What is ",
        ):
            if name not in ("tokenizer.json", "vocab.json"):
                assert word.encode() not in content, (name, word)


def same_as_here(folder: str, hub: HubServer, repo: str = REPO) -> None:
    """The repository holds the folder's files byte for byte; proof.json has the Hub's list beside that, here alone."""
    there = hub.files(repo)
    del there[".gitattributes"]
    here = {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}
    assert set(here) == set(there)
    proof, sent = json.loads(here.pop("proof.json")), json.loads(there.pop("proof.json"))
    pushed = proof.pop("pushed")
    assert proof == sent
    assert here == there
    assert {entry["name"] for entry in pushed["files"]} == set(there) | {"proof.json", ".gitattributes"}


def test_a_card_says_that_several_adapters_were_merged(
    push: Pusher, make_trained: Any, make_adapter: Any, base: Path, tmp_path: Path
) -> None:
    run, other = make_trained(), make_adapter(tmp_path / "other", base, seed=2)
    merge(run, adapters=[(other, 0.5)])
    made = push(run)
    assert any(line.endswith(f"this adapter (weight 1) and {other} (weight 0.5) by cat") for line in made["lines"])
    card = push.hub.files(REPO)["README.md"].decode()
    assert "The weights are those of 2 adapters, combined by PEFT (cat) with the weights 1 and 0.5" in card
    assert json.loads(push.hub.files(REPO)["proof.json"])["figures"]["merge"]["combination"]["type"] == "cat"
    check_nothing_private(push.hub, run)
    assert not any(str(other).encode() in content for content in push.hub.files(REPO).values())


def test_a_merged_run_comes_back_bit_for_bit_with_a_true_card(
    push: Pusher, make_trained: Any, base: Path, tmp_path: Path
) -> None:
    import torch
    import transformers

    push.hub.data_sets = {"ft/numbers"}
    run = make_trained()
    made = push(run)
    assert push.hub.repos[REPO].private
    assert {"config.json", "model.safetensors", "README.md", "proof.json", "tokenizer.json"} <= set(
        push.hub.files(REPO)
    )
    assert not {"merge.json", "training_args.bin", "adapter_config.json"} & set(push.hub.files(REPO))
    assert "not pushed: merge.json" in made["lines"]
    check_nothing_private(push.hub, run)
    same_as_here(made["file"], push.hub)

    data, text = card_of(push.hub)
    push.read("model", tmp_path / "read.pt", code_in(text))  # what the card tells people to do works, from the server
    read = torch.load(tmp_path / "read.pt", weights_only=True)
    local = transformers.AutoModelForCausalLM.from_pretrained(run / "merged", dtype="auto").state_dict()
    assert set(read) == set(local)
    assert all(torch.equal(read[name], local[name]) and read[name].dtype == local[name].dtype for name in local)

    assert data == {
        "library_name": "transformers", "license": "other", "pipeline_tag": "text-generation",
        "tags": ["ft", "lora", "sft"], "datasets": ["ft/numbers"],
    }  # fmt: skip
    for said in (
        "fine-tuned by `sft`", "`dates.jsonl`, `ft/numbers:train`, `ft/gone`", "| rows trained on | 1,900 |",
        "| optimizer steps | 120 |", "| `lora.r` | `4` |", "| `training.learning_rate` | `0.0002` |",
        "| `sft.train_on` | `answers` |", "| `max_length` | `77` |", "| loss | 3.125 | 0.25 |",
        "| exact match |  | 0.98 |", "On 10 rows of `held_out.jsonl`", "licence of the base model is not known here",
        "ft-core 0.1.0", "peft 0.21.2", "Outputs of ",
    ):  # fmt: skip
        assert said in text, said
    assert "max_steps" not in text

    asked = len(push.hub.asked)
    again = push(run)
    assert any(line.startswith("sent 0 of ") for line in again["lines"])
    assert not [one for one in push.hub.asked[asked:] if one[0] == "PUT" or "/commit/" in one[1]]


def test_an_adapter_names_a_base_that_others_have(push: Pusher, make_trained: Any, base: Path, tmp_path: Path) -> None:
    import torch
    from peft import AutoPeftModelForCausalLM

    run = make_trained()
    assert "which nobody else has: add base=USER/NAME" in push(run, type="adapter")["error"]
    assert push.hub.asked == []
    made = push(base, options={"repo": "me/base", "private": "no"})
    assert not push.hub.repos["me/base"].private
    made = push(run, type="adapter", options={"base": "me/base"})
    files = push.hub.files(REPO)
    assert set(files) >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"}
    assert "training_args.bin" not in files
    config = json.loads(files["adapter_config.json"])
    was = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config == {**was, "base_model_name_or_path": "me/base", "revision": None}
    assert files["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    check_nothing_private(push.hub, run)
    same_as_here(made["file"], push.hub)

    data, text = card_of(push.hub)
    assert data["base_model"] == "me/base"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    for file in run.glob("adapter/*"):  # an adapter without a tokenizer is used with its base's
        if "token" in file.name or file.name.startswith("chat"):
            file.unlink()
    push(run, type="adapter", options={"base": "me/base", "repo": "me/bare"})
    bare = code_in(card_of(push.hub, "me/bare")[1])
    assert 'AutoTokenizer.from_pretrained("me/base")' in bare
    push.read("adapter", tmp_path / "read.pt", code_in(text), bare)
    read = torch.load(tmp_path / "read.pt", weights_only=True)
    local = AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype="auto").state_dict()
    assert set(read) == set(local)
    assert all(torch.equal(read[name], local[name]) for name in local)
    said = push(run, type="adapter", options={"base": "me/misspelt", "repo": "me/bare"})["error"]
    assert said == "the Hub shows no model me/misspelt with this token: look at base=me/misspelt"


def test_a_gguf_file_goes_with_its_figures_and_without_its_texts(push: Pusher, make_trained: Any) -> None:
    pytest.importorskip("gguf", reason='pip install "ft-export[gguf]"')
    pytest.importorskip("xllamacpp", reason='pip install "ft-export[gguf]"')
    run = make_trained()
    push.hub.cards["ft/base"] = {"license": "apache-2.0"}
    made = push(run, type="q8_0", options={"base": "ft/base"})
    assert set(push.hub.files(REPO)) == {".gitattributes", "README.md", "proof.json", "my-run-q8_0.gguf"}
    check_nothing_private(push.hub, run)
    same_as_here(made["file"], push.hub)
    data, text = card_of(push.hub)
    assert data["base_model_relation"] == "finetune"  # its weights are not the base's, whatever the file's type
    assert data["library_name"] == "gguf"
    assert data["license"] == "apache-2.0"
    assert f"llama-server --hf-repo {REPO} --hf-file my-run-q8_0.gguf --jinja" in text
    proof = json.loads(push.hub.files(REPO)["proof.json"])
    assert proof["figures"]["continuations"]["tokens"] > 0
    assert "answer" not in proof["figures"]["continuations"]


def test_a_dry_run_shows_everything_and_sends_nothing(push: Pusher, shards: Path) -> None:
    made = push(shards, options={"dry": "yes"}, environment={"HF_TOKEN": ""})
    assert push.hub.asked == []
    assert push.hub.repos == {}
    folder = Path(made["file"])
    assert made["lines"][-1] == "a dry run: nothing was sent"
    shown = dict(
        re.fullmatch(r" +([\d,]+) bytes  (.+)", line).groups()[::-1] for line in made["lines"] if "bytes " in line
    )
    assert shown == {p.name: f"{p.stat().st_size:,}" for p in folder.iterdir()}
    assert made["next"] == f"ft export '{shards}' --to hub --type merged repo={REPO}"
    assert not {what for _, _, what in made["shown"]} & set(made["lines"])  # a terminal shows both: the list once


def test_the_list_is_shown_before_anything_is_sent(push: Pusher, shards: Path) -> None:
    shown = [what for _, _, what in push(shards)["shown"]]
    assert shown.index(next(line for line in shown if line.endswith("config.json"))) < shown.index("files sent")


def test_a_model_taken_as_it_is_claims_no_training(push: Pusher, shards: Path, tmp_path: Path) -> None:
    push(shards)
    data, text = card_of(push.hub)
    assert "base_model" not in data
    assert data["license"] == "other"
    assert "fine-tuned" not in text
    assert "## Training" not in text
    assert "## Evaluation" not in text
    push.read("model", tmp_path / "read.pt")


def test_a_model_trained_in_full(push: Pusher, shards: Path, make_run: Any, tmp_path: Path) -> None:
    """Its base lies in a folder with a card of its own; what the Hub calls the base is said by the person."""
    base = tmp_path / "base"
    shutil.copytree(shards, base, ignore=shutil.ignore_patterns("export"))
    (base / "README.md").write_text("---\nlicense: llama3.2\n---\n# The base\n")
    run = make_run(base=base)
    shutil.copytree(shards, run / "model", ignore=shutil.ignore_patterns("export"))
    made = push(run, options={"base": "ft/base", "dry": "yes"}, environment={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert made["lines"][-1] == "a dry run: nothing was sent"  # a dry run does without the Hub
    assert "the Hub shows no model ft/base" in push(run, options={"base": "ft/base"})["error"]
    push.hub.cards["ft/base"] = {"license": "mit"}
    push(run, options={"base": "ft/base"})
    data, text = card_of(push.hub)
    assert data["base_model"] == "ft/base"
    assert data["base_model_relation"] == "finetune"
    assert data["license"] == "llama3.2"  # the folder was trained on, so its word goes before the Hub's
    assert "A transformers model, fine-tuned from [ft/base](https://huggingface.co/ft/base) by `sft`." in text


def test_an_adapter_that_only_fits_what_its_files_cannot_name(make_run: Any) -> None:
    from ft_export import ExportError
    from ft_export.hub.export import export

    options = {"repo": REPO, "base": "ft/base"}
    rope = {"max_position_embeddings": 96, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}
    for name, more, expected in (("a", rope, "other rotary scaling"), ("b", {}, "began as what nf4 lost")):
        run = make_run(name, rope=more)
        (run / "adapter").mkdir()
        (run / "adapter" / "adapter_config.json").write_text("{}")
        if not more:
            (run / "config.yaml").write_text("quantization: nf4\nlora: {init_lora_weights: loftq}\n")
        with pytest.raises(ExportError, match=f"{expected}.*push it with --type merged"):
            export(run, type="adapter", options=options)


@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (lambda hub: hub.tokens.clear(), r"does not take the token \(401\), it is wrong or was revoked"),
        (lambda hub: setattr(hub, "role", "read"), r"may only read, and pushing to me/dates writes \(403\)"),
        (
            lambda hub: hub.fail("POST", "repos/create", 403, 9, body={"error": "no rights here"}),
            r"has no right to write to me/dates \(403\), 'no rights here'",
        ),
        (lambda hub: hub.add_repo(REPO, private=False), "everybody can see it, .* add private=no"),
        (lambda hub: hub.fail("POST", "/preupload/", 404, 9), r"the Hub has no me/dates, or .* \(404\)"),
        (lambda hub: hub.fail("GET", "whoami", 429, 99), r"asks to wait \(429\) and was asked several times"),
        (
            lambda hub: hub.fail("GET", "whoami", 429, 1, headers={"Retry-After": "9000"}),
            r"asks to wait \(429\)",
        ),
        (lambda hub: hub.fail("POST", "/commit/", 429, 99), r"asks to wait \(429\)"),
        (lambda hub: hub.fail("POST", "repos/create", 500, 99), "creating the repository: the Hub answered 500"),
        (lambda hub: hub.fail("PUT", "/storage/", 500, 999), "sending the files: the Hub answered 500 several times"),
        (lambda hub: hub.fail("POST", "/commit/", 503, 99), "the Hub answered 503 several times: run the same command"),
        (lambda hub: hub.fail("POST", "validate-yaml", 400, 99), "sending the files: the Hub answered 400, 'pla"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line(
    push: Pusher, shards: Path, plant: Callable[[HubServer], Any], expected: str
) -> None:
    plant(push.hub)
    said = push(shards)["error"]
    assert re.search(expected, said), said
    assert "\n" not in said
    assert not push.hub.repos.get(REPO) or set(push.hub.files(REPO)) == {".gitattributes"}


def test_no_token_no_connection_and_another_s_name(push: Pusher, shards: Path) -> None:
    assert push(shards, environment={"HF_TOKEN": ""})["error"].startswith("no token for the Hub: log in with `hf auth")
    said = push(shards, environment={"HF_ENDPOINT": "http://127.0.0.1:9"})["error"]
    assert "the Hub is not reached (ConnectError)" in said
    assert "HF_HUB_OFFLINE is set" in push(shards, environment={"HF_HUB_OFFLINE": "1"})["error"]
    said = push(shards, options={"repo": "somebody/dates"})["error"]
    assert "(403): it belongs to me and team; use a token of somebody" in said
    assert "lines" in push(shards, options={"repo": "team/dates"})


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "whoami"), ("POST", "repos/create"), ("POST", "/preupload/"), ("POST", "objects/batch"),
     ("PUT", "/storage/"), ("POST", "/commit/"), ("GET", "/tree/")],
)  # fmt: skip
@pytest.mark.parametrize("status", [429, 500, 0])
def test_what_passes_is_waited_for(push: Pusher, shards: Path, method: str, path: str, status: int) -> None:
    push.hub.fail(method, path, status, 2, **({"headers": {"Retry-After": "1"}} if status == 429 else {}))
    made = push(shards)
    assert "lines" in made, made
    assert [fault.times for fault in push.hub.faults] == [0]
    same_as_here(made["file"], push.hub)
    assert push.hub.repos[REPO].messages.count("merged model by ft-export") == 1


def test_an_upload_that_was_cut_off_is_not_begun_anew(push: Pusher, shards: Path) -> None:
    """The process dies after the first file; the next one sends the others only. Nobody saw half a model."""
    push.hub.hold.clear()
    process = push.start(push.words(shards))
    assert push.hub.received.wait(120)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    push.hub.hold.set()
    assert set(push.hub.files(REPO)) == {".gitattributes"}
    there = set(push.hub.storage)
    assert there
    asked = len(push.hub.asked)
    made = push(shards)
    sent = [path.rpartition("/")[2] for method, path, _ in push.hub.asked[asked:] if method == "PUT"]
    assert sent
    assert not there & set(sent)
    same_as_here(made["file"], push.hub)


def test_a_connection_that_breaks_within_a_file(push: Pusher, shards: Path) -> None:
    push.hub.fail("PUT", "/storage/", 0, 1, after=5000)
    same_as_here(push(shards)["file"], push.hub)


def test_what_arrived_wrong_is_named(push: Pusher, shards: Path) -> None:
    name = sorted(path.name for path in shards.glob("*.safetensors"))[1]
    push.hub.lost.add(name)
    said = push(shards)["error"]
    assert said.startswith(f"{REPO} holds another {name} than was sent (")
    assert "push again with --overwrite" in said
    proof = json.loads((shards / "export" / "hub" / "proof.json").read_text())
    assert "pushed" not in proof


def test_another_model_in_the_repository_is_replaced_only_when_asked(push: Pusher, base: Path, shards: Path) -> None:
    old = {"model.safetensors": b"old", "config.json": b"{}", "notes.md": b"mine", "adapter_config.json": b"{}"}
    push.hub.add_repo(REPO, True, old)
    said = push(shards)["error"]
    assert "holds another config.json, adapter_config.json, model.safetensors: pass --overwrite" in said
    assert push.hub.files(REPO)["model.safetensors"] == b"old"
    made = push(shards, overwrite=True)
    files = push.hub.files(REPO)
    assert files["notes.md"] == b"mine"
    assert not {"model.safetensors", "adapter_config.json"} & set(files)  # they would be loaded in place of ours
    assert any("removed adapter_config.json, model.safetensors" in line for line in made["lines"])


def test_a_licence_of_one_s_own(push: Pusher, shards: Path) -> None:
    options = {"license": "other", "license_name": "house-rules", "license_link": "https://example.org/rules"}
    push(shards, options=options)
    data, text = card_of(push.hub)
    assert {key: data[key] for key in options} == options
    assert "Published under [`house-rules`](https://example.org/rules), as its publisher says." in text


def test_two_pushes_at_once_do_not_mix(push: Pusher, shards: Path) -> None:
    """Somebody else's commit comes between this push's look and its own commit: theirs stays as it is."""
    theirs = {".gitattributes": b"", "config.json": b"{}", "model.safetensors": b"theirs"}
    pushed: list[str] = []

    def intrude(repo: Repo) -> None:
        if not pushed:
            blobs = {name: Blob(content, name.endswith(LARGE)) for name, content in theirs.items()}
            pushed.append(repo.commit("main", blobs, "theirs"))

    push.hub.before_commit = intrude
    said = push(shards)["error"]
    assert said.startswith(f"{REPO} was changed by another push while this one was sending (its branch main is at ")
    assert pushed[0][:8] in said
    assert push.hub.files(REPO) == theirs
    assert "pushed" not in json.loads((shards / "export" / "hub" / "proof.json").read_text())
    assert "pass --overwrite" in push(shards)["error"]  # asked again, it sees what is there
    same_as_here(push(shards, overwrite=True)["file"], push.hub)


def test_a_commit_whose_answer_was_lost_is_known_for_one_s_own(push: Pusher, shards: Path) -> None:
    push.hub.swallow = 1
    same_as_here(push(shards)["file"], push.hub)
    assert push.hub.swallow == 0
    assert push.hub.repos[REPO].messages.count("merged model by ft-export") == 1


def test_a_base_s_relative_path_is_no_name_on_the_hub(push: Pusher, make_trained: Any) -> None:
    """The training named its base `models/base`, from its own folder; the export runs in another one."""
    run = make_trained()
    environment = json.loads((run / "environment.json").read_text())
    environment["base_model"] |= {"reference": "models/base"}  # its path is whole, as ft train writes it
    (run / "environment.json").write_text(json.dumps(environment))
    push(run)
    data, text = card_of(push.hub)
    assert "base_model" not in data
    assert "models/base" not in text
    said = push(run, type="adapter")["error"]
    assert "which nobody else has: add base=USER/NAME with the name that these weights have" in said


def test_a_branch(push: Pusher, shards: Path) -> None:
    made = push(shards, options={"revision": "v2"})
    assert "config.json" in push.hub.files(REPO, "v2")
    assert "config.json" not in push.hub.files(REPO, "main")
    assert made["next"] == f"hf download {REPO} --revision v2"
    assert f'from_pretrained("{REPO}", revision="v2")' in push.hub.files(REPO, "v2")["README.md"].decode()


def test_what_must_not_go_out_is_taken_out_or_refused(push: Pusher, shards: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(shards, model, ignore=shutil.ignore_patterns("export"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "_name_or_path": str(tmp_path / "private")}))
    (model / "train.jsonl").write_text("{}\n")
    (model / "modeling.py").write_text("")
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    push(model)
    assert "_name_or_path" not in json.loads(push.hub.files(REPO)["config.json"])
    assert not {"train.jsonl", "modeling.py", "pytorch_model.bin"} & set(push.hub.files(REPO))

    puts = push.hub.count("PUT", "")
    (model / "config.json").write_text(json.dumps({**config, "a": [{"b": str(model)}]}))
    said = push(model, overwrite=True)["error"]
    assert f"config.json holds a path on this machine at a[0].b: {model}; change it in the original" in said
    (model / "config.json").write_text(json.dumps({**config, "note": f"use {TOKEN} for it"}))
    said = push(model, overwrite=True)["error"]
    assert said.startswith("config.json holds an access token: take it out")
    assert TOKEN not in said
    assert push.hub.count("PUT", "") == puts


def test_the_folder_is_refused_where_it_is_something_else(push: Pusher, shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "gguf"
    other.mkdir()
    (other / "proof.json").write_text('{"proof_format": 1}')
    assert "holds another export" in push(shards, out=str(other), options={"dry": "yes"})["error"]
    assert (other / "proof.json").read_text() == '{"proof_format": 1}'
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_text("{}")
    (cut / "model.safetensors").write_bytes((shards / "config.json").read_bytes())
    assert "is not a whole safetensors file" in push(cut)["error"]
    assert not (cut / "export" / "hub").exists()
    assert push.hub.repos == {}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"repo": ""}, "where to push is not said: add repo=USER/NAME"),
        ({"repo": "dates"}, "repo=dates is not allowed"),
        ({"repo": "me/a--b"}, "repo=me/a--b is no name that the Hub allows"),
        ({"private": "maybe"}, "private=maybe is not allowed (allowed: yes, no)"),
        ({"licence": "mit"}, "option 'licence' is not known for hub (allowed: repo, private, dry, license"),
        (
            {"license": "My Own"},
            "license=My Own is not allowed (allowed: the identifiers in https://huggingface.co/docs",
        ),
        ({"license": "apache2"}, "license=apache2 is not allowed, did you mean apache-2.0?"),
        ({"license": "MIT"}, "license=MIT is not allowed, did you mean mit?"),
        ({"license": "other"}, "license=other needs the licence's name: add license_name=NAME"),
        ({"license": "other", "license_name": "a b"}, "license_name=a b is not allowed"),
        ({"license": "other", "license_name": "a", "license_link": "LICENSE"}, "license_link=LICENSE is not allowed"),
        ({"license_name": "mine"}, "license_name=mine is for license=other"),
        ({"license": "mit", "license_link": "https://a.b"}, "license_link=https://a.b is for license=other"),
        ({"revision": "../x"}, "revision=../x is not allowed"),
        ({"base": "/home/me/model"}, "base=/home/me/model is not allowed"),
        ({"pre": "qwen2"}, "pre= names a GGUF file's tokenizer rules"),
    ],
)
def test_options_that_are_refused(shards: Path, options: dict[str, str], expected: str) -> None:
    from ft_export import ExportError
    from ft_export.hub.export import export

    with pytest.raises(ExportError, match=re.escape(expected)):
        export(shards, options={key: value for key, value in {"repo": REPO, **options}.items() if value})
    with pytest.raises(ExportError, match="holds no adapter: push it with --type merged"):
        export(shards, type="adapter", options={"repo": REPO})
    with pytest.raises(ExportError, match=r"type 'q2_k_s' is not known for hub \(allowed: merged, adapter, f16"):
        export(shards, type="q2_k_s", options={"repo": REPO})


APACHE = "\n                                 Apache License\n                           Version 2.0, January 2004\n"


@pytest.mark.parametrize(
    ("type", "trained", "relation", "library"),
    [("merged", True, "finetune", "transformers"), ("adapter", True, "adapter", "peft"),
     ("q4_k_m", True, "finetune", "gguf"), ("q4_k_m", False, "quantized", "gguf")],
)  # fmt: skip
def test_how_it_comes_from_its_base(tmp_path: Path, type: str, trained: bool, relation: str, library: str) -> None:
    from huggingface_hub import ModelCard

    from ft_export.hub.card import Subject, write_card
    from ft_export.hub.licence import Licence
    from ft_export.hub.record import Record
    from ft_export.hub.wanted import Wanted

    file = "m.gguf" if library == "gguf" else None
    about = Subject(Wanted(REPO, type, revision="v2"), "text-generation", True, REPO, trained, file, ["ft"], ["x"])
    name = "a: 'name'\n# of `two` lines"
    record = Record(base="ft/base", data=(name,), config={"seed": 3, "path": "/home/me/x", "a|b": "c"})
    path = write_card(tmp_path, about, record, Licence("other", "x", name, "https://example.org/a"), [])
    card = ModelCard.load(path)
    assert card.data.to_dict()["base_model_relation"] == relation
    assert card.data.library_name == library
    assert card.data.license_name == name
    assert "Trained on `a: 'name' # of two lines`." in card.text
    assert "/home/me" not in card.text
    assert ("fine-tuned" in card.text or "trained for" in card.text) == trained
    if file:
        assert f"hf download {REPO} m.gguf --revision v2 --local-dir .\nllama-server -m m.gguf --jinja" in card.text


@pytest.mark.parametrize(
    ("files", "card", "expected"),
    [
        ({"README.md": "---\nlicense: mit\n---\n# x\n", "LICENSE": APACHE}, None, ("mit", None, None)),
        ({"LICENSE": APACHE}, None, ("apache-2.0", None, None)),
        ({"LICENSE.txt": "My own rules"}, None, ("other", None, "LICENSE.txt")),
        (
            {"README.md": "---\nlicense: other\nlicense_name: rules\nlicense_link: LICENSE\n---\n"},
            None,
            ("other", "rules", "https://huggingface.co/ft/base/blob/main/LICENSE"),
        ),
        ({"README.md": "no front matter: mit"}, {"license": "llama3.2"}, ("llama3.2", None, None)),
        ({}, {"license": ["gemma"]}, ("gemma", None, None)),
        ({}, {"tags": []}, ("other", None, None)),
        ({}, None, ("other", None, None)),
    ],
)
def test_the_licence_is_the_base_model_s(
    tmp_path: Path, files: dict[str, str], card: dict[str, Any] | None, expected: tuple[Any, ...]
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    found = find_licence(None, tmp_path, "ft/base", card)
    assert (found.id, found.name, found.link) == expected
    assert ("is not known" in found.sentence) == (expected == ("other", None, None))
    assert find_licence(said_licence("mit"), tmp_path, "ft/base", card) == said_licence("mit")


def test_the_licence_s_text_travels(push: Pusher, make_model: Any, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    (model / "LICENSE").write_text(APACHE)
    push(model)
    assert push.hub.files(REPO)["LICENSE"].decode() == APACHE
    assert card_of(push.hub)[0]["license"] == "apache-2.0"
