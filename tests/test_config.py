"""The configuration is strict: a typo is an error, a default is declared once, nothing changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specserve import config as configs
from specserve.config import Config, build, dump_config, load_config


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a SPECSERVE_CONFIG of the machine out of the tests."""
    monkeypatch.delenv(configs.CONFIG_ENV, raising=False)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a TOML file and return its path."""

    def write(text: str) -> Path:
        path = tmp_path / "config.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_nothing_given_is_all_defaults() -> None:
    assert load_config() == Config()


def test_file_changes_only_what_it_names(write: Any) -> None:
    config = load_config(write('[engine]\nprecision = "bf16"\n[scheduler]\nmax_num_seqs = 8\n'))
    expected = Config(
        engine=dataclasses.replace(Config().engine, precision="bf16"),
        scheduler=dataclasses.replace(Config().scheduler, max_num_seqs=8),
    )
    assert config == expected


def test_environment_names_the_file_unless_one_is_given(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(configs.CONFIG_ENV, str(write("[engine]\nnum_threads = 3\n")))
    assert load_config().engine.num_threads == 3
    other = tmp_path / "other.toml"
    other.write_text("[engine]\nnum_threads = 5\n")
    assert load_config(other).engine.num_threads == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[schedular]\n", r"'schedular' in config: did you mean 'scheduler'\?"),
        ("[scheduler]\nmax_seqs = 3\n", r"'max_seqs' in .*scheduler: did you mean 'max_num_seqs'"),
        ("[policy]\nxyzzy = 3\n", "unknown key 'xyzzy' in config.policy: did you mean"),
        ("[scheduler]\nmax_num_seqs = '8'\n", "max_num_seqs is '8', expected int"),
        ("[scheduler]\nmax_num_seqs = 8.0\n", "max_num_seqs is 8.0, expected int"),
        ("[scheduler]\nmax_num_seqs = true\n", "max_num_seqs is True, expected int"),
        ("[server]\nexclude_input_in_output = 1\n", "is 1, expected bool"),
        ("[policy]\nmin_survival = false\n", "is False, expected float"),
        ("[engine]\nname = 3\n", "config.engine.name is 3, expected str"),
        ("engine = 3\n", "config.engine is 3, expected a table"),
        ("[engine\n", "is not valid TOML"),
    ],
)
def test_mistake_in_the_file_is_refused_by_name(write: Any, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(write(text))


def test_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot read config file .*nowhere\.toml"):
        load_config(tmp_path / "nowhere.toml")


def test_whole_number_is_a_float_where_one_is_expected(write: Any) -> None:
    config = load_config(write("[policy]\nmin_survival = 0\n"))
    assert config.policy.min_survival == 0.0
    assert isinstance(config.policy.min_survival, float)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("scheduler.max_num_seqs=8", "scheduler", "max_num_seqs", 8),
        ("policy.name=fixed", "policy", "name", "fixed"),
        ('policy.name="fixed"', "policy", "name", "fixed"),
        ("policy.min_survival=0.5", "policy", "min_survival", 0.5),
        ("server.exclude_input_in_output=false", "server", "exclude_input_in_output", False),
        ("engine.dir=/a/b=c d", "engine", "dir", "/a/b=c d"),
    ],
)
def test_override_sets_one_value(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load_config(overrides=[override]), section), key) == value


def test_override_beats_the_file_and_the_last_one_wins(write: Any) -> None:
    path = write("[scheduler]\nmax_num_seqs = 2\nprefill_chunk_tokens = 9\n")
    config = load_config(path, ["scheduler.max_num_seqs=3", "scheduler.max_num_seqs=4"])
    assert config.scheduler.max_num_seqs == 4
    assert config.scheduler.prefill_chunk_tokens == 9


@pytest.mark.parametrize("override", ["max_num_seqs=8", "scheduler.max_num_seqs", "", "=", "a=b.c"])
def test_override_of_another_form_is_refused(override: str) -> None:
    with pytest.raises(ValueError, match=r"not of the form section\.key=value"):
        load_config(overrides=[override])


@pytest.mark.parametrize(
    "override", ["scheduler.max_seqs=8", "sched.max_num_seqs=8", "scheduler.max_num_seqs=many"]
)
def test_override_is_as_strict_as_the_file(override: str) -> None:
    with pytest.raises(ValueError, match=r"did you mean|expected int"):
        load_config(overrides=[override])


def test_override_under_a_key_that_is_no_table_is_refused(write: Any) -> None:
    with pytest.raises(ValueError, match="engine"):
        load_config(write("engine = 3\n"), ["engine.name=openvino"])


@given(
    name=st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    number=st.integers(-(2**62), 2**62),
    ratio=st.floats(allow_nan=False),
    flag=st.booleans(),
)
def test_dump_loads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, name: str, number: int, ratio: float, flag: bool
) -> None:
    config = Config(
        engine=configs.EngineConfig(name=name, dir=name, num_threads=number),
        policy=configs.PolicyConfig(min_survival=ratio),
        server=configs.ServerConfig(exclude_input_in_output=flag),
    )
    path = tmp_path_factory.getbasetemp() / "dumped.toml"
    path.write_text(dump_config(config), encoding="utf-8", newline="")
    assert load_config(path) == config


def test_the_tree_is_frozen() -> None:
    config = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.engine = configs.EngineConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.scheduler.max_num_seqs = 3


def test_build_takes_any_frozen_dataclass_with_optional_values() -> None:
    @dataclasses.dataclass(frozen=True)
    class Thing:
        size: int | None = None

    assert build(Thing, {}, "thing") == Thing(None)
    assert build(Thing, {"size": 3}, "thing") == Thing(3)
    with pytest.raises(ValueError, match=r"thing\.size is '3', expected int or NoneType"):
        build(Thing, {"size": "3"}, "thing")
