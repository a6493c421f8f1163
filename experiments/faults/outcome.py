"""What came of a fault that was tried many times."""

from collections.abc import Iterable
from typing import NamedTuple

RIGHT = ""  # of a trial that went as it should


class Outcome(NamedTuple):
    """A row of the page."""

    fault: str
    happens: str  # what should happen
    lost: str
    tried: int
    problems: tuple[str, ...]  # of the trials that went otherwise

    @property
    def right(self) -> int:
        """The trials that went as they should."""
        return self.tried - len(self.problems)


def tally(fault: str, happens: str, lost: str, trials: Iterable[str]) -> Outcome:
    """Counts trials, each of which gives RIGHT or what went wrong."""
    found = list(trials)
    problems = tuple(problem for problem in found if problem != RIGHT)
    return Outcome(fault, happens, lost, len(found), problems)
