"""The dropout rate of each layer: one for all, others by a pattern of names, or growing over training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real

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
        """Raise ``ValueError`` for a rate that is no number in [0, 1) and a pattern that is no regular expression."""
        given = [("rate", self.rate), *self.pattern.items()]
        if self.initial is not None:
            given.append(("initial", self.initial))
        for name, rate in given:
            if not isinstance(rate, Real) or not 0.0 <= rate < 1.0:
                raise ValueError(
                    f"the dropout rate is a probability, a number at least 0 and below 1, found {rate!r} for {name!r}"
                )
        for pattern in self.pattern:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"rate_pattern: {pattern!r} is no regular expression: {error}") from error

    def of(self, name: str, progress: float = 1.0) -> float:
        """The rate of a layer when ``progress`` of the training is done; the ensemble's is that at the end.

        Raises:
            ValueError: ``progress`` outside 0 to 1.
        """
        if not 0.0 <= progress <= 1.0:
            raise ValueError(f"progress: the share of the training that is done, 0 to 1, found {progress}")
        final = self.pattern.get(get_pattern_key(list(self.pattern), name), self.rate)
        if self.initial is None:
            return final
        return self.initial + (final - self.initial) * progress

    def unused(self, names: Iterable[str]) -> list[str]:
        """Patterns that name no layer."""
        used = {get_pattern_key(list(self.pattern), name) for name in names}
        return [pattern for pattern in self.pattern if pattern not in used]
