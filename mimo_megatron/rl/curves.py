"""What a run of reinforcement learning tells while it goes: numbers for each task, and some rollouts to read.

``metrics.jsonl`` and TensorBoard get one record a step (tags ``reward/count``, ``pass_rate/count``, ...),
``evaluations.jsonl`` a row for each evaluation, ``rollouts.jsonl`` a few groups of each step with their pictures'
places.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from mimo_megatron.config.run import RunConfig
from mimo_megatron.log import get_logger
from mimo_megatron.mcore.optimizer import learning_rates
from mimo_megatron.reward.shapes import gold_shapes, said_shapes
from mimo_megatron.rl.collect import Collected, Sampler
from mimo_megatron.rl.groups import RewardedGroup
from mimo_megatron.rl.questions import Question
from mimo_megatron.rl.sync.canary import Gap
from mimo_megatron.rl.update import UpdateResult
from mimo_megatron.train.jsonl import keep_rows_until, open_to_append
from mimo_megatron.train.metrics import MetricsWriter, StepRecord
from mimo_megatron.train.rate import rate_factor

EVALUATIONS, ROLLOUTS = "evaluations.jsonl", "rollouts.jsonl"
_GROUPS_SHOWN = 1
_RESPONSES_SHOWN = 4


class Curves:
    """Made on rank 0 only. ``questions`` by id, for what was asked."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        metrics: MetricsWriter,
        questions: Mapping[str, Question],
        sampler: Sampler,
    ) -> None:
        self._config, self._metrics = config, metrics
        self._questions, self._sampler = questions, sampler
        self._folder = folder

    def open_for(self, step: int) -> None:
        """Ready for the steps after ``step``; rows of an earlier attempt beyond it go."""
        for name in (EVALUATIONS, ROLLOUTS):
            keep_rows_until(self._folder / name, step)

    def step(
        self,
        step: int,
        batch: Collected,
        update: UpdateResult | None,
        num_stale: Mapping[str, int],
        gaps: Sequence[Gap],
        part_seconds: Mapping[str, float],
        seconds: float,
    ) -> None:
        for alarm in batch.report.alarms:
            self._metrics.event("alarm", step, alarm)
            get_logger().warning("step %d: %s", step, alarm)
        if update is None:
            self._metrics.event("nothing_learnt", step, "no group had unequal rewards; the weights stay")
        numbers = task_numbers(batch, update) | {f"seconds/{part}": spent for part, spent in part_seconds.items()}
        numbers |= {f"canary/mean_gap_{number}": gap.mean for number, gap in enumerate(gaps)}
        numbers |= {f"stale/{task}": float(count) for task, count in num_stale.items()}
        numbers |= {f"unknown/{reason}": float(count) for reason, count in batch.unknown.items()}
        self._metrics.write(self._record(step, batch, update, numbers, seconds))
        self._append(ROLLOUTS, *self._shown(step, batch))

    def event(self, event: str, step: int, detail: str) -> None:
        self._metrics.event(event, step, detail)

    def evaluated(self, step: int, rewards: Mapping[str, float]) -> None:
        """``rewards``: mean held-out reward of each task; none where no response got one."""
        if not rewards:
            self._metrics.event("evaluation_without_rewards", step, "no held-out response got a reward")
            get_logger().warning("after step %d no held-out response got a reward: look at the reward service", step)
            return
        self._append(EVALUATIONS, {"step": step, "rewards": dict(rewards)})
        words = ", ".join(f"{task} {reward:.3f}" for task, reward in rewards.items())
        get_logger().info("held-out reward after step %d: %.3f (%s)", step, fmean(rewards.values()), words)

    def _record(
        self, step: int, batch: Collected, update: UpdateResult | None, numbers: Mapping[str, float], seconds: float
    ) -> StepRecord:
        train, steps, rows = self._config.train, update.steps if update else (), update.rows if update else ()
        encoded = update.encoded if update else ()
        patches = {row.question_id: row.num_patches for row in rows}
        factor = rate_factor(step - 1, train.steps, train.schedule)
        return StepRecord(
            step=step,
            loss=fmean(one.loss for one in steps) if steps else 0.0,
            grad_norm=fmean(one.grad_norm for one in steps) if steps else 0.0,
            lrs={str(name): rate * factor for name, rate in learning_rates(train).items()},
            num_tokens=sum(row.num_tokens for row in rows),
            num_trained_tokens=sum(one.num_trained for one in steps),
            num_slots=update.num_slots if update else 1,
            num_patches=sum(patches[name] for name in encoded),
            num_images=sum(len(self._questions[name].raw.media) for name in encoded),
            num_samples=len(rows),
            seconds=seconds,
            numbers=numbers,
        )

    def _shown(self, step: int, batch: Collected) -> list[dict[str, Any]]:
        """Of each task the first group."""
        by_task: dict[str, list[RewardedGroup]] = defaultdict(list)
        for group in batch.judged:
            by_task[group.task].append(group)
        return [self._row(step, group) for groups in by_task.values() for group in groups[:_GROUPS_SHOWN]]

    def _row(self, step: int, group: RewardedGroup) -> dict[str, Any]:
        """``shapes`` are the boxes [x1, y1, x2, y2] and points [x, y] that were judged, in pixels of the stored
        picture: the gold's, and each response's."""
        question = self._questions[group.question_id]
        items = [self._sampler.item(question, rollout) for rollout in group.rollouts[:_RESPONSES_SHOWN]]
        judged = zip(items, group.rollouts, group.rewards_G, group.reasons_G, strict=False)
        return {
            "step": step,
            "task": group.task,
            "question": group.question_id,
            "messages": list(question.raw.messages),
            "media": [[ref.kind, ref.path, ref.offset, ref.num_bytes] for ref in question.raw.media],
            "gold": question.gold,
            "shapes": [one.corners for one in gold_shapes(items[0])],
            "mean": group.mean,
            "responses": [
                {
                    "text": item.response,
                    "reward": reward,
                    "reason": reason,
                    "tokens": len(rollout.token_ids_T),
                    "finish": rollout.finish_reason,
                    "shapes": [one.corners for one in said_shapes(item)],
                }
                for item, rollout, reward, reason in judged
            ],
        }

    def _append(self, name: str, *rows: Mapping[str, Any]) -> None:
        with open_to_append(self._folder / name) as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")


