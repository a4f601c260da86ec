"""A run's latest metrics as Prometheus reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Gauge, start_http_server

from moesys.errors import MoesysError


class Exporter:
    """Serves http://host:port/metrics until it is closed: one gauge per metric, labelled with the run's name.

    Raises:
        MoesysError: the port cannot be had.
    """

    def __init__(self, run: str, port: int, host: str):
        self._run, self._registry = run, CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        try:
            self._server, self._thread = start_http_server(port, host, self._registry)
        except OSError as error:
            reason = error.strerror or str(error)
            raise MoesysError(
                f"measure.metrics_port: {host}:{port}: {reason.lower()}\n    remedy: choose another port"
            ) from None

    def tell(self, metrics: Mapping[str, float]) -> None:
        """From now on these are the latest; others stay as they were."""
        for name, value in metrics.items():
            if name not in self._gauges:
                key = "moesys_" + re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
                self._gauges[name] = Gauge(key, name, ["run"], registry=self._registry)
            self._gauges[name].labels(self._run).set(value)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
