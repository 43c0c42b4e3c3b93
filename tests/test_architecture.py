"""The structure of the code: imports go strictly down, and folders are imported as a whole."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mamba_eqx"

# From the bottom to the top: a file may import from the levels above its own line, and from its own
# folder. CONTRIBUTING.md contains the same list.
LEVELS = {
    "": [
        "_atomic _checks _compilation_cache _dtypes _explicit_axes _processor _trees _version "
        "shipped",
        "formats ops text",
        "layers",
        "models",
        "generation inspection pretrained testing",
        "serving training",
        "sharding",
        "_cli",
        "__main__ __init__",
    ],
    "ops": [
        "_arguments _chunks _exp _linear_map _masks _native _norm _quantize_weight _rotary",
        "_pieces _primitives",
        "_attention _conv _gated_delta _narrow_product _quantized_product _scan_chunks",
        "_grouped_blocks _mamba3 _recurrence _scan_native _ssd",
        "_grouped_product _selective_scan",
        "__init__",
    ],
    "formats": [
        "_tensors",
        "_files",
        "_json torch",
        "_safetensors",
        "__init__",
    ],
    "text": [
        "_declared_tokens _protocols _rust _special_ids _unicode chat",
        "_steps",
        "_bytes _chat_template _spelling _stop_strings _text_decoder",
        "_private_spelling",
        "_encoding",
        "_text_tokenizer",
        "__init__",
    ],
    "text/chat": [
        "_limits",
        "_written",
        "_values",
        "_attributes _formatting _json",
        "_filters _operators",
        "_environment",
        "_expressions",
        "_statements",
        "_render",
        "__init__",
    ],
    "layers": [
        "_protocol _recurrence_parameters _initialisers _scaled",
        "_arguments _cache _gate",
        "_linear",
        "_conv _joined _norm _quantized mlps",
        "mixers",
        "_block _bidirectional",
        "_separate",
        "_stack",
        "_stacked",
        "__init__",
    ],
    "models": [
        "_config_fields _language_model _round_trip",
        "_sequence_classifier mixer_configs mlp_configs",
        "_block_config _fingerprint _quantize",
        "_config_json",
        "_language_model_config",
        "_sequence_classifier_config",
        "__init__",
    ],
    "pretrained": [
        "_card _hub_errors layouts",
        "_arrays _assign _hub_options _quantized",
        "_hub_requests",
        "_hub_cache",
        "_hub",
        "_source _state_dict",
        "_token_ids _weights",
        "_checkpoint _companions _folder",
        "_load _tokenizer",
        "_save",
        "_classifier _push",
        "_describe",
        "__init__",
    ],
    "pretrained/layouts": [
        "_fields _layout _skeleton",
        "_match _names _tables",
        "_mixers",
        "_state_spaces_mixers transformers",
        "_state_spaces",
        "_mistral",
        "_registry",
        "__init__",
    ],
    "pretrained/layouts/transformers": [
        "_family",
        "_hybrid_names _mamba _nemotron_pattern",
        "_mamba2",
        "_hybrid",
        "_granite_mlps _nemotron_experts",
        "_bamba _falcon_h1 _granite _jamba _nemotron_h",
        "_registry",
        "__init__",
    ],
    "training": [
        "_checkpoint_record _load_balance _loss_scale _recipe _row_sharding _write_error data "
        "finetuning",
        "_checkpoint_arrays _interruption _loss _metrics",
        "_checkpoints _gradients _plots _progress",
        "_fit _step",
        "__init__",
    ],
    "testing": [
        "_running",
        "_laws",
        "_plans",
        "_check_laws",
        "__init__",
    ],
    "inspection": [
        "_selective _summary",
        "__init__",
    ],
    "sharding": [
        "_context _plans _rules",
        "_share",
        "_tensor",
        "__init__",
    ],
    "generation": [
        "sampling",
        "_state constraints",
        "_prompts _result",
        "_sampling",
        "_constrained _stopping",
        "_options _model",
        "_prefill",
        "_loop",
        "_stream",
        "_drafts _generate _score",
        "_beam_search _speculate _state_file engine",
        "__init__",
    ],
    "generation/constraints": [
        "_protocols",
        "_automaton _grammar _matching",
        "__init__",
    ],
    "generation/engine": [
        "_job _prefixes _slots",
        "_requests",
        "_batch _reading",
        "_engine",
        "__init__",
    ],
    "serving": [
        "_aiohttp _metrics",
        "_errors",
        "_texts _worker",
        "_connections _fields _forms _served",
        "_page _structured",
        "_asked",
        "_openai",
        "_server",
        "__init__",
    ],
    "generation/sampling": [
        "_checks _threshold",
        "_draw _filters _penalties",
        "_sample",
        "__init__",
    ],
    "_cli": [
        "_messages",
        "_arguments",
        "_adapter _hub_arguments _quantization _terminal _train_settings",
        "_completion _convert _inspect _opened _training_run",
        "_sampling_arguments _score _serve _streaming _train",
        "_conversation _generate",
        "_chat",
        "__init__",
    ],
}


def test_imports_go_strictly_down():
    wrong = [f"{name} has no levels" for name in folders_of_package() - LEVELS.keys()]
    for folder, lines in LEVELS.items():
        level = {name: i for i, line in enumerate(lines) for name in line.split()}
        base = PACKAGE / folder
        for path in base.rglob("*.py"):
            here = unit(base, path)
            others = {unit(base, target) for target in imported(path) if base in target.parents}
            wrong += [
                f"{path.relative_to(ROOT)} imports {folder}/{other}"
                for other in others - {here}
                if level[other] >= level[here]
            ]
    assert not wrong, "\n".join(wrong)


def test_contributing_lists_the_levels():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    listed = text.partition("<!-- levels -->\n```\n")[2].partition("```")[0]
    assert listed == "\n".join(
        "".join([f"mamba_eqx/{folder}\n".replace("/\n", "\n"), *(f"    {x}\n" for x in lines)])
        for folder, lines in LEVELS.items()
    )


def test_no_file_imports_a_private_file_of_another_folder():
    """A private file may be imported only from its own folder and from folders below that."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {target.relative_to(ROOT)}"
        for path in PACKAGE.rglob("*.py")
        for target in imported(path)
        if target.name.startswith("_") and target.parent not in path.parents
    ]
    assert not wrong


