"""Embedding and boxes → low-resolution masks on ONNX Runtime."""

from support.references import check_close

from dbsam_deploy.core.imaging import postprocess, to_model_frame


def test_decoder(benchmark_ratio, subject, case, pixels, check_masks) -> None:
    how, size = subject.artefact.preprocessing, case.image.shape[:2]
    feed = {
        **subject.pytorch.run("encoder", {"image": pixels}),
        "boxes": to_model_frame(case.boxes, size, how)[None],
    }
    expected = subject.pytorch.run("decoder", feed)

    def check(outputs) -> dict[str, str | float]:
        for name, values in expected.items():
            check_close(outputs[name], values, "float32", name)
        return check_masks(postprocess(outputs["low_res_masks"][0, :, 0], size, how))

    benchmark_ratio(lambda: subject.onnxruntime.run("decoder", feed), check)
