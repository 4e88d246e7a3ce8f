"""The reward ``reasoning-gym``: the answer is judged by the verifier of the data set in reasoning-gym that asked."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from ft_core.errors import ConfigError, RunError
from ft_rl.rewards.extraction import Part, PartName, extract
from ft_rl.rewards.samples import Text, column_of, score_each, start_of, text_of
from ft_rl.rewards.sandbox import Limits, check_isolation, run_python

__all__ = ["ReasoningGymSettings", "reasoning_gym", "verified"]

START = 120.0
"""Seconds that importing reasoning-gym may take."""

PROGRAM = """
import json, os, signal, sys
import reasoning_gym
from reasoning_gym.factory import DATASETS
descriptor = int(os.environ.pop("RESULT"))
told = json.load(sys.stdin)
names = {name for name, _, _ in told["answers"]}
judges = {name: reasoning_gym.get_score_answer_fn(name) for name in names if name in DATASETS}
def say(number, what):
    os.write(descriptor, f"{told['word']} {number} {what}\\n".encode())
for number, (name, answer, entry) in enumerate(told["answers"]):
    if name not in judges:
        say(number, "unknown")
        continue
    # A process each: one that hangs or crashes takes no other with it, and leaves nothing behind for the next.
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_REAL, told["seconds"])
        try:
            say(number, float(judges[name](answer, entry)))
        except MemoryError:
            pass
        except Exception as error:
            say(number, f"error {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        os._exit(0)
    os.waitpid(child, 0)
"""


class ReasoningGymSettings(Part):
    """Settings of ``reasoning-gym``; those of :class:`ft_rl.rewards.extraction.Part` too, ``part`` being ``tag``.

    The data has the columns ``answer`` and ``metadata`` of reasoning-gym's entries (``metadata`` as an object or as
    JSON text; text where entries of several data sets are mixed), and may have ``question``, else the prompt stands
    for it.

    Attributes:
        dataset: the data set whose verifier judges; unset, the one that the row's metadata name as ``source_dataset``.
        seconds: how long judging one answer may take; one that takes longer gets 0.
    """

    part: PartName = "tag"
    dataset: str | None = Field(default=None, min_length=1)
    seconds: float = Field(default=5.0, gt=0, le=600, allow_inf_nan=False)


def reasoning_gym(settings: ReasoningGymSettings) -> Any:
    """The reward function: what the verifier says, from 0 to 1; 0 where the completion has no answer.

    Some of reasoning-gym's verifiers evaluate the answer as Python, so they run where it can harm nothing.

    Raises:
        ConfigError: reasoning-gym isn't installed.
        NoIsolation: this machine cannot keep code from the network and from its files.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError('reasoning-gym is not installed: pip install "ft-rl[gym]"')
    check_isolation()

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        answers, metadata = column_of(columns, "answer"), column_of(columns, "metadata")
        questions = columns.get("question")
        asked: dict[int, tuple[str, str, dict[str, Any]]] = {}
        wrong: dict[int, str] = {}
        for i, completion in enumerate(completions):
            answer = extract(text_of(completion), settings)
            if answer is None:
                continue
            try:
                found = json.loads(metadata[i]) if isinstance(metadata[i], str) else metadata[i]
                name = settings.dataset or found["source_dataset"]
            except (ValueError, TypeError, KeyError):
                wrong[i] = f"the row's metadata {str(metadata[i])[:40]!r} name no source_dataset"
                continue
            question = questions[i] if isinstance(questions, list) else start_of(prompts[i], 10**6)
            entry = {"question": question, "answer": answers[i], "metadata": found}
            asked[i] = (str(name), answer, entry)
        judged = dict(zip(asked, verified(list(asked.values()), settings.seconds), strict=True))

        def score(i: int) -> float:
            said = wrong.get(i) or judged.get(i, 0.0)
            if said == "unknown":
                name = asked[i][0]
                if settings.dataset:
                    raise ConfigError(f"reasoning-gym has no data set {name!r}")
                raise ValueError(f"reasoning-gym has no data set {name!r}")
            if isinstance(said, str):
                raise ValueError(said)
            return said

        return score_each(len(completions), score)

    reward.columns = ("answer", "metadata")  # type: ignore[attr-defined]
    return reward


def verified(answers: Sequence[tuple[str, str, Mapping[str, Any]]], seconds: float) -> list[float | str]:
    """What reasoning-gym's verifiers say of answers.

    Args:
        answers: name of the data set, answer, and the entry that was asked.
        seconds: how long one may take.

    Returns:
        A score each, 0.0 where it took too long or too much; ``unknown`` for no such data set; or what the verifier
        raised.

    Raises:
        NoIsolation: as :func:`ft_rl.rewards.sandbox.run_python`.
        RunError: reasoning-gym itself does not start.
    """
    import secrets

    if not answers:
        return []
    word = secrets.token_hex(16)
    told = json.dumps({"answers": answers, "seconds": seconds, "word": word}, default=str)
    limits = Limits(
        seconds=START + seconds * len(answers), cpu_seconds=int(START + seconds * len(answers)), memory=4 * 2**30
    )
    outcome = run_python(PROGRAM, limits, stdin=told, packages=True)
    if outcome.status == "exit" and outcome.code != 0:
        lines = outcome.output.decode(errors="replace").strip().splitlines()
        raise RunError(f"reasoning-gym fails in the sandbox: {lines[-1] if lines else 'it says nothing'}")
    found: list[float | str] = [0.0] * len(answers)
    for line in outcome.result.decode(errors="replace").splitlines():
        said, _, rest = line.partition(" ")
        number, _, what = rest.partition(" ")
        if said == word:
            found[int(number)] = what if what == "unknown" or what.startswith("error ") else float(what)
    return found
