"""Run by the nox session `alone` in an environment that holds one package's wheel and what it asks for, nothing else.

It checks which of ft's packages came along, imports every module, uses the package once, and checks that all that was
imported belongs to a declared dependency. Not a pytest file: pytest would be one more thing installed there.
"""

from __future__ import annotations

import importlib
import io
import math
import pkgutil
import re
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import distributions, metadata, packages_distributions, requires
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORE = {"ft-core", "ft-kernels"}
# What each requirement brings of ft, from the design's table of who may import whom.
BRINGS = {
    "ft-kernels": {"ft-kernels"},
    "ft-core": CORE,
    "ft-core[rl]": {*CORE, "ft-rl"},
    "ft-rl": {*CORE, "ft-rl"},
    "ft-vision": {*CORE, "ft-vision"},
    "ft-speech": {*CORE, "ft-speech"},
    "ft-core[speech]": {*CORE, "ft-speech"},
    "ft-export": {"ft-export"},
}
# Modules that may be imported only with something that the package does not depend on by itself.
OPTIONAL = {"ft_export.plugin": "ft_core"}
# Both come with every new environment of Python 3.11, and libraries look for setuptools.
PRESENT = {"pip", "setuptools"}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(package: str) -> set[str]:
    """A distribution and all that it depends on, extras left out save where one of ours names them."""
    found: set[str] = set()
    todo = [package]
    while todo:
        name = normal(todo.pop())
        if name in found:
            continue
        found.add(name)
        for requirement in requires(name) or ():
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            assert match, requirement
            wanted = normal(match.group())
            # Whether a marker holds is pip's business: what it left out is not installed, and so not imported either.
            if "extra ==" not in requirement and any(normal(d.name) == wanted for d in distributions()):
                todo.append(wanted)
    return found


def import_all(module: str) -> None:
    before = set(sys.modules)
    package = importlib.import_module(module)
    heavy = {"torch", "transformers", "trl", "peft"} & (set(sys.modules) - before)
    assert module == "ft_kernels" or not heavy, f"import {module} brings {sorted(heavy)}"
    for found in pkgutil.walk_packages(package.__path__, f"{module}."):
        if found.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if error.name is None or OPTIONAL.get(found.name) != error.name.split(".")[0]:
                raise


def tiny_llama() -> object:
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
    )


def use_kernels() -> None:
    import torch

    import ft_kernels

    # Equal logits: the loss is the logarithm of the number of classes, whatever the target.
    loss = ft_kernels.cross_entropy(torch.zeros(3, 50), torch.tensor([0, 7, 49]))
    assert abs(loss.item() - math.log(50)) < 1e-6, loss
    assert ft_kernels.rms_norm(torch.full((2, 8), 3.0), torch.ones(8), eps=0.0).sub(1).abs().max() < 1e-6
    # The README's examples, as the wheel carries them.
    text = str(metadata("ft-kernels").get_payload())
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2, len(examples)
    for example in examples:
        done = subprocess.run([sys.executable, "-I", "-c", example], check=False, capture_output=True, text=True)
        losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", done.stdout)]
        assert done.returncode == 0, done.stderr
        assert losses[-1] < losses[0], losses


