"""What an operator watches, in Prometheus' format, from a registry of this service's own."""

from collections import Counter as Counts
from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mimo_megatron.reward.service.lanes import Queue
from mimo_megatron.reward.service.ledger import Ledger
from mimo_megatron.reward.service.model_lane import ModelLane
from mimo_megatron.reward.service.pool import AsyncPool
from mimo_megatron.reward.verdict import Verdict

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    def __init__(
        self, pool: AsyncPool, queues: Mapping[str, Queue], ledger: Ledger, models: Mapping[str, ModelLane]
    ) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("reward_requests", "HTTP answers.", ["path", "code"], registry=self._registry)
        self.verdicts = Counter("reward_verdicts", "Items.", ["task", "status", "reason"], registry=self._registry)
        self.seconds = Histogram(
            "reward_seconds", "From arrival to verdict.", ["task"], buckets=_SECONDS, registry=self._registry
        )
        self.reward = Summary("reward_value", "Rewards; sum over count is the mean.", ["task"], registry=self._registry)
        self._registry.register(_State(pool, queues, ledger, models))

    def observe(self, task: str, verdict: Verdict, seconds: float) -> None:
        self.verdicts.labels(task, verdict.status, verdict.reason.value).inc()
        self.seconds.labels(task).observe(seconds)
        if verdict.reward is not None:
            self.reward.labels(task).observe(verdict.reward)

    def page(self) -> bytes:
        return generate_latest(self._registry)


class _State(Collector):
    """What is counted elsewhere, read when it is asked for."""

    def __init__(
        self, pool: AsyncPool, queues: Mapping[str, Queue], ledger: Ledger, models: Mapping[str, ModelLane]
    ) -> None:
        self._pool, self._queues, self._ledger, self._models = pool, queues, ledger, models

    def collect(self) -> Iterator[Metric]:
        items = GaugeMetricFamily("reward_queue_items", "Unfinished items.", labels=["lane"])
        age = GaugeMetricFamily("reward_queue_oldest_seconds", "Age of the oldest of them.", labels=["lane"])
        for lane, queue in self._queues.items():
            items.add_metric([lane], queue.num_items)
            age.add_metric([lane], queue.oldest_seconds)
        yield from (items, age)
        yield _counts("reward_worker_events", "Kills by cause, losses, spawns, recycled.", "event", self._pool.events)
        rss = GaugeMetricFamily("reward_worker_rss_bytes", "After its last job.", labels=["worker"])
        for slot, worker in enumerate(self._pool.workers):
            rss.add_metric([str(slot)], worker.rss_bytes if worker else 0)
        yield rss
        yield GaugeMetricFamily(
            "reward_quarantined_items", "Answers that killed two workers.", value=self._pool.num_quarantined
        )
        yield CounterMetricFamily("reward_cache_hits", "Items not worked out again.", value=self._ledger.num_hits)
        for task, model in self._models.items():
            yield _counts(f"reward_model_events_{task}", "Second attempts, failures, no answer.", "event", model.events)
            is_open = GaugeMetricFamily(f"reward_model_open_{task}", "Breaker open.", labels=["replica"])
            for number, replica in enumerate(model.replicas):
                is_open.add_metric([str(number)], float(replica.breaker.is_open))
            yield is_open


def _counts(name: str, help_text: str, label: str, counts: Counts[str]) -> Metric:
    family = CounterMetricFamily(name, help_text, labels=[label])
    for what, count in counts.items():
        family.add_metric([what], count)
    return family
