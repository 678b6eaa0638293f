"""What a channel is to the stage that builds it: a name, what it needs, and a build of plain arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from configs.schema import ChannelsConfig, Section
from trainer.catalogue import Catalogue
from trainer.co_views import CoViews
from trainer.neighbors import NeighborLists
from trainer.sequences import SequenceStore


@dataclass(frozen=True)
class Given:
    """What a build may read beside the views.

    indexes: the run's indexes folder, whose item vectors the embedding channel may take. threads: of its kernels.
    """

    config: ChannelsConfig
    catalogue: Catalogue
    indexes: Path | None = None
    threads: int = 1


@dataclass(frozen=True)
class Built:
    """A channel's lists, and counts for the manifest (JSON values; the same inputs give the same counts)."""

    lists: NeighborLists
    facts: Mapping[str, Any] = field(default_factory=dict)


class Channel(Protocol):
    """One item-to-item retrieval method. A new one is a file with such a class, a config section, and a line in
    CHANNELS."""

    name: str

    def section(self, config: ChannelsConfig) -> Section:
        """Its own part of the config: other parts cannot change its lists, `top` and `window_h` aside."""

    def lacks(self, store: SequenceStore) -> str | None:
        """Why it cannot be built from these logs, for people; None where it can."""

    def sources(self, watermark_ms: int, given: Given) -> Mapping[str, Any]:
        """What it reads beside logs and config, by name and fingerprint.

        Raises:
            InputError: if that is not there.
        """

    def build(self, views: CoViews, given: Given) -> Built:
        """The lists as of views.watermark_ms: nothing at or after it may be read."""
