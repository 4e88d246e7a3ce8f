"""``ft train CONFIG.yaml key=value …``"""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from ft_core.config import TrainConfig

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the configuration")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="values to use instead: training.max_steps=100"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run in 'output'")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in 'output'")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and stop")
    # What ft plan has it for: taken here too, to say where it goes.
    parser.add_argument("--memory", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from ft_core.config import load_config, to_yaml
    from ft_core.errors import ConfigError

    if args.memory is not None:
        raise ConfigError(
            f"--memory {args.memory} is no option: what a training may take is a setting, memory=AMOUNT (allowed: "
            "auto, or one above zero, such as 12GiB; units: GiB, MiB, GB, MB)"
        )
    from ft_core.training.modality import with_local_task

    config = with_local_task(load_config(args.config, args.overrides))
    if args.print_config:
        print(to_yaml(config, header=False), end="")
        return 0
    from ft_core.memory import let_segments_grow
    from ft_core.training.before import check_before

    let_segments_grow()
    check_before(config, resume=args.resume, overwrite=args.overwrite)
    from ft_core.console import counted, quiet, say

    quiet()
    from ft_core.evaluation import table
    from ft_core.installing import how_to_install
    from ft_core.plugins import registry
    from ft_core.runs import Run
    from ft_core.training import train
    from ft_core.training.ranks import Ranks

    result = train(config, resume=args.resume, overwrite=args.overwrite, say=say)
    if not Ranks().is_main:
        return 0
    again = shlex.join(["ft", "train", args.config, *args.overrides])
    if result.status == "interrupted":
        say(f"stopped at step {result.steps}; go on with: {again} --resume")
        return 130
    loss = f", loss {result.train_loss:.4f}" if result.train_loss is not None else ""
    print(f"done: {counted(result.steps, 'step')}{loss}, in {result.run}")
    if result.evaluation:
        print(table(result.evaluation))
    print(f"report: {result.run / 'report.html'}")
    config = Run.open(result.run).config  # with the task that its model is of
    commands = _next(config, result.run, evaluated=result.evaluation is not None)
    if commands:
        print("next: " + "  |  ".join(shlex.join(["ft", *words]) for words in commands))
    if not registry().names("ft.exporters"):
        print(f"to merge it, or export it to GGUF, Ollama and others: {how_to_install('export')}")
    return 0


def _next(config: TrainConfig, run: Path, *, evaluated: bool) -> list[list[str]]:
    """The commands that this run can be handed to as it is."""
    from ft_core.plugins import MethodSpec, ModalitySpec, registry

    words = [["eval", str(run)]] if evaluated else []  # where no rows were held out it has nothing to measure
    speaks = registry().get(MethodSpec, config.method).head == "language-model"  # a score is no answer
    if speaks and (config.task == "text" or registry().get(ModalitySpec, config.task).answerer is not None):
        words.append(["chat", str(run)])
    if config.task != "text":  # the others read nothing else yet
        named = registry().get(ModalitySpec, config.task).next
        return words + [[word.format(run=run) for word in command] for command in named]
    if config.lora is not None and "merge" in registry().names("ft.commands"):
        words.append(["merge", str(run)])
    if speaks and "gguf" in registry().names("ft.exporters"):
        words.append(["export", str(run), "--to", "gguf"])
    return words
