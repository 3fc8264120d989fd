"""A graph as compiled models of OpenVINO that follow each other: in a session and in a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def run_parts(
    parts: Sequence[Any], feed: Mapping[str, Any], names: Sequence[str]
) -> dict[str, Any]:
    """Run compiled models, each on the feed and on what those before it gave.

    Args:
        parts: OpenVINO's compiled models; a tensor has one name in all of them.
        feed: arrays by the names of the graph's inputs; they are read where they lie.
        names: the graph's outputs.

    Returns:
        An array for each of `names`, of its own.

    Raises:
        RuntimeError: OpenVINO fails to run one.
    """
    values, requests = dict(feed), []  # what one request wrote, the next one reads in its place
    for part in parts:
        known = {name for port in part.inputs for name in port.names}
        given = {name: values[name] for name in values if name in known}
        requests.append(part.create_infer_request())
        last = len(requests) == len(parts)
        outputs = requests[-1].infer(given, share_inputs=True, share_outputs=not last)
        # A value that is cast at the end has the names of both.
        values |= {name: outputs[port] for port in part.outputs for name in port.names}
    return {name: values[name] for name in names}
