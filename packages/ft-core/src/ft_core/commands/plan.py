"""``ft plan CONFIG.yaml key=value …``: whether a training fits, and how long it takes, before anything is loaded."""

from __future__ import annotations

import argparse
import json

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="a configuration of ft train")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="values to use instead: max_length=8192"
    )
    parser.add_argument("--gpu", metavar="NAME", help='a card that need not be here, such as "RTX 4090"')
    parser.add_argument("--memory", metavar="AMOUNT", help="of the card, such as 12GiB (in place of what it has)")
    parser.add_argument("--json", action="store_true", help="print JSON: bytes and seconds")


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0 if it fits, 1 if not.

    Raises:
        FtError: the configuration, its data, the card or the amount cannot be used, or the model's configuration is not
            found.
    """
    from ft_core import console
    from ft_core.config import load_config
    from ft_core.errors import ConfigError
    from ft_core.memory import bytes_of
    from ft_core.plugins import ModalitySpec, registry
    from ft_core.training.modality import with_local_task

    config = with_local_task(load_config(args.config, args.overrides))
    if config.task != "text" and registry().get(ModalitySpec, config.task).plan is None:
        raise ConfigError(f"task: ft plan does not know the task {config.task!r} yet")
    try:
        memory = None if args.memory is None else bytes_of(args.memory)
    except ValueError:
        raise ConfigError(
            f"--memory {args.memory!r} is no amount (allowed: one above zero, such as 12GiB; units: GiB, MiB, GB, MB)"
        ) from None
    from ft_core.training.before import check_data
    from ft_core.training.disk import disk_folder

    check_data(config)  # a training that would be refused does not fit
    if args.gpu is None and memory is None:  # that is for this machine, whose folders are here
        disk_folder(config)
    console.quiet()
    from ft_core.fast.spill import disk_room
    from ft_core.models.device import host_memory
    from ft_core.models.positions import fit_to_model
    from ft_core.planning import card_here, find_card, plan, ways, with_memory
    from ft_core.planning.blueprint import find_outline
    from ft_core.planning.show import table
    from ft_core.training.modality import with_task

    elsewhere = args.gpu is not None
    taken: list[str] = []
    named = find_card(args.gpu, memory, say=taken.append) if elsewhere else None  # before a model is looked for
    source = find_outline(config)
    config = fit_to_model(with_task(config, source), source, say=console.say)
    for said in taken:  # not beside a mistake, which is one line
        console.say(said)
    card = named or card_here()
    if memory is not None:
        elsewhere = elsewhere or card is None
        card = with_memory(card, memory)
    if card is None:
        raise ConfigError(
            'there is no GPU here to plan for: name one (--gpu "RTX 4090"), or an amount (--memory 12GiB)'
        )
    folder = None if elsewhere else disk_folder(config)
    disk = 0 if folder is None else disk_room(folder)
    planned = plan(config, source, card, host=None if elsewhere else host_memory()[0], disk=disk)
    found = [] if planned.fits else ways(planned.planner, config, card)
    if args.json:
        print(json.dumps({**planned.as_json(), "would_fit": found}, indent=2))
    else:
        print(table(planned, found))
    return 0 if planned.fits else 1