def ft(*words: str) -> str:
    command = [Path(sysconfig.get_path("scripts")) / "ft", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def use_core() -> None:
    import torch

    import ft_core

    assert ft_core.__version__ in ft("--version")
    assert "cannot be used" not in ft("plugins")
    model = ft_core.add_lora(tiny_llama(), r=4)
    tokens = torch.arange(16)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    learning = {name for name, value in model.named_parameters() if value.grad is not None}
    assert learning, "nothing learns"
    assert all("lora_" in name for name in learning), learning


def use_rl() -> None:
    import torch

    from ft_rl.objectives import bradley_terry

    loss, _ = bradley_terry(torch.zeros(2), torch.zeros(2))
    assert abs(loss.item() - math.log(2)) < 1e-6, loss
    listed = ft("plugins")
    assert " reward " in listed, listed
    assert "cannot be used" not in listed, listed


def use_vision() -> None:
    from PIL import Image

    from ft_vision import read_image

    file = io.BytesIO()
    Image.new("RGB", (5, 3), (200, 100, 50)).save(file, "PNG")
    image = read_image(file.getvalue())
    assert (image.size, image.getpixel((4, 2))) == ((5, 3), (200, 100, 50))
    # What ft-rl trains on images is not here, and says what to install.
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text("model: m\ntask: vision\nmethod: dpo\ndata: d.jsonl\noutput: o\n")
        command = [Path(sysconfig.get_path("scripts")) / "ft", "train", str(config)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "ft-rl" in done.stderr or "ft-core[rl]" in done.stderr, done.stderr


def use_speech() -> None:
    import numpy

    from ft_speech import read_audio, write_audio

    tone = numpy.sin(numpy.arange(1600) * 0.1).astype("float32") / 2
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tone.wav"
        write_audio(file, tone, 16_000)
        samples, rate = read_audio(file)
    assert rate == 16_000
    assert abs(samples - tone).max() < 2**-15, "more than one step of 16 bits"
    assert not any(normal(found.name) == "torchaudio" for found in distributions())
    listed = ft("plugins")
    for name in (" stt ", " tts ", " transcribe ", " speak ", " snac ", " mimi "):
        assert name in listed, listed
    assert "cannot be used" not in listed, listed
    listen()


def listen() -> None:
    """A step of a tiny Whisper on the fast layers is that of transformers' own."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    from ft_speech.fast.whisper import enable

    torch.manual_seed(0)
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    sizes |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "vocab_size"), 64)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            **sizes,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
            d_model=32,
            num_mel_bins=8,
            max_source_positions=20,
            max_target_positions=16,
        )
    ).train()
    given = {"input_features": torch.randn(2, 8, 40), "labels": torch.randint(64, (2, 9))}
    plain = model(**given).loss.item()
    enable(model)
    assert abs(model(**given).loss.item() - plain) < 1e-5 * plain


def use_export() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from ft_export import merge

    tokens = torch.arange(16)[None]
    with tempfile.TemporaryDirectory() as folder:
        base, adapter, merged = (Path(folder) / name for name in ("base", "adapter", "merged"))
        tiny_llama().to(torch.bfloat16).save_pretrained(base)
        words = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
        words.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        model.save_pretrained(adapter)
        merge(adapter, merged)
        after = AutoModelForCausalLM.from_pretrained(merged)
        assert after(tokens).logits.shape == (1, 16, 64)


USES = {
    "ft-kernels": use_kernels,
    "ft-core": use_core,
    "ft-core[rl]": use_rl,
    "ft-rl": use_rl,
    "ft-vision": use_vision,
    "ft-speech": use_speech,
    "ft-core[speech]": use_speech,
    "ft-export": use_export,
}


def main(requirement: str) -> None:
    ours = {normal(d.name) for d in distributions() if normal(d.name).startswith("ft-")}
    assert ours == BRINGS[requirement], f"{requirement} brought {sorted(ours)}, not {sorted(BRINGS[requirement])}"
    packages = BRINGS[requirement] if "[" in requirement else {requirement}
    for package in sorted(packages):
        import_all(package.replace("-", "_"))
    USES[requirement]()

    places = packages_distributions()
    tops = {name.partition(".")[0] for name in sys.modules}
    imported = {normal(distribution) for top in tops for distribution in places.get(top, ())}
    allowed = set().union(*(declared(package) for package in packages)) | PRESENT
    assert imported <= allowed, f"imported but not declared: {sorted(imported - allowed)}"
    checkout = [
        m.__file__ for m in sys.modules.values() if str(getattr(m, "__file__", "")).startswith(f"{ROOT}/packages")
    ]
    assert not checkout, f"imported from the checkout, not from the wheel: {checkout}"
    print(f"{requirement} works alone; of ft there is {', '.join(sorted(ours))}")


if __name__ == "__main__":
    main(sys.argv[1])
