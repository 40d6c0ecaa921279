"""The pre-training run: start or resume, step, log, save. Every rank runs it; rank 0 speaks."""

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from mimo_megatron import log, platform
from mimo_megatron.config.check import check
from mimo_megatron.config.load import dump_resolved
from mimo_megatron.config.run import ModuleName, RunConfig
from mimo_megatron.data.loader import PackLoader
from mimo_megatron.errors import DataError, Interrupted, NonFiniteError
from mimo_megatron.mcore.boot import RankAddress, megatron, side_store
from mimo_megatron.mcore.optimizer import learning_rates
from mimo_megatron.parallel.collectives import gather_objects, sum_over
from mimo_megatron.parallel.mesh import Mesh
from mimo_megatron.report.run_report import write_report
from mimo_megatron.train.agreement import agree, recipe_digest
from mimo_megatron.train.faults import keep_fault
from mimo_megatron.train.flops import peak_flops, step_flops
from mimo_megatron.train.metrics import MetricsWriter, StepRecord
from mimo_megatron.train.rate import rate_factor
from mimo_megatron.train.run_folder import RunFolder
from mimo_megatron.train.saving import Resumed, Saver, resume_newest
from mimo_megatron.train.signals import StopWish
from mimo_megatron.train.skip_limit import SkipLimit
from mimo_megatron.train.start import load_weights
from mimo_megatron.train.step import StepResult, Trainer, build_trainer, media_part, train_step
from mimo_megatron.train.watchdog import Watchdog
from mimo_megatron.types import PackedBatch


def pretrain(address: RankAddress, config: RunConfig) -> None:
    """Train as ``config`` says, on every rank of the job. A run folder with checkpoints is continued.

    ``Interrupted``, on all ranks after the same step and with that step saved, where any of them got a signal.
    """
    log.set_up(address.rank)
    check(config, address.world_size)
    folder, timeout_seconds = RunFolder(config.dir), config.train.collective_timeout_seconds
    with (
        folder.in_use() if address.rank == 0 else nullcontext(),
        # The watchdog speaks first; the collectives' own limit is for the case that it cannot.
        megatron(config.parallel, address, config.seed, 2 * timeout_seconds) as mesh,
        Watchdog(
            side_store("heartbeats") if address.world_size > 1 else None,
            address.rank,
            address.world_size,
            timeout_seconds,
            folder.faults,
        ) as watchdog,
    ):
        loader = PackLoader(  # before the model, so that workers start meanwhile
            config.data,
            config.model,
            packs_per_step=config.train.packs_per_step,
            seed=config.seed,
            dp_rank=mesh.dp.rank,
            dp_size=mesh.dp.size,
            part=media_part(config.parallel, mesh),
        )
        trainer = build_trainer(config, mesh, address.local_rank)
        first_step, skipped, resumed = _start_or_resume(trainer, loader, folder)
        if address.rank == 0:
            folder.root.mkdir(parents=True, exist_ok=True)
            dump_resolved(config, folder.config)
            folder.forget_skipped_after(first_step)
        # Until here a signal ends the process at once: nothing is lost, and ranks that hang while they connect can go.
        with (
            StopWish() as wish,
            closing(loader),
            _metrics(config, address, trainer.device) or nullcontext() as metrics,
        ):
            if metrics is not None:
                metrics.open_for(first_step)
                for step, reason in resumed.refused if resumed else ():
                    metrics.event("checkpoint_refused", step, reason)
            last_step = _steps(trainer, loader, folder, first_step, skipped, metrics, watchdog, wish)
        if address.rank == 0 and last_step == config.train.steps:
            log.get_logger().info("report: %s", write_report(folder.root))
    if last_step < config.train.steps:
        raise Interrupted(
            f"stopped after step {last_step} of {config.train.steps}, as {wish.name or 'a signal to another rank'} "
            f"asked; {'it is saved' if last_step else 'nothing was trained yet'}: start the run again to go on"
        )


def _start_or_resume(
    trainer: Trainer, loader: PackLoader, folder: RunFolder
) -> tuple[int, Counter[str], Resumed | None]:
    """The steps already taken and the samples skipped in them, with model, optimizer and loader set to continue."""
    config = trainer.config
    resumed = resume_newest(trainer, folder)
    if resumed is not None:
        state = resumed.state
        loader.load_state(state["loader"])
        loader.take_skip_log()  # what was found when the loader opened is in the saved counts already
        log.get_logger().info("resumed after step %d from %s", state["step"], resumed.path)
        return int(state["step"]), Counter(state["skipped"]), resumed
    if config.start_from is not None:
        load_weights(config.start_from, config.model, trainer.bare_chunks, folder.root)
        trainer.optimizer.reload_model_params()
    return 0, Counter(), None


