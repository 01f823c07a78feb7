"""What a new LoRA adapter is like; a module of its own, since experiments are validated without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tribunal.core.config import Section


class LoraSettings(Section):
    """A new adapter. The defaults are those of the published activation oracles."""

    rank: int = Field(64, ge=1, description="rank of each update")
    alpha: float = Field(128, gt=0, description="scale of the update: alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="of the update's input")
    targets: Literal["all-linear"] | list[str] = Field("all-linear", description="modules to adapt: all linear ones but the head, or names")
