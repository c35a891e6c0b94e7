"""What is read off the machine."""

from pathlib import Path

import pytest

from transmamba.machine import has_slow_bf16


@pytest.mark.parametrize(
    ("text", "is_slow"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n\nflags\t\t: amx_bf16\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16 x\n", False),
        ("processor\t: 0\nflags\t\t: fpu avx2 amx_bf16 amx_tile\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd\n", True),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False),
        ("processor\t: 0\n", False),
    ],
)
def test_units_for_bf16_are_read_off_the_cpu_s_flags(text: str, is_slow: bool, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert has_slow_bf16(str(file)) is is_slow


def test_a_machine_that_does_not_say_is_not_called_slow(tmp_path: Path) -> None:
    assert not has_slow_bf16(str(tmp_path / "none"))
