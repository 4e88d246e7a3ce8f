"""Answers by ft beside transformers' own generate(), on one GPU: python benchmarks/decoding.py --work DIR [...]

A model of the shape of Llama 3.1 8B with random weights is made once in DIR (16 GB, as benchmarks/fast_path.py makes
it). Each contestant runs in a process of its own and loads the model once for each quantization: greedy answers of
--new tokens without an end token, to --batches prompts of --prompt tokens. Timed is what follows the first tokens: the
time for --new tokens less the time for 8, after one answer that compiles and warms up. transformers may make fewer
(--peer-new), since its tokens take the same time each. A row for each case is added to
benchmarks/results/decoding.jsonl and a table is printed, with how far both agree: the tokens before the first that
differs (between near tokens of random weights rounding decides soon), and, with --exact, the error of a step's logits
against the same weights in float32.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fast_path import TARGETS, versions

RESULTS = Path(__file__).with_name("results") / "decoding.jsonl"
CONTESTANTS = ("transformers", "ft")
FIRST = 8
"""Tokens of the short answer whose time is taken off the long one's: it has the prompt's pass in it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="where the model is made, and kept")
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--quantization", default="none,nf4")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--prompt", type=int, default=100, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--peer-new", type=int, default=64, help="tokens that transformers makes")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--lora", action="store_true", help="with a live adapter of rank 16 on all linear layers")
    parser.add_argument("--exact", action="store_true", help="measure the first logits against float32 (32 GB more)")
    parser.add_argument("--tune", action="store_true", help="let ft search for its kernels' launch settings first")
    parser.add_argument("--profile", action="store_true", help="print the kernels of ft's steps")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: a tiny model, to test this program
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.add_argument("--one", metavar="CONTESTANT", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.work / f"llama-{'8b' if args.device == 'cuda' else 'tiny'}-{args.layers}"
    if args.one:
        run(args, folder)
        return
    if not (folder / "config.json").is_file():  # in a process of its own, which gives its memory on the GPU back
        program = [sys.executable, str(Path(__file__).with_name("fast_path.py")), "--work", str(args.work), "--make"]
        subprocess.run([*program, "--layers", str(args.layers), "--device", args.device], check=True)
    rows: list[dict[str, Any]] = []
    args.results.parent.mkdir(exist_ok=True)
    facts = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "layers": args.layers}
    with tempfile.TemporaryDirectory() as tokens:
        for contestant in args.contestants.split(","):
            command = [sys.executable, __file__, *sys.argv[1:], "--one", contestant, "--tokens", tokens]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
            if others := [line for line in done.stdout.splitlines() if not line.startswith("{")]:
                print("\n".join(others))
            if done.returncode:
                print(done.stderr[-3000:], file=sys.stderr)
                words = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
                lines.append({"contestant": contestant, "error": words[-1][:300]})
            rows += lines
            for line in lines:
                print(table_line(line), flush=True)
            with open(args.results, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({**facts, **line}) + "\n" for line in lines)
        print()
        for row in rows:
            print(table_line(row))
        ratios(rows)
        agreement(Path(tokens))


def table_line(row: dict[str, Any]) -> str:
    """A row of the table."""
    if "error" in row:
        return f"{row['contestant']:13} {row['error']}"
    exact = "" if row["error_of_logits"] is None else f"  error of logits {row['error_of_logits']:.2e}"
    case = f"{row['contestant']:13} {row['quantization']:4} batch {row['batch']:<3}"
    return (
        f"{case} {row['tokens_per_second']:8.1f} tok/s  {row['step_ms']:7.2f} ms a step  "
        f"first {FIRST} after {row['first_s'] * 1e3:.0f} ms (cold {row['cold_s']:.0f} s)  "
        f"{row['peak_gib']:6.2f} GiB{exact}{'  ' + row['note'] if row['note'] else ''}"
    )


def ratios(rows: list[dict[str, Any]]) -> None:
    """By how much ft is faster, case by case."""
    found = {(r["contestant"], r["quantization"], r["batch"]): r["tokens_per_second"] for r in rows if "error" not in r}
    for (contestant, quantization, batch), speed in found.items():
        peer = found.get(("transformers", quantization, batch))
        if contestant == "ft" and peer:
            print(f"{quantization:4} batch {batch:<3} {speed / peer:.2f} times as fast as transformers")


def agreement(folder: Path) -> None:
    """How many tokens are the same before the first that differs, on the average of a batch's rows."""
    for file in sorted(folder.glob("ft-*.json")):
        other = file.with_name(file.name.replace("ft-", "transformers-", 1))
        if not other.is_file():
            continue
        ours, theirs = (json.loads(one.read_text(encoding="utf-8")) for one in (file, other))
        same = []
        for mine, its in zip(ours, theirs, strict=True):
            pairs = list(zip(mine, its, strict=False))
            same.append(next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs)))
        least = min(len(its) for its in theirs)
        print(f"{file.stem.removeprefix('ft-')}: {sum(same) / len(same):.1f} of {least} tokens until one differs")


