"""Which tokens are trained, for chat templates of every kind, on a small tokenizer and on SmolLM2's."""

from __future__ import annotations

from typing import Any

import pytest

from ft_core.data import Tokenized, render_prompt, tokenize_rows
from ft_core.errors import DataError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# as Qwen3's and DeepSeek-R1's: the thoughts of earlier answers are dropped
FORGETFUL = CHATML.replace(
    "m['content'] +", "(m['content'] if loop.last or m['role'] == 'user' else m['content'].split('</think>')[-1]) +"
)
# the generation prompt opens a thought that a finished answer does not begin with
OPENING = CHATML.replace("'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif")
PLAIN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"  # noqa: E501  # fmt: skip
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('must begin with user') }}{% endif %}" + CHATML


def chat(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


TWO_TURNS = {"messages": chat("what is it", "Paris", "and the capital", "no more")}


def texts(tokenized: Tokenized, tokenizer: Any, index: int = 0) -> tuple[str, str]:
    """The whole of a document, and its trained tokens with | between those that are apart."""
    document = tokenized[index]
    assert len(document["input_ids"]) == len(document["labels"]) == tokenized.lengths[index]
    runs: list[list[int]] = [[]]
    for token, label in zip(document["input_ids"], document["labels"], strict=True):
        assert label in (-100, token)
        if label != -100:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return tokenizer.decode(document["input_ids"]), "|".join(tokenizer.decode(run) for run in runs if run)


@pytest.mark.parametrize(
    ("template", "trained"),
    [
        (CHATML, "Paris<|im_end|>|no more<|im_end|>"),
        (LLAMA3, "Paris<|eot_id|>|no more<|eot_id|>"),
        (MARKED, "Paris<|im_end|>|no more<|im_end|>"),
        (OPENING, "Paris<|im_end|>|no more<|im_end|>"),
        (STRICT, "Paris<|im_end|>|no more<|im_end|>"),
    ],
    ids=["chatml", "llama-3", "markers", "opens-a-thought", "strict"],
)
def test_answers_and_the_token_that_ends_them_are_trained(make_tokenizer: Any, template: str, trained: str) -> None:
    tokenizer = make_tokenizer(template, bos=True)
    tokenized = tokenize_rows([TWO_TURNS], tokenizer, max_length=500)
    whole, found = texts(tokenized, tokenizer)
    assert found == trained
    assert tokenized[0]["input_ids"] == tokenizer.apply_chat_template(TWO_TURNS["messages"])["input_ids"]
    assert whole.count("<s>") == (template == LLAMA3)
    assert (len(tokenized), tokenized.rows, tokenized.overlong, tokenized.dropped) == (1, 1, 0, 0)
    assert tokenized.trained_tokens == sum(label != -100 for label in tokenized[0]["labels"])
    assert tokenized.tokens == len(tokenized[0]["input_ids"])


def test_markers_around_the_whole_turn_do_not_reach_into_the_next(make_tokenizer: Any) -> None:
    template = LLAMA3.replace("m['content'] | trim + '<|eot_id|>' }}", "'' }}{% generation %}{{ m['content'] + '<|eot_id|>' }}{% endgeneration %}")  # noqa: E501  # fmt: skip
    template = template.replace("{% generation %}", "{% if m['role'] == 'assistant' %}{% generation %}")
    template = template.replace("{% endgeneration %}", "{% endgeneration %}{% else %}{{ m['content'] + '<|eot_id|>' }}{% endif %}")  # noqa: E501  # fmt: skip
    tokenizer = make_tokenizer(template)
    found = texts(tokenize_rows([TWO_TURNS], tokenizer, max_length=500), tokenizer)[1]
    assert found == "Paris<|eot_id|>|no more<|eot_id|>"


def test_a_template_that_rewrites_earlier_turns_gives_a_document_for_each_answer(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(FORGETFUL)
    messages = chat("what", "<think>hm</think>Paris", "and", "<think>so</think>no more")
    tokenized = tokenize_rows([{"messages": messages}], tokenizer, max_length=500)
    assert (len(tokenized), tokenized.rows, list(tokenized.row_of)) == (2, 1, [0, 0])
    for index, last in enumerate((1, 3)):
        whole, trained = texts(tokenized, tokenizer, index)
        assert trained == messages[last]["content"] + "<|im_end|>"
        prompt = tokenizer.apply_chat_template(messages[:last], tokenize=False, add_generation_prompt=True)
        assert whole == prompt + trained + "\n"  # what comes before an answer is what the model will see before it
    assert "hm" not in texts(tokenized, tokenizer, 1)[0]


def test_a_template_without_an_end_of_turn_is_ended(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(PLAIN)
    found = texts(tokenize_rows([TWO_TURNS], tokenizer, max_length=500), tokenizer)[1]
    assert found == " Paris\n| no more\n</s>"  # the prompt ends with a space, which belongs to the token " Paris"


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["chatml", "markers"])
def test_turns_of_weight_0_and_those_of_a_prompt_are_not_trained(make_tokenizer: Any, template: str) -> None:
    tokenizer = make_tokenizer(template)
    messages: list[dict[str, Any]] = [dict(message) for message in TWO_TURNS["messages"]]
    messages[1]["weight"] = 0
    found = texts(tokenize_rows([{"messages": messages}], tokenizer, max_length=500), tokenizer)[1]
    assert found == "no more<|im_end|>"


def test_all_tokens_are_trained_if_asked(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(CHATML)
    tokenized = tokenize_rows([TWO_TURNS], tokenizer, max_length=500, train_on="all")
    assert tokenized[0]["labels"] == [-100, *tokenized[0]["input_ids"][1:]]


def test_a_conversation_that_begins_with_the_answer(make_tokenizer: Any) -> None:
    for template in (CHATML, OPENING):
        tokenizer = make_tokenizer(template)
        messages = [{"role": "assistant", "content": "Paris"}, *chat("what", "no")]
        found = texts(tokenize_rows([{"messages": messages}], tokenizer, max_length=99), tokenizer)[1]
        assert found == "Paris<|im_end|>|no<|im_end|>"


def test_what_the_template_refuses_is_one_line_with_the_row(make_tokenizer: Any) -> None:
    rows = [TWO_TURNS, {"messages": [{"role": "system", "content": ""}, *chat("a", "b")]}]
    expected = r"row 2: the chat template refuses a conversation of system, user, assistant: must begin with user"
    with pytest.raises(DataError, match=expected):
        tokenize_rows(rows, make_tokenizer(STRICT), max_length=99)


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_and_completion(make_tokenizer: Any, bos: bool) -> None:
    tokenizer = make_tokenizer(CHATML, bos=bos)  # the template has no part in it
    row = {"prompt": "what is the capital:", "completion": " Paris"}
    whole, trained = texts(tokenize_rows([row], tokenizer, max_length=99), tokenizer)
    start = "<s>" if bos else ""
    assert (whole, trained) == (f"{start}what is the capital: Paris</s>", " Paris</s>")
    already = {"prompt": start + row["prompt"], "completion": " Paris</s>"}
    assert tokenize_rows([already], tokenizer, max_length=99)[0]["input_ids"] == tokenizer(whole, add_special_tokens=False)["input_ids"]  # noqa: E501  # fmt: skip


def test_a_token_across_the_border_of_the_prompt_is_trained(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    assert len(tokenizer(" the")["input_ids"]) == 1
    row = {"prompt": "what t", "completion": "he capital"}  # "what| the| capital", one token over the border
    assert texts(tokenize_rows([row], tokenizer, max_length=99), tokenizer)[1] == " the capital</s>"


def test_plain_text_is_trained_whole_and_split(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(CHATML, bos=True)
    rows = [{"text": "the capital"}, {"text": "Paris, no more. " * 50}, {"text": " \n"}]
    tokenized = tokenize_rows(rows, tokenizer, max_length=32)
    assert texts(tokenized, tokenizer)[0] == "<s>the capital</s>"
    pieces = [document["input_ids"] for document in tokenized[1:]]
    assert [len(piece) for piece in pieces[:-1]] == [32] * (len(pieces) - 1)
    assert tokenizer.decode([token for piece in pieces for token in piece]) == "<s>" + rows[1]["text"] + "</s>"
    assert all(document["labels"] == [-100, *document["input_ids"][1:]] for document in tokenized)
    assert (tokenized.rows, tokenized.overlong, tokenized.pieces) == (3, 1, len(pieces))
    assert tokenized.dropped == 1  # the empty text


def test_overlong_answers_are_cut_and_dropped_without_any_left(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer()
    long = {"prompt": "what", "completion": " Paris" * 100}
    lost = {"prompt": "what is " * 100, "completion": " Paris"}
    short = {"prompt": "what", "completion": " Paris"}
    tokenized = tokenize_rows([long, lost, short], tokenizer, max_length=24)
    assert (tokenized.rows, tokenized.overlong, tokenized.dropped, len(tokenized)) == (3, 2, 1, 2)
    assert list(tokenized.row_of) == [0, 2]
    full = tokenize_rows([long], tokenizer, max_length=10_000)
    assert tokenized[0] == {key: values[:24] for key, values in full[0].items()}
    with pytest.raises(DataError, match=r"none of 1 row has a trained token within max_length 24 \(1 is longer\)"):
        tokenize_rows([lost], tokenizer, max_length=24)


def test_alpaca_without_a_chat_template(make_tokenizer: Any) -> None:
    row = {"messages": chat("Add.\n\n2 2", "4"), "alpaca": {"instruction": "Add.", "input": "2 2"}}
    tokenizer = make_tokenizer()
    whole, trained = texts(tokenize_rows([row], tokenizer, max_length=500), tokenizer)
    assert trained == "4</s>"
    assert whole.endswith("### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n4</s>")
    bare = {"messages": chat("Add {x}.", "4"), "alpaca": {"instruction": "Add {x}.", "input": ""}}
    assert "Input" not in texts(tokenize_rows([bare], tokenizer, max_length=500), tokenizer)[0]
    with_template = make_tokenizer(CHATML)
    assert "###" not in texts(tokenize_rows([row], with_template, max_length=500), with_template)[0]
    with pytest.raises(DataError, match="row 1: the tokenizer has no chat template"):
        tokenize_rows([TWO_TURNS], tokenizer, max_length=99)


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA3, MARKED, FORGETFUL], ids=["chatml", "llama-3", "markers", "forgetful"]
)
def test_the_prompt_for_generation_is_what_training_has_before_the_answer(make_tokenizer: Any, template: str) -> None:
    tokenizer = make_tokenizer(template, bos=True)
    for row in (TWO_TURNS, {"prompt": "what is", "completion": " Paris"}):
        prompt, expected = render_prompt(row, tokenizer)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        document = tokenize_rows([row], tokenizer, max_length=500)[-1]
        assert document["input_ids"][: len(ids)] == ids
        assert document["labels"][len(ids)] != -100 == document["labels"][len(ids) - 1]
        assert expected in ("no more", " Paris")


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last and "
    "'</thought>' not in m['content'] %}{{ EMPTY }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + OPENED }}{% endif %}"
)


@pytest.mark.parametrize(
    ("opened", "empty", "answer", "begins", "expected"),
    [
        # the generation prompt opens a thought, which the answer goes on with
        ("<thought>\n", "", "<thought>\nno\n</thought>\n\nyes", "<thought>\n", "no\n</thought>\n\nyes"),
        # and a finished turn is written with an empty one, as by Qwen3's thinking models
        ("<thought>\n", "<thought>\n\n</thought>\n\n", "yes", "<thought>\n", "</thought>\n\nyes"),
        # the model itself writes the empty thought, as by Qwen3's
        ("", "<thought>\n\n</thought>\n\n", "yes", "", "<thought>\n\n</thought>\n\nyes"),
        # a finished turn has no thought at all: the model was trained without, so it is measured without
        ("<thought>\n", "", "yes", "", "yes"),
    ],
)
def test_the_expected_answer_is_what_follows_the_prompt(
    make_tokenizer: Any, opened: str, empty: str, answer: str, begins: str, expected: str
) -> None:
    """The tokens of prompt and answer are those of training, so that a model that learnt them matches exactly."""
    tokenizer = make_tokenizer(THINKING.replace("OPENED", repr(opened)).replace("EMPTY", repr(empty)))
    row = {"messages": chat("is it?", answer)}
    prompt, found = render_prompt(row, tokenizer)
    assert prompt == f"<|im_start|>user\nis it?<|im_end|>\n<|im_start|>assistant\n{begins}"
    assert found == expected
    document = tokenize_rows([row], tokenizer, max_length=500)[-1]
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert document["input_ids"][: len(ids)] == ids
    answered = tokenizer.decode(document["input_ids"][len(ids) :], skip_special_tokens=True)
    assert answered.strip() == found


def test_prompts_of_other_rows(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(CHATML, bos=True)
    assert render_prompt({"text": "the capital"}, tokenizer) == ("<s>the capital", None)
    assert render_prompt({"prompt": "a", "chosen": "b", "rejected": "c"}, tokenizer) == ("<s>a", "b")
    preference = {"prompt": chat("a"), "chosen": chat("x", "b")[1:], "rejected": chat("x", "c")[1:]}
    assert render_prompt(preference, tokenizer) == ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "b")


def test_refusals(make_tokenizer: Any) -> None:
    tokenizer = make_tokenizer(CHATML)
    with pytest.raises(DataError, match=r"row 1: .*'prompt', 'chosen', 'rejected' is not in a form"):
        tokenize_rows([{"prompt": "a", "chosen": "b", "rejected": "c"}], tokenizer, max_length=9)
    with pytest.raises(DataError, match="max_length must be at least 2, not 1"):
        tokenize_rows([TWO_TURNS], tokenizer, max_length=1)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        tokenize_rows([TWO_TURNS], tokenizer, max_length=9)


def test_strings_are_tokenized_as_trl_does(make_tokenizer: Any) -> None:
    import tempfile

    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = make_tokenizer(bos=True)
    tokenizer.pad_token = "</s>"
    rows = [
        {"prompt": "what is the capital:", "completion": " Paris"},
        {"prompt": "what t", "completion": "he capital"},
        {"prompt": "what is", "completion": " no more, no less" * 30},
        {"prompt": "and", "completion": ""},
    ]
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer)))
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(output_dir=folder, use_cpu=True, bf16=False, max_length=40, report_to=[], disable_tqdm=True)
        trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    ours = tokenize_rows(rows, tokenizer, max_length=40)
    assert ours.input_ids == [list(ids) for ids in trainer.train_dataset["input_ids"]]
    assert ours.labels == [list(labels) for labels in trainer.train_dataset["labels"]]


def test_smollm2(smollm2: Any) -> None:
    messages = chat("The 3rd of May 1999?", "1999-05-03", "Thanks!", " Welcome \n")
    tokenized = tokenize_rows([{"messages": messages}], smollm2, max_length=500)
    whole, trained = texts(tokenized, smollm2)
    assert whole == smollm2.apply_chat_template(messages, tokenize=False)
    assert whole.count("<|im_start|>") == 5  # its bos token is the one that opens a turn: none is added before them
    assert trained == "1999-05-03<|im_end|>| Welcome \n<|im_end|>"
    prompt, expected = render_prompt({"messages": messages[:2]}, smollm2)
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert expected == "1999-05-03"
    row = {"prompt": "The capital of France is", "completion": " Paris"}
    assert texts(tokenize_rows([row], smollm2, max_length=9), smollm2) == (
        "The capital of France is Paris<|im_end|>",
        " Paris<|im_end|>",
    )