def _steps(
    trainer: Trainer,
    loader: PackLoader,
    folder: RunFolder,
    first_step: int,
    skipped: Counter[str],
    metrics: MetricsWriter | None,
    watchdog: Watchdog,
    wish: StopWish,
) -> int:
    """The last step taken and saved: that of the recipe, or an earlier one where a signal asked to stop."""
    train, recipe = trainer.config.train, recipe_digest(trainer.config)
    position = loader.state()
    loader.steps_to_come = train.steps - first_step
    limit = SkipLimit(trainer.config.data.max_skipped_fraction)

    def after_last_step() -> dict[str, Any]:
        return {"loader": position, "skipped": skipped}

    def announce(event: str, step: int, detail: str) -> None:
        if metrics is not None:
            metrics.event(event, step, detail)

    with Saver(trainer, folder, after_last_step, announce) as saver:
        for step in range(first_step + 1, train.steps + 1):
            began = time.perf_counter()
            watchdog.at(step, "data")
            saver.check()
            batches = loader.next_step()
            waited = time.perf_counter() - began
            watchdog.at(step, "agreement")
            agreed = agree(bool(wish.name), waited, recipe, loader, batches, trainer.mesh, trainer.device, step)
            if agreed.stop:
                watchdog.at(step, "save")
                if step - 1 > first_step:
                    saver.save(step - 1, wait=True)
                announce("interrupted", step - 1, wish.name or "a signal to another rank")
                return step - 1
            batches = agreed.batches
            factor = rate_factor(step - 1, train.steps, train.schedule)
            watchdog.at(step, "forward-backward")
            try:
                result = train_step(trainer, batches, step, factor, partial(watchdog.at, step, "optimizer"))
            except NonFiniteError as error:
                watchdog.at(step, "save")
                raise keep_fault(error, trainer, batches, folder, step) from None
            watchdog.at(step, "metrics")
            position = loader.state()
            totals = _totals(trainer, batches)
            new = _newly_skipped(trainer, loader, folder, step)
            skipped += new
            if metrics is not None:
                rates = {name: rate * factor for name, rate in learning_rates(train).items()}
                record = _record(step, result, totals, trainer.mesh, rates, skipped, time.perf_counter() - began)
                numbers = {f"epochs/{name}": epochs for name, epochs in loader.epochs_of_sources().items()}
                metrics.write(replace(record, data_seconds=agreed.waited_seconds, numbers=numbers))
            is_due = train.checkpoint.every_steps and step % train.checkpoint.every_steps == 0
            watchdog.at(step, "save")
            too_many = limit.exceeded_by(loader.num_drawn, new)
            if is_due or step == train.steps or too_many:
                saver.save(step, wait=bool(too_many))
            if too_many:
                raise DataError(f"stopped after step {step}, which is saved: {too_many}")
        saver.finish()
    watchdog.at(train.steps, "end")
    return train.steps


def _totals(trainer: Trainer, batches: Sequence[PackedBatch]) -> list[int]:
    """Tokens, slots, patches, images, samples, squares of segments and of frames, model FLOPs, and of the encoder's
    ranks the heaviest's and all ranks' predicted FLOPs, of the step, over all data-parallel ranks."""
    own = [0] * 10
    sharing = trainer.sharing
    for batch in batches:
        grids = batch.vision.grids_I3 if batch.vision else ()
        trained = tuple(learning_rates(trainer.config.train))
        flops = step_flops(trainer.config.model, batch.segment_lengths, grids, trained, num_head_rows=batch.num_trained)
        loads = sharing.predicted_loads(grids) if sharing else [0]
        work = flops.total, max(loads), sum(loads)
        segments = sum(length**2 for length in batch.segment_lengths)
        frames = sum(count * (height * width) ** 2 for count, height, width in grids)
        sizes = (batch.num_tokens, batch.num_slots, batch.num_patches, len(grids), len(batch.sample_ids))
        row = (*sizes, segments, frames, *work)
        own = [total + one for total, one in zip(own, row, strict=True)]
    return sum_over(own, trainer.mesh.dp, trainer.device)


def _record(
    step: int,
    result: StepResult,
    totals: list[int],
    mesh: Mesh,
    rates: Mapping[ModuleName, float],
    skipped: Counter[str],
    seconds: float,
) -> StepRecord:
    tokens, slots, patches, images, samples, segments, frames, flops, heaviest, vision = totals
    return StepRecord(
        step=step,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lrs={str(name): rate for name, rate in rates.items()},
        num_tokens=tokens,
        num_trained_tokens=result.num_trained,
        num_slots=slots,
        num_patches=patches,
        num_images=images,
        num_samples=samples,
        seconds=seconds,
        skipped=dict(skipped),
        segment_squares=segments,
        frame_squares=frames,
        model_flops=flops,
        vision_imbalance=heaviest * mesh.tp_cp.size / vision if vision else None,
        pair_accuracy=result.pair_accuracy,
        mtp_loss=result.mtp_loss,
    )


def _newly_skipped(trainer: Trainer, loader: PackLoader, folder: RunFolder, step: int) -> Counter[str]:
    """Samples left out since the last call by reason, over all dp ranks; each is listed once in the run's folder."""
    mesh = trainer.mesh
    news = loader.take_skip_log()
    if mesh.tp.rank == mesh.cp.rank == mesh.pp.rank == 0:
        folder.record_skipped(news, step)
    if not sum_over([len(news)], mesh.dp, trainer.device)[0]:
        return Counter()
    return sum(gather_objects(Counter(row["reason"] for row in news), mesh.dp), Counter())


def _metrics(config: RunConfig, address: RankAddress, device: torch.device) -> MetricsWriter | None:
    if address.rank != 0:
        return None
    has_peak = not platform.current().is_cpu and config.train.precision == "bf16"
    peak = peak_flops(torch.cuda.get_device_name(device)) if has_peak else None
    return MetricsWriter(
        config.dir,
        config,
        config.train.steps,
        sys.stderr.isatty(),
        num_ranks=address.world_size,
        peak_flops=peak * address.world_size if peak else None,
    )
