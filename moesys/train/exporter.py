"""Serves a run's latest metrics for Prometheus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from threading import Lock

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from moesys.errors import MoesysError
from moesys.train.metric_table import INFO, LAYER_IMBALANCE, LOAD, Metric, families, metric

Family = CounterMetricFamily | GaugeMetricFamily
Labels = tuple[tuple[str, str], ...]


class Exporter(Collector):
    """Serves http://host:port/metrics until it is closed; names are in `metric_table`, and all have the label `run`.

    Args:
        run: the run's name.
        about: further labels of `moesys_run_info`.

    Raises:
        MoesysError: the port cannot be used.
    """

    def __init__(self, run: str, port: int, host: str, about: Mapping[str, str] | None = None):
        self._run, self._lock = run, Lock()
        self._values: dict[str, dict[Labels, float]] = {}
        self._set(INFO, 1.0, *(about or {}).items())
        registry = CollectorRegistry()
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            reason = error.strerror or str(error)
            raise MoesysError(
                f"measure.metrics_port: {host}:{port}: {reason.lower()}\n    remedy: choose another port"
            ) from None

    def set_metrics(self, metrics: Mapping[str, float]) -> None:
        """Replace the values of these metrics, given by their keys in metrics.jsonl; others stay."""
        with self._lock:
            for key, value in metrics.items():
                m = metric(key)
                if m.family:
                    self._set(m, value, *([m.label] if m.label else []))

    def set_load(self, layers: Sequence[int], load: Sequence[Sequence[float]]) -> None:
        """Replace the numbers of assignments of every expert in these layers, given by their blocks' numbers."""
        with self._lock:
            for layer, counts in zip(layers, load, strict=True):
                here, mean = ("layer", str(layer)), sum(counts) / len(counts)
                for expert, count in enumerate(counts):
                    self._set(LOAD, count, here, ("expert", str(expert)))
                self._set(LAYER_IMBALANCE, max(counts) / mean if mean else float("nan"), here)

    def _set(self, m: Metric, value: float, *labels: tuple[str, str]) -> None:
        self._values.setdefault(m.family, {})[("run", self._run), *labels] = float(value)

    def describe(self) -> Iterable[Family]:
        """Nothing: Prometheus then collects nothing when the exporter is registered."""
        return ()  # registering then collects nothing

    def collect(self) -> Iterable[Family]:
        """All families that have a value."""
        known = families()
        with self._lock:
            return [_family(known[name], values) for name, values in self._values.items()]

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _family(m: Metric, values: Mapping[Labels, float]) -> Family:
    names = [name for name, _ in next(iter(values))]
    kind = CounterMetricFamily if m.kind == "counter" else GaugeMetricFamily
    family: Family = kind(m.family, m.help, labels=names)
    for labels, value in values.items():
        family.add_metric([label for _, label in labels], value)
    return family
