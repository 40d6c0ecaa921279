"""`mimo-megatron rl`: everything that a run of reinforcement learning needs, opened in order and closed again."""

import sys
from contextlib import ExitStack, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path

from mimo_megatron import log
from mimo_megatron.config.check import check
from mimo_megatron.config.load import dump_resolved
from mimo_megatron.config.rl import RLConfig
from mimo_megatron.config.run import RunConfig
from mimo_megatron.data.records import SampleError
from mimo_megatron.data.tokenizer import TextTokenizer, load_tokenizer
from mimo_megatron.errors import ConfigError, Interrupted
from mimo_megatron.mcore.boot import RankAddress, megatron, side_store
from mimo_megatron.model.vlm import VisionLanguageModel
from mimo_megatron.report.run_report import write_report
from mimo_megatron.reward.service.settings import read_token
from mimo_megatron.rl.collect import Collector, Sampler
from mimo_megatron.rl.curves import Curves
from mimo_megatron.rl.cycle import cycle
from mimo_megatron.rl.engine.elsewhere import AnnouncedEngines
from mimo_megatron.rl.engine.embedded import EmbeddedEngine
from mimo_megatron.rl.engine.protocol import RolloutEngine
from mimo_megatron.rl.engine.rounds import Rounds, RoundsEngine
from mimo_megatron.rl.engine.several import SeveralEngines
from mimo_megatron.rl.engine.vllm import VllmEngine
from mimo_megatron.rl.judging import Judging
from mimo_megatron.rl.pool import QuestionPool, quotas
from mimo_megatron.rl.questions import Question, QuestionReader
from mimo_megatron.rl.reward_processes import RewardProcesses, announced_service
from mimo_megatron.rl.run import Head, Reader, Run
from mimo_megatron.rl.scheduler.rates import PassRates
from mimo_megatron.rl.sync.publisher import Publisher, Readers
from mimo_megatron.rl.sync.shared_memory import LocalBuckets
from mimo_megatron.train.metrics import MetricsWriter
from mimo_megatron.train.run_folder import RunFolder
from mimo_megatron.train.saving import Resumed, Saver, resume_newest
from mimo_megatron.train.signals import StopWish
from mimo_megatron.train.start import load_weights
from mimo_megatron.train.step import DTYPES, Trainer, build_model, build_trainer
from mimo_megatron.train.watchdog import Watchdog
from mimo_megatron.types import EncodedSample

MEDIA = "media"
"""Pictures that reward models judge, or that came inside parquet, by their SHA-256; in the run's folder."""


def reinforce(address: RankAddress, config: RunConfig) -> None:
    """Run or continue the recipe's reinforcement learning, on every rank. ``Interrupted`` where a signal asked."""
    log.set_up(address.rank)
    check(config, address.world_size)
    rl = config.rl
    if rl is None:
        raise ConfigError(f"run {config.name!r} has no section rl: give it one, or use `mimo-megatron train`")
    folder, timeout_seconds = RunFolder(config.dir), config.train.collective_timeout_seconds
    with ExitStack() as stack:
        if address.rank == 0:
            stack.enter_context(folder.in_use())
        mesh = stack.enter_context(megatron(config.parallel, address, config.seed, 2 * timeout_seconds))
        store = side_store("heartbeats") if address.world_size > 1 else None
        watchdog = Watchdog(store, address.rank, address.world_size, timeout_seconds, folder.faults)
        stack.enter_context(watchdog)
        trainer = build_trainer(config, mesh, address.local_rank)
        resumed = _start_or_resume(trainer, folder)
        first_step = int(resumed.state["step"]) if resumed else 0
        folder.root.mkdir(parents=True, exist_ok=True)
        tokenizer = load_tokenizer(config.data.tokenizer, config.model.tokens, config.model.text.vocab_size)
        questions, held_out = _questions(config, rl)
        by_id = {one.id: one for one in chain(*questions.values(), *held_out.values())}
        reader = Reader(by_id, tokenizer, config, rl)
        wish = stack.enter_context(StopWish())
        publisher = _publisher(config, rl, trainer)
        run = Run(
            config=config,
            rl=rl,
            trainer=trainer,
            publisher=publisher,
            engines=_engines(config, rl, trainer, publisher, address.rank, stack),
            read=reader.read,
            canary=_canary(questions, reader),
            reference=_reference(trainer, folder) if rl.algorithm.kl_weight else None,
            watchdog=watchdog,
            wish=wish,
        )
        run.rounds = Rounds(run.engines, reader.read, run.at_round)
        if address.rank == 0:
            dump_resolved(config, folder.config)
            run.head = _head(run, questions, held_out, tokenizer, resumed, first_step, address, stack)
        run.saver = stack.enter_context(Saver(trainer, folder, run.state, run.announce))
        last_step = cycle(run, first_step)
        run.saver.finish()
        watchdog.at(last_step, "end")
    if address.rank == 0:
        log.get_logger().info("report: %s", write_report(folder.root))
    if last_step < config.train.steps:
        raise Interrupted(
            f"stopped after step {last_step} of {config.train.steps}, as a signal asked; start the run again to go on"
        )


def _start_or_resume(trainer: Trainer, folder: RunFolder) -> Resumed | None:
    config = trainer.config
    resumed = resume_newest(trainer, folder)
    if resumed is not None:
        log.get_logger().info("resumed after step %d from %s", resumed.state["step"], resumed.path)
    elif config.start_from is not None:
        load_weights(config.start_from, config.model, trainer.bare_chunks, folder.root)
        trainer.optimizer.reload_model_params()
    return resumed