def load(quantization: str, folder: Path, lora: bool, device: str) -> Any:
    """The model in bf16 or nf4, plain or with an adapter whose B is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0 if device == "cuda" else "cpu"}, attn_implementation="sdpa",
        quantization_config=four_bits if quantization == "nf4" else None,
    )  # fmt: skip
    if lora:
        torch.manual_seed(1)
        config = LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    return model.eval()


def prompts(batch: int, tokens: int, vocabulary: int) -> list[list[int]]:
    import torch

    found: list[list[int]] = torch.randint(
        3, vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(batch)
    ).tolist()
    return found


def by_transformers(model: Any, given: list[list[int]], new: int) -> list[list[int]]:
    import torch
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=2)
    ids = torch.tensor(given, device=model.device)
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
    rows: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return rows


def by_ft(model: Any, given: list[list[int]], new: int) -> list[list[int]]:
    from ft_core.fast.decoding import decoder_of

    decoder = decoder_of(model, anywhere=True)
    assert decoder is not None
    assert decoder.reason is None, decoder.reason
    problem = decoder.why_not(len(given), len(given[0]) + new)
    assert problem is None, problem
    return decoder.answers(given, new=new, stops=(), temperature=0.0, top_p=1.0)


def error_of_logits(contestant: str, model: Any, given: list[list[int]]) -> float:
    """Of the logits after one token over kept ones, in L2, against a copy of the model in float32."""
    import torch

    ids = torch.tensor(given, device=model.device)
    with torch.inference_mode():
        if contestant == "ft":
            from ft_core.fast.decoding import decoder_of

            decoder = decoder_of(model, anywhere=True)
            assert decoder is not None
            session = decoder._session(len(given), len(given[0]) + 1)
            session.begin([row[:-1] for row in given])
            logits = session.follow(ids[:, -1], 1)[: len(given)].double()
        else:
            cache = model(ids[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
            logits = model(ids[:, -1:], past_key_values=cache).logits[:, -1].double()
        exact = widened(model)(ids, logits_to_keep=1).logits[:, -1].double()
    return float((logits - exact).norm() / exact.norm())


def widened(model: Any) -> Any:
    """A copy in float32, of quantized weights with the numbers that they stand for."""
    import copy

    import torch

    from ft_core.fast.linears import numbers

    wide = copy.deepcopy(model)
    for module in list(wide.modules()):
        for name, child in list(module.named_children()):
            found = numbers(child)
            if found is not None:
                linear = torch.nn.Linear(child.in_features, child.out_features, bias=False, device="meta")
                linear.weight = torch.nn.Parameter(found, requires_grad=False)
                setattr(module, name, linear)
    for parameter in wide.parameters():
        parameter.data = parameter.data.float()
    return wide


def run(args: argparse.Namespace, folder: Path) -> None:
    """Print a line of JSON for each case."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    cuda = args.device == "cuda"

    def wait() -> float:
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    answer = by_ft if args.one == "ft" else by_transformers
    new = args.new if args.one == "ft" else args.peer_new
    for quantization in args.quantization.split(","):
        model = load(quantization, folder, args.lora, args.device)
        for batch in map(int, args.batches.split(",")):
            given = prompts(batch, args.prompt, 128000 if cuda else 500)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            begun = wait()
            answer(model, given, new if args.one == "ft" else FIRST)  # compiles, warms up, and for ft records
            cold = time.perf_counter() - begun
            if args.tune and args.one == "ft":
                tune(model, given)
            seconds = {}
            for count in (FIRST, new):
                begun = wait()
                said = answer(model, given, count)
                seconds[count] = wait() - begun
            step = (seconds[new] - seconds[FIRST]) / (new - FIRST)
            peak = round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0.0
            remark = note(model) if args.one == "ft" else ""
            error = error_of_logits(args.one, model, given) if args.exact else None
            torch.cuda.empty_cache()
            row = {
                "contestant": args.one, "quantization": quantization, "batch": batch, "prompt": args.prompt, "new": new,
                "lora": args.lora, "tokens_per_second": round(batch / step, 1), "step_ms": round(step * 1e3, 3),
                "first_s": round(seconds[FIRST], 4), "cold_s": round(cold, 1), "peak_gib": peak,
                "error_of_logits": error, "note": remark,
                "gpu": torch.cuda.get_device_name() if cuda else "none", "versions": versions(),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            name = f"{args.one}-{quantization}-{batch}.json"
            (args.tokens / name).write_text(json.dumps(said), encoding="utf-8")
            if args.profile and args.one == "ft":
                profile(model, given)
        if args.one == "ft":
            from ft_core.fast.decoding import forget

            forget(model)
        del model
        torch.cuda.empty_cache()


def note(model: Any) -> str:
    """What is worth knowing of ft's session."""
    from ft_core.fast.decoding import decoder_of

    decoder = decoder_of(model, anywhere=True)
    session = None if decoder is None else decoder.session
    if session is None:
        return "no session"
    return "" if session.recorded else f"not recorded: {session.reason}"


def tune(model: Any, given: list[list[int]]) -> None:
    """Each launch of a step that is not recorded is a trial of one candidate; the best are recorded anew."""
    from ft_core.fast.decoding import decoder_of, forget
    from ft_kernels import tuning

    with tuning.autotune():
        decoder = decoder_of(model, anywhere=True)
        assert decoder is not None
        session = decoder._session(len(given), len(given[0]) + 64)
        session.reason = "tuning"
        session._graph = None
        for _ in range(4):
            logits = session.begin(given)
            for _ in range(8):
                logits = session.follow(logits[: len(given)].argmax(-1), 1)
    for (_, name, key), chosen in tuning._state.found.items():
        print(f"{name} {key}: {chosen}")
    forget(model)
    by_ft(model, given, 16)


def profile(model: Any, given: list[list[int]]) -> None:
    """The kernels of sixteen steps."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as profiled:
        by_ft(model, given, 17)
        torch.cuda.synchronize()
    print(profiled.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    main()
