"""Services in a folder that machines share: whole files, for their owner alone, gone with the service."""

import pytest

from mimo_megatron.errors import ConfigError
from mimo_megatron.rl.announcements import announced, read_announcement

CONTENT = {"address": "tcp:node7:4000", "token": "secret"}
KEYS = ("address", "token")


def test_an_announcement_is_there_while_its_service_is_and_for_its_owner_alone(tmp_path):
    folder = tmp_path / "runs/services"
    with announced(folder, "engine-1.json", CONTENT) as path:
        assert read_announcement(path, KEYS) == CONTENT
        assert path.stat().st_mode & 0o777 == 0o600
        assert list(folder.iterdir()) == [path]
    assert list(folder.iterdir()) == []
    assert read_announcement(path, KEYS) is None


def test_an_announcement_replaces_the_one_that_a_killed_service_left(tmp_path):
    (tmp_path / "rewards.json").write_text("{}")
    with announced(tmp_path, "rewards.json", CONTENT) as path:
        assert read_announcement(path, KEYS) == CONTENT


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"address": "a"}', '{"address": "a", "token": 1}', '{"url": "a", "token": "b"}']
)
def test_a_file_that_announces_nothing_is_refused_by_name(text, tmp_path):
    path = tmp_path / "engine-1.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"engine-1\.json .*remove it"):
        read_announcement(path, KEYS)


def test_a_folder_that_cannot_be_written_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="where the trainer looks"), announced(tmp_path / "file", "a.json", CONTENT):
        pass
