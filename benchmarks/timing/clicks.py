"""A click on a known image by the real Triton server, beside the decoder and its mask alone.

With `--backend` a second server runs the graphs on another runtime, and both are asked in turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np

from dbsam_deploy import load
from dbsam_deploy.api.served_graphs import ONNXRUNTIME, SERVED_BACKENDS, served_graphs
from dbsam_deploy.artefact import Artefact, load_artefact
from dbsam_deploy.cli import say_on_stderr
from dbsam_deploy.clients.client import DbsamClient, OpenImage
from dbsam_deploy.core.contract import BOXES, IMAGE_EMBEDDINGS, IOU_PREDICTIONS, LOW_RES_MASKS
from dbsam_deploy.core.imaging import ByteArray, FloatArray, postprocess, to_model_frame
from dbsam_deploy.loadtesting.work import drawn_subject
from dbsam_deploy.prediction.predictor import Predictor
from dbsam_deploy.serving.environment import check_openvino, find_environment
from dbsam_deploy.serving.ports import Ports
from dbsam_deploy.serving.repository import build_repository
from dbsam_deploy.serving.server import TritonServer
from dbsam_deploy.sessions.onnxruntime_session import OnnxRuntimeSession

Click = Callable[[], float]
"""Do it once; its seconds."""
SIDE = 1024
WARM_UP = 3
PAUSE_S = 0.1
"""Between two clicks, in which threads of the one before come to rest."""
GOAL = 1.2


def bare(artefact: Artefact, embedding: FloatArray) -> None:
    """Decode the box that is named on a line of the input and make its mask; print the seconds."""
    import onnxruntime

    how, options = artefact.preprocessing, onnxruntime.SessionOptions()
    options.enable_mem_pattern = False  # as the server's, see standin_backends/onnxruntime
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(
        str(artefact.path("decoder")), options, providers=["CPUExecutionProvider"]
    )
    for line in sys.stdin:
        box = np.array([[float(word) for word in line.split()]], np.float32)
        start = time.perf_counter()
        boxes = to_model_frame(box, (SIDE, SIDE), how)[None]
        feed = {IMAGE_EMBEDDINGS: embedding, BOXES: boxes}
        low, _ = session.run([LOW_RES_MASKS, IOU_PREDICTIONS], feed)
        mask = postprocess(low[0], (SIDE, SIDE), how)
        print(time.perf_counter() - start, np.count_nonzero(mask), flush=True)


@contextmanager
def bare_process(artefact: Artefact, embedding: FloatArray, box: FloatArray) -> Iterator[Click]:
    """The work alone, in a process of its own as the server's is; it checks the mask's size."""
    with TemporaryDirectory() as folder:
        kept = Path(folder, "embedding.npy")
        np.save(kept, embedding)
        words = [sys.executable, __file__, str(artefact.folder), "--bare", str(kept)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        sizes = set[str]()

        def click() -> float:
            print(*box.tolist(), file=process.stdin, flush=True)
            seconds, size = process.stdout.readline().split()
            sizes.add(size)
            return float(seconds)

        yield click
        process.stdin.close()
        process.wait()
        assert len(sizes) == 1, sizes


def served_click(image: OpenImage, boxes: FloatArray) -> float:
    """Seconds of a box on an image that the server knows."""
    start = time.perf_counter()
    image.predict(boxes=boxes)
    return time.perf_counter() - start


def served_image(client: DbsamClient, pixels: ByteArray, boxes: FloatArray) -> float:
    """Seconds of a box on an image that the server does not know, from the image to the mask."""
    pixels[0, 0] = np.random.default_rng().integers(0, 256, 3, np.uint8)
    start = time.perf_counter()
    client.open(pixels).predict(boxes=boxes)
    return time.perf_counter() - start


@contextmanager
def served_ways(artefact: Artefact, folder: Path, backend: str) -> Iterator[dict[str, Click]]:
    """A server and what it is asked; first each mask is held against the same runtime's here."""
    environment = find_environment()
    compiled = served_graphs(
        backend, artefact.folder, partial(check_openvino, environment), say_on_stderr
    )
    subject = drawn_subject(SIDE, SIDE)
    boxes = subject.box[None]
    with load(artefact.folder, backend=backend) as local:
        expected = local.predict(subject.image, boxes=boxes).masks
    repository = build_repository(artefact, folder / "model_repository").folder
    log = folder / "server.log"
    with ExitStack() as stack:
        server = stack.enter_context(
            TritonServer(repository, environment, log=log, ports=Ports(0, 0, 0), compiled=compiled)
        )
        clients = {
            "gRPC, packed masks": DbsamClient(server.grpc_url),
            "gRPC, masks as bytes": DbsamClient(server.grpc_url, packed=False),
            "HTTP, packed masks": DbsamClient(server.http_url, "http"),
        }
        ways: dict[str, Click] = {}
        for name, client in clients.items():
            image = stack.enter_context(client).open(subject.image)
            np.testing.assert_array_equal(image.predict(boxes=boxes).masks, expected)
            ways[name] = partial(served_click, image, boxes)
        fresh = next(iter(clients.values()))
        ways["a new image, gRPC"] = partial(served_image, fresh, subject.image.copy(), boxes)
        yield ways


def in_turns(ways: dict[str, Click], clicks: int) -> dict[str, list[float]]:
    """Seconds of each way, one after another, so that all see the same machine."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(clicks + WARM_UP):
        for name, click in ways.items():
            time.sleep(PAUSE_S)
            seconds = click()
            if number >= WARM_UP:
                taken[name].append(seconds)
    return taken


def compare(artefact: Artefact, clicks: int, backend: str) -> dict[str, list[float]]:
    """Seconds of a click, and of a new image, by each way."""
    subject = drawn_subject(SIDE, SIDE)
    local = Predictor(OnnxRuntimeSession(artefact), artefact.preprocessing)
    local.set_image(subject.image)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        alone = bare_process(artefact, local.image_embeddings, subject.box)
        ways = {"decoder and mask alone": stack.enter_context(alone)}
        for name in dict.fromkeys((ONNXRUNTIME, backend)):
            (folder / name).mkdir()
            served = stack.enter_context(served_ways(artefact, folder / name, name))
            mark = "" if name == ONNXRUNTIME else f", {name}"
            ways |= {f"{way}{mark}": click for way, click in served.items()}
        return in_turns(ways, clicks)


def main() -> None:
    """Print a row for each way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artefact", type=Path, help="folder of an export")
    parser.add_argument("--clicks", type=int, default=40)
    parser.add_argument("--backend", choices=SERVED_BACKENDS, default=ONNXRUNTIME)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    artefact = load_artefact(args.artefact)
    if args.bare:
        bare(artefact, np.load(args.bare))
        return
    taken = compare(artefact, args.clicks, args.backend)
    first, *_ = taken.values()
    for name, seconds in taken.items():
        ratio = median(own / base for own, base in zip(seconds, first, strict=True))
        p50, p95, least = (1e3 * float(np.quantile(seconds, q)) for q in (0.5, 0.95, 0))
        print(
            f"{name:32} p50 {p50:6.1f} ms  p95 {p95:6.1f}  least {least:6.1f}  "
            f"× {ratio:.2f} (goal {GOAL})"
        )


if __name__ == "__main__":
    main()
