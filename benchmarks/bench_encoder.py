"""Image → embedding on ONNX Runtime."""

import numpy as np
from support.references import check_close


def test_encoder(benchmark_ratio, subject, pixels) -> None:
    feed = {"image": pixels}
    (expected,) = subject.pytorch.run("encoder", feed).values()

    def check(embedding: np.ndarray) -> dict[str, str | float]:
        check_close(embedding, expected, "float32", "image_embeddings")
        norms = np.linalg.norm(embedding) * np.linalg.norm(expected)
        cosine = float(embedding.ravel() @ expected.ravel() / norms)
        assert cosine >= subject.gate.embedding_cosine
        return {**subject.facts, "cosine": cosine}

    benchmark_ratio(lambda: subject.onnxruntime.run("encoder", feed)["image_embeddings"], check)
