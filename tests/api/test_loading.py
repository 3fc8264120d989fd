"""Arguments of `load` of the wrong kind; sources, runtimes and servers: test_model."""

import pytest

import dbsam_deploy as db
from dbsam_deploy.core.errors import InputError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"source": 3}, "a model is 3: expected text"),
        ({"source": b"build"}, "a model is b'build': expected text"),
        ({"backend": "pytorch", "image_size": "64"}, "image size '64': expected a multiple"),
        ({"backend": "pytorch", "image_size": 96.0}, "image size 96.0"),
        ({"backend": "pytorch", "variant": ["db_sam"]}, "expected text"),
        ({"decoder_weights": 7}, "decoder_weights is 7"),
        (
            {"source": "triton://localhost:1", "timeout_s": "5"},
            "timeout_s is '5'",
        ),
    ],
)
def test_what_is_no_path_text_or_number(words, message):
    with pytest.raises(InputError, match=message):
        db.load(**words)
