"""Makes the golden files of this folder with other implementations, in float64.

    python -m tests.golden.make                              # all cases of transformers
    python -m tests.golden.make --official FOLDER            # the others too, and more checks
    python -m tests.golden.make --case mamba_tiny --out somewhere

Nothing of `mamba_eqx` is imported here. Each case is computed twice, by its witness and by a plain
loop over tokens (`_loop_*.py`), and is written only if the two agree to `_witness.TOLERANCE`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from tests.golden import _official_mamba2, _official_mamba3
from tests.golden._official import SCAN_CASES, make_scan, make_state_spaces
from tests.golden._official_attention import make_hybrid
from tests.golden._transformers import TRANSFORMERS_CASES, make_transformers


class Case(NamedTuple):
    """How a case is made."""

    make: Callable[[str, Path, Path | None], None]
    """Takes the name of the case, the folder to write to, and the official code."""
    needs: str = ""
    """A file of the official code without which the case is left out."""


SETUP = "setup.py"
MAMBA3_TESTS = "tests/ops/triton/test_mamba3_siso.py"

CASES = {
    **dict.fromkeys(TRANSFORMERS_CASES, Case(make_transformers)),
    **dict.fromkeys(SCAN_CASES, Case(make_scan, SETUP)),
    "state_spaces_mamba": Case(make_state_spaces),
    "state_spaces_mamba2": Case(_official_mamba2.make_model, SETUP),
    "ssd_minimal": Case(_official_mamba2.make_ssd, SETUP),
    "state_spaces_hybrid": Case(make_hybrid, SETUP),
    "mamba3_ref": Case(_official_mamba3.make_references, MAMBA3_TESTS),
    **dict.fromkeys(_official_mamba3.MODELS, Case(_official_mamba3.make_model, MAMBA3_TESTS)),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, action="append", help="default: all cases")
    parser.add_argument(
        "--official",
        type=Path,
        metavar="FOLDER",
        help="a clone of the official repository, or an unpacked source archive of mamba-ssm "
        "(which lacks the tests that the Mamba-3 cases need)",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="default: here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")
    for name in args.case or CASES:
        case = CASES[name]
        if case.needs and (args.official is None or not (args.official / case.needs).exists()):
            print(f"{name}: left out, it needs --official FOLDER with {case.needs}")
        else:
            case.make(name, args.out, args.official)


if __name__ == "__main__":
    main()
