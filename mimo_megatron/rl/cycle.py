"""The cycle of reinforcement learning: rollouts, rewards, advantages, one update, weights back, a checkpoint.

Every rank runs it. Rank 0 decides what is asked and judged (``collect.py``); all ranks sample, learn and publish.
"""

from mimo_megatron.rl.groups import without_stale
from mimo_megatron.rl.publish import publish
from mimo_megatron.rl.run import Run, StepTimes
from mimo_megatron.rl.update import update_policy
from mimo_megatron.train.rate import rate_factor


def cycle(run: Run, first_step: int) -> int:
    """Steps after ``first_step``; the last one taken, earlier than the recipe's where a signal asked to stop."""
    train = run.config.train
    sync(run, first_step)
    if first_step == 0:
        run.evaluate(0)
    for step in range(first_step + 1, train.steps + 1):
        clock = StepTimes()
        run.watch(step, "rollout")
        batch = run.rollout(step)
        if batch is None:
            run.save(step - 1, wait=True)
            return step - 1
        clock.ends("rollout")

        groups, num_stale = without_stale(batch.groups, run.version)
        update = None
        if groups:  # a step whose every group taught nothing changes nothing, and says so
            run.watch(step, "forward-backward", "update")
            rate = rate_factor(step - 1, train.steps, train.schedule)
            update = update_policy(run.trainer, groups, run.read, step, rate, run.reference, run.at_optimizer(step))
        clock.ends("update")

        sync(run, step)
        clock.ends("sync")

        run.tell(step, batch, update, num_stale, clock)
        run.evaluate(step)
        run.save(step)
    return train.steps


def sync(run: Run, step: int) -> None:
    """The weights after ``step`` become the engines' policy, which is named after the step."""
    run.watch(step, "sync")
    published = publish(run.trainer, run.publisher, run.engines, step, run.canary, run.rl.sync)
    run.version, run.gaps = published.version, published.gaps