Questions = dict[str, list[Question]]


def _questions(config: RunConfig, rl: RLConfig) -> tuple[Questions, Questions]:
    """By task: those to learn from, and the first held-out ones."""
    reader = QuestionReader(config.model, config.data, config.dir / MEDIA)
    questions = {one.task: reader.read(one.path, one.task, one.reward) for one in rl.prompts}
    held_out = {
        one.task: [
            _named(f"held-out/{question.id}", question)  # both files may number their rows alike
            for question in reader.read(one.held_out, one.task, one.reward)[: rl.evaluation.questions]
        ]
        for one in rl.prompts
        if one.held_out is not None
    }
    return questions, held_out


def _named(name: str, question: Question) -> Question:
    return replace(question, id=name, raw=replace(question.raw, id=name))


def _canary(questions: Questions, reader: Reader) -> list[EncodedSample]:
    """The first prompt of text alone, and the first that begins with each kind of media, of those that can be read and
    fit."""
    found: dict[tuple[str, ...], EncodedSample] = {}
    for one in chain(*questions.values()):
        kind = tuple(ref.kind for ref in one.raw.media[:1])
        if kind not in found:
            with suppress(SampleError):  # it is left out when it is drawn, and counted
                found[kind] = reader.read(one.id)
    return list(found.values())


def _publisher(config: RunConfig, rl: RLConfig, trainer: Trainer) -> Publisher:
    readers: Readers = "all" if rl.rollout.engine == "embedded" else "first"
    return Publisher(trainer.bare_chunks, config.model, trainer.mesh, rl.sync.bucket_mib << 20, readers)


def _engines(
    config: RunConfig, rl: RLConfig, trainer: Trainer, publisher: Publisher, rank: int, stack: ExitStack
) -> SeveralEngines | None:
    """This rank's: the embedded engine on every rank, vLLM's on rank 0."""
    dtype, sequences = DTYPES[config.train.precision], rl.rollout.max_sequences

    def embedded(_: float) -> RolloutEngine:
        return EmbeddedEngine(
            config.model,
            max_sequences=sequences,
            max_tokens=config.data.pack_tokens,
            dtype=dtype,
            device=trainer.device,
        )

    if rl.rollout.engine == "vllm" and rank:
        return None
    if rl.rollout.engine == "embedded":
        engines = SeveralEngines(embedded, 1)
    elif rl.vllm.folder is None:
        memory = LocalBuckets(publisher.largest_bucket_bytes)
        stack.callback(memory.close)

        def vllm(_: float) -> RolloutEngine:
            given = config.model, config.data, rl.vllm
            return VllmEngine.start(*given, dtype=dtype, max_sequences=sequences, memory=memory)

        engines = SeveralEngines(vllm, rl.vllm.engines)
    else:
        engines = SeveralEngines(AnnouncedEngines(config.model, rl.vllm.folder).take, rl.vllm.engines)
    stack.callback(engines.close)
    return engines


def _reference(trainer: Trainer, folder: RunFolder) -> list[VisionLanguageModel]:
    """The policy that the KL divergence is measured from: the weights that the run began with."""
    config = trainer.config
    assert config.start_from is not None
    chunks = build_model(config, trainer.mesh, trainer.device)
    load_weights(config.start_from, config.model, chunks, folder.root)
    return [chunk.eval() for chunk in chunks]


def _head(
    run: Run,
    questions: Questions,
    held_out: Questions,
    tokenizer: TextTokenizer,
    resumed: Resumed | None,
    first_step: int,
    address: RankAddress,
    stack: ExitStack,
) -> Head:
    config, rl = run.config, run.rl
    pool = QuestionPool(
        questions,
        seed=config.seed,
        easy_mean=rl.rollout.easy_mean,
        easy_share=rl.rollout.easy_share,
        max_attempts=rl.rollout.max_attempts,
    )
    rates = PassRates(prior_groups=rl.rollout.prior_groups)
    judging = stack.enter_context(_judging(rl, config.dir, stack))
    engine = RoundsEngine(run.rounds)
    sampler = Sampler(engine, judging, run.read, tokenizer, config.model.tokens.ends, rl.rollout.max_new_tokens)
    shares = quotas({one.task: one.ratio for one in rl.prompts}, rl.rollout.groups_per_step)
    metrics = stack.enter_context(
        MetricsWriter(config.dir, config, config.train.steps, sys.stderr.isatty(), num_ranks=address.world_size)
    )
    metrics.open_for(first_step)
    for step, reason in resumed.refused if resumed else ():
        metrics.event("checkpoint_refused", step, reason)
    curves = Curves(config.dir, config, metrics, {one.id: one for one in chain(*questions.values())}, sampler)
    curves.open_for(first_step)
    collector = Collector(sampler, pool, rates, rl.rollout, shares)
    if resumed is not None:
        collector.load_state(resumed.state["rl"])
    return Head(sampler, engine, collector, curves, list(chain(*held_out.values())), metrics)


def _judging(rl: RLConfig, folder: Path, stack: ExitStack) -> Judging:
    """Rewards from the recipe's service, or from one of this run's own."""
    reward = rl.reward
    if reward.folder is not None:
        return Judging(*announced_service(reward.folder), reward.deadline_seconds)
    if reward.url is not None:
        token = read_token(reward.token_file) if reward.token_file is not None else None
        return Judging(reward.url, token, reward.deadline_seconds)
    processes = stack.enter_context(RewardProcesses(reward, folder / "rewards", image_root=folder / MEDIA))
    return Judging(processes.url, processes.token, reward.deadline_seconds)
