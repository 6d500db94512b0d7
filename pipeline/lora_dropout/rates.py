"""The dropout rate of each layer: one for all, others by a pattern of names, or growing over training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from peft.utils.other import get_pattern_key


@dataclass(frozen=True)
class Rates:
    """Probability p with which a feature is dropped."""

    rate: float
    """Of every layer that no pattern names."""
    pattern: Mapping[str, float] = field(default_factory=dict)
    """Rates by module name, as in peft's ``rank_pattern``: the end of a name from a dot on, or a regular expression."""
    initial: float | None = None
    """At the start of training, of every layer; it moves linearly to the layer's own at the end. None: constant."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a rate outside [0, 1) and for a pattern that is no regular expression."""
        given = {"rate": self.rate, **self.pattern, **({} if self.initial is None else {"initial": self.initial})}
        for name, rate in given.items():
            if not 0.0 <= rate < 1.0:
                raise ValueError(f"the dropout rate is a probability below 1, found {rate} for {name!r}")
        for pattern in self.pattern:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rate_pattern: {pattern!r} is no regular expression: {error}") from error

    def of(self, name: str, progress: float = 1.0) -> float:
        """The rate of a layer when ``progress`` (0 to 1) of the training is done; the ensemble's is that at the end."""
        final = self.pattern.get(get_pattern_key(list(self.pattern), name), self.rate)
        if self.initial is None:
            return final
        return self.initial + (final - self.initial) * min(max(progress, 0.0), 1.0)

    def unused(self, names: Iterable[str]) -> list[str]:
        """Patterns that name no layer."""
        used = {get_pattern_key(list(self.pattern), name) for name in names}
        return [pattern for pattern in self.pattern if pattern not in used]
