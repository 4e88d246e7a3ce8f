"""How to use what was pushed: lines to copy, right for its kind."""

from __future__ import annotations

import json

from ft_export.hub.wanted import MAIN, Wanted

__all__ = ["LISTENS", "SEES", "SPEAKS", "usage"]

TASKS = {"text-generation": "CausalLM", "text-classification": "SequenceClassification"}
SEES = "image-text-to-text"
LISTENS, SPEAKS = "automatic-speech-recognition", "text-to-speech"
QUESTION, LOOK = "What can you do?", "What is in this picture?"
LLAMA_CPP = "With `llama-server` of [llama.cpp](https://github.com/ggml-org/llama.cpp/releases):"


def usage(
    wanted: Wanted,
    task: str | None,
    template: bool,
    tokenizer: str | None,
    file: str | None,
    projector: str | None = None,
) -> str:
    """The card's section on use.

    Args:
        task: the Hub's name of what the model does; other than generating or classifying text, no code is given.
        template: whether the model has a chat template.
        tokenizer: the repository with the tokenizer: this one, or that of an adapter's base.
        file: the GGUF file's name in the repository.
        projector: that of the tower and projector beside it, of a model that sees.
    """
    if file is not None:
        return _llama_cpp(wanted, file, projector)
    if task == SEES and tokenizer is not None:
        return _with_images(wanted, tokenizer)
    # a recogniser with a chat template is a language model, whose request its own processor makes
    if task == LISTENS and not template and wanted.type != "adapter" and tokenizer == wanted.repo:
        return _with_sound(wanted)
    kind = TASKS.get(task or "")
    if kind is None or tokenizer is None:
        return (
            f"```\nhf download {wanted.repo}{'' if wanted.revision == MAIN else f' --revision {wanted.revision}'}\n```"
        )
    adapter = wanted.type == "adapter"
    revision = "" if wanted.revision == MAIN else f', revision="{wanted.revision}"'
    where = f'"{wanted.repo}"{revision}'
    words = where if tokenizer == wanted.repo else f'"{tokenizer}"'
    library, model = ("peft", f"AutoPeftModelFor{kind}") if adapter else ("transformers", f"AutoModelFor{kind}")
    imports = (
        ["from peft import " + model, "from transformers import AutoTokenizer"]
        if adapter
        else [f"from {library} import {model}, AutoTokenizer"]
    )
    lines = [
        *imports,
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({words})",
        f'model = {model}.from_pretrained({where}, dtype="auto")',
    ]
    if task == "text-classification":
        lines += [f'inputs = tokenizer("{QUESTION}", return_tensors="pt")', "print(model(**inputs).logits)"]
        return _python(lines)
    if template:
        lines += [
            f'messages = [{{"role": "user", "content": "{QUESTION}"}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer("Once upon a time", return_tensors="pt")')
    lines += [
        "answer = model.generate(**inputs, max_new_tokens=100)[0, inputs.input_ids.shape[1] :]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    return _python(lines)


def _with_images(wanted: Wanted, words: str) -> str:
    where = f'"{wanted.repo}"' + ("" if wanted.revision == MAIN else f', revision="{wanted.revision}"')
    lines = [
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        f"processor = AutoProcessor.from_pretrained({where if words == wanted.repo else json.dumps(words)})",
        f'model = AutoModelForImageTextToText.from_pretrained({where}, dtype="auto")',
        f'asked = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "{LOOK}"}}]',
        "inputs = processor.apply_chat_template(",
        '    [{"role": "user", "content": asked}],',
        '    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",',
        ")",
        'answer = model.generate(**inputs, max_new_tokens=100)[0, inputs["input_ids"].shape[1] :]',
        "print(processor.decode(answer, skip_special_tokens=True))",
    ]
    return _python(lines)


def _with_sound(wanted: Wanted) -> str:
    where = f'"{wanted.repo}"' + ("" if wanted.revision == MAIN else f', revision="{wanted.revision}"')
    lines = [
        "import soundfile",
        "from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor",
        "",
        f"processor = AutoProcessor.from_pretrained({where})",
        f'model = AutoModelForSpeechSeq2Seq.from_pretrained({where}, dtype="auto")',
        'samples, rate = soundfile.read("speech.wav")  # mono, 16 kHz, up to 30 seconds',
        'inputs = processor(samples, sampling_rate=rate, return_tensors="pt").to(model.dtype)',
        "print(processor.batch_decode(model.generate(**inputs), skip_special_tokens=True)[0])",
    ]
    return _python(lines)


def _llama_cpp(wanted: Wanted, file: str, projector: str | None) -> str:
    if projector is not None:
        branch = "" if wanted.revision == MAIN else f" --revision {wanted.revision}"
        fetch = f"hf download {wanted.repo} {file} {projector}{branch} --local-dir ."
        return f"{LLAMA_CPP}\n\n```\n{fetch}\nllama-server -m {file} --mmproj {projector} --jinja\n```"
    if wanted.revision == MAIN:
        return f"{LLAMA_CPP}\n\n```\nllama-server --hf-repo {wanted.repo} --hf-file {file} --jinja\n```"
    fetch = f"hf download {wanted.repo} {file} --revision {wanted.revision} --local-dir ."
    return f"{LLAMA_CPP}\n\n```\n{fetch}\nllama-server -m {file} --jinja\n```"


def _python(lines: list[str]) -> str:
    return "```python\n" + "\n".join(lines) + "\n```"
