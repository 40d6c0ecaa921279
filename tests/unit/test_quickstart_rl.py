"""The demo's RL questions: the right answer earns the whole reward, files are read, shares do not mix."""

import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.quickstart import morl
from examples.quickstart.assets import Split
from examples.quickstart.rl_questions import KINDS, Drawn, build, draw, row_of, split_of
from mimo_megatron.cli import main
from mimo_megatron.config.load import load_recipe
from mimo_megatron.data.tokenizer import load_tokenizer
from mimo_megatron.reward.gold_check import GoldRow, check_golds
from mimo_megatron.reward.service.offline import Offline
from mimo_megatron.reward.wire import ScoreItem
from mimo_megatron.rl.pool import quotas
from mimo_megatron.rl.questions import QuestionReader, encode_question
from mimo_megatron.train.run_folder import RunFolder
from tests.repository import ROOT

RULED = [name for name, kind in KINDS.items() if not kind.reward.startswith("rm_")]
RECIPE = load_recipe(ROOT / "examples/recipes/tiny/morl.yaml")


@pytest.fixture(scope="module")
def offline() -> Iterator[Offline]:
    with Offline() as offline:
        yield offline


def reward(offline: Offline, name: str, one: Drawn, response: str) -> float | None:
    row = row_of(KINDS[name].reward, one, "")
    item = ScoreItem(id="x", task=row["task"], gold=row["gold"], meta=row["meta"], response=response)
    return offline.score(item.task, item.response, item.gold, item.meta).reward


@pytest.mark.parametrize("name", RULED)
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_the_right_answer_as_the_model_says_it_earns_the_reward(offline: Offline, name: str, split: Split) -> None:
    """Boxes are said in whole pixels of the shown picture, which costs some overlap; all others earn 1."""
    questions = draw(name, split, 40)
    rewards = [reward(offline, name, one, one.question.said) for one in questions]
    assert all(value is not None and value >= (0.9 if name == "box" else 1.0) for value in rewards), rewards


def test_answers_that_never_look_earn_little() -> None:
    rows = [
        (number, GoldRow.model_validate(row_of(KINDS[name].reward, one, "") | {"id": f"{name}/{one.id}"}))
        for name in ("box", "point", "count", "time")
        for number, one in enumerate(draw(name, "held_out", 60), start=1)
    ]
    report = check_golds(rows, lambda gold, meta: "no mathematics is in these rows")
    assert report.num_bad == 0 and len(report.constant_rewards) == 6
    assert max(report.constant_rewards.values()) < 0.45, report.constant_rewards


@pytest.mark.parametrize("name", RULED)
def test_the_answer_to_another_question_earns_less(offline: Offline, name: str) -> None:
    questions = draw(name, "train", 20)
    pairs = itertools.pairwise([*questions, questions[0]])
    rewards = [reward(offline, name, one, other.question.said) or 0.0 for one, other in pairs]
    assert statistics.fmean(rewards) < 0.6, rewards


def test_files_are_read_by_rewards_check_and_become_questions_that_fit_the_recipe(tmp_path: Path) -> None:
    build(tmp_path, num_train=4, num_held_out=2)
    tokenizer = load_tokenizer(RECIPE.data.tokenizer, RECIPE.model.tokens, RECIPE.model.text.vocab_size)
    reader = QuestionReader(RECIPE.model, RECIPE.data, tmp_path / "media")
    assert RECIPE.rl is not None
    for name, (split, number) in itertools.product(KINDS, (("train", 4), ("held_out", 2))):
        path = tmp_path / name / f"{split}.jsonl"
        assert main(["rewards", "check", str(path)]) == 0
        questions = reader.read(path, name)
        assert [one.reward_task for one in questions] == [KINDS[name].reward] * number
        for one in questions:
            encode_question(one, tokenizer, RECIPE.model, RECIPE.data, RECIPE.rl.rollout.max_new_tokens)
            assert bool(one.meta.messages) == (name not in RULED)


def test_the_recipe_asks_every_kind_and_what_is_built() -> None:
    assert RECIPE.rl is not None
    files = {one.task: (one.path, one.held_out) for one in RECIPE.rl.prompts}
    folder = Path("demo/rl")
    assert files == {name: (folder / name / "train.jsonl", folder / name / "held_out.jsonl") for name in KINDS}
    ratios = {one.task: one.ratio for one in RECIPE.rl.prompts}
    groups = quotas(ratios, RECIPE.rl.rollout.groups_per_step)
    assert all(groups[name] in ((4, 5) if name in RULED else (2,)) for name in KINDS)


def test_questions_in_words_are_asked_in_one_share_only_and_not_twice() -> None:
    for name in ("math", "helpful_text"):
        train, held_out = ([one.question.prompt for one in draw(name, split, 60)] for split in ("train", "held_out"))
        assert len(set(train)) == len(set(held_out)) == 60 and not set(train) & set(held_out)
        assert {split_of(prompt) for prompt in train} == {"train"}


def test_a_kind_asks_in_its_own_words() -> None:
    words = {name: {" ".join(one.question.prompt.split()[:2]) for one in draw(name, "train", 40)} for name in KINDS}
    assert words["math"] == {"Add the", "Subtract the", "How many"} and words["box"] == {"Locate the"}
    assert words["point"] == {"Point to"} and words["count"] == {"How many"} and words["time"] == {"When is"}
    assert words["helpful_text"] == {"Add the", "Subtract the", "Read the", "How many"}
    assert len(words["helpful_multimodal"]) == 6


def test_the_demo_of_reinforcement_learning_names_what_its_recipe_reads(monkeypatch):
    monkeypatch.chdir(ROOT)
    config, start = load_recipe(morl.RECIPE), load_recipe(morl.START)
    assert config.rl is not None
    assert config.start_from == RunFolder(start.dir).checkpoint(start.train.steps)
    assert {one.path.parent.parent for one in config.rl.prompts} == {morl.QUESTIONS}
    for kind, path in (("text", config.rl.reward.text_model), ("multimodal", config.rl.reward.multimodal_model)):
        model = load_recipe(morl.RECIPES / f"reward_model_{kind}.yaml")
        assert path == RunFolder(model.dir).checkpoint(model.train.steps)


def test_the_demo_shows_the_first_and_the_last_evaluation(tmp_path):
    rows = [{"step": step, "rewards": {"math": step / 100, "box": 0.5}} for step in (0, 20, 40)]
    (tmp_path / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = morl.reward_table(tmp_path)
    assert [str(column.header) for column in table.columns] == ["task", "step 0", "step 40"]
    assert [list(column.cells) for column in table.columns] == [["math", "box"], ["0.000", "0.500"], ["0.400", "0.500"]]
