"""What decides which tokens may come next: automata, grammars, and rules of users."""

from ._automaton import TokenAutomaton as TokenAutomaton
from ._grammar import Grammar as Grammar
from ._matching import Matching as Matching
from ._protocols import (
    AbstractConstraint as AbstractConstraint,
    HostConstraint as HostConstraint,
    Matcher as Matcher,
)


# The public names. Other folders of the package may import the other names too.
__all__ = ["AbstractConstraint", "Grammar", "HostConstraint", "Matcher", "TokenAutomaton"]
