"""Running a model over text: generation, beam search, speculative decoding, and scoring."""

from . import sampling as sampling
from ._beam_search import Beams as Beams, beam_search as beam_search
from ._drafts import PromptLookup as PromptLookup
from ._generate import generate as generate, stream as stream
from ._prefill import prefill as prefill
from ._result import FinishReason as FinishReason, Generation as Generation
from ._sampling import Sampling as Sampling
from ._score import Score as Score, embed as embed, score as score
from ._speculate import Speculation as Speculation, speculate as speculate
from ._state import DecodingState as DecodingState, decoding_state as decoding_state, fork as fork
from ._state_file import load_state as load_state, save_state as save_state
from ._stream import Stream as Stream
from .constraints import (
    AbstractConstraint as AbstractConstraint,
    Grammar as Grammar,
    HostConstraint as HostConstraint,
    Matcher as Matcher,
    TokenAutomaton as TokenAutomaton,
)
from .engine import (
    Engine as Engine,
    EngineCounts as EngineCounts,
    EngineFullError as EngineFullError,
    Job as Job,
    Progress as Progress,
)


# The public names. Other folders of the package may import the other names too.
__all__ = [
    "AbstractConstraint",
    "Beams",
    "DecodingState",
    "Engine",
    "EngineCounts",
    "EngineFullError",
    "FinishReason",
    "Generation",
    "Grammar",
    "HostConstraint",
    "Job",
    "Matcher",
    "Progress",
    "PromptLookup",
    "Sampling",
    "Score",
    "Speculation",
    "Stream",
    "TokenAutomaton",
    "beam_search",
    "decoding_state",
    "embed",
    "fork",
    "generate",
    "load_state",
    "prefill",
    "save_state",
    "score",
    "speculate",
    "stream",
]