def task_numbers(batch: Collected, update: UpdateResult | None) -> dict[str, float]:
    """By tag and task: of all groups that were judged reward, length, share of right ones and of groups without
    variance; of those learnt from entropy and gap to the engine; and the mean over tasks of the reward."""
    judged: dict[str, list[RewardedGroup]] = defaultdict(list)
    for group in batch.judged:
        judged[group.task].append(group)
    numbers: dict[str, float] = {}
    for task, groups in sorted(judged.items()):
        report = batch.report.tasks[task]
        settled = report.valid + report.zero_variance
        numbers |= {
            f"reward/{task}": fmean(group.mean for group in groups),
            f"length/{task}": fmean(len(one.token_ids_T) for group in groups for one in group.rollouts),
            f"cut/{task}": fmean(one.finish_reason == "length" for group in groups for one in group.rollouts),
            f"pass_rate/{task}": fmean(reward >= 0.5 for group in groups for reward in group.rewards_G),
            f"zero_variance/{task}": report.zero_variance / settled if settled else 0.0,
        }
    numbers["reward/mean"] = fmean(numbers[f"reward/{task}"] for task in judged) if judged else 0.0
    if update is None:
        return numbers
    of_task = {group.question_id: group.task for group in batch.groups}
    for name, values_N in (("entropy", update.entropies_N), ("gap", update.gaps_N)):
        seen: dict[str, list[float]] = defaultdict(list)
        for row, value in zip(update.rows, values_N, strict=True):
            seen[of_task[row.question_id]].append(value)
        numbers |= {f"{name}/{task}": fmean(values) for task, values in sorted(seen.items())}
    return numbers | {
        "policy/largest_gap": update.largest_gap,
        "policy/largest_ratio_error": update.largest_ratio_error,
        "policy/clipped": update.clipped_fraction,
    }
