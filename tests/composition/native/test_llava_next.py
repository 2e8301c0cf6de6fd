"""LLaVA-NeXT and LLaVA-OneVision: imported, run beside the native class, exported."""

import pytest

from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import check_case


@pytest.mark.parametrize("case", native_cases("llava_next"), ids=str)
def test_an_imported_model_is_the_native_one(case):
    assert check_case(case).problems == []
