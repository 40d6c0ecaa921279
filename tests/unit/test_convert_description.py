"""model.json: what makes two checkpoints those of the same model."""

from pathlib import Path
from typing import Any

import pytest

from mimo_megatron.config.description import check_description, read_description, write_description
from mimo_megatron.config.presets import preset
from mimo_megatron.errors import CheckpointError


def tiny(part: str, **fields: Any) -> Any:
    model = preset("tiny-vl")
    return model.model_copy(update={part: getattr(model, part).model_copy(update=fields)})


def test_a_model_is_read_as_it_was_written(tmp_path: Path) -> None:
    for name in ("tiny-vl", "tiny-base", "mimo-vl-7b"):
        write_description(tmp_path, preset(name))
        assert read_description(tmp_path) == preset(name)


@pytest.mark.parametrize("fields", [{"max_positions": 9}, {"mtp_loss_weight": 0.3}])
def test_how_a_model_is_trained_may_differ(fields: dict[str, Any], tmp_path: Path) -> None:
    write_description(tmp_path, tiny("text", **fields))
    check_description(tmp_path, preset("tiny-vl").model_copy(update={"name": "other"}))


@pytest.mark.parametrize(
    "part, fields, message",
    [
        ("text", {"rope_theta": 30.0}, r"model\.text\.rope_theta: found 30\.0, wanted 20\.0"),
        ("vision", {"depth": 5}, r"model\.vision\.depth: found 5, wanted 4"),
        ("tokens", {"pad": 7}, r"model\.tokens\.pad: found 7, wanted 0"),
    ],
)
def test_what_changes_weights_or_their_meaning_may_not(
    part: str, fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write_description(tmp_path, tiny(part, **fields))
    with pytest.raises(CheckpointError, match=message):
        check_description(tmp_path, preset("tiny-vl"))


def test_the_remedy_for_an_encoder_of_another_size_is_a_new_start(tmp_path: Path) -> None:
    for fields, is_new_start in (({"depth": 5, "ffn_width": 8}, True), ({"depth": 5, "window_size": 56}, False)):
        write_description(tmp_path, tiny("vision", **fields))
        with pytest.raises(CheckpointError, match=r"(?s)holds another model:.*config model") as refused:
            check_description(tmp_path, preset("tiny-vl"))
        assert ("convert assemble" in str(refused.value)) == is_new_start


def test_a_text_model_is_not_a_vision_model(tmp_path: Path) -> None:
    write_description(tmp_path, preset("tiny-vl").model_copy(update={"vision": None}))
    with pytest.raises(CheckpointError, match=r"model\.vision\.depth: found None, wanted 4"):
        check_description(tmp_path, preset("tiny-vl"))
