"""GOT-OCR 2.0: imported, run beside the native class, exported."""

import pytest

from anyvlm.compatibility.native_cases import native_cases
from anyvlm.compatibility.native_checks import build_native, check_case
from anyvlm.composition.errors import CompositionError
from anyvlm.composition.native import from_native


CASES = native_cases("got_ocr2")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_imported_model_is_the_native_one(case):
    assert check_case(case).problems == []


def test_a_processor_that_writes_other_numbers_of_tokens_is_refused():
    native, processor = build_native(CASES[0], seed=0, tied=False)
    processor.num_image_tokens = 100
    with pytest.raises(CompositionError, match="writes 100 tokens for a view, of which the model makes 256"):
        from_native(native, processor)
