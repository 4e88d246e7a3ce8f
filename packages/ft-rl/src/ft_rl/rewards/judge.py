"""The reward ``http``: a server judges, at an address that the configuration names."""

from __future__ import annotations

import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ft_core.errors import DataError
from ft_rl.rewards.samples import SampleErrors, Text
from ft_rl.web import bearer, check_address, direct

__all__ = ["HttpSettings", "http"]

ANSWER = 64 * 2**20
"""Bytes of the longest answer that is read."""

AGAIN = (408, 429, 500, 502, 503, 504)
"""What a server says when it may work another time."""


class HttpSettings(BaseModel):
    """Settings of ``http``.

    Attributes:
        url: where to POST a JSON object ``{"prompts": […], "completions": […], "columns": {"answer": […], …}}``. The
            answer is ``{"rewards": […]}`` or the list alone, with a number, or null for none, per completion.
        columns: the columns of the data that are sent; unset, all.
        timeout: seconds that one request may take.
        retries: how often a request that found nobody, or a server that is busy or broken, is sent again.
        wait: seconds before the first time that it is, doubled each time.
        batch: how many completions go into one request; unset, all of a batch.
        token_file: a file whose text goes along as ``Authorization: Bearer …``; the run's configuration has its path
            only.
    """

    model_config = ConfigDict(extra="forbid")

    url: str
    columns: list[str] | None = None
    timeout: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    retries: int = Field(default=3, ge=0)
    wait: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    batch: int | None = Field(default=None, ge=1)
    token_file: str | None = None

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        return check_address(url)


def http(settings: HttpSettings) -> Any:
    """The reward function: what the server says. Requests go to the address that is configured, by no proxy.

    A request that fails for good is a fault of each sample in it.

    Raises:
        ConfigError: the token's file cannot be read.
    """
    headers = {"Content-Type": "application/json", "Accept": "application/json", **bearer(settings.token_file)}
    opener = direct()

    def reward(prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[float | None]:
        sent = _columns(columns, len(prompts), settings.columns)
        size = settings.batch or max(len(prompts), 1)
        values: list[float | None] = []
        errors: dict[int, str] = {}
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            body = {
                "prompts": prompts[part],
                "completions": completions[part],
                "columns": {name: column[part] for name, column in sent.items()},
            }
            count = len(body["completions"])
            try:
                values += _rewards(_post(opener, settings, headers, _json(body)), count)
            except ValueError as error:
                errors |= dict.fromkeys(range(start, start + count), f"{settings.url} {error}")
                values += [None] * count
        if errors:
            raise SampleErrors(values, errors)
        return values

    if settings.columns:
        reward.columns = tuple(settings.columns)  # type: ignore[attr-defined]
    return reward


def _columns(columns: dict[str, Any], count: int, wanted: list[str] | None) -> dict[str, list[Any]]:
    there = {name: v for name, v in columns.items() if isinstance(v, list) and len(v) == count}
    if wanted is None:
        return {name: v for name, v in there.items() if name not in ("completion_ids", "environments")}
    missing = [name for name in wanted if name not in there]
    if missing:
        raise DataError(f"the data has no column {missing[0]!r} (it has: {', '.join(there) or 'none'})")
    return {name: there[name] for name in wanted}


def _json(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"a column cannot be sent as JSON ({error}): name those to send in columns") from error


def _post(opener: urllib.request.OpenerDirector, settings: HttpSettings, headers: dict[str, str], body: bytes) -> bytes:
    """The answer; a ValueError that says what the address did, once there is no retry left."""
    request = urllib.request.Request(settings.url, data=body, headers=headers, method="POST")
    for tried in range(settings.retries + 1):
        if tried:
            time.sleep(settings.wait * 2 ** (tried - 1))
        try:
            with opener.open(request, timeout=settings.timeout) as answer:
                read: bytes = answer.read(ANSWER + 1)
            if len(read) > ANSWER:
                raise ValueError(f"answers with more than {ANSWER // 2**20} MiB")
            return read
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(200).decode(errors="replace")
            said = f"answers {error.code} {error.reason}{': ' + ' '.join(text.split()) if text.strip() else ''}"
            if error.code not in AGAIN:
                raise ValueError(said) from error
        except (OSError, EOFError) as error:  # a URLError is one
            reason = getattr(error, "reason", error)
            said = f"cannot be reached ({reason or type(error).__name__})"
    times = f" {settings.retries + 1} times" if settings.retries else ""
    raise ValueError(f"{said}, tried{times}" if times else said)


def _rewards(answer: bytes, count: int) -> list[float | None]:
    shown = answer[:60].decode(errors="replace")
    try:
        said = json.loads(answer)
    except (ValueError, RecursionError):
        raise ValueError(f"answers what is no JSON: {shown!r}") from None
    rewards = said.get("rewards") if isinstance(said, dict) else said
    if not isinstance(rewards, list):
        raise ValueError(f"answers {shown!r}, without a list of rewards")
    if len(rewards) != count:
        raise ValueError(f"answers with {len(rewards)} rewards for {count} completions")
    for reward in rewards:
        number = isinstance(reward, int | float) and not isinstance(reward, bool)
        if reward is not None and not (number and math.isfinite(reward)):
            raise ValueError(f"answers with the reward {reward!r}, which is no number")
    return rewards
