"""Qwen2-VL and Qwen2.5-VL: imported, run beside the native class, exported."""

import pytest

from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import check_case


@pytest.mark.parametrize("case", native_cases("qwen2_vl"), ids=str)
def test_an_imported_model_is_the_native_one(case):
    assert check_case(case).problems == []