def test_mixers_do_not_import_each_other():
    mixers = PACKAGE / "layers" / "mixers"
    files = {path for path in mixers.glob("_*.py") if "AbstractSequenceLayer[" in path.read_text()}
    assert len(files) >= 4
    assert not [path for path in files if set(imported(path)) & files]


def test_no_test_module_imports_another():
    """Tests share code through `tests/support` only."""
    wrong = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if re.search(r"^\s*(from|import) (tests\b|\.).*\btest_\w+", path.read_text(), re.MULTILINE)
    ]
    assert not wrong


def test_files_are_small():
    folders = ("mamba_eqx", "tests", "examples", "benchmarks")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert not [path for path in files if len(path.read_text().splitlines()) > 420]


def test_each_private_name_is_used_in_its_own_file_only():
    wrong = [
        f"{path.relative_to(ROOT)} imports {alias.name}"
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.level and node.module
        for alias in node.names
        if alias.name.startswith("_")
    ]
    assert not wrong


def folders_of_package() -> set[str]:
    """Returns the names of the folders directly below the package that have several files."""
    return {path.name for path in PACKAGE.iterdir() if len([*path.glob("_[!_]*.py")]) > 1}


def unit(base: Path, path: Path) -> str:
    """Returns the part of the folder `base` that a path belongs to: a folder in it, or a file."""
    return path.relative_to(base).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[Path]:
    """Yields the files and folders of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                target = base / alias.name if (base / alias.name).is_dir() else base
                target = target if node.module or target != base else base / alias.name
                file = target.with_suffix(".py")
                yield file if file.exists() else target
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            assert not any(str(name).split(".")[0] == "mamba_eqx" for name in names), path
