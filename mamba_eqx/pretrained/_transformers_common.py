"""What the model types of transformers share."""

from ._stored import CheckpointError


# Ours: transformers has no field for it, and keeps what it does not know.
UNPADDED = "unpadded_vocab_size"

# How to initialise, and which implementation to run.
MAMBA_IGNORED = frozenset(
    """
    initializer_range rescale_prenorm_residual time_step_scale time_step_min time_step_max
    time_step_init_scheme time_step_floor use_mambapy use_associative_scan
    """.split()  # noqa: SIM905
)


def inexpressible(what: str, value: str) -> CheckpointError:
    return CheckpointError(
        f"The 'transformers' layout has no model whose {what} ({value}). "
        'Use `layout="state-spaces"` if that fits.'
    )
