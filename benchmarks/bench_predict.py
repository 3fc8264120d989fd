"""Image and boxes → masks in the image frame, in this process."""

from dbsam_deploy.prediction.predictor import Predictor


def test_predict(benchmark_ratio, subject, case, check_masks) -> None:
    predictor = Predictor(subject.onnxruntime, subject.artefact.preprocessing)

    def predict():
        predictor.forget_images()  # an image that comes back would not be encoded
        predictor.set_image(case.image)
        return predictor.predict_boxes(case.boxes).masks[:, 0]

    benchmark_ratio(predict, check_masks)
