"""What global concurrency limits a Prefect has: what both ways of reading them share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_OF_A_DEPLOYMENT = re.compile("deployment:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_OF_A_TAG = "tag:"


@dataclass(frozen=True, slots=True)
class GlobalLimit:
    """A limit as Prefect has it. Nothing of it has been checked."""

    name: Any
    limit: Any
    slot_decay_per_second: Any
    active: Any
    active_slots: int


@dataclass(frozen=True, slots=True)
class Found:
    """What a Prefect has.

    Attributes:
        source: where it was read, without any secret.
        limits: those that people have made.
        tags, deployments: how many limits Prefect keeps for tags of tasks, and for deployments.
    """

    source: str
    limits: tuple[GlobalLimit, ...]
    tags: int
    deployments: int


def found(source: str, limits: Iterable[GlobalLimit], tags: Iterable[str]) -> Found:
    """Sort what was read. ``tags``: those that have a limit of the old kind."""
    ours: list[GlobalLimit] = []
    tagged, deployments = set(tags), 0
    for each in limits:
        name = str(each.name)
        if name.startswith(_OF_A_TAG):
            tagged.add(name.removeprefix(_OF_A_TAG))
        elif _OF_A_DEPLOYMENT.fullmatch(name):
            deployments += 1
        else:
            ours.append(each)
    return Found(source, tuple(ours), len(tagged), deployments)
