"""What the operating system says about the processor."""

from pathlib import Path

import pytest

from mamba_eqx import _processor


@pytest.mark.parametrize(
    ("text", "fast"),
    [
        ("processor : 0\nflags\t\t: fpu avx2 amx_tile amx_bf16\n", True),
        ("flags : avx512f avx512_bf16 avx512_fp16\n", True),
        ("flags : fpu avx2 avx512f avx512_fp16 bf16\n", False),
        ("vmx flags : amx_bf16\nflags : fpu\n", False),
        ("Features : asimd bf16\n", False),
        (None, False),
    ],
)
def test_reads_the_flags_of_the_processor(
    text: str | None, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(_processor, "Path", lambda _: path)
    assert _processor.multiplies_bfloat16.__wrapped__() == fast
